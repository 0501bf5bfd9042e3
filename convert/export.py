"""A bundle becomes diffusers folders: transformer/ [transformer_2/] vae/ text_encoder/ ...

Tensors go through memory one at a time, also into the safetensors shards: their format is a length,
a JSON header and the bytes. Every leaf is compared with its checksum on the way.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_videoreason import bundles, leaves
from jax_videoreason.folders import UNMOVED, beside, disk, held_beside, remove, spare
from jax_videoreason.models import clip as image_tower
from jax_videoreason.models.clip import CLIPConfig
from jax_videoreason.models.umt5 import UMT5Config
from jax_videoreason.models.wan import WanConfig
from jax_videoreason.models.wan21_vae import WanVAEConfig

from . import clip, umt5, vae, wan
from .engine import Faults, Move, moves_back, nest, same_bits
from .reader import DTYPES, headers, read

INDEX = "model_index.json"
SHARD_BYTES = 5 * 10**9
CLIP_PREFIX = "vision_model."  # before every key of a published image tower
THETA = 10_000.0  # of the rotary positions; diffusers knows no other
FOLDERS = {"dit_0": "transformer", "dit_1": "transformer_2", "vae": "vae", "text": "text_encoder"}
FOLDERS["clip"] = "image_encoder"
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
SCHEDULER = {
  "_class_name": "UniPCMultistepScheduler",
  "num_train_timesteps": 1000,
  "prediction_type": "flow_prediction",
  "use_flow_sigmas": True,
  "flow_shift": 5.0,
}
TOKENIZER = {
  "tokenizer_class": "PreTrainedTokenizerFast",
  "pad_token": "<pad>",
  "eos_token": "</s>",
  "unk_token": "<unk>",
}
PIPELINES = {"none": "WanPipeline", "overwrite": "WanPipeline", "concat": "WanImageToVideoPipeline"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A part on its way back; shapes, dtypes, sums: of its leaves; sizes: of axes that are joined."""

  name: str
  tree: Path
  moves: tuple[Move, ...]
  shapes: Mapping[str, tuple[int, ...]]
  dtypes: Mapping[str, np.dtype]
  sums: Mapping[str, str]
  sizes: Mapping[str, int]
  config: Mapping[str, Any]
  added: Mapping[str, np.ndarray]  # tensors that the layout has and the bundle does not

  @property
  def place(self) -> str:
    return FOLDERS[self.name]

  @property
  def stem(self) -> str:
    """What the names of its files begin with."""
    return "model" if self.name in ("text", "clip") else "diffusion_pytorch_model"

  def entries(self) -> Iterator[tuple[str, np.dtype, tuple[int, ...]]]:
    """Key, dtype and shape of every tensor, in the order of `values`."""
    for move in self.moves:
      yield move.source, self.dtypes[move.target], self.shape(move)
    for key, value in self.added.items():
      yield key, value.dtype, value.shape

  def values(self) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the layout; ValueError names a leaf that differs from its checksum."""
    digest = hashlib.sha256()
    for move in self.moves:
      stored = leaves.read_slice(self.tree, move.target, move.layer)
      yield move.source, np.ascontiguousarray(move.back(stored, **self.sizes))
      digest.update(np.ascontiguousarray(stored).view(np.uint8).data)
      if move.layer is None or move.layer == self.shapes[move.target][0] - 1:
        if digest.hexdigest() != self.sums[move.target]:
          raise ValueError(
            f"leaf {self.name}/{move.target} in {self.tree} differs from its checksum: copy the "
            "bundle again."
          )
        digest = hashlib.sha256()
    for key, value in self.added.items():
      yield key, np.ascontiguousarray(value)

  def shape(self, move: Move) -> tuple[int, ...]:
    """Of the tensor, found without reading it."""
    whole = self.shapes[move.target]
    slot = whole if move.layer is None else whole[1:]
    return move.back(np.broadcast_to(np.zeros((), np.int8), slot), **self.sizes).shape

  @property
  def nbytes(self) -> int:
    return sum(
      int(np.prod(self.shapes[path], dtype=np.int64)) * dtype.itemsize
      for path, dtype in self.dtypes.items()
    )


def parts(bundle: str | os.PathLike[str]) -> list[Part]:
  """What of a bundle can be written back. Faults: something that diffusers has no name for."""
  described = bundles.describe(bundle)
  found = []
  faults = []
  for name, tree in described.folders.items():
    if name == "preview":  # ours alone: it is learnt again from the VAE
      continue
    if name not in FOLDERS:
      faults.append(f"{described.folder}: part {name} cannot be written in the diffusers layout.")
      continue
    kind = name.split("_")[0]
    config = getattr(described.modules, kind).config
    if kind == "dit" and config.theta != THETA:
      faults.append(f"{described.folder}: theta {config.theta:g}, diffusers has {THETA:g} alone.")
    records = described.leaves[name]
    target = nest(records)
    table, settings, sizes = _as_diffusers(kind, config)
    made = moves_back([row for row in table if row[1] in records], target)
    if kind == "clip":
      made = [dataclasses.replace(move, source=CLIP_PREFIX + move.source) for move in made]
    found.append(
      Part(
        name=name,
        tree=tree,
        moves=tuple(made),
        shapes={path: record.shape for path, record in records.items()},
        dtypes={path: record.dtype for path, record in records.items()},
        sums={path: record.sha256 for path, record in records.items()},
        sizes=sizes,
        config=settings,
        added=_last_layer(config) if kind == "clip" else {},
      )
    )
  if faults:
    raise Faults(faults)
  return found


def summary(made: Iterable[Part]) -> list[tuple[str, str, int, str, str]]:
  """A row per part: part, its folder, tensors, dtypes, GB."""
  return [
    (
      part.name,
      f"{part.place}/",
      len(part.moves),
      " ".join(sorted({dtype.name for dtype in part.dtypes.values()})),
      f"{part.nbytes / 1e9:.3f}",
    )
    for part in made
  ]


def write(
  bundle: str | os.PathLike[str],
  out: Path,
  *,
  redo: bool = False,
  check: bool = False,
  shard_bytes: int = SHARD_BYTES,
  advance: Callable[[int], Any] = lambda _: None,
) -> Path:
  """Writes the folders; they appear under `out` when they are whole.

  check: read what was written and compare before it appears.
  ValueError: the destination exists, another command writes it, or the disk is too small.
  OSError: it filled up meanwhile.
  """
  out = Path(os.path.abspath(out))
  with held_beside(out):
    if out.exists() and not redo:
      raise ValueError(f"{out} exists already: remove it, or give --redo to replace it.")
    if out.exists() and not (out / INDEX).is_file():
      raise ValueError(
        f"{out} has no {INDEX}, and --redo replaces folders of diffusers alone: remove it, or "
        "choose another --out."
      )
    spare(out, bundles.describe(bundle).folders.values())
    made = parts(bundle)
    bundles.check_space(out, sum(part.nbytes for part in made))
    old = out.with_name(f".{out.name}.old")
    with disk(out), beside(out, last=INDEX) as partial:
      for part in made:
        place = partial / part.place
        place.mkdir(parents=True)
        _write_shards(place, part, shard_bytes, advance)
        _write_json(place / "config.json", part.config)
        if check:
          _compare(place, part)
      _write_rest(partial, bundles.describe(bundle), [part.name for part in made])
      remove(old)
      if out.exists():
        _put_away(out, old)
    remove(old)
    return out


def _put_away(out: Path, old: Path) -> None:
  """Moves a former export aside; where folders can't be renamed it is removed, first what tells
  that it is whole."""
  try:
    out.rename(old)
  except OSError as error:
    if error.errno not in UNMOVED:
      raise
    (out / INDEX).unlink()
    remove(out)


def _as_diffusers(kind: str, config: Any) -> tuple[Iterable[Any], dict[str, Any], dict[str, int]]:
  """Table, config.json and the sizes of joined axes of a part."""
  if kind == "dit":
    sizes: dict[str, int] = dict(zip(("pf", "ph", "pw"), config.patch, strict=True))
    return wan.table("diffusers"), dit_config(config), sizes
  if kind == "vae":
    return vae.table(config, "diffusers"), vae_config(config), {}
  if kind == "clip":
    return clip.table("transformers"), clip_config(config), {"p": config.patch, "q": config.patch}
  return umt5.table("transformers"), text_config(config), {}


def dit_config(config: WanConfig) -> dict[str, Any]:
  """config.json of a WanTransformer3DModel."""
  return {
    "_class_name": "WanTransformer3DModel",
    "patch_size": list(config.patch),
    "num_attention_heads": config.heads,
    "attention_head_dim": config.width // config.heads,
    "in_channels": config.in_channels,
    "out_channels": config.out_channels,
    "text_dim": config.text_width,
    "freq_dim": config.freq_dim,
    "ffn_dim": config.ffn_width,
    "num_layers": config.layers,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": config.epsilon,
    "image_dim": config.clip_width,
    "added_kv_proj_dim": None if config.clip_width is None else config.width,
    "rope_max_seq_len": 1024,
  }


def vae_config(config: WanVAEConfig) -> dict[str, Any]:
  """config.json of an AutoencoderKLWan."""
  return {
    "_class_name": "AutoencoderKLWan",
    "base_dim": config.base_width,
    "decoder_base_dim": config.decoder_width,
    "z_dim": config.z_channels,
    "dim_mult": list(config.stages),
    "num_res_blocks": config.blocks,
    "temperal_downsample": list(config.temporal),
    "attn_scales": [],
    "dropout": 0.0,
    "latents_mean": list(config.mean),
    "latents_std": list(config.std),
    "is_residual": config.residual,
    "in_channels": 3 * config.fold**2,
    "out_channels": 3 * config.fold**2,
    "patch_size": None if config.fold == 1 else config.fold,
    "scale_factor_temporal": config.stride[0],
    "scale_factor_spatial": config.stride[1],
  }


def clip_config(config: CLIPConfig) -> dict[str, Any]:
  """config.json of a CLIPVisionModel; it counts the last layer, which Wan does not read."""
  return {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_size": config.width,
    "intermediate_size": config.ffn_width,
    "num_hidden_layers": config.layers + 1,
    "num_attention_heads": config.heads,
    "image_size": config.image,
    "patch_size": config.patch,
    "hidden_act": "gelu",
    "layer_norm_eps": config.epsilon,
  }


def _last_layer(config: CLIPConfig) -> dict[str, np.ndarray]:
  """A last layer that changes nothing, and the norm after it: no bundle has them, Wan reads before.

  Zeros and ones take no memory here.
  """
  d, ffn, layer = config.width, config.ffn_width, f"encoder.layers.{config.layers}"
  zeros: dict[str, tuple[int, ...]] = {
    f"{layer}.self_attn.{name}_proj": (d, d) for name in ("q", "k", "v", "out")
  }
  zeros |= {f"{layer}.mlp.fc1": (ffn, d), f"{layer}.mlp.fc2": (d, ffn)}
  made = {f"{name}.weight": np.broadcast_to(np.float32(0), shape) for name, shape in zeros.items()}
  for name in (f"{layer}.layer_norm1", f"{layer}.layer_norm2", "post_layernorm"):
    zeros[name] = (d,)
    made[f"{name}.weight"] = np.ones(d, np.float32)
  made |= {f"{name}.bias": np.zeros(shape[0], np.float32) for name, shape in zeros.items()}
  return {CLIP_PREFIX + key: value for key, value in made.items()}


def text_config(config: UMT5Config) -> dict[str, Any]:
  """config.json of a UMT5EncoderModel."""
  return {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "vocab_size": config.vocab,
    "d_model": config.width,
    "d_kv": config.head_width,
    "d_ff": config.ffn_width,
    "num_layers": config.layers,
    "num_heads": config.heads,
    "relative_attention_num_buckets": config.buckets,
    "relative_attention_max_distance": config.max_distance,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": True,
  }


def _write_shards(place: Path, part: Part, shard_bytes: int, advance: Callable[[int], Any]) -> None:
  """Shards of at most so many bytes (one tensor may be larger), and their index if several."""
  shards: list[dict[str, dict[str, Any]]] = [{}]
  used = total = 0
  for key, dtype, shape in part.entries():
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if shards[-1] and used + size > shard_bytes:
      shards.append({})
      used = 0
    where = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [used, used + size]}
    shards[-1][key] = where
    used += size
    total += size
  count = len(shards)
  weights = {}
  values = part.values()
  for number, shard in enumerate(shards, 1):
    name = f"{part.stem}.safetensors"
    if count > 1:
      name = f"{part.stem}-{number:05d}-of-{count:05d}.safetensors"
    header = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
    header += b" " * (-len(header) % 8)
    with (place / name).open("wb") as file:
      file.write(len(header).to_bytes(8, "little") + header)
      for key, value in itertools.islice(values, len(shard)):
        file.write(value.view(np.uint8).data)
        weights[key] = name
        advance(value.nbytes)
      file.flush()
      os.fsync(file.fileno())
  next(values, None)  # the checksum of the last leaf
  if count > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    _write_json(place / f"{part.stem}.safetensors.index.json", index)


def _compare(place: Path, part: Part) -> None:
  """Faults names every tensor on disk that is not what the bundle holds."""
  found = headers(sorted(place.glob("*.safetensors")))
  faults = [
    f"{found[key].file}: {key} differs from part {part.name} of the bundle."
    for key, value in part.values()
    if not same_bits(read(found[key]), value)
  ]
  if faults:
    raise Faults(faults)


def _write_rest(folder: Path, described: bundles.Described, names: list[str]) -> None:
  """The index, the scheduler and the tokenizer."""
  modules, card = described.modules, described.card
  config = modules.dit.config
  index: dict[str, Any] = {
    "_class_name": PIPELINES[config.image_input],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"] if "dit_1" in names else [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"] if "vae" in names else [None, None],
    "text_encoder": ["transformers", "UMT5EncoderModel"] if "text" in names else [None, None],
    "image_encoder": [None, None],
    "image_processor": [None, None],
    "tokenizer": [None, None],
    "scheduler": ["diffusers", SCHEDULER["_class_name"]],
    "boundary_ratio": card.boundary,
    "expand_timesteps": config.image_input == "overwrite",
  }
  if config.image_input != "concat":
    del index["image_encoder"], index["image_processor"]
  if card.tokenizer:
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "tokenizer").mkdir()
    shutil.copyfile(card.tokenizer, folder / "tokenizer" / "tokenizer.json")
    _write_json(folder / "tokenizer" / "tokenizer_config.json", TOKENIZER)
  if modules.clip is not None and "clip" in names:
    index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    side = modules.clip.config.image
    (folder / "image_processor").mkdir()
    _write_json(folder / "image_processor" / "preprocessor_config.json", _processor(side))
  (folder / "scheduler").mkdir()
  _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
  _write_json(folder / INDEX, index)


def _processor(side: int) -> dict[str, Any]:
  """preprocessor_config.json of a CLIPImageProcessor."""
  return {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": side},
    "crop_size": {"height": side, "width": side},
    "image_mean": list(image_tower.MEAN),
    "image_std": list(image_tower.STD),
    "resample": 3,
  }


def _write_json(file: Path, value: Any) -> None:
  file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
