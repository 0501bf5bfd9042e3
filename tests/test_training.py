"""Training: losses and steps by their formulas, resumed equals undisturbed, NaN changes nothing."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import FREQ, GRID, tiny_config
from jax_videoreason import schedules, training
from jax_videoreason.models.umt5 import UMT5Config, UMT5Encoder
from jax_videoreason.models.wan import WanDiT
from jax_videoreason.structs import Conditioning, Parts
from jax_videoreason.training import TrainSettings

TEXT = UMT5Config(
  vocab=10, width=12, head_width=4, heads=2, ffn_width=16, layers=1, dtype="float32"
)
SETTINGS = TrainSettings(steps=60, batch=4, learning_rate=3e-3, warmup=5)
VIDEO = np.random.default_rng(0).uniform(-1, 1, (2, 5, 16, 16, 3)).astype(np.float32)


def cases(count):
  """A batch of `count` cases with prompts, none of them empty."""
  rng = np.random.default_rng(0)
  cells = (count, *GRID)
  ids = np.asarray(rng.integers(2, 10, (count, 5)), np.int32)
  return {
    "latents": np.broadcast_to(rng.normal(size=(count, 1, 1, 1, 4)), cells).astype(np.float16),
    "known": np.zeros(cells, np.float16),
    "known_mask": np.zeros((*cells[:-1], 4), np.float32),
    "ids": ids,
    "mask": np.ones_like(ids, bool),
    "empty_ids": np.array([[1, 0, 0, 0, 0]], np.int32),
    "empty_mask": np.array([[True, False, False, False, False]]),
  }


@pytest.fixture(scope="module")
def problem():
  """Step, first state and batches of a training in miniature."""
  parts = Parts(dit=WanDiT(tiny_config()), text=UMT5Encoder(TEXT))
  batch = cases(4)
  ids, cells = batch["ids"], batch["latents"].shape
  cond = Conditioning(
    text=jnp.zeros((1, 4, 5, 12)),
    known=jnp.zeros(cells),
    known_mask=jnp.zeros((*cells[:-1], 4)),
  )
  params = {
    "dit": jax.jit(parts.dit.init)(jax.random.key(0), jnp.zeros(cells), jnp.zeros((2, 16)), cond)[
      "params"
    ],
    "text": jax.jit(parts.text.init)(jax.random.key(1), ids, ids > 0)["params"],
  }
  step = training.make_step(training.flow_loss(parts, SETTINGS), SETTINGS, seed=0)
  return step, (lambda: training.begin(params, SETTINGS)), batch


def run(step, state, batch, count):
  losses = []
  for _ in range(count):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  return state, losses


@pytest.mark.slow
def test_the_loss_falls_and_a_resumed_training_is_the_undisturbed_one(problem):
  step, begin, batch = problem
  whole, losses = run(step, begin(), batch, 60)
  assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
  half, _ = run(step, begin(), batch, 30)
  stored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
  again, _ = run(step, stored, batch, 30)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, whole))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(problem):
  step, begin, batch = problem
  bad = {**batch, "latents": np.full_like(batch["latents"], np.nan)}
  state, metrics = step(begin(), bad)
  assert not metrics["finite"]
  before = begin()
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, before))


@pytest.mark.slow
def test_the_bands_say_where_the_loss_is(problem):
  step, begin, batch = problem
  _, metrics = step(begin(), batch)
  counts = np.asarray(metrics["band_counts"])
  assert counts.sum() == 4
  mean = float((np.asarray(metrics["bands"]) * counts).sum() / 4)
  assert abs(mean - float(metrics["loss"])) < 1e-5


def stubs(velocity):
  """A DiT that answers `velocity(noisy, time, cond)`, and a text encoder that adds 1 to the ids."""
  dit = SimpleNamespace(
    config=SimpleNamespace(freq_dim=FREQ),
    apply=lambda params, *given: (velocity(*given)[None], None),
  )
  return Parts(dit=dit, text=SimpleNamespace(apply=lambda params, ids, mask: 1.0 + ids[..., None]))


def flow(velocity, batch, seed=0, **changes):
  """The flow loss of a DiT that answers `velocity`, and its metrics."""
  settings = dataclasses.replace(SETTINGS, **changes)
  loss = training.flow_loss(stubs(velocity), settings)
  return loss({"dit": None, "text": None}, batch, jax.random.key(seed))


def flow_value(velocity, batch, **changes):
  return float(flow(velocity, batch, **changes)[0])


def sigmas_of(time, **changes):
  """The sigmas that rows of time stand for."""
  sigma, rows = training.sigma_table(dataclasses.replace(SETTINGS, **changes), FREQ)
  away = np.abs(rows[None, :, 0] - np.asarray(time)[:, None, 0]).max(-1)
  assert np.all(away.min(1) < 1e-6)
  return sigma[away.argmin(1)]


# With shift 3, sigma = 3u / (1 + 2u).
@pytest.mark.parametrize(("u", "sigma"), [(0.1, 0.25), (0.5, 0.75), (1.0, 1.0)])
def test_the_velocity_of_a_mixture_points_from_the_clean_latent_to_normal_noise(u, sigma):
  batch = cases(64)
  clean = batch["latents"].astype(np.float32)
  only = {"shift": 3.0, "low": u - 5e-4, "high": u + 5e-4}
  said = []

  def velocity(noisy, time, cond):
    wanted = schedules.sinusoid(np.array([1000.0 * sigma, 0.0]), FREQ)
    np.testing.assert_allclose(time, np.broadcast_to(wanted, (64, 2, FREQ)), atol=1e-5)
    # noisy = (1 - sigma) clean + sigma noise, solved for noise - clean
    said.append((noisy - clean) / sigma)
    return said[-1]

  assert flow_value(velocity, batch, **only) == pytest.approx(0.0, abs=1e-9)
  noise = said[0] + clean
  assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1.0) < 0.05
  away = flow_value(lambda *given: -velocity(*given), batch, **only)
  assert away == pytest.approx(4.0 * float(np.mean(np.square(said[0]))), rel=1e-5)


def test_the_network_is_told_what_is_known_of_each_case_and_where():
  rng, batch, seen = np.random.default_rng(1), cases(64), []
  for name in ("known", "known_mask"):
    batch[name] = rng.integers(0, 9, batch[name].shape).astype(batch[name].dtype)

  def velocity(noisy, time, cond):
    seen.append(cond)
    return noisy

  flow(velocity, batch)
  assert seen[0].known.dtype == jnp.float32
  np.testing.assert_array_equal(seen[0].known, batch["known"])
  np.testing.assert_array_equal(seen[0].known_mask, batch["known_mask"])


def test_each_case_has_noise_of_its_own_and_every_sigma_comes_as_often():
  batch, seen = cases(1000), []
  batch["latents"] = np.zeros_like(batch["latents"])
  last_three = {"low": 0.9975}

  def velocity(noisy, time, cond):
    seen.append((noisy, time))
    return noisy

  flow(velocity, batch, **last_three)
  ((noisy, time),) = seen
  sigma = sigmas_of(time, **last_three)
  found, counts = np.unique(sigma, return_counts=True)
  u = np.array([0.998, 0.999, 1.0])
  np.testing.assert_allclose(found, 3 * u / (1 + 2 * u), rtol=1e-6)
  assert np.all(np.abs(counts - 1000 / 3) < 4 * (1000 * 1 / 3 * 2 / 3) ** 0.5)
  alike = np.corrcoef(np.asarray(noisy).reshape(1000, -1))
  assert np.abs(alike - np.eye(1000)).max() < 0.5


def test_sigmas_noise_and_dropped_prompts_are_drawn_by_keys_of_their_own(monkeypatch):
  keys = [tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1)]

  def remembering(draw):
    def remembered(key, *given, **named):
      keys.append(tuple(jax.random.key_data(key).tolist()))
      return draw(key, *given, **named)

    return remembered

  for name in ("randint", "normal", "bernoulli"):
    monkeypatch.setattr(jax.random, name, remembering(getattr(jax.random, name)))
  for seed in (0, 1):
    flow(lambda noisy, time, cond: noisy, cases(64), seed)
  assert len(keys) == len(set(keys)) == 2 + 2 * 3


@pytest.mark.parametrize("low", [0.0, 0.7])
def test_the_loss_of_a_band_is_that_of_the_cases_whose_sigma_lies_in_it(low):
  batch, seen = cases(1000), []
  clean = batch["latents"].astype(np.float32)

  def velocity(noisy, time, cond):
    sigma = sigmas_of(time, low=low)
    seen.append(sigma)
    # Wrong by sigma everywhere, so that the loss of a case is sigma squared.
    level = sigma[:, None, None, None, None]
    return (noisy - clean) / level + level

  value, metrics = flow(velocity, batch, low=low)
  assert float(value) == pytest.approx(np.mean(seen[0] ** 2), rel=1e-4)
  edges = [0.0, 0.4, 0.7, 0.9, 1.1]
  inside = [seen[0][(seen[0] >= a) & (seen[0] < b)] for a, b in itertools.pairwise(edges)]
  wanted = [np.mean(sigma**2) if len(sigma) else 0.0 for sigma in inside]
  np.testing.assert_array_equal(metrics["band_counts"], [len(sigma) for sigma in inside])
  np.testing.assert_allclose(metrics["bands"], wanted, rtol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_cases_that_is_asked_sees_the_empty_prompt(share):
  batch, seen = cases(1000), []

  def velocity(noisy, time, cond):
    seen.append(np.asarray(cond.text)[0, :, :, 0])
    return noisy

  flow_value(velocity, batch, drop_prompt=share)
  own = np.all(seen[0] == 1 + batch["ids"], axis=1)
  empty = np.all(seen[0] == np.array([[2, 0, 0, 0, 0]]), axis=1)
  assert np.all(own ^ empty)
  assert abs(empty.mean() - share) <= 4 * (share * (1 - share) / 1000) ** 0.5


def vae(video, logvar, kl_weight=0.0, seed=0):
  """The loss of a VAE whose latent is the video, with a variance, and its metrics."""

  def apply(params, x, method):
    return {"encode_moments": (x, jnp.full_like(x, logvar)), "decode_values": x}[method]

  loss = training.vae_loss(SimpleNamespace(apply=apply), kl_weight)
  return jax.tree.map(float, loss({}, {"video": video}, jax.random.key(seed)))


def test_the_vae_pays_for_its_errors_and_as_much_as_is_asked_for_its_kl():
  spread = 0.5
  (free, metrics), (paid, _) = (vae(VIDEO, np.log(spread**2), weight) for weight in (0.0, 2.0))
  # This VAE errs by its own sampling: normal, of standard deviation `spread`.
  assert metrics["l1"] == pytest.approx(spread * (2 / np.pi) ** 0.5, rel=0.05)
  assert metrics["l2"] == pytest.approx(spread**2, rel=0.05)
  assert free == pytest.approx(metrics["l1"] + metrics["l2"])
  # KL(N(m, s^2), N(0, 1)) = (s^2 + m^2 - 1) / 2 - log s
  kl = float(np.mean((spread**2 + VIDEO**2 - 1) / 2 - np.log(spread)))
  assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
  assert paid - free == pytest.approx(2.0 * kl, rel=1e-5)


def test_a_vae_counts_as_neither_surer_nor_less_sure_than_a_bound():
  for beyond, bound, within in ((-30.0, -20.0, -19.0), (90.0, 5.0, 4.0)):
    assert vae(VIDEO, beyond, 1.0) == vae(VIDEO, bound, 1.0)
    assert vae(VIDEO, within, 1.0)[1]["kl"] < vae(VIDEO, bound, 1.0)[1]["kl"]


def test_the_latents_of_a_vae_are_sampled_anew_at_each_step():
  first, again, other = (vae(VIDEO, 0.0, seed=seed)[0] for seed in (0, 0, 1))
  assert first == again != other


def walk(loss, settings, params, batches, seed=0):
  """The state and the metrics after each step, as numpy."""
  step, state = training.make_step(loss, settings, seed), training.begin(params, settings)
  for batch in batches:
    state, metrics = step(state, batch)
    yield jax.tree.map(np.array, (state, metrics))


def test_the_average_of_the_params_follows_them_slower_until_it_has_the_decay_that_is_asked():
  settings = TrainSettings(steps=9, batch=1, learning_rate=0.1, warmup=0, ema=0.25)
  params = {"w": jnp.arange(3.0)}

  def loss(params, batch, key):
    return jnp.sum(jnp.square(params["w"] - 5.0)), {}

  wanted = np.arange(3.0)
  states = [state for state, _ in walk(loss, settings, params, [{}] * 4)]
  for state, decay in zip(states, (1 / 10, 2 / 11, 3 / 12, 0.25), strict=True):
    wanted = decay * wanted + (1.0 - decay) * state.params["w"]
    np.testing.assert_allclose(state.ema["w"], wanted, rtol=1e-6)


def test_a_step_whose_loss_or_gradient_is_not_finite_leaves_the_state_as_it_was():
  settings = TrainSettings(steps=9, batch=1, learning_rate=0.1, warmup=0)

  def loss(params, batch, key):
    # A root of 0 is finite, and its slope is not.
    return jnp.sqrt(batch["under"] * params["w"]) + batch["added"], {}

  def batch(under=1.0, added=0.0):
    return {"under": jnp.float32(under), "added": jnp.float32(added)}

  good, of_loss, of_gradient = batch(), batch(added=np.inf), batch(under=0.0)
  batches = [good, of_loss, of_gradient, good]
  found = list(walk(loss, settings, {"w": jnp.array(2.0)}, batches))
  assert [bool(metrics["finite"]) for _, metrics in found] == [True, False, False, True]
  assert [bool(np.isfinite(metrics["loss"])) for _, metrics in found] == [True, False, True, True]
  assert [bool(np.isfinite(m["grad_norm"])) for _, m in found] == [True, True, False, True]
  (first, _), *others, (last, _) = found
  for state, _ in others:
    jax.tree.map(np.testing.assert_array_equal, state, first)
  *_, (undisturbed, _) = walk(loss, settings, {"w": jnp.array(2.0)}, [good, good])
  jax.tree.map(np.testing.assert_array_equal, last, undisturbed)


def test_a_step_gives_up_the_state_it_is_given_but_not_the_params_a_training_began_with():
  params = {"w": jnp.arange(3.0)}
  state = training.begin(params, SETTINGS)
  step = training.make_step(lambda params, batch, key: (params["w"].sum(), {}), SETTINGS, 0)
  step(state, {})
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema)))
  np.testing.assert_array_equal(params["w"], np.arange(3.0))


def test_the_steps_are_those_of_adam_with_memories_of_ten_and_of_fifty_steps():
  settings = TrainSettings(
    steps=9, batch=1, learning_rate=0.1, warmup=0, final_fraction=1.0, weight_decay=0.0
  )

  def loss(params, batch, key):
    return batch["slope"] * params["w"], {}

  slopes = [0.5, -0.2, 0.8, 0.1]
  batches = [{"slope": jnp.float32(slope)} for slope in slopes]
  states = [state for state, _ in walk(loss, settings, {"w": jnp.array(0.0)}, batches)]
  w = mean = square = 0.0
  for count, (state, slope) in enumerate(zip(states, slopes, strict=True), start=1):
    mean, square = 0.9 * mean + 0.1 * slope, 0.98 * square + 0.02 * slope**2
    w -= 0.1 * mean / (1 - 0.9**count) / (square / (1 - 0.98**count)) ** 0.5
    assert float(state.params["w"]) == pytest.approx(w, rel=1e-4)


def test_a_training_shorter_than_its_warm_up_warms_up_as_far_as_it_goes():
  settings = TrainSettings(steps=2, batch=1, learning_rate=0.1, warmup=4, weight_decay=0.0)
  *_, (state, _) = walk(
    lambda p, batch, key: (p["w"], {}), settings, {"w": jnp.array(0.0)}, [{}] * 2
  )
  assert float(state.params["w"]) == pytest.approx(-0.1 * (0 / 4 + 1 / 4), rel=1e-4)


def test_the_rate_warms_up_and_decays_by_a_cosine_and_weights_decay_by_it():
  settings = TrainSettings(
    steps=12, batch=1, learning_rate=0.1, warmup=4, final_fraction=0.2, weight_decay=0.5
  )
  cosine = [0.2 + 0.8 * (1 + np.cos(np.pi * t / 8)) / 2 for t in range(9)]
  rates = 0.1 * np.array([0.0, 0.25, 0.5, 0.75, *cosine, 0.2])

  def loss(params, batch, key):
    return params["pulled"], {}

  params = {"pulled": jnp.array(0.0), "idle": jnp.array(1.0)}
  pulled, idle = 0.0, 1.0
  states = [state for state, _ in walk(loss, settings, params, [{}] * len(rates))]
  # A gradient that stays 1 is a step of 1 to Adam.
  for state, rate in zip(states, rates, strict=True):
    pulled, idle = pulled - rate * (1.0 + 0.5 * pulled), idle - rate * 0.5 * idle
    assert float(state.params["pulled"]) == pytest.approx(pulled, rel=1e-4)
    assert float(state.params["idle"]) == pytest.approx(idle, rel=1e-5)


def test_a_gradient_beyond_the_norm_that_is_asked_counts_as_one_of_that_norm():
  settings = TrainSettings(steps=9, batch=1, learning_rate=0.1, warmup=0, clip_norm=2.0)

  def loss(params, batch, key):
    return batch["norm"] * (0.6 * params["a"] + 0.8 * params["b"]), {}

  def after(norm):
    params = {"a": jnp.array(0.0), "b": jnp.array(0.0)}
    batches = [{"norm": jnp.float32(0.5)}, {"norm": jnp.float32(norm)}]
    state, metrics = list(walk(loss, settings, params, batches))[-1]
    assert float(metrics["grad_norm"]) == pytest.approx(norm)
    return np.array([state.params["a"], state.params["b"]])

  bound = after(2.0)
  np.testing.assert_allclose(after(20.0), bound, rtol=1e-5)
  np.testing.assert_allclose(after(2000.0), bound, rtol=1e-5)
  assert np.all(np.abs(after(1.0) - bound) > 1e-3)


@pytest.mark.parametrize("default", ["threefry2x32", "rbg"])
def test_each_step_draws_by_the_seed_and_its_number_alone(default):
  def loss(params, batch, key):
    return params["w"], {"draw": jax.random.uniform(key)}

  for seed in (3, 4):
    with jax.default_prng_impl(default):
      steps = [*walk(loss, SETTINGS, {"w": jnp.array(1.0)}, [{}] * 3, seed)]
    drawn = [float(metrics["draw"]) for _, metrics in steps]
    keys = [jax.random.fold_in(jax.random.key(seed), step) for step in range(3)]
    assert drawn == [float(jax.random.uniform(key)) for key in keys]


@pytest.mark.parametrize(("end", "weights"), [(1, 4 + 3), (2, 3 + 2 * 3)])
def test_the_frames_at_the_end_of_a_preview_count_as_often_as_is_asked(end, weights):
  video = np.zeros((2, 5, 4, 4, 3), np.float32)
  video[:, 0], video[:, -1] = 1.0, 2.0
  blank = SimpleNamespace(apply=lambda params, latents: jnp.zeros_like(video))
  loss = training.preview_loss(blank, end=end, weight=3.0)
  value, metrics = loss({}, {"latents": None, "video": video}, jax.random.key(0))
  assert float(value) == pytest.approx((1.0 + 3 * 4.0) / weights)
  assert float(metrics["l2"]) == pytest.approx(1.0)


def test_an_expert_is_trained_on_its_own_sigmas():
  sigma, rows = training.sigma_table(
    TrainSettings(steps=1, batch=1, shift=5.0, low=0.642), freq_dim=16
  )
  assert rows.shape == (358, 2, 16) and abs(sigma.min() - 0.9) < 1e-2 and sigma.max() == 1.0
  np.testing.assert_array_equal(rows[-1, 0], np.float32(schedules.sinusoid(np.array(1000.0), 16)))


def test_two_experts_share_the_sigmas_between_them():
  settings = TrainSettings(steps=1, batch=1)
  whole, low, high = (
    training.sigma_table(dataclasses.replace(settings, **part), freq_dim=16)
    for part in ({}, {"high": 0.75}, {"low": 0.75})
  )
  assert low[0].max() == np.float32(0.9)  # 3 * 0.75 / (1 + 2 * 0.75), the last one of its expert
  for one, *halves in zip(whole, low, high, strict=True):
    np.testing.assert_array_equal(np.concatenate(halves), one)


@pytest.mark.parametrize(
  ("device", "wanted"),
  [
    ({"platform": "cpu"}, "float32"),
    ({"platform": "tpu"}, "bfloat16"),
    ({"platform": "gpu", "compute_capability": "7.5"}, "float32"),
    ({"platform": "gpu", "compute_capability": "9.0"}, "bfloat16"),
    ({"platform": "gpu", "compute_capability": "gfx942"}, "float32"),
    ({"platform": "gpu", "compute_capability": "10.0"}, "bfloat16"),
  ],
)
def test_bfloat16_where_the_device_has_it(device, wanted):
  assert training.compute_dtype(SimpleNamespace(**device)) == wanted


def test_a_deepened_network_has_its_layers_evenly_spaced_and_new_ones_that_add_nothing():
  layer = np.array([[1.0], [2.0]])
  blocks = {
    "modulation": layer,
    "self_attn": {"q": {"kernel": layer}, "o": {"kernel": layer, "bias": layer}},
    "mlp": {"up": {"kernel": layer}, "down": {"kernel": layer}},
  }
  grown = training.deepen({"blocks": blocks, "head": layer}, 5)
  np.testing.assert_array_equal(grown["head"], layer)
  copied, silent = [1, 1, 1, 2, 2], [1, 0, 0, 2, 0]
  wanted = {
    "modulation": copied,
    "self_attn": {"q": {"kernel": copied}, "o": {"kernel": silent, "bias": silent}},
    "mlp": {"up": {"kernel": copied}, "down": {"kernel": silent}},
  }
  assert jax.tree.map(lambda leaf: leaf[:, 0].tolist(), grown["blocks"]) == wanted


@pytest.mark.slow
def test_a_deepened_network_computes_what_it_computed_and_its_new_layers_can_learn(problem):
  _, begin, batch = problem
  params, small = begin().params["dit"], tiny_config()
  kernel = jax.random.normal(jax.random.key(3), params["head"]["kernel"].shape)
  params = {**params, "head": {**params["head"], "kernel": kernel}}
  deep = WanDiT(dataclasses.replace(small, layers=2 * small.layers + 1))
  grown = training.deepen(params, deep.config.layers)
  cond = Conditioning(
    text=jnp.ones((1, 4, 5, 12)),
    known=jnp.asarray(batch["known"], jnp.float32),
    known_mask=jnp.asarray(batch["known_mask"]),
  )
  latents, time = jnp.asarray(batch["latents"], jnp.float32), jnp.ones((2, 16))

  def velocity(dit, params):
    return dit.apply({"params": params}, latents, time, cond)[0]

  before = velocity(WanDiT(small), params)
  assert np.std(before) > 0.1
  np.testing.assert_allclose(velocity(deep, grown), before, rtol=1e-5, atol=1e-5)
  slopes = jax.grad(lambda p: jnp.sum(velocity(deep, p) ** 2))(grown)["blocks"]
  for part in (slopes["self_attn"]["o"], slopes["cross_attn"]["o"], slopes["mlp"]["down"]):
    assert np.all(np.abs(part["kernel"]).sum(axis=(1, 2)) > 0)
  with pytest.raises(ValueError, match=f"layers={small.layers - 1} of a network with"):
    training.deepen(params, small.layers - 1)
