"""A 20-step image-to-video trajectory with two experts against a loop in PyTorch, at every step.

Tolerances, relative L2: 1e-4 at guidance 1 and 3e-4 at 5. The forward passes differ by 1e-6 each
(float32 sums in another order); guidance multiplies that by its scale and the steps carry it on.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from helpers import relative
from jax_videoreason import runs, schedules
from jax_videoreason.convert import engine, wan
from jax_videoreason.models.wan import WanConfig, WanDiT, abstract_params
from jax_videoreason.sampler import denoise
from jax_videoreason.structs import Card, Conditioning, LatentSpec, ModelBundle, Parts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

STEPS, BOUNDARY, SHIFT = 20, 0.875, 5.0
GRID, CHANNELS, TEXT = (3, 4, 6), 6, 20
CONFIG = WanConfig(
  width=48,
  ffn_width=64,
  heads=2,
  layers=2,
  in_channels=2 * CHANNELS + 4,
  out_channels=CHANNELS,
  text_width=TEXT,
  freq_dim=32,
  image_input="concat",
  numerics="diffusers",
)


@functools.cache
def experts():
  """Two reference models with different random weights."""
  from diffusers import WanTransformer3DModel

  made = []
  for seed in (0, 1):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
      num_attention_heads=CONFIG.heads,
      attention_head_dim=CONFIG.width // CONFIG.heads,
      in_channels=CONFIG.in_channels,
      out_channels=CHANNELS,
      text_dim=TEXT,
      freq_dim=CONFIG.freq_dim,
      ffn_dim=CONFIG.ffn_width,
      num_layers=CONFIG.layers,
    ).eval()
    with torch.no_grad():
      for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter == 1))
    made.append(model)
  return made


def problem(branches):
  draw = np.random.default_rng(3).standard_normal
  known_mask = np.zeros((2, *GRID, 4), np.float32)
  known_mask[:, 0] = 1
  return (
    draw((2, *GRID, CHANNELS), np.float32),
    Conditioning(
      text=draw((branches, 2, 7, TEXT), np.float32),
      known=draw((2, *GRID, CHANNELS), np.float32),
      known_mask=known_mask,
    ),
  )


def channels_first(x):
  return torch.tensor(rearrange(np.asarray(x), "r f h w c -> r c f h w"))


def reference(solver, guidance):
  """Latents that the model saw at every step, and the final ones: S+1 R F H W C."""
  from diffusers import UniPCMultistepScheduler

  noise, cond = problem(1 if guidance == 1 else 2)
  latents = channels_first(noise)
  rest = channels_first(np.concatenate([cond.known_mask, cond.known], axis=-1))
  scheduler = UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
  )
  scheduler.set_timesteps(STEPS)
  sigmas = [float(s) for s in scheduler.sigmas]
  seen = []
  for i, t in enumerate(scheduler.timesteps):
    seen.append(latents)
    # Which expert: by the timestep before it is rounded, here never within one of the boundary.
    model = experts()[0] if 1000 * sigmas[i] >= 1000 * BOUNDARY else experts()[1]
    stacked = torch.cat([latents, rest], dim=1)
    with torch.no_grad():
      branch = [
        model(
          hidden_states=stacked,
          timestep=torch.full((2,), float(t)),
          encoder_hidden_states=torch.tensor(text),
          return_dict=False,
        )[0]
        for text in cond.text
      ]
    velocity = branch[0] if guidance == 1 else branch[1] + guidance * (branch[0] - branch[1])
    if solver == "euler":
      latents = latents + velocity * (sigmas[i + 1] - sigmas[i])
    else:
      latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
  seen.append(latents)
  return np.stack([rearrange(x.numpy(), "r c f h w -> r f h w c") for x in seen])


@pytest.mark.parametrize("guidance", [pytest.param(1, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_every_step_of_a_two_expert_trajectory(solver, guidance):
  noise, cond = problem(1 if guidance == 1 else 2)
  target = abstract_params(CONFIG)
  params = tuple(
    engine.fill(
      {name: value.numpy() for name, value in model.state_dict().items()},
      wan.table("diffusers"),
      target,
    )
    for model in experts()
  )
  bundle = ModelBundle(
    params=params,
    parts=Parts(dit=WanDiT(CONFIG)),
    card=Card(
      name="pair",
      family="wan21",
      latents=LatentSpec(channels=CHANNELS, stride=(4, 8, 8)),
      text_length=7,
      boundary=BOUNDARY,
    ),
  )
  schedule = schedules.build(
    steps=STEPS,
    shift=SHIFT,
    guidance=float(guidance),
    boundary=BOUNDARY,
    solver=solver,
    grid="diffusers",
    numerics="diffusers",
    freq_dim=CONFIG.freq_dim,
  )
  assert 0 < int(np.sum(schedule.which)) < STEPS
  start = runs.make_noise([0, 1], (*GRID, CHANNELS), noise)
  final, trace, _ = denoise(bundle, start, cond, schedule)
  ours = np.concatenate([trace.latents, jnp.asarray(final)[None]])
  theirs = reference(solver, guidance)
  worst = max(relative(a, b) for a, b in zip(ours, theirs, strict=True))
  assert worst <= (1e-4 if guidance == 1 else 3e-4)
  assert relative(ours[-1], ours[0]) > 0.1
