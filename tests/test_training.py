"""Training: the loss falls, resumed equals undisturbed, a NaN changes nothing."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import GRID, tiny_config
from jax_videoreason import schedules, training
from jax_videoreason.models.umt5 import UMT5Config, UMT5Encoder
from jax_videoreason.models.wan import WanDiT
from jax_videoreason.structs import Conditioning, Parts
from jax_videoreason.training import TrainSettings

TEXT = UMT5Config(
  vocab=10, width=12, head_width=4, heads=2, ffn_width=16, layers=1, dtype="float32"
)
SETTINGS = TrainSettings(steps=60, batch=4, learning_rate=3e-3, warmup=5)


@pytest.fixture(scope="module")
def problem():
  """Step, first state and batches of a training in miniature."""
  parts = Parts(dit=WanDiT(tiny_config()), text=UMT5Encoder(TEXT))
  rng = np.random.default_rng(0)
  cells = (4, *GRID)
  ids = np.asarray(rng.integers(2, 10, (4, 5)), np.int32)
  batch = {
    "latents": np.broadcast_to(rng.normal(size=(4, 1, 1, 1, 4)), cells).astype(np.float16),
    "known": np.zeros(cells, np.float16),
    "known_mask": np.zeros((*cells[:-1], 4), np.float32),
    "ids": ids,
    "mask": np.ones_like(ids, bool),
    "empty_ids": np.array([[1, 0, 0, 0, 0]], np.int32),
    "empty_mask": np.array([[True, False, False, False, False]]),
  }
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
