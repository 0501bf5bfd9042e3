"""What each reduction keeps, against its definition in numpy, and what it must not mix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason.reductions import REDUCTIONS, Inputs, pca3, signs, squeeze

G, R, F, T, D, N, P = 2, 3, 2, 10, 12, 3, 2
REFERENCE = np.array([0, 0, 1])


def reduce_all(value, inputs):
  return {name: reduction.apply(value, inputs) for name, reduction in REDUCTIONS.items()}


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(1)
  regions = rng.uniform(size=(R, P, T)).astype(np.float32)
  regions[:, 1] = 0
  return {
    "value": rng.normal(size=(G, R, T, D)).astype(np.float32) + np.arange(D, dtype=np.float32),
    "directions": rng.normal(size=(P, D)).astype(np.float32),
    "regions": regions,
    "targets": rng.normal(size=(R, T, P)).astype(np.float32),
    "head": rng.normal(size=(D, 4)).astype(np.float32),
  }


@pytest.fixture(scope="module")
def reductions(arrays):
  """One compiled call of all reductions: (value, regions, targets, reference) -> dict."""

  @jax.jit
  def call(value, regions, targets, reference):
    head = jnp.asarray(arrays["head"])
    inputs = Inputs(
      frames=F,
      heads=N,
      directions=jnp.asarray(arrays["directions"]),
      regions=regions,
      targets=targets,
      reference=reference,
      head=lambda x: jnp.einsum("grtd,dc->grtc", x, head),
    )
    return reduce_all(value, inputs)

  return call


@pytest.fixture(scope="module")
def kept(arrays, reductions):
  return reductions(arrays["value"], arrays["regions"], arrays["targets"], REFERENCE)


def definition(name, a):
  x = a["value"].astype(np.float64)
  other = x[:, REFERENCE]
  length = np.linalg.norm(x, axis=-1)
  if name == "norm":
    return length
  if name == "frame_norm":
    return np.sqrt((length**2).reshape(G, R, F, T // F).sum(-1))
  if name == "head_norm":
    return np.sqrt((x.reshape(G, R, F, T // F, N, D // N) ** 2).sum((3, 5)))
  if name == "channel_moments":
    return np.stack([x.mean(2), x.var(2)], axis=2)
  if name == "top_channels":
    most = np.argsort(-x.var(2), axis=-1)[:, :, None, :6]
    return np.concatenate([np.take_along_axis(x, most, axis=3), most], axis=2)
  if name == "region_mean":
    first = a["regions"][:, :1] / a["regions"][:, :1].sum(-1, keepdims=True)
    mean = np.einsum("rpt,grtd->grpd", first, x)
    return np.concatenate([mean, np.zeros_like(mean)], axis=2)
  if name == "project":
    return x @ a["directions"].T
  if name == "gram":
    xx = np.einsum("grtk,grtj->grkj", x, x)
    return np.concatenate([xx, np.einsum("grtk,rtp->grkp", x, a["targets"])], axis=-1)
  if name == "cosine_to":
    return (x * other).sum(-1) / length / length[:, REFERENCE]
  if name == "cka_to":
    c = x - x.mean(2, keepdims=True)
    d = c[:, REFERENCE]
    size = [np.linalg.norm(np.einsum("grtk,grtj->grkj", y, y), axis=(2, 3)) for y in (c, d)]
    cross = np.linalg.norm(np.einsum("grtk,grtj->grkj", d, c), axis=(2, 3)) ** 2
    return cross / size[0] / size[1]
  if name == "lens":
    return x @ a["head"]
  return x


@pytest.mark.parametrize("name", sorted(set(REDUCTIONS) - {"pca3"}))
def test_definition(name, kept, arrays):
  # float32 against float64; entries reach 1e3
  np.testing.assert_allclose(kept[name], definition(name, arrays), rtol=2e-5, atol=2e-5)


def test_each_reduction_is_of_its_own_run(kept, arrays, reductions):
  """Permuting the runs permutes what is kept (and the reference with them)."""
  order = np.array([2, 0, 1])
  place = np.argsort(order)
  moved = reductions(
    arrays["value"][:, order],
    arrays["regions"][order],
    arrays["targets"][order],
    place[REFERENCE[order]],
  )
  for name, value in kept.items():
    np.testing.assert_allclose(moved[name], value[:, order], rtol=1e-4, atol=1e-4, err_msg=name)


def test_nan_stays_in_its_run(arrays, reductions):
  value = arrays["value"].copy()
  value[:, 2] = np.nan
  kept = reductions(value, arrays["regions"], arrays["targets"], REFERENCE)
  for name, result in kept.items():
    assert np.isfinite(result[:, :2]).all(), name


def test_bf16_values_are_reduced_in_float32(arrays, reductions):
  rounded = arrays["value"].astype(jnp.bfloat16)
  whole = reductions(rounded.astype(np.float32), arrays["regions"], arrays["targets"], REFERENCE)
  kept = reductions(rounded, arrays["regions"], arrays["targets"], REFERENCE)
  assert kept["full"].dtype == jnp.bfloat16
  for name in set(kept) - {"full", "pca3"}:
    assert kept[name].dtype == jnp.float32, name
    np.testing.assert_allclose(kept[name], whole[name], rtol=1e-5, atol=1e-5, err_msg=name)


def spectrum(seed, t=40, d=24):
  """G R T D with known, well separated main axes, and an offset that PCA must take away."""
  rng = np.random.default_rng(seed)
  left = np.linalg.qr(rng.normal(size=(t, t)))[0][:, :d]
  right = np.linalg.qr(rng.normal(size=(d, d)))[0]
  sizes = 9.0 * 0.6 ** np.arange(d)
  return ((left * sizes) @ right.T + 3.0)[None, None].astype(np.float32)


@pytest.fixture(scope="module")
def components():
  return jax.jit(lambda value, before: pca3(value, Inputs(frames=1, before=before)))


@pytest.mark.parametrize("start", ["first layer", "layer before", "layer before, nothing kept"])
def test_pca3_is_the_svd(start, components):
  value = spectrum(0)
  before = {
    "first layer": None,
    "layer before": components(spectrum(0) + spectrum(1) * 0.05, None),
    "layer before, nothing kept": np.zeros((1, 1, 40, 3), np.float32),
  }[start]
  found = np.asarray(components(value, before))[0, 0]
  x = value[0, 0].astype(np.float64)
  u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
  exact = u[:, :3] * s[:3]
  exact *= np.sign(vt[np.arange(3), np.abs(vt[:3]).argmax(1)])
  # eight columns and four iterations leave (s9/s3)^8 of the wrong axes, 3e-5 of the largest score
  np.testing.assert_allclose(found, exact, atol=2e-3 * s[0])


def test_pca3_of_fewer_than_three_channels_is_padded(components):
  found = np.asarray(components(spectrum(0)[..., :2], None))
  assert found.shape == (1, 1, 40, 3)
  assert (found[..., 2] == 0).all()


def test_cka_is_blind_to_rotation_and_scale_and_sees_noise():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 16)).astype(np.float32)
  turned = 3 * x @ np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32) + 1
  other = rng.normal(size=(60, 16)).astype(np.float32)
  constant = np.ones_like(x)
  value = np.stack([x, x, turned, other, constant])[None]
  inputs = Inputs(frames=1, reference=np.zeros(5, np.int32))
  same, again, rotated, noise, flat = np.asarray(REDUCTIONS["cka_to"].apply(value, inputs))[0]
  np.testing.assert_allclose([same, again, rotated], 1, atol=1e-5)
  assert noise < 0.5
  assert flat == 0


def test_projection_is_fixed_and_keeps_inner_products():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(30, 1000)).astype(np.float32) * 0.1
  x[1] = x[0]
  small = np.asarray(squeeze(x, 256))
  assert small.shape == (30, 256)
  np.testing.assert_array_equal(small[0], small[1])
  # relative error of a squared length is about sqrt(2/256) = .09
  np.testing.assert_allclose((small**2).sum(1), (x**2).sum(1), rtol=0.4)
  np.testing.assert_array_equal(squeeze(x[:, :16], 128), x[:, :16])
  assert signs(4, 6).tolist() == signs.__wrapped__(4, 6).tolist()


def test_gram_adds_up_over_batches(arrays, reductions, kept):
  """The sum over two halves of the tokens is the gram of all: what a ridge probe needs."""
  gram = REDUCTIONS["gram"].apply
  halves = [
    gram(arrays["value"][:, :, cut], Inputs(frames=1, targets=arrays["targets"][:, cut]))
    for cut in (slice(0, 4), slice(4, T))
  ]
  np.testing.assert_allclose(halves[0] + halves[1], kept["gram"], rtol=1e-5, atol=1e-4)


def test_cosine_with_nothing_is_zero():
  value = np.zeros((1, 2, 3, 4), np.float32)
  value[0, 1] = 1
  inputs = Inputs(frames=1, reference=np.array([1, 1]))
  np.testing.assert_allclose(
    REDUCTIONS["cosine_to"].apply(value, inputs), [[[0, 0, 0], [1, 1, 1]]], atol=1e-6
  )


@pytest.mark.parametrize("name", ["region_mean", "project", "gram", "cosine_to", "cka_to", "lens"])
def test_what_is_missing_is_said(name, arrays):
  with pytest.raises(ValueError, match=r"None|no output head"):
    REDUCTIONS[name].apply(arrays["value"], Inputs(frames=F))
