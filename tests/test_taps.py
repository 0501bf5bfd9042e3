"""Slots, buffers, records inside a layer scan, and the bytes they need."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason.reductions import REDUCTIONS
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import (
  HEAD_SITES,
  SITES,
  TapAids,
  TapSpec,
  check_budget,
  empty_buffers,
  layer_slots,
  record,
  tap_bytes,
)

SIZES = Sizes(S=4, R=3, G=2, L=5, F=3, H=4, W=4, C=2, T=12, D=16, N=4, sites=SITES)
WAN = Sizes(S=50, R=1, G=2, L=40, F=21, H=60, W=104, C=16, T=32760, D=5120)
AIDS = TapAids(grid=(3, 2, 2), head=lambda x: x[..., :8], heads=4)
ARRAYS = {
  "directions": np.ones((2, 16), np.float32),
  "regions": np.ones((3, 3, 12), np.float32),
  "targets": np.ones((3, 12, 1), np.float32),
  "reference": np.zeros(3, np.int32),
}
ALL = TapSpec(
  sites=("attn_out", "update"),
  reduce=tuple(name for name, reduction in REDUCTIONS.items() if not reduction.heads),
  layers=(1, 3),
  branches=(1,),
  **ARRAYS,
)
OF_HEADS = dataclasses.replace(
  ALL,
  sites=HEAD_SITES,
  reduce=tuple(name for name, reduction in REDUCTIONS.items() if reduction.heads is not False),
)


@pytest.fixture(scope="module")
def values():
  return jax.random.normal(jax.random.key(0), (SIZES.L, 2, 3, 12, 16))


@pytest.fixture(scope="module")
def scanned(values):
  """The buffers after a layer scan, by slots."""

  @jax.jit
  def call(slots):
    def layer(buffers, row):
      value, slot = row
      for site in SITES:
        buffers = record(buffers, site, value, ALL, slot, AIDS)
      return record(buffers, "update", value, ALL, slot, AIDS), None

    return jax.lax.scan(layer, empty_buffers(ALL, SIZES, AIDS), (values, slots))[0]

  return call


def test_slots_number_the_layers_asked_for():
  assert layer_slots(TapSpec(layers=(1, 3)), 5).tolist() == [2, 0, 2, 1, 2]
  assert layer_slots(TapSpec(), 3).tolist() == [0, 1, 2]
  assert layer_slots(TapSpec(), 3).dtype == np.int32


@pytest.mark.parametrize(
  ("given", "kept"),
  [
    ({"layers": 3}, (3,)),
    ({"layers": np.int64(3)}, (3,)),
    ({"layers": np.array([1, 3])}, (1, 3)),
    ({"layers": jnp.array([1, 3])}, (1, 3)),
    ({"layers": [1, 3]}, (1, 3)),
    ({"steps": slice(0, 1)}, (0,)),
    ({"steps": slice(None, 4, 2)}, (0, 2)),
    ({"steps": range(1, 4)}, (1, 2, 3)),
    ({"steps": ()}, ()),
    ({"branches": 1}, (1,)),
    ({"sites": ["attn_out"]}, ("attn_out",)),
    ({"reduce": ["norm", "update/full"]}, ("norm", "update/full")),
  ],
)
def test_selections_become_tuples_that_a_program_is_known_by(given, kept):
  ((field, _),) = given.items()
  spec = TapSpec(**given)
  assert spec == TapSpec(**{field: kept}) and hash(spec) == hash(TapSpec(**{field: kept}))
  assert all(type(one) in (int, str) for one in getattr(spec, field))


def test_lists_of_numbers_become_arrays():
  lists = {name: array.tolist() for name, array in ARRAYS.items()}
  buffers = empty_buffers(dataclasses.replace(ALL, **lists), SIZES, AIDS)
  assert {n: b.shape for n, b in buffers.items()} == {
    n: b.shape for n, b in empty_buffers(ALL, SIZES, AIDS).items()
  }
  rows = jax.jit(lambda d: TapSpec(directions=[d, 2 * d]).directions)(jnp.ones(16))
  np.testing.assert_array_equal(rows, np.ones((2, 16)) * [[1], [2]])
  marked = jax.tree.map(lambda _: ("seed", None), ALL)
  assert marked.directions == ("seed", None)


@pytest.mark.parametrize(
  ("given", "said"),
  [
    ({"sites": "attn_out"}, r"sites='attn_out', wanted a tuple: sites=\('attn_out',\)\."),
    ({"reduce": "norm"}, r"reduce='norm', wanted a tuple: reduce=\('norm',\)\."),
    ({"sites": None}, r"sites=None, wanted a tuple of names\."),
    ({"layers": "3"}, r"layers='3', wanted indices from 0 on"),
    ({"layers": 1.5}, r"layers=1\.5, wanted indices from 0 on"),
    ({"layers": [[1], [2]]}, r"wanted indices from 0 on"),
    ({"layers": np.array([False, True])}, r"of a mask, np\.flatnonzero\(mask\)"),
    ({"branches": None}, r"branches=None, wanted indices from 0 on"),
    ({"layers": slice(2, None)}, r"None\), wanted a slice i:j .*: layers=range\(i, j\)\."),
    ({"layers": slice(-2, 4)}, r"ends counted from 0"),
    ({"layers": slice(4, 1, -1)}, r"ends counted from 0"),
    ({"layers": slice(0, 4, 0)}, r"ends counted from 0"),
    ({"layers": slice(0.5, 4)}, r"ends counted from 0"),
    ({"layers": [[1], [2, 3]]}, r"layers=\[\[1\], \[2, 3\]\] makes no array: give rows of one"),
    ({"regions": [[1.0, 2.0], [3.0]]}, r"regions=.* makes no array: give rows of one length"),
  ],
)
def test_what_is_no_selection_is_refused(given, said):
  with pytest.raises(ValueError, match=said):
    TapSpec(**given)


def test_a_traced_layer_is_refused():
  with pytest.raises(ValueError, match="layers is traced, and decides what the program holds"):
    jax.jit(lambda layer: layer_slots(TapSpec(layers=layer), 5))(3)


def test_a_scan_fills_the_rows_of_the_layers_asked_for(values, scanned):
  kept = scanned(layer_slots(ALL, SIZES.L))
  assert set(kept) == {f"{site}/{name}" for site in ALL.sites for name in ALL.reduce}
  for key, buffer in kept.items():
    assert buffer.shape[:3] == (2, 1, 3), key
  for row, layer in enumerate((1, 3)):
    np.testing.assert_array_equal(kept["attn_out/full"][row], values[layer, 1:])
    np.testing.assert_allclose(
      kept["update/norm"][row], np.linalg.norm(values[layer, 1:], axis=-1), rtol=1e-5
    )


def test_scan_is_loop(values, scanned):
  kept = scanned(layer_slots(ALL, SIZES.L))
  buffers = empty_buffers(ALL, SIZES, AIDS)
  write = jax.jit(lambda buffers, value, slot: record(buffers, "attn_out", value, ALL, slot, AIDS))
  for value, slot in zip(values, layer_slots(ALL, SIZES.L), strict=True):
    buffers = write(buffers, value, slot)
  for key in (key for key in kept if key.startswith("attn_out/")):
    np.testing.assert_allclose(kept[key], buffers[key], rtol=1e-4, atol=1e-4, err_msg=key)


def test_layers_and_steps_nobody_asked_for_write_nothing(scanned):
  kept = scanned(jnp.full(SIZES.L, 2, jnp.int32))
  assert all((buffer == 0).all() for buffer in kept.values())


def test_dearer_reductions_sit_under_a_cond(values):
  """Only what costs no more than a norm is computed at every layer."""
  for name, reduction in REDUCTIONS.items():
    (site,) = sites = ("attn_heads" if reduction.heads else "attn_out",)
    spec = dataclasses.replace(ALL, sites=sites, reduce=(name,))
    buffers = empty_buffers(spec, SIZES, AIDS)
    program = jax.make_jaxpr(
      lambda b, v, s, spec=spec, site=site: record(b, site, v, spec, s, AIDS)
    )(buffers, values[0], 0)
    conds = [e for e in program.eqns if e.primitive.name == "cond"]
    assert len(conds) == reduction.costly, name
    outside = {e.primitive.name for e in program.eqns}
    assert not outside & ({"dot_general", "eigh", "gather"} if reduction.costly else {"eigh"}), name


def test_a_site_not_named_is_not_in_the_program(values):
  buffers = empty_buffers(ALL, SIZES, AIDS)
  assert record(buffers, "mlp_out", values[0], ALL, 0, AIDS) is buffers
  assert empty_buffers(TapSpec(reduce=("gram",)), SIZES, AIDS) == {}


def test_a_reduction_may_be_of_one_site_alone(values):
  spec = dataclasses.replace(ALL, reduce=("norm", "update/full"))
  buffers = empty_buffers(spec, SIZES, AIDS)
  assert set(buffers) == {"attn_out/norm", "update/norm", "update/full"}
  for site in spec.sites:
    buffers = record(buffers, site, values[0], spec, 1, AIDS)
  np.testing.assert_array_equal(buffers["update/full"][1], values[0, 1:])
  both = dataclasses.replace(ALL, reduce=("norm", "full"))
  alone = dataclasses.replace(ALL, sites=("attn_out",), reduce=("full",))
  assert tap_bytes(spec, SIZES) == tap_bytes(both, SIZES) - tap_bytes(alone, SIZES)


def test_hidden_states_keep_the_dtype_of_the_model():
  aids = dataclasses.replace(AIDS, dtype=jnp.bfloat16)
  for key, buffer in empty_buffers(ALL, SIZES, aids).items():
    state = key.split("/")[1] in ("full", "region_mean")
    assert buffer.dtype == (jnp.bfloat16 if state else jnp.float32), key


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", [ALL, OF_HEADS], ids=["stream", "heads"])
def test_bytes_are_those_of_the_buffers(spec, dtype):
  spec = dataclasses.replace(spec, steps=(0, 2, 3), branches=(0, 1))
  buffers = empty_buffers(spec, SIZES, dataclasses.replace(AIDS, dtype=dtype))
  assert tap_bytes(spec, SIZES, dtype) == 3 * sum(b.nbytes for b in buffers.values())


def test_the_length_of_each_head_in_each_latent_frame(values):
  buffers = empty_buffers(OF_HEADS, SIZES, AIDS)
  kept = record(buffers, "cross_heads", values[3], OF_HEADS, 1, AIDS)["cross_heads/head_norm"]
  heads = np.asarray(values[3, 1:], np.float64).reshape(1, 3, 3, 4, 4, 4)  # G R f (h w) N K
  np.testing.assert_allclose(kept[1], np.sqrt((heads**2).sum(axis=(3, 5))), rtol=1e-5)
  assert not kept[0].any()


@pytest.mark.parametrize(
  ("spec", "sizes", "gigabytes"),
  [
    (TapSpec(sites=("resid_post",), reduce=("full",)), WAN, 670.9),
    (TapSpec(sites=("resid_post",), reduce=("norm",)), WAN, 0.262),
    (
      TapSpec(sites=SITES, reduce=("norm",), branches=(0, 1)),
      dataclasses.replace(WAN, R=8),
      46.13,
    ),
  ],
)
def test_bytes_of_a_14b_run(spec, sizes, gigabytes):
  assert tap_bytes(spec, sizes, jnp.bfloat16) / 1e9 == pytest.approx(gigabytes, rel=1e-3)


def test_the_budget_error_names_bytes_and_a_cheaper_choice():
  spec = TapSpec(sites=("resid_post",), reduce=("full",))
  with pytest.raises(ValueError) as error:
    check_budget(spec, WAN, 8e9, dtype=jnp.bfloat16)
  said = str(error.value)
  assert said.startswith(
    "taps need 670.9 GB (S=50 L=40 G=1 R=1 T=32760 D=5120, bf16); the budget is 8.0 GB. "
    'Use reduce=("region_mean",), a region per frame (0.43 GB), or layers='
  )
  check_budget(spec, WAN, 671e9, dtype=jnp.bfloat16)


@pytest.mark.parametrize("reduce", [("full",), ("norm",), ("frame_norm",), ("full", "norm")])
@pytest.mark.parametrize("budget", [5e9, 4e8, 3e7, 1e5, 5e4])
def test_what_the_budget_error_proposes_fits(reduce, budget):
  spec = TapSpec(sites=("resid_post",), reduce=reduce)
  if tap_bytes(spec, WAN, jnp.bfloat16) <= budget:
    check_budget(spec, WAN, budget, dtype=jnp.bfloat16)
    return
  with pytest.raises(ValueError, match="taps need") as error:
    check_budget(spec, WAN, budget, dtype=jnp.bfloat16)
  proposed = re.search(r"layers=(\([\d, ]+\))(?: with steps=(\([\d, ]+\)))?", str(error.value))
  if proposed:
    fewer = {
      name: tuple(int(n) for n in re.findall(r"\d+", text))
      for name, text in zip(("layers", "steps"), proposed.groups(), strict=True)
      if text
    }
    assert tap_bytes(dataclasses.replace(spec, **fewer), WAN, jnp.bfloat16) <= budget
  else:
    assert "fewer sites, runs or a smaller video" in str(error.value)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"sites": ("resid_mid",)}, r"no site 'resid_mid' to tap; there are: resid_pre, .*, update\."),
    ({"reduce": ("mean",)}, "no reduction 'mean'; there are: norm, "),
    ({"reduce": ("norm", "norm")}, "names one twice"),
    ({"reduce": ("norm", "update/norm")}, "names one twice"),
    ({"reduce": ("bogus/norm",), "sites": ()}, "reduce names 'bogus/norm', no site 'bogus'"),
    ({"reduce": ("/norm",)}, "reduce names '/norm', no site ''"),
    (
      {"reduce": ("update/norm",), "sites": ("resid_post", "update")},
      r"sites names 'resid_post' and reduce=\('update/norm',\) keeps nothing there",
    ),
    ({"reduce": ("update/mean",)}, "no reduction 'mean'; there are: norm, "),
    ({"reduce": ("mlp_out/norm",)}, r"reduce names 'mlp_out/norm' and sites=.* has no 'mlp_out'"),
    (
      {"reduce": ("head_norm",)},
      r"'head_norm' means nothing at 'attn_out': .* reduce=\('attn_heads/head_norm',\)",
    ),
    (
      {"reduce": ("norm", "lens"), "sites": ("resid_post", "cross_heads")},
      r"'lens' means nothing at 'cross_heads': .* reduce=\('resid_post/lens',\)",
    ),
    ({"layers": (5,)}, r"layers=\(5,\): there is no 5, only 0\.\.4"),
    ({"layers": (-1,)}, r"there is no -1, only 0\.\.4"),
    ({"layers": (3, 1)}, r"wanted increasing: use \(1, 3\)"),
    ({"layers": ()}, "keeps nothing"),
    ({"branches": (2,)}, r"branches=\(2,\): there is no 2, only 0\.\.1"),
    ({"directions": None}, r"'project' needs directions \(P D\), got None"),
    ({"regions": None}, "'region_mean' needs regions"),
    ({"targets": None}, "'gram' needs targets"),
    ({"reference": None}, "'cosine_to' needs reference"),
    ({"directions": np.ones((2, 8))}, r"directions is \(2, 8\), wanted P D = \(P, 16\)"),
    ({"regions": np.ones((3, 11))}, r"regions is \(3, 11\), wanted R P T = \(3, P, 12\)"),
    ({"reference": np.array([0, 1, 3])}, r"names a run outside 0\.\.2"),
  ],
)
def test_what_does_not_exist_is_refused(change, said):
  with pytest.raises(ValueError, match=said):
    empty_buffers(dataclasses.replace(ALL, **change), SIZES, AIDS)


def test_steps_outside_the_schedule_are_refused():
  with pytest.raises(ValueError, match=r"steps=\(9,\): there is no 9, only 0\.\.3"):
    tap_bytes(dataclasses.replace(ALL, steps=(9,)), SIZES)


def test_a_grid_of_other_tokens_is_refused():
  with pytest.raises(ValueError, match="has 8 tokens, wanted T=12"):
    empty_buffers(ALL, SIZES, TapAids(grid=(2, 2, 2)))
