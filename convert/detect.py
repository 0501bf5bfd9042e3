"""Which model lies in a folder or file, by its keys, shapes and config files.

Three layouts: original (config.json beside diffusion_pytorch_model*.safetensors, or
high_noise_model/ and low_noise_model/; models_t5*, Wan2.?_VAE*, models_clip*, google/umt5-xxl/),
diffusers (model_index.json, a folder per part), and a single file with the weights of one
transformer.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_videoreason.models import FAMILIES, wan21_vae, wan22_vae
from jax_videoreason.models.clip import CLIPConfig
from jax_videoreason.models.umt5 import UMT5Config
from jax_videoreason.models.wan import WanConfig
from jax_videoreason.models.wan21_vae import WanVAEConfig
from jax_videoreason.settings import nearest
from jax_videoreason.structs import LatentSpec
from jax_videoreason.tokenizer import Tokenizer

from . import clip, umt5, vae, wan
from .engine import Faults, Row
from .reader import SUFFIXES, Header, files_in, headers, read, read_json

FAMILY = "wan21"
PARTS = ("dit", "vae", "text", "clip")
HEAD_WIDTH = 128  # of every published Wan; a config.json may say otherwise
CLIP_HEAD_WIDTH = 80  # of ViT-H/14, likewise
PREFIXES = ("model.diffusion_model.", "model.")  # some single files have one before every key
EXPERTS = ("high_noise_model", "low_noise_model")
# Latent channels -> stride of the VAE that makes them, for a transformer converted without it.
STRIDES = {16: (4, 8, 8), 48: (4, 16, 16)}
# The experts of the published pairs change at this sigma: image to video, text to video.
BOUNDARY = {"concat": 0.9, "none": 0.875}
# Latent channels -> how the VAE that makes them normalises, where no config.json says it.
NORMALISATION = {
  16: (wan21_vae.MEAN, wan21_vae.STD),
  48: (wan22_vae.MEAN, wan22_vae.STD),
}
# What the images of a model_type are: whether they are channels of the transformer's input.
CONCAT = {"t2v": False, "ti2v": False, "i2v": True}
# What a part is recognised by, in each naming.
MARKS = {
  ("dit", "original"): "text_embedding.0.weight",
  ("dit", "diffusers"): "condition_embedder.text_embedder.linear_1.weight",
  ("vae", "original"): "decoder.head.0.gamma",
  ("vae", "diffusers"): "decoder.norm_out.gamma",
  ("text", "original"): "blocks.0.pos_embedding.embedding.weight",
  ("text", "transformers"): f"{umt5.SELF.format(L=0)}.SelfAttention.relative_attention_bias.weight",
  ("clip", "original"): "cls_embedding",
  ("clip", "transformers"): "embeddings.class_embedding",
}
KINDS = {
  "dit": "a Wan transformer",
  "vae": "a Wan VAE",
  "text": "a UMT5 encoder",
  "clip": "a CLIP image tower",
}
# Keys that are not read at all: the text tower in the file of the image tower, and counters.
SKIPPED = {"clip": r"textual\..*|log_scale|.*position_ids"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """One part: where it lies, its tensors, and how they become ours."""

  place: Path
  naming: str
  tensors: Mapping[str, Header]
  config: Any
  table: tuple[Row, ...]
  ignore: tuple[str, ...] = ()

  @property
  def files(self) -> list[Path]:
    return sorted({header.file for header in self.tensors.values()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A checkpoint as found; parts: "dit_0", "dit_1", "vae", "text", "clip"."""

  root: Path
  layout: str
  parts: Mapping[str, Found]
  tokenizer: Path | None
  boundary: float | None

  @property
  def latents(self) -> LatentSpec:
    """What a latent of the model is."""
    config = self.parts["dit_0"].config
    made = STRIDES.get(config.out_channels)
    if "vae" in self.parts:
      made = self.parts["vae"].config.stride
    if made is None:
      raise Faults(
        [
          f"{self.root}: latents of {config.out_channels} channels, and no VAE that says how many "
          f"pixels they stand for; without a VAE wanted one of {', '.join(map(str, STRIDES))}."
        ]
      )
    return LatentSpec(channels=config.out_channels, stride=made, patch=config.patch)


def source(root: Path, parts: Sequence[str] | None = None) -> Source:
  """What lies at a path; parts: of `PARTS`, None = all that the layout has.

  Faults: nothing is recognised, files lack or are damaged, configs contradict shapes or each other,
  or a part was asked for that the model does not have.
  """
  for part in parts or ():
    if part not in PARTS:
      raise Faults([f"no part {part!r}; {nearest(part, PARTS)}"])
  if parts is not None and "dit" not in parts:
    raise Faults(["a bundle has a transformer: name dit among the parts."])
  if root.is_file():
    return _from_file(root)
  if not root.is_dir():
    raise Faults([f"{root} is not there: give a folder or a file."])
  if (root / "bundle.json").is_file():
    raise Faults([f"{root} is a bundle already: --to diffusers writes it back."])
  found = _from_folder(root, tuple(parts) if parts is not None else PARTS)
  if "clip" in (parts or ()) and "clip" not in found.parts:
    raise Faults([f"{root}: the transformer reads no CLIP tokens: leave clip out of the parts."])
  return found


def _from_folder(root: Path, chosen: Sequence[str]) -> Source:
  if (root / "model_index.json").is_file():
    return _from_diffusers(root, chosen)
  if any((root / name).is_dir() for name in EXPERTS) or list(
    root.glob("diffusion_pytorch_model*.safetensors*")
  ):
    return _from_original(root, chosen)
  raise Faults(
    [
      f"{root} is no checkpoint: neither model_index.json (diffusers) nor "
      f"diffusion_pytorch_model*.safetensors or {EXPERTS[0]}/ (original) lies there."
    ]
  )


def naming_of(tensors: Mapping[str, Any], kind: str, place: Path) -> str:
  """The naming of a part; Faults says what lies there instead."""
  found = [(part, naming) for (part, naming), mark in MARKS.items() if mark in tensors]
  for part, naming in found:
    if part == kind:
      return naming
  keys = ", ".join(sorted(tensors)[:3])
  other = f"it is {KINDS[found[0][0]]}" if found else f"its keys begin {keys}"
  marks = " or ".join(mark for (part, _), mark in MARKS.items() if part == kind)
  raise Faults([f"{place}: {KINDS[kind]} wanted (a key {marks}), {other}."])


def dit(place: Path, tensors: Mapping[str, Header], settings: Mapping[str, Any]) -> Found:
  """A transformer, by its shapes; `settings` is its config.json, {} where there is none."""
  for prefix in PREFIXES:
    if tensors and all(key.startswith(prefix) for key in tensors):
      tensors = {key.removeprefix(prefix): header for key, header in tensors.items()}
  naming = naming_of(tensors, "dit", place)
  shape = _shapes(place, tensors)
  original = naming == "original"
  text = "text_embedding.0" if original else "condition_embedder.text_embedder.linear_1"
  time = "time_embedding.0" if original else "condition_embedder.time_embedder.linear_1"
  image = "img_emb.proj.1" if original else "condition_embedder.image_embedder.ff.net.0.proj"
  ffn = "blocks.0.ffn.0" if original else "blocks.0.ffn.net.0.proj"
  head = "head.head" if original else "proj_out"
  width, in_channels, *patch = shape("patch_embedding.weight", 5)
  out_channels = shape(f"{head}.weight", 2)[0] // math.prod(patch)
  ffn_width = shape(f"{ffn}.weight", 2)[0]
  text_width = shape(f"{text}.weight", 2)[1]
  freq_dim = shape(f"{time}.weight", 2)[1]
  layers = count_layers(tensors, r"blocks\.(\d+)\.")
  heads = settings.get("num_heads", settings.get("num_attention_heads"))
  if heads is None and width % HEAD_WIDTH:
    raise Faults(
      [
        f"{place}: width {width} does not divide into heads of {HEAD_WIDTH}, and no config.json "
        "says how many there are: put config.json beside it."
      ]
    )
  heads = width // HEAD_WIDTH if heads is None else heads
  concat = in_channels == 2 * out_channels + 4
  overwrite = settings.get("model_type") == "ti2v" or out_channels == 48
  plain = "overwrite" if overwrite else "none"
  _agree(
    place,
    settings,
    {
      ("dim",): width,
      ("ffn_dim",): ffn_width,
      ("num_layers",): layers,
      ("in_dim", "in_channels"): in_channels,
      ("out_dim", "out_channels"): out_channels,
      ("freq_dim",): freq_dim,
      ("text_dim",): text_width,
      ("attention_head_dim",): width / heads,
    },
  )
  if CONCAT.get(str(settings.get("model_type")), concat) != concat:
    raise Faults(
      [
        f"{place}: config.json says model_type={settings['model_type']}, the transformer reads "
        f"{in_channels} channels."
      ]
    )
  with_clip = f"{image}.weight" in tensors
  try:
    config = WanConfig(
      width=width,
      ffn_width=ffn_width,
      heads=heads,
      layers=layers,
      in_channels=in_channels,
      out_channels=out_channels,
      text_width=text_width,
      freq_dim=freq_dim,
      patch=(patch[0], patch[1], patch[2]),
      image_input="concat" if concat else plain,
      clip_width=shape(f"{image}.weight", 2)[1] if with_clip else None,
      epsilon=settings.get("eps", 1e-6),
    )
  except ValueError as error:
    raise Faults([f"{place}: {error}"]) from error
  return Found(
    place=place,
    naming=naming,
    tensors=tensors,
    config=config,
    table=wan.table("original" if original else "diffusers"),
  )


def wan_vae(place: Path, tensors: Mapping[str, Header], settings: Mapping[str, Any]) -> Found:
  """A Wan2.1 or Wan2.2 VAE, read from its encoder and the first layer of its decoder."""
  naming = naming_of(tensors, "vae", place)
  original = naming == "original"
  shape = _shapes(place, tensors)
  first = "encoder.conv1.weight" if original else "encoder.conv_in.weight"
  latent = "conv2.weight" if original else "post_quant_conv.weight"
  base_width, pixels = shape(first, 5)[:2]
  z_channels = shape(latent, 5)[0]
  fold = math.isqrt(pixels // 3)
  if pixels != 3 * fold**2:
    raise Faults([f"{place}: {first} reads {pixels} channels, wanted 3 times a square."])
  stages, blocks, temporal, residual = _vae_stages(tensors, original, shape)
  head = "decoder.conv1.weight" if original else "decoder.conv_in.weight"
  decoder_width = shape(head, 5)[0] // (stages[-1] // base_width)
  _agree(
    place,
    settings,
    {
      ("base_dim",): base_width,
      ("z_dim",): z_channels,
      ("is_residual",): residual,
      ("in_channels",): pixels,
    },
  )
  mean, std = NORMALISATION.get(z_channels, ((), ()))
  mean, std = settings.get("latents_mean", mean), settings.get("latents_std", std)
  try:
    config = WanVAEConfig(
      base_width=base_width,
      z_channels=z_channels,
      stages=tuple(width // base_width for width in stages),
      blocks=blocks,
      temporal=temporal,
      mean=tuple(mean),
      std=tuple(std),
      decoder_width=None if decoder_width == base_width else decoder_width,
      fold=fold,
      residual=residual,
    )
  except ValueError as error:
    raise Faults([f"{place}: {error}"]) from error
  return Found(
    place=place,
    naming=naming,
    tensors=tensors,
    config=config,
    table=vae.table(config, "original" if original else "diffusers"),
  )


def _vae_stages(
  tensors: Mapping[str, Header], original: bool, shape: Callable[[str, int], tuple[int, ...]]
) -> tuple[list[int], int, tuple[bool, ...], bool]:
  """Width of each stage, blocks in a stage, what halves the frames, and whether it is Wan2.2's.

  Wan2.1 numbers all blocks in a row, Wan2.2 inside its stages; a resampling ends a stage.
  """
  stem = "encoder.downsamples" if original else "encoder.down_blocks"
  conv = "residual.2.weight" if original else "conv1.weight"
  inner = "downsamples" if original else "resnets"
  residual = f"{stem}.0.{inner}.0.{conv}" in tensors
  names: list[str] = []
  for n in range(count_layers(tensors, rf"{re.escape(stem)}\.(\d+)\.")):
    if not residual:
      names.append(f"{stem}.{n}")
      continue
    inside = count_layers(tensors, rf"{re.escape(stem)}\.{n}\.{inner}\.(\d+)\.")
    names += [f"{stem}.{n}.{inner}.{j}" for j in range(inside)]
    if f"{stem}.{n}.downsampler.resample.1.weight" in tensors:
      names.append(f"{stem}.{n}.downsampler")
  widths: list[list[int]] = [[]]
  temporal: list[bool] = []
  for name in names:
    if f"{name}.resample.1.weight" in tensors:
      temporal.append(f"{name}.time_conv.weight" in tensors)
      widths.append([])
    else:
      widths[-1].append(shape(f"{name}.{conv}", 5)[0])
  return [stage[0] for stage in widths if stage], len(widths[0]), tuple(temporal), residual


def text_encoder(place: Path, tensors: Mapping[str, Header], settings: Mapping[str, Any]) -> Found:
  """A UMT5 encoder."""
  naming = naming_of(tensors, "text", place)
  original = naming == "original"
  shape = _shapes(place, tensors)

  def weight(name: str) -> tuple[int, ...]:
    row = next(row for row in umt5.TENSOR if row[2] == name)
    return shape(f"{row[0 if original else 1].format(L=0)}.weight", 2)

  vocab, width = weight("token_embedding")
  buckets, heads = weight("blocks/relative_bias")
  layers = count_layers(tensors, r"blocks\.(\d+)\." if original else r"encoder\.block\.(\d+)\.")
  config = UMT5Config(
    vocab=vocab,
    width=width,
    heads=heads,
    head_width=weight("blocks/attn/q/kernel")[0] // heads,
    ffn_width=weight("blocks/ffn/gate/kernel")[0],
    layers=layers,
    buckets=buckets,
    max_distance=settings.get("relative_attention_max_distance", 128),
  )
  _agree(
    place,
    settings,
    {("vocab_size",): vocab, ("d_model",): width, ("num_heads",): heads, ("num_layers",): layers},
  )
  return Found(
    place=place,
    naming=naming,
    tensors=tensors,
    config=config,
    table=umt5.table("original" if original else "transformers"),
    ignore=() if original else umt5.IGNORE,
  )


def count_layers(tensors: Mapping[str, Any], regex: str) -> int:
  """One more than the highest number that the regex finds."""
  found = [int(match[1]) for key in tensors if (match := re.match(regex, key))]
  return max(found, default=-1) + 1


def image_tower(place: Path, tensors: Mapping[str, Header], settings: Mapping[str, Any]) -> Found:
  """A CLIP image tower, without its last layer."""
  tensors = clip.prepared(tensors, Header.piece)
  naming = naming_of(tensors, "clip", place)
  original = naming == "original"
  shape = _shapes(place, tensors)
  position = "pos_embedding" if original else "embeddings.position_embedding.weight"
  patches = "patch_embedding.weight" if original else "embeddings.patch_embedding.weight"
  up = "transformer.0.mlp.0.weight" if original else "encoder.layers.0.mlp.fc1.weight"
  layers = count_layers(
    tensors, r"transformer\.(\d+)\." if original else r"encoder\.layers\.(\d+)\."
  )
  width, _, patch, _ = shape(patches, 4)
  side = math.isqrt(shape(position, 3 if original else 2)[-2])
  _agree(
    place,
    settings,
    {
      ("hidden_size",): width,
      ("num_hidden_layers",): layers,
      ("patch_size",): patch,
      ("image_size",): side * patch,
    },
  )
  heads = settings.get("num_attention_heads")
  if heads is None and width % CLIP_HEAD_WIDTH:
    raise Faults([f"{place}: width {width} does not divide into heads of {CLIP_HEAD_WIDTH}."])
  try:
    config = CLIPConfig(
      width=width,
      ffn_width=shape(up, 2)[0],
      heads=width // CLIP_HEAD_WIDTH if heads is None else heads,
      layers=layers - 1,
      image=side * patch,
      patch=patch,
      epsilon=settings.get("layer_norm_eps", 1e-5),
    )
  except ValueError as error:
    raise Faults([f"{place}: {error}"]) from error
  return Found(
    place=place,
    naming=naming,
    tensors=tensors,
    config=config,
    table=clip.table("original" if original else "transformers"),
    ignore=clip.ignored(config),
  )


READERS: dict[str, Callable[..., Found]] = {
  "dit": dit,
  "vae": wan_vae,
  "text": text_encoder,
  "clip": image_tower,
}


def _from_file(file: Path) -> Source:
  if file.suffix not in SUFFIXES:
    raise Faults([f"{file}: wanted a file ending in {' or '.join(SUFFIXES)}, or a folder."])
  tensors = headers([file])
  beside = file.parent / "config.json"
  settings = read_json(beside) if beside.is_file() else {}
  found = dit(file, tensors, settings)
  return Source(root=file, layout="file", parts={"dit_0": found}, tokenizer=None, boundary=None)


def _from_diffusers(root: Path, chosen: Sequence[str]) -> Source:
  index = read_json(root / "model_index.json")
  two = (index.get("transformer_2") or [None])[0] or (root / "transformer_2").is_dir()
  folders = {"dit_0": "transformer"}
  if two:
    folders["dit_1"] = "transformer_2"
  folders |= {"vae": "vae", "text": "text_encoder", "clip": "image_encoder"}
  readings = {
    name: _Reading(kind=_kind(name), files=_Folder(root / folder))
    for name, folder in folders.items()
    if _kind(name) in chosen
  }
  parts = _read_all(readings)
  tokenizer = _tokenizer(root / "tokenizer" / "tokenizer.json", parts)
  boundary = index.get("boundary_ratio")
  if two and boundary is None:
    boundary = BOUNDARY.get(parts["dit_0"].config.image_input)
  if index.get("expand_timesteps") and parts["dit_0"].config.image_input == "none":
    changed = dataclasses.replace(parts["dit_0"].config, image_input="overwrite")
    parts["dit_0"] = dataclasses.replace(parts["dit_0"], config=changed)
  return Source(
    root=root,
    layout="diffusers",
    parts=parts,
    tokenizer=tokenizer,
    boundary=boundary if two else None,
  )


def _from_original(root: Path, chosen: Sequence[str]) -> Source:
  two = any((root / name).is_dir() for name in EXPERTS)
  folders = {f"dit_{i}": root / name for i, name in enumerate(EXPERTS)} if two else {"dit_0": root}
  readings = {name: _Reading(kind="dit", files=_Folder(folder)) for name, folder in folders.items()}
  for kind, pattern in (
    ("vae", "Wan2.?_VAE"),
    ("text", "models_t5*"),
    ("clip", "models_clip*"),
  ):
    if kind in chosen:
      readings[kind] = _Reading(kind=kind, files=_File(root, pattern))
  parts = _read_all(readings)
  return Source(
    root=root,
    layout="original",
    parts=parts,
    tokenizer=_tokenizer(root / "google" / "umt5-xxl" / "tokenizer.json", parts),
    boundary=BOUNDARY.get(parts["dit_0"].config.image_input) if two else None,
  )


@dataclasses.dataclass(frozen=True)
class _Folder:
  """The shards of a folder and its config.json."""

  folder: Path

  def find(self) -> tuple[Path, list[Path], dict[str, Any]]:
    if not self.folder.is_dir():
      raise Faults([f"{self.folder} is missing: download it, or leave it out by --parts."])
    config = self.folder / "config.json"
    return self.folder, files_in(self.folder), read_json(config) if config.is_file() else {}


@dataclasses.dataclass(frozen=True)
class _File:
  """The one file of a folder that has a name: .safetensors before .pth."""

  folder: Path
  pattern: str

  def find(self) -> tuple[Path, list[Path], dict[str, Any]]:
    for suffix in SUFFIXES:
      found = sorted(self.folder.glob(self.pattern + suffix))
      if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise Faults([f"{self.folder} has {names}: leave the one that is meant."])
      if found:
        return found[0], found, {}
    named = " or ".join(self.pattern + suffix for suffix in SUFFIXES)
    raise Faults([f"{self.folder} has no {named}: download it, or leave it out by --parts."])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reading:
  kind: str
  files: _Folder | _File


def _read_all(readings: Mapping[str, _Reading]) -> dict[str, Found]:
  """Every part, or the faults of all of them."""
  faults: list[str] = []
  parts: dict[str, Found] = {}
  for name, reading in readings.items():
    if name == "clip" and ("dit_0" not in parts or parts["dit_0"].config.clip_width is None):
      continue  # most models have none; the transformers are read before
    try:
      place, files, settings = reading.files.find()
      only = [f for f in files if reading.kind != "dit" or not _belongs_elsewhere(f)]
      tensors = headers(only, SKIPPED.get(reading.kind))
      parts[name] = READERS[reading.kind](place, tensors, settings)
    except Faults as error:
      faults += error.faults
  if not faults and "dit_1" in parts:
    faults += _experts_that_do_not_fit(parts["dit_0"], parts["dit_1"])
  if not faults and "text" in parts:
    given, wanted = parts["text"].config.width, parts["dit_0"].config.text_width
    if given != wanted:
      place = parts["text"].place
      faults.append(f"{place} is {given} wide, the transformer reads text {wanted} wide.")
  if not faults and "vae" in parts:
    given, wanted = parts["vae"].config.z_channels, parts["dit_0"].config.out_channels
    if given != wanted:
      place = parts["vae"].place
      faults.append(f"{place} has {given} latent channels, the transformer {wanted}.")
  if not faults and "clip" in parts:
    given, wanted = parts["clip"].config.width, parts["dit_0"].config.clip_width
    if given != wanted:
      place = parts["clip"].place
      faults.append(f"{place} is {given} wide, the transformer reads image tokens {wanted} wide.")
  if faults:
    raise Faults(faults)
  return parts


def _belongs_elsewhere(file: Path) -> bool:
  """Whether a file in the root of an original checkpoint is the VAE's, the text's or CLIP's."""
  return file.name.startswith(("Wan2.", "models_"))


def _experts_that_do_not_fit(high: Found, low: Found) -> list[str]:
  faults = []
  if high.config != low.config:
    differ = [
      f"{field} {ours} and {theirs}"
      for field, ours in vars(high.config).items()
      if (theirs := getattr(low.config, field)) != ours
    ]
    faults.append(f"{high.place} and {low.place} do not belong together: {', '.join(differ)}.")
  for found, wrong in ((high, "low_noise"), (low, "high_noise")):
    config = found.place / "config.json"
    named = read_json(config).get("_name_or_path", "") if config.is_file() else ""
    if wrong in str(named):
      faults.append(f"{config} says _name_or_path={named!r}: the experts are exchanged.")
  return faults or _equal_experts(high, low)


def _equal_experts(high: Found, low: Found) -> list[str]:
  """Compares tensor by tensor, the small ones first, until one differs."""
  same = {a.resolve() for a in high.files} == {b.resolve() for b in low.files}
  keys = sorted(high.tensors, key=lambda key: high.tensors[key].nbytes)
  if same or all(
    key in low.tensors
    and high.tensors[key].shape == low.tensors[key].shape
    and (read(high.tensors[key]) == read(low.tensors[key])).all()
    for key in keys
  ):
    return [
      f"{high.place} and {low.place} hold the same weights: one expert was copied over the other, "
      "download it again."
    ]
  return []


def _tokenizer(file: Path, parts: Mapping[str, Found]) -> Path | None:
  """The tokenizer of the text encoder, None where no encoder was asked for."""
  if "text" not in parts:
    return None
  if not file.is_file():
    raise Faults(
      [f"{file} is missing (spiece.model alone is not read): download it, or leave text out."]
    )
  try:
    words = Tokenizer(file).vocab
  except ValueError as error:
    raise Faults([str(error)]) from error
  rows = parts["text"].config.vocab
  if words > rows:
    raise Faults([f"{file} has {words} ids, the text encoder {rows} rows: they don't belong."])
  return file


def _kind(part: str) -> str:
  return part.split("_")[0]


def _shapes(place: Path, tensors: Mapping[str, Header]) -> Callable[[str, int], tuple[int, ...]]:
  """The shape of a key, which must be there and have so many axes."""

  def shape(key: str, axes: int) -> tuple[int, ...]:
    if key not in tensors:
      raise Faults([f"{place} has no {key}: a shard may be missing."])
    given = tensors[key].shape
    if len(given) != axes:
      raise Faults([f"{tensors[key].file}: {key} is {given}, wanted {axes} axes."])
    return given

  return shape


def _agree(
  place: Path, settings: Mapping[str, Any], found: Mapping[tuple[str, ...], float]
) -> None:
  """Faults names what config.json and the tensors say differently."""
  faults = [
    f"{place}: config.json says {name}={settings[name]}, the tensors {value:g}."
    for names, value in found.items()
    for name in names
    if settings.get(name, value) != value
  ]
  if faults:
    raise Faults(faults)


def abstract(found: Found, kind: str) -> Any:
  """The parameter tree of a part as shapes."""
  return FAMILIES[FAMILY].parts[kind].abstract(found.config)
