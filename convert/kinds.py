"""The parts of a model, each recognised by its keys, shapes and config.json."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from einops import EinopsError

from jax_videoreason.models import FAMILIES, wan21_vae, wan22_vae
from jax_videoreason.models.clip import CLIPConfig
from jax_videoreason.models.umt5 import UMT5Config
from jax_videoreason.models.wan import WanConfig
from jax_videoreason.models.wan21_vae import WanVAEConfig

from . import clip, umt5, vae, wan
from .engine import Faults, Row
from .reader import Header, Settings

FAMILY = "wan21"
HEAD_WIDTH = 128  # of every published Wan; a config.json may say otherwise
CLIP_HEAD_WIDTH = 80  # of ViT-H/14, likewise
PREFIXES = ("model.diffusion_model.", "model.")  # some single files have one before every key
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


def transformer(place: Path, tensors: Mapping[str, Header], said: Settings) -> Found:
  """A transformer, by its shapes; `said` is its config.json, empty where there is none."""
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
  heads = said.whole("num_heads", "num_attention_heads")
  if heads is None and width % HEAD_WIDTH:
    raise Faults(
      [
        f"{place}: width {width} does not divide into heads of {HEAD_WIDTH}, and no config.json "
        "says how many there are: put config.json beside it."
      ]
    )
  heads = width // HEAD_WIDTH if heads is None else heads
  concat = in_channels == 2 * out_channels + 4
  overwrite = said.values.get("model_type") == "ti2v" or out_channels == 48
  plain = "overwrite" if overwrite else "none"
  _agree(
    place,
    said,
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
  if CONCAT.get(str(said.values.get("model_type")), concat) != concat:
    raise Faults(
      [
        f"{place}: config.json says model_type={said.values['model_type']}, the transformer reads "
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
      epsilon=said.number("eps", 1e-6),
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


def wan_vae(place: Path, tensors: Mapping[str, Header], said: Settings) -> Found:
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
  if not blocks or any(width % base_width for width in stages):
    wanted = f"wanted multiples of {base_width}: a shard may be missing"
    raise Faults([f"{place}: the stages of the encoder are {stages} wide, {wanted}."])
  head = "decoder.conv1.weight" if original else "decoder.conv_in.weight"
  decoder_width = shape(head, 5)[0] // (stages[-1] // base_width)
  _agree(
    place,
    said,
    {
      ("base_dim",): base_width,
      ("z_dim",): z_channels,
      ("is_residual",): residual,
      ("in_channels",): pixels,
    },
  )
  known = NORMALISATION.get(z_channels, ((), ()))
  mean, std = said.numbers("latents_mean", known[0]), said.numbers("latents_std", known[1])
  if any(number <= 0 for number in std):
    raise said.fault("latents_std", std, "numbers over 0")
  try:
    config = WanVAEConfig(
      base_width=base_width,
      z_channels=z_channels,
      stages=tuple(width // base_width for width in stages),
      blocks=blocks,
      temporal=temporal,
      mean=mean,
      std=std,
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


def text_encoder(place: Path, tensors: Mapping[str, Header], said: Settings) -> Found:
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
    max_distance=said.whole("relative_attention_max_distance") or 128,
  )
  _agree(
    place,
    said,
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


def image_tower(place: Path, tensors: Mapping[str, Header], said: Settings) -> Found:
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
    said,
    {
      ("hidden_size",): width,
      ("num_hidden_layers",): layers,
      ("patch_size",): patch,
      ("image_size",): side * patch,
    },
  )
  heads = said.whole("num_attention_heads")
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
      epsilon=said.number("layer_norm_eps", 1e-5),
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
  "dit": transformer,
  "vae": wan_vae,
  "text": text_encoder,
  "clip": image_tower,
}


def abstract(found: Found, kind: str) -> Any:
  """The parameter tree of a part as shapes. Faults: its sizes fit no model."""
  try:
    return FAMILIES[FAMILY].parts[kind].abstract(found.config)
  except (EinopsError, ValueError, TypeError) as error:
    first = str(error).strip().splitlines()[0]
    raise Faults(
      [f"{found.place}: the tensors make no whole model ({first}): a shard may be missing."]
    ) from error


def _shapes(place: Path, tensors: Mapping[str, Header]) -> Callable[[str, int], tuple[int, ...]]:
  """The shape of a key, which must be there and have so many axes."""

  def shape(key: str, axes: int) -> tuple[int, ...]:
    if key not in tensors:
      raise Faults([f"{place} has no {key}: a shard may be missing."])
    given = tensors[key].shape
    if len(given) != axes or not all(given):
      raise Faults([f"{tensors[key].file}: {key} is {given}, wanted {axes} axes, none empty."])
    return given

  return shape


def _agree(place: Path, said: Settings, found: Mapping[tuple[str, ...], float]) -> None:
  """Faults names what config.json and the tensors say differently."""
  faults = [
    f"{place}: config.json says {name}={said.values[name]}, the tensors {value:g}."
    for names, value in found.items()
    for name in names
    if said.values.get(name, value) != value
  ]
  if faults:
    raise Faults(faults)
