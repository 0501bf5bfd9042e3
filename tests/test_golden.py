"""Golden files of the references (scripts/make_golden.py), met without PyTorch.

The tolerances are those of tests/parity: float32 programs that sum in another order.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import relative
from jax_videoreason.convert import engine, umt5, vae, wan
from jax_videoreason.models.umt5 import UMT5Config, UMT5Encoder
from jax_videoreason.models.wan import WanConfig, WanDiT, abstract_params
from jax_videoreason.models.wan21_vae import WanVAE, WanVAEConfig
from jax_videoreason.schedules import build, sinusoid
from jax_videoreason.solvers import SOLVERS
from jax_videoreason.structs import Conditioning
from jax_videoreason.taps import TapSpec

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


def golden(name):
  """(settings, weights by published name, the other arrays) of a file."""
  with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
    arrays = dict(file)
  settings = json.loads(str(arrays.pop("about")))["config"]
  settings = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
  weights = {
    key.removeprefix("weights/"): arrays.pop(key) / np.float32(64)
    for key in list(arrays)
    if key.startswith("weights/")
  }
  return settings, weights, arrays


def test_the_files_are_small_and_say_what_made_them():
  names = [path.stem for path in FILES]
  assert names == ["dit_concat", "dit_overwrite", "umt5", "unipc", "vae_wan21", "vae_wan22"]
  for path in FILES:
    assert path.stat().st_size < 100_000
    with np.load(path) as file:
      about = json.loads(str(file["about"]))
    assert {"torch", "diffusers", "transformers", "python"} == set(about["versions"])
    assert about["command"] == "python scripts/make_golden.py"


@pytest.mark.parametrize("name", ["dit_concat", "dit_overwrite"])
def test_the_transformer(name):
  """1e-5 for the stream after each layer, 2e-5 for the velocity, relative L2."""
  settings, weights, kept = golden(name)
  config = WanConfig(**settings)
  params = engine.fill(weights, wan.table("diffusers"), abstract_params(config))
  cond = Conditioning(text=kept["text"][None], known=kept["known"], known_mask=kept["known_mask"])
  time = sinusoid([float(kept["timestep"]), 0.0], config.freq_dim, "diffusers")
  spec = TapSpec(sites=("resid_post",), reduce=("full",))
  run = jax.jit(lambda p, x: WanDiT(config).apply({"params": p}, x, time, cond, taps=spec))
  velocity, taps = run(params, kept["latents"])
  for ours, theirs in zip(taps["resid_post/full"], kept["streams"], strict=True):
    assert relative(ours[0], theirs) <= 1e-5
  assert relative(velocity[0], kept["velocity"]) <= 2e-5


@pytest.mark.parametrize("name", ["vae_wan21", "vae_wan22"])
def test_the_vae(name):
  """1e-4 absolute: the project's tolerance on pixels in [-1, 1]."""
  settings, weights, kept = golden(name)
  config = WanVAEConfig(**settings)
  model = WanVAE(config)
  video = jnp.asarray(kept["video"])
  wanted = jax.eval_shape(model.init, jax.random.key(0), video)["params"]
  params = engine.fill(weights, vae.table(config, "diffusers"), dict(wanted))

  @jax.jit
  def run(params, video):
    mean, logvar = model.apply({"params": params}, video, method="encode_moments")
    latents = model.apply({"params": params}, video, method="encode")
    return mean, logvar, model.apply({"params": params}, latents, method="decode")

  assert np.std(kept["decoded"]) > 0.05  # one colour would agree with anything
  for ours, key in zip(run(params, video), ("mean", "logvar", "decoded"), strict=True):
    np.testing.assert_allclose(ours, kept[key], atol=1e-4)


def test_the_text_encoder():
  """1e-4 on values of about 3."""
  settings, weights, kept = golden("umt5")
  model = UMT5Encoder(UMT5Config(**settings))
  ids, mask = kept["ids"], kept["mask"]
  wanted = jax.eval_shape(model.init, jax.random.key(0), ids, mask)["params"]
  params = engine.fill(weights, umt5.table("transformers"), wanted, umt5.IGNORE)
  states = jax.jit(model.apply)({"params": params}, ids, mask)
  np.testing.assert_allclose(states[mask], kept["states"][mask], atol=1e-4)


def test_the_grid_and_the_sinusoids():
  """The grid to the last bit; sinusoids to 1e-6 but at the two frequencies of docs/numerics.md."""
  settings, _, kept = golden("unipc")
  schedule = build(**settings, grid="diffusers", numerics="diffusers")
  np.testing.assert_array_equal(schedule.sigma, kept["sigma"])
  np.testing.assert_array_equal(schedule.timestep, kept["timestep"])
  gap = np.abs(schedule.time[:, 0] - kept["time"]).max(axis=0)
  assert np.sum(gap > 1e-6) <= 4
  assert gap.max() <= 6e-5


def test_unipc():
  """1e-6 relative L2 after every step, on random velocities."""
  settings, _, kept = golden("unipc")
  schedule = build(**settings, grid="diffusers", solver="unipc")
  latents = jnp.asarray(kept["start"])
  solver = SOLVERS["unipc"]
  memory, step = solver.init(latents), jax.jit(solver.step)
  for i, wanted in enumerate(kept["path"]):
    row = {key: values[i] for key, values in schedule.coef.items()}
    v = kept["velocity"][i]
    latents, memory = step(
      memory, latents, v, latents - schedule.sigma[i] * v, row, np.zeros(2, bool)
    )
    assert relative(latents, wanted) <= 1e-6, f"step {i}"
