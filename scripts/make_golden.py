"""Golden files: what diffusers and transformers compute, for machines without PyTorch.

  python scripts/make_golden.py        writes tests/golden/*.npz, each below 100 kB

A file holds tiny random weights under their published names (`weights/...`, int8, in units of
1/64: exact in float32), inputs, what the reference made of them, and `about`: the settings of our
config, the versions, the command. `tests/test_golden.py` computes the same from them, and
`tests/parity/test_golden.py` holds the files to this script.
"""

import dataclasses
import json
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from einops import rearrange

from jax_videoreason.models.umt5 import UMT5Config
from jax_videoreason.models.wan import WanConfig
from jax_videoreason.models.wan21_vae import MEAN, STD, WanVAEConfig

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden"
UNIT = 1 / 64
Arrays = dict[str, np.ndarray]


def draw_weights(model: torch.nn.Module, seed: int, shared: Iterable[str] = ()) -> Arrays:
  """Fills every tensor of `model` with int8 numbers times 1/64 and returns those, by name.

  Tensors that start at one stay around one; matrices have a variance of one over their inputs.
  shared: names that are other names' tensors, and are left out.
  """
  rng, kept = np.random.default_rng(seed), {}
  with torch.no_grad():
    for name, tensor in model.state_dict().items():
      if name in shared:
        continue
      fan_in = np.prod(tensor.shape[1:]) if tensor.ndim > 1 else 25.0
      value = rng.normal(0, fan_in**-0.5, tensor.shape) + bool((tensor == 1).all())
      kept[f"weights/{name}"] = np.clip(np.round(value / UNIT), -127, 127).astype(np.int8)
      tensor.copy_(torch.from_numpy(kept[f"weights/{name}"] * np.float32(UNIT)))
  return kept


def dit(config: WanConfig, seed: int) -> tuple[dict[str, Any], Arrays]:
  """Two runs of a WanTransformer3DModel: the stream after each layer, and the velocity."""
  model = diffusers.WanTransformer3DModel(
    num_attention_heads=config.heads,
    attention_head_dim=config.width // config.heads,
    in_channels=config.in_channels,
    out_channels=config.out_channels,
    text_dim=config.text_width,
    freq_dim=config.freq_dim,
    ffn_dim=config.ffn_width,
    num_layers=config.layers,
  ).eval()
  weights = draw_weights(model, seed)
  draw = np.random.default_rng(seed + 1).standard_normal
  runs, f, h, w, t = 2, 3, 6, 10, 937.0
  latents, known = (draw((runs, f, h, w, config.out_channels), np.float32) for _ in range(2))
  mask = np.zeros((runs, f, h, w, 4), np.float32)
  mask[:, 0] = 1
  text = draw((runs, 7, config.text_width), np.float32)
  if config.image_input == "concat":
    seen, timestep = np.concatenate([latents, mask, known], -1), np.full(runs, t)
  else:  # overwrite: the tokens of the given frame are at t = 0
    seen = np.where(mask[..., :1] > 0, known, latents)
    timestep = np.full((runs, f, h * w // 4), t)
    timestep[:, 0] = 0
    timestep = rearrange(timestep, "r f hw -> r (f hw)")
  streams: list[np.ndarray] = []
  for block in model.blocks:
    block.register_forward_hook(lambda module, given, out: streams.append(out.numpy()))
  with torch.no_grad():
    velocity = model(
      hidden_states=torch.from_numpy(rearrange(seen, "r f h w c -> r c f h w").copy()),
      timestep=torch.from_numpy(timestep),
      encoder_hidden_states=torch.from_numpy(text),
      return_dict=False,
    )[0].numpy()
  return dataclasses.asdict(config), {
    **weights,
    "timestep": np.array(t),
    "latents": latents,
    "known": known,
    "known_mask": mask,
    "text": text,
    "streams": np.stack(streams),
    "velocity": rearrange(velocity, "r c f h w -> r f h w c"),
  }


def vae(config: WanVAEConfig, seed: int, **theirs: Any) -> tuple[dict[str, Any], Arrays]:
  """One clip through an AutoencoderKLWan: mean and log variance, and their decoded mean."""
  model = diffusers.AutoencoderKLWan(
    base_dim=config.base_width,
    z_dim=config.z_channels,
    dim_mult=list(config.stages),
    temperal_downsample=list(config.temporal),
    num_res_blocks=config.blocks,
    latents_mean=list(config.mean),
    latents_std=list(config.std),
    **theirs,
  ).eval()
  weights = draw_weights(model, seed)
  frames, high, wide = 1 + 2 * config.stride[0], 2 * config.stride[1], config.stride[2]
  video = np.random.default_rng(seed + 1).uniform(-1, 1, (1, frames, high, wide, 3))
  video = video.astype(np.float32)
  with torch.no_grad():
    given = torch.from_numpy(rearrange(video, "r f h w c -> r c f h w").copy())
    moments = model.encode(given).latent_dist
    decoded = model.decode(moments.mode()).sample
  made = {"mean": moments.mode(), "logvar": moments.logvar, "decoded": decoded}
  made = {key: rearrange(value.numpy(), "r c f h w -> r f h w c") for key, value in made.items()}
  return dataclasses.asdict(config), {**weights, "video": video, **made}


def umt5(config: UMT5Config, seed: int) -> tuple[dict[str, Any], Arrays]:
  """Three prompts through a UMT5EncoderModel, beyond the largest distance and padded."""
  model = transformers.UMT5EncoderModel(
    transformers.UMT5Config(
      vocab_size=config.vocab,
      d_model=config.width,
      d_kv=config.head_width,
      d_ff=config.ffn_width,
      num_layers=config.layers,
      num_heads=config.heads,
      relative_attention_num_buckets=config.buckets,
      relative_attention_max_distance=config.max_distance,
      feed_forward_proj="gated-gelu",
      dropout_rate=0.0,
    )
  ).eval()
  weights = draw_weights(model, seed, shared=("encoder.embed_tokens.weight",))
  lengths = np.array([40, 17, 1])
  ids = np.random.default_rng(seed + 1).integers(1, config.vocab, (3, 40)).astype(np.int32)
  mask = np.arange(40)[None] < lengths[:, None]
  ids = np.where(mask, ids, 0).astype(np.int32)
  with torch.no_grad():
    states = model(
      input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long()
    ).last_hidden_state
  return dataclasses.asdict(config), {**weights, "ids": ids, "mask": mask, "states": states.numpy()}


def unipc(steps: int, shift: float, seed: int) -> tuple[dict[str, Any], Arrays]:
  """The grid of diffusers, its sinusoids, and latents after every UniPC step on random velocities.

  The solver steps on the float64 sigmas of the same grid: in float32 its own differences of
  log-SNR are off by 1e-5.
  """
  scheduler = diffusers.UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
  )
  scheduler.set_timesteps(steps)
  sigma, timestep = scheduler.sigmas.numpy().copy(), scheduler.timesteps.numpy().copy()
  u = np.linspace(1.0, 1.0 / 1000, steps + 1)[:-1]
  exact = np.append(shift * u / (1 + (shift - 1) * u), 0.0)
  exact[0] -= 1e-6
  scheduler.sigmas = torch.from_numpy(exact)
  draw = np.random.default_rng(seed).standard_normal
  start, velocity = draw((2, 1, 2, 2, 3), np.float32), draw((steps, 2, 1, 2, 2, 3), np.float32)
  latents, path = torch.from_numpy(start.astype(np.float64)), []
  for i in range(steps):
    v = torch.from_numpy(velocity[i].astype(np.float64))
    latents = scheduler.step(v, scheduler.timesteps[i], latents, return_dict=False)[0]
    path.append(latents.numpy())
  embed = diffusers.models.embeddings.get_timestep_embedding
  time = embed(scheduler.timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
  return {"steps": steps, "shift": shift}, {
    "sigma": sigma,
    "timestep": timestep,
    "time": time.numpy(),
    "start": start,
    "velocity": velocity,
    "path": np.stack(path),
  }


DIT = {"width": 24, "ffn_width": 32, "heads": 2, "layers": 2, "text_width": 8, "freq_dim": 16}
DIT |= {"out_channels": 4, "numerics": "diffusers"}
VAE = {"stages": (1, 2, 2), "temporal": (False, True), "blocks": 1, "z_channels": 4}
VAE |= {"mean": MEAN[:4], "std": STD[:4]}

# heads * head_width is not the width, so that a transposed matrix can't pass
GOLDEN: dict[str, Callable[[], tuple[dict[str, Any], Arrays]]] = {
  "dit_concat": lambda: dit(WanConfig(in_channels=12, image_input="concat", **DIT), 0),
  "dit_overwrite": lambda: dit(WanConfig(in_channels=4, image_input="overwrite", **DIT), 10),
  "vae_wan21": lambda: vae(WanVAEConfig(base_width=4, **VAE), 20),
  "vae_wan22": lambda: vae(
    WanVAEConfig(base_width=2, decoder_width=4, fold=2, residual=True, **VAE), 30,
    decoder_base_dim=4, patch_size=2, is_residual=True, in_channels=12, out_channels=12,
    scale_factor_spatial=8,
  ),
  "umt5": lambda: umt5(
    UMT5Config(vocab=48, width=16, head_width=4, heads=6, ffn_width=24, layers=2, buckets=8,
               max_distance=20, dtype="float32"), 40),
  "unipc": lambda: unipc(12, 5.0, 50),
}  # fmt: skip


def make(name: str) -> Arrays:
  """The arrays of one golden file."""
  config, arrays = GOLDEN[name]()
  versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
  about = {"config": config, "versions": versions | {"python": platform.python_version()}}
  about["command"] = "python scripts/make_golden.py"
  return {"about": np.array(json.dumps(about)), **arrays}


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  for name in GOLDEN:
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, **make(name))
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
  main()
