"""Which model lies in a folder or file, by its keys, shapes and config files.

Three layouts: original (config.json beside diffusion_pytorch_model*.safetensors, or
high_noise_model/ and low_noise_model/; models_t5*, Wan2.?_VAE*, models_clip*, google/umt5-xxl/),
diffusers (model_index.json, a folder per part), and a single file with the weights of one
transformer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax_videoreason.settings import nearest
from jax_videoreason.structs import LatentSpec
from jax_videoreason.tokenizer import Tokenizer

from .engine import Faults
from .kinds import READERS, SKIPPED, Found, transformer
from .reader import SUFFIXES, Settings, files_in, headers, read, settings

PARTS = ("dit", "vae", "text", "clip")
EXPERTS = ("high_noise_model", "low_noise_model")
# Latent channels -> stride of the VAE that makes them, for a transformer converted without it.
STRIDES = {16: (4, 8, 8), 48: (4, 16, 16)}
# The experts of the published pairs change at this sigma: image to video, text to video.
BOUNDARY = {"concat": 0.9, "none": 0.875}


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


def check_parts(parts: Sequence[str] | None) -> None:
  """Faults where a part does not exist, or no bundle can be made of these."""
  for part in parts or ():
    if part not in PARTS:
      raise Faults([f"no part {part!r}; {nearest(part, PARTS)}"])
  if parts is not None and "dit" not in parts:
    raise Faults(["a bundle has a transformer: name dit among the parts."])


def source(root: Path, parts: Sequence[str] | None = None) -> Source:
  """What lies at a path; parts: of `PARTS`, None = all that the layout has.

  Faults: nothing is recognised, files lack or are damaged, configs contradict shapes or each other,
  or a part was asked for that the model does not have.
  """
  check_parts(parts)
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


def _from_file(file: Path) -> Source:
  if file.suffix not in SUFFIXES:
    raise Faults([f"{file}: wanted a file ending in {' or '.join(SUFFIXES)}, or a folder."])
  found = transformer(file, headers([file]), settings(file.parent / "config.json"))
  return Source(root=file, layout="file", parts={"dit_0": found}, tokenizer=None, boundary=None)


def _from_diffusers(root: Path, chosen: Sequence[str]) -> Source:
  index = settings(root / "model_index.json")
  two = index.values.get("transformer_2") not in (None, [None, None])
  two = two or (root / "transformer_2").is_dir()
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
  boundary = None
  if index.values.get("boundary_ratio") is not None:
    boundary = index.number("boundary_ratio")
    if boundary > 1:
      raise index.fault("boundary_ratio", boundary, "a sigma, at most 1")
  if two and boundary is None:
    boundary = BOUNDARY.get(parts["dit_0"].config.image_input)
  if index.values.get("expand_timesteps") and parts["dit_0"].config.image_input == "none":
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

  def find(self) -> tuple[Path, list[Path], Settings]:
    if not self.folder.is_dir():
      raise Faults([f"{self.folder} is missing: download it, or leave it out by --parts."])
    return self.folder, files_in(self.folder), settings(self.folder / "config.json")


@dataclasses.dataclass(frozen=True)
class _File:
  """The one file of a folder that has a name: .safetensors before .pth."""

  folder: Path
  pattern: str

  def find(self) -> tuple[Path, list[Path], Settings]:
    for suffix in SUFFIXES:
      found = sorted(self.folder.glob(self.pattern + suffix))
      if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise Faults([f"{self.folder} has {names}: leave the one that is meant."])
      if found:
        return found[0], found, Settings(file=found[0], values={})
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
      place, files, said = reading.files.find()
      only = [f for f in files if reading.kind != "dit" or not _belongs_elsewhere(f)]
      tensors = headers(only, SKIPPED.get(reading.kind))
      parts[name] = READERS[reading.kind](place, tensors, said)
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
    said = settings(found.place / "config.json")
    named = said.values.get("_name_or_path", "")
    if wrong in str(named):
      faults.append(f"{said.file} says _name_or_path={named!r}: the experts are exchanged.")
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
