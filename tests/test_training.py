"""Training: losses and steps by their formulas, resumed equals undisturbed, NaN changes nothing."""

import dataclasses
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


def flow_value(velocity, batch, **changes):
  """The flow loss of a DiT that answers `velocity`."""
  settings = dataclasses.replace(SETTINGS, **changes)
  loss = training.flow_loss(stubs(velocity), settings)
  return float(loss({"dit": None, "text": None}, batch, jax.random.key(0))[0])


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


def test_the_vae_pays_for_its_errors_and_as_much_as_is_asked_for_its_kl():
  video = np.random.default_rng(0).uniform(-1, 1, (2, 5, 16, 16, 3)).astype(np.float32)
  spread = 0.5

  def apply(params, x, method):
    moments = x, jnp.full_like(x, np.log(spread**2))
    return {"encode_moments": moments, "decode_values": x}[method]

  def value(kl_weight):
    loss = training.vae_loss(SimpleNamespace(apply=apply), kl_weight)
    return jax.tree.map(float, loss({}, {"video": video}, jax.random.key(0)))

  (free, metrics), (paid, _) = value(0.0), value(2.0)
  # This VAE errs by its own sampling: normal, of standard deviation `spread`.
  assert metrics["l1"] == pytest.approx(spread * (2 / np.pi) ** 0.5, rel=0.05)
  assert metrics["l2"] == pytest.approx(spread**2, rel=0.05)
  assert free == pytest.approx(metrics["l1"] + metrics["l2"])
  # KL(N(m, s^2), N(0, 1)) = (s^2 + m^2 - 1) / 2 - log s
  kl = float(np.mean((spread**2 + video**2 - 1) / 2 - np.log(spread)))
  assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
  assert paid - free == pytest.approx(2.0 * kl, rel=1e-5)


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


def test_each_step_draws_by_the_seed_and_its_number():
  def loss(params, batch, key):
    return params["w"], {"draw": jax.random.uniform(key)}

  for seed in (3, 4):
    steps = walk(loss, SETTINGS, {"w": jnp.array(1.0)}, [{}] * 3, seed)
    drawn = [float(metrics["draw"]) for _, metrics in steps]
    keys = [jax.random.fold_in(jax.random.key(seed), step) for step in range(3)]
    assert drawn == [float(jax.random.uniform(key)) for key in keys]


def test_the_frames_at_the_end_of_a_preview_count_as_often_as_is_asked():
  video = np.zeros((2, 5, 4, 4, 3), np.float32)
  video[:, 0], video[:, -1] = 1.0, 2.0
  blank = SimpleNamespace(apply=lambda params, latents: jnp.zeros_like(video))
  loss = training.preview_loss(blank, end=1, weight=3.0)
  value, metrics = loss({}, {"latents": None, "video": video}, jax.random.key(0))
  assert float(value) == pytest.approx((1.0 + 3 * 4.0) / (4 + 3))
  assert float(metrics["l2"]) == pytest.approx(1.0)


def test_an_expert_is_trained_on_its_own_sigmas():
  sigma, rows = training.sigma_table(
    TrainSettings(steps=1, batch=1, shift=5.0, low=0.642), freq_dim=16
  )
  assert rows.shape == (358, 2, 16) and abs(sigma.min() - 0.9) < 1e-2 and sigma.max() == 1.0
  np.testing.assert_array_equal(rows[-1, 0], np.float32(schedules.sinusoid(np.array(1000.0), 16)))


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
