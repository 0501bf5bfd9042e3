"""Grids, timesteps, sinusoids and UniPC against diffusers and against torch's arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason.schedules import build, sinusoid
from jax_videoreason.solvers import SOLVERS

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.torch
STEPS = (4, 5, 7, 10, 16, 20, 30, 40, 50)


def unipc(steps, shift):
  scheduler = diffusers.UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
  )
  scheduler.set_timesteps(steps)
  return scheduler


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_diffusers_grid(steps, shift):
  schedule = build(steps=steps, shift=shift, grid="diffusers", numerics="diffusers")
  scheduler = unipc(steps, shift)
  np.testing.assert_array_equal(schedule.sigma, scheduler.sigmas.numpy())
  np.testing.assert_array_equal(schedule.timestep, scheduler.timesteps.numpy())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_official_grid_is_the_old_diffusers_grid(steps, shift):
  """Before 0.37 diffusers built the official sigmas in another way: shift 1 - linspace, flip."""
  sigma = 1.0 - np.linspace(1.0, 1.0 / 1000, steps + 1)
  sigma = np.flip(shift * sigma / (1 + (shift - 1) * sigma))[:-1]
  schedule = build(steps=steps, shift=shift, grid="official")
  np.testing.assert_allclose(schedule.sigma[:-1], sigma, rtol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, *STEPS, 12, 15, 60, 82, 100, 120])
@pytest.mark.parametrize("shift", [1.0, 2.7, 3.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_the_diffsynth_grid_is_torch_float32(steps, shift, boundary):
  """To the last bit: sigmas and their differences, timesteps (bfloat16 or truncated), experts."""
  u = torch.linspace(1.0, 0.0, steps + 1)[:-1]
  sigma = shift * u / (1 + (shift - 1) * u)
  timestep = sigma * 1000
  whole = torch.cat([sigma, torch.zeros(1)])
  schedule = build(steps=steps, shift=shift, numerics="diffsynth", boundary=boundary)
  np.testing.assert_array_equal(schedule.sigma, whole.numpy())
  np.testing.assert_array_equal(schedule.coef["delta"], torch.diff(whole).numpy())
  rounded = timestep.to(torch.bfloat16).float().numpy()
  np.testing.assert_array_equal(schedule.timestep, rounded)
  assert schedule.which.tolist() == [int(t.item() < boundary * 1000) for t in timestep]
  truncated = build(steps=steps, shift=shift, numerics="official").timestep
  np.testing.assert_array_equal(truncated, timestep.trunc().numpy())


def frequencies():
  """Theirs, the float32 nearest to the exponential of their exponents, and that in float64."""
  exponent = -math.log(10000) * torch.arange(0, 128, dtype=torch.float32) / 128
  exact = np.exp(exponent.numpy().astype(np.float64))
  return torch.exp(exponent).numpy(), exact.astype(np.float32), exact


def test_the_float32_sinusoid_of_diffusers():
  """1e-6, but where torch's exp misses the nearest float32.

  MKL's does so for 2 of 128; such a frequency moves a phase by at most 1000 * 2^-24 < 6e-5. No
  other formula gives its bits: on a GPU torch's exp is another one.
  """
  from diffusers.models.embeddings import get_timestep_embedding

  t = torch.arange(0, 1001)
  theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
  theirs = theirs.numpy()
  ours = sinusoid(t.numpy(), 256, "diffusers")
  torchs, nearest, _ = frequencies()
  same = np.tile(torchs == nearest, 2)
  assert same.mean() > 0.9
  np.testing.assert_allclose(ours[:, same], theirs[:, same], atol=1e-6)
  np.testing.assert_allclose(ours, theirs, atol=6e-5)


def test_where_torch_misses_a_frequency_two_floats_are_nearly_as_near():
  """So the frequencies are the whole difference, and a matter of rounding alone."""
  torchs, nearest, exact = frequencies()
  off = np.abs(torchs - exact)[torchs != nearest] / np.spacing(nearest[torchs != nearest])
  assert np.all(off < 0.6)  # half a unit in the last place is the best there is


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_unipc_follows_diffusers_at_every_step(steps, shift):
  """Random velocities, so that every term counts.

  diffusers gets its own sigmas as float64: its log-SNR differences in float32 are off by 1e-5.
  """
  rng = np.random.default_rng(steps)
  start = rng.standard_normal((2, 1, 3, 2, 4))
  velocities = rng.standard_normal((steps, *start.shape))
  scheduler = unipc(steps, shift)
  schedule = build(steps=steps, shift=shift, grid="diffusers", solver="unipc")
  exact = np.append(_diffusers_sigmas(steps, shift), 0.0)
  np.testing.assert_array_equal(exact.astype(np.float32), scheduler.sigmas.numpy())
  scheduler.sigmas = torch.from_numpy(exact)

  theirs, ours = torch.from_numpy(start), jnp.asarray(start, jnp.float32)
  solver, memory = SOLVERS["unipc"], SOLVERS["unipc"].init(ours)
  step, edited = jax.jit(solver.step), np.zeros(2, bool)
  for i in range(steps):
    theirs = scheduler.step(
      torch.from_numpy(velocities[i]), scheduler.timesteps[i], theirs, return_dict=False
    )[0]
    v = jnp.asarray(velocities[i], jnp.float32)
    row = {name: values[i] for name, values in schedule.coef.items()}
    ours, memory = step(memory, ours, v, ours - schedule.sigma[i] * v, row, edited)
    gap = np.linalg.norm(np.asarray(ours, np.float64) - theirs.numpy())
    assert gap <= 1e-6 * np.linalg.norm(theirs.numpy()), f"step {i}"


def _diffusers_sigmas(steps, shift):
  u = np.linspace(1.0, 1.0 / 1000, steps + 1)[:-1]
  sigma = shift * u / (1 + (shift - 1) * u)
  sigma[0] -= 1e-6
  return sigma
