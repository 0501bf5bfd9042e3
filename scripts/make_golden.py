"""Golden files: what the references compute, and what their tensors are called.

  python scripts/make_golden.py                writes tests/golden/*.npz, each below 100 kB
  python scripts/make_golden.py keys FOLDER    writes tests/golden/*.keys.json

A .npz holds tiny random weights under their published names (`weights/...`, int8, in units of
1/64: exact in float32), inputs, what diffusers or transformers made of them, and `about`: the
settings of our config, the versions, the command. `tests/test_golden.py` computes the same from
them, and `tests/parity/test_golden.py` holds the files to this script.

A .keys.json lists key, dtype and shape of every tensor of a published part at full size, once as
Wan's own code builds it and once as diffusers or transformers do, and the settings it was built by;
keys that differ in the number of the layer alone are one, with `{}` for the number and their count.
`tests/test_published_keys.py` converts checkpoints that have these keys. FOLDER holds clones:

  git clone https://github.com/Wan-Video/Wan2.1 FOLDER/Wan2.1
  git clone https://github.com/Wan-Video/Wan2.2 FOLDER/Wan2.2
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import platform
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

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


def versions() -> dict[str, str]:
  made = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
  return made | {"python": platform.python_version()}


def make(name: str) -> Arrays:
  """The arrays of one golden file."""
  config, arrays = GOLDEN[name]()
  about = {"config": config, "versions": versions(), "command": "python scripts/make_golden.py"}
  return {"about": np.array(json.dumps(about)), **arrays}


# The published transformers: repository, file of the sizes in wan/configs; then what that does not
# say and the config.json of each does: model_type, channels of the input, of the output.
TRANSFORMERS = {
  "wan21_t2v_1_3b": ("Wan2.1", "wan_t2v_1_3B", "t2v", 16, 16),
  "wan21_t2v_14b": ("Wan2.1", "wan_t2v_14B", "t2v", 16, 16),
  "wan21_i2v_14b": ("Wan2.1", "wan_i2v_14B", "i2v", 36, 16),
  "wan22_t2v_a14b": ("Wan2.2", "wan_t2v_A14B", "t2v", 16, 16),
  "wan22_i2v_a14b": ("Wan2.2", "wan_i2v_A14B", "i2v", 36, 16),
  "wan22_ti2v_5b": ("Wan2.2", "wan_ti2v_5B", "ti2v", 48, 48),
}
# As the config.json of the diffusers repositories have them.
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24}
UMT5_XXL |= {"num_heads": 64, "relative_attention_num_buckets": 32}
UMT5_XXL |= {"relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu"}
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
VIT_H |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu"}
VAE22 = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True}
VAE22 |= {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}


class Attributes(dict[str, Any]):
  """What Wan's configurations use of easydict."""

  __getattr__ = dict.__getitem__
  __setattr__ = dict.__setitem__


def wan_code(folder: Path, name: str) -> Callable[[str], ModuleType]:
  """Imports `modules.x` and `configs.x` of a clone alone, without what their packages import.

  Neither easydict nor torchvision nor a GPU is needed: no forward pass is run.
  """
  if not (folder / name / "wan" / "modules").is_dir():
    raise SystemExit(f"{folder / name} has no wan/modules: git clone Wan-Video/{name} there.")
  root = name.replace(".", "_")
  for package in ("", ".modules", ".configs"):
    made = ModuleType(root + package)
    made.__path__ = [str(folder / name / "wan" / package.removeprefix("."))]
    sys.modules[root + package] = made
  stubs: dict[str, Any] = {key: mock.Mock() for key in ("torchvision", "torchvision.transforms")}
  stubs["easydict"] = SimpleNamespace(EasyDict=Attributes)

  def load(module: str) -> ModuleType:
    lacking = {key: stub for key, stub in stubs.items() if key not in sys.modules}
    sys.modules.update(lacking)
    try:
      with mock.patch("torch.cuda.current_device"):
        return importlib.import_module(f"{root}.{module}")
    finally:
      for key in lacking:
        del sys.modules[key]

  return load


def collapsed(model: torch.nn.Module) -> dict[str, list[Any]]:
  """Key -> dtype, shape, count of the tensors; the keys that are one differ in their first number.

  The count is 1 of a key that stands for itself; numbers run from 0 to count - 1.
  """
  groups: dict[str, dict[str, list[Any]]] = defaultdict(dict)
  for key, value in model.state_dict().items():
    name = re.sub(r"(?<=\.)\d+(?=\.)", "{}", key, count=1)
    groups[name][key] = [str(value.dtype).removeprefix("torch."), list(value.shape)]
  listed: dict[str, list[Any]] = {}
  for name, rows in groups.items():
    one, *others = rows.values()
    numbered = list(rows) == [name.replace("{}", str(i)) for i in range(len(rows))]
    if others and numbered and all(row == one for row in others):
      listed[name] = [*one, len(rows)]
    else:
      listed |= {key: [*row, 1] for key, row in rows.items()}
  return listed


def listing(model: torch.nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
  """One naming of a part: the class, the settings it was built by, its tensors."""
  settings = {key: value for key, value in settings.items() if not key.startswith("_")}
  return {"class": type(model).__name__, "config": settings, "keys": collapsed(model)}


def reference(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
  """The listing of a class of diffusers or transformers; the text encoder is published in bf16."""
  with torch.device("meta"):
    if hasattr(diffusers, name):
      model = getattr(diffusers, name)(**settings)
      return listing(model, model.config)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings))
  if name == "UMT5EncoderModel":
    model = model.to(torch.bfloat16)
  return listing(model, settings)


def transformer_keys(load: Callable[[str], ModuleType], name: str) -> dict[str, Any]:
  """Both namings of a published transformer."""
  _, file, model_type, in_dim, out_dim = TRANSFORMERS[name]
  sizes = getattr(load(f"configs.{file}"), file.removeprefix("wan_"))
  kind = load("modules.model").WanModel
  known = inspect.signature(kind).parameters.keys() & sizes.keys()
  settings = {key: sizes[key] for key in sorted(known)}
  with torch.device("meta"):
    model = kind(**settings, model_type=model_type, in_dim=in_dim, out_dim=out_dim)
  clip = name == "wan21_i2v_14b"
  return {
    "original": listing(model, model.config),
    "diffusers": reference(
      "WanTransformer3DModel",
      {
        "num_attention_heads": sizes.num_heads,
        "attention_head_dim": sizes.dim // sizes.num_heads,
        "in_channels": in_dim,
        "out_channels": out_dim,
        "text_dim": model.text_dim,
        "freq_dim": sizes.freq_dim,
        "ffn_dim": sizes.ffn_dim,
        "num_layers": sizes.num_layers,
        "cross_attn_norm": sizes.cross_attn_norm,
        "eps": sizes.eps,
        "image_dim": 1280 if clip else None,
        "added_kv_proj_dim": sizes.dim if clip else None,
      },
    ),
  }


def vae_keys(module: ModuleType, name: str, **theirs: Any) -> dict[str, Any]:
  """Both namings of a published VAE; Wan's own code says the normalisation of the latents."""
  with mock.patch.object(module, "_video_vae") as asked:
    made = getattr(module, name)(dtype=torch.float64, device="cpu")
  mean, inverse = made.scale
  with mock.patch("torch.load"), mock.patch.object(module.WanVAE_, "load_state_dict"):
    model = module._video_vae(**asked.call_args.kwargs)
  settings = {key: v for key, v in asked.call_args.kwargs.items() if key != "pretrained_path"}
  theirs["latents_mean"] = [round(x, 4) for x in mean.tolist()]
  theirs["latents_std"] = [round(1 / x, 4) for x in inverse.tolist()]
  return {"original": listing(model, settings), "diffusers": reference("AutoencoderKLWan", theirs)}


def all_keys(folder: Path) -> dict[str, dict[str, Any]]:
  """Part -> naming -> listing, of every published part."""
  wan = {name: wan_code(folder, name) for name in ("Wan2.1", "Wan2.2")}
  made = {name: transformer_keys(wan[TRANSFORMERS[name][0]], name) for name in TRANSFORMERS}
  made["wan21_vae"] = vae_keys(wan["Wan2.1"]("modules.vae"), "WanVAE")
  made["wan22_vae"] = vae_keys(wan["Wan2.2"]("modules.vae2_2"), "Wan2_2_VAE", **VAE22)
  text = wan["Wan2.1"]("modules.t5").umt5_xxl
  clip = wan["Wan2.1"]("modules.clip").clip_xlm_roberta_vit_h_14
  made["umt5_xxl"] = {
    "original": listing(text(encoder_only=True, dtype=torch.bfloat16, device="meta"), {}),
    "diffusers": reference("UMT5EncoderModel", UMT5_XXL),
  }
  made["clip_vit_h"] = {
    "original": listing(clip(device="meta"), {}),
    "diffusers": reference("CLIPVisionModel", VIT_H),
  }
  return made


def laid_out(value: Any, indent: str = "") -> str:
  """JSON with a line for each entry of an object, and lists on one."""
  if not isinstance(value, dict) or not value:
    return json.dumps(value)
  inner = indent + " "
  rows = [f"{inner}{json.dumps(key)}: {laid_out(below, inner)}" for key, below in value.items()]
  return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


def write_keys(folder: Path) -> None:
  commits = {
    f"github.com/Wan-Video/{name}": subprocess.run(
      ["git", "-C", folder / name, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    for name in ("Wan2.1", "Wan2.2")
  }
  about = {"command": "python scripts/make_golden.py keys FOLDER", "versions": commits | versions()}
  for name, namings in all_keys(folder).items():
    path = FOLDER / f"{name}.keys.json"
    path.write_text(laid_out({"about": about, **namings}) + "\n", encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  keys = parser.add_subparsers(dest="what").add_parser("keys", help="write *.keys.json")
  keys.add_argument("folder", type=Path, help="where Wan2.1/ and Wan2.2/ are cloned")
  asked = parser.parse_args()
  FOLDER.mkdir(exist_ok=True)
  if asked.what == "keys":
    write_keys(asked.folder)
    return
  for name in GOLDEN:
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, **make(name))
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
  main()
