"""What a bundle on disk is, read and written without its weights: `bundle.json` and the tokenizer.

`bundle.json` names the model, the config of each part, the folder where the part lies (it may be
in another bundle, by a relative path) and every leaf with its checksum, and has one of itself.
`checkpoint` reads and writes the weights.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_videoreason.folders import local
from jax_videoreason.models import FAMILIES
from jax_videoreason.pytrees import leaves as leaves_of
from jax_videoreason.records import SUM, checksum, mapping_of, sealed, unsealed
from jax_videoreason.structs import Card, LatentSpec, ModelBundle, Parts
from jax_videoreason.version import __version__

FORMAT = 1
ASSETS = Path(__file__).resolve().parent / "assets"
DESCRIPTION = "bundle.json"
TOKENIZER = "tokenizer.json"
MODULES = ("dit", "vae", "text", "clip", "preview")  # the parts that have a config
OTHERS = ("vae", "text", "clip", "preview")  # the parts beside the experts of the DiT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """A leaf on disk."""

  shape: tuple[int, ...]
  dtype: Any
  sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
  """A bundle without its weights; folders, leaves: by the name of the part."""

  folder: Path
  modules: Parts
  card: Card
  folders: Mapping[str, Path]
  leaves: Mapping[str, Mapping[str, Record]]

  @property
  def experts(self) -> int:
    return count_experts(self.leaves)


def shipped() -> list[str]:
  """The names of the bundles inside the package."""
  return sorted(path.parent.name for path in ASSETS.glob(f"*/{DESCRIPTION}"))


def find(name_or_path: str | os.PathLike[str]) -> Path:
  """The folder of a shipped bundle, else the path. FileNotFoundError lists what is shipped."""
  if str(name_or_path) in shipped():
    return ASSETS / str(name_or_path)
  folder = local(name_or_path)
  if not folder.is_dir():
    names = ", ".join(shipped()) or "none"
    raise FileNotFoundError(
      f"no bundle {str(name_or_path)!r}: it is neither shipped (there are: {names}) nor a folder; "
      "`videoreason convert` makes one."
    )
  if not (folder / DESCRIPTION).is_file():
    raise FileNotFoundError(
      f"{folder} has no {DESCRIPTION}, so it is no bundle: give the folder that "
      "`videoreason convert` wrote."
    )
  return folder


def describe(name_or_path: str | os.PathLike[str]) -> Described:
  """What a bundle is, from its bundle.json alone; refuses as `checkpoint.load`."""
  folder = find(name_or_path)
  with understood(folder):
    described = read_description(folder)
    tokenizer = described.get("tokenizer")
    return Described(
      folder=folder,
      modules=modules_of(described, folder),
      card=card_of(described, str(tokenizer_of(folder, tokenizer, True)) if tokenizer else ""),
      folders={name: folder / where for name, where in described["parts"].items()},
      leaves={
        name: {
          path: Record(
            shape=tuple(record["shape"]), dtype=jnp.dtype(record["dtype"]), sha256=record["sha256"]
          )
          for path, record in leaves.items()
        }
        for name, leaves in described["leaves"].items()
      },
    )


@contextlib.contextmanager
def understood(folder: Path) -> Iterator[None]:
  """Turns what is raised for a description of other content than this version writes into a
  ValueError; one of an earlier version has no checksum."""
  try:
    yield
  except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
    raise ValueError(
      f"{folder / DESCRIPTION} is damaged ({type(error).__name__}: {error}): copy the bundle again."
    ) from error


def fingerprint(name_or_path: str | os.PathLike[str]) -> str:
  """Tells the weights of one bundle from those of another: all leaves of all parts count.

  A description has the same with and without its checksum, which earlier versions did not write.
  """
  file = find(name_or_path) / DESCRIPTION
  described = mapping_of(file)
  if described is None or file.read_text(encoding="utf-8") != _text(sealed(described)):
    return checksum(file)
  return hashlib.sha256(_text(described).encode()).hexdigest()


def complete(folder: Path, bundle: ModelBundle, leaves: Mapping[str, Mapping[str, Record]]) -> None:
  """Makes a folder that holds the trees of all parts a bundle: its description, its tokenizer.

  bundle: card and modules; its weights are not looked at. leaves: part -> path -> record.
  ValueError: the leaves contradict the config of their module.
  """
  records = {
    part: {
      path: {
        "shape": list(record.shape),
        "dtype": np.dtype(record.dtype).name,
        "sha256": record.sha256,
      }
      for path, record in tree.items()
    }
    for part, tree in leaves.items()
  }
  tokenizer = tokenizer_record(bundle.card.tokenizer)
  described = description(bundle, {part: part for part in leaves}, records, tokenizer)
  for part in leaves:
    check_config(described, folder, part)
  write_description(folder, described, bundle.card.tokenizer)


def read_description(folder: Path) -> dict[str, Any]:
  """What bundle.json says. ValueError: it is damaged, or newer than this version."""
  file = folder / DESCRIPTION
  try:
    described = json.loads(file.read_text(encoding="utf-8"))
    found = described["format"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{file} is damaged ({error}): copy the bundle again.") from error
  if found != FORMAT:
    raise ValueError(
      f"{file} has format {found}, this version ({__version__}) reads {FORMAT}: "
      "upgrade jax-videoreason."
    )
  described = unsealed(described)
  if described is None:
    raise ValueError(
      f"{file} differs from the checksum {SUM!r} in it: copy the bundle again, or take {SUM!r} out "
      "where it was changed on purpose."
    )
  wanted = {"name", "family", "numerics", "boundary", "text_length", "latents", "sources", "config"}
  missing = sorted((wanted | {"parts", "leaves", "version"}) - described.keys())
  if missing or described["parts"].keys() != described["leaves"].keys():
    fault = f"no {', '.join(missing)}" if missing else "parts and leaves name different parts"
    raise ValueError(f"{file} is damaged ({fault}): copy the bundle again.")
  return described


def write_description(folder: Path, described: Mapping[str, Any], tokenizer: str) -> None:
  """bundle.json, and the tokenizer where it is the bundle's own."""
  if described["tokenizer"] and described["tokenizer"]["file"] == TOKENIZER:
    shutil.copyfile(tokenizer, folder / TOKENIZER)
  (folder / DESCRIPTION).write_text(_text(sealed(described)), encoding="utf-8")


def _text(described: Mapping[str, Any]) -> str:
  return json.dumps(described, indent=1) + "\n"


def description(
  bundle: ModelBundle,
  parts: Mapping[str, str],
  records: Mapping[str, Any],
  tokenizer: Mapping[str, str] | None,
) -> dict[str, Any]:
  """What bundle.json says of a bundle, whose weights are not looked at.

  parts: part -> its folder. records: part -> path of a leaf -> its shape, dtype and sha256.
  """
  card = bundle.card
  modules = {n: m for n in MODULES if (m := getattr(bundle.parts, n)) is not None}
  if "preview" not in parts:  # which a model may be without
    modules.pop("preview", None)
  return {
    "format": FORMAT,
    "version": __version__,
    "name": card.name,
    "family": card.family,
    "numerics": card.numerics,
    "boundary": card.boundary,
    "text_length": card.text_length,
    "latents": dataclasses.asdict(card.latents),
    "tokenizer": tokenizer,
    "sources": [list(source) for source in card.sources],
    "tables": dict(card.tables),
    "config": {name: dataclasses.asdict(module.config) for name, module in modules.items()},
    "parts": dict(parts),
    "leaves": records,
  }


def card_of(described: Mapping[str, Any], tokenizer: str) -> Card:
  """The card of a description. tokenizer: its file, "" = none."""
  return Card(
    name=described["name"],
    family=described["family"],
    latents=LatentSpec(**_tuples(described["latents"])),
    text_length=described["text_length"],
    boundary=described["boundary"],
    numerics=described["numerics"],
    tokenizer=tokenizer,
    sources=_tuples(described["sources"]),
    tables=tuple(described.get("tables", {}).items()),
  )


def modules_of(described: Mapping[str, Any], folder: Path) -> Parts:
  """The modules of a description. ValueError: an unknown family, a config that does not fit."""
  family = FAMILIES.get(described["family"])
  if family is None:
    raise ValueError(
      f"{folder} is of family {described['family']!r}; this version knows: "
      f"{', '.join(FAMILIES)}. Upgrade jax-videoreason."
    )
  try:
    return family.build(_tuples(described["config"]))
  except TypeError as error:
    raise ValueError(
      f"the config in {folder / DESCRIPTION} does not fit this version ({error}): upgrade "
      "jax-videoreason, or convert again."
    ) from error


def check_config(described: Mapping[str, Any], folder: Path, name: str) -> None:
  """ValueError when the leaves of a part have other shapes than its config asks for."""
  kind = name.split("_")[0]
  if kind not in described["config"]:
    return
  found = {path: tuple(record["shape"]) for path, record in described["leaves"][name].items()}

  def asked(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    part = FAMILIES[described["family"]].parts[kind]
    tree = part.abstract(part.config(**_tuples(settings)))
    return {path: leaf.shape for path, leaf in leaves_of(tree).items()}

  config = described["config"][kind]
  wanted = asked(config)
  if found == wanted:
    return
  differ = [path for path in {**wanted, **found} if found.get(path) != wanted.get(path)]
  for path in differ[:1]:
    for have, want in zip(found.get(path, ()), wanted.get(path, ()), strict=False):
      for field, value in config.items():
        if have != want == value and asked({**config, field: have}) == found:
          raise ValueError(
            f"{folder} was written with {field}={have}, the config says {field}={want}. "
            "Change the config, or convert again."
          )
  path = differ[0]
  raise ValueError(
    f"{folder}: {len(differ)} leaves of {name} contradict the config, first {path}: "
    f"{found.get(path, 'absent')} is there, {wanted.get(path, 'nothing')} is asked for. Change "
    "the config, or convert again."
  )


def chosen_parts(
  parts: Sequence[str] | None, described: Mapping[str, Any], folder: Path
) -> tuple[str, ...]:
  """The parts to load, in the order of bundle.json; parts: as `checkpoint.load` takes them."""
  there = tuple(described["parts"])
  if parts is None:
    return there
  asked = {parts} if isinstance(parts, str) else set(parts)
  if "dit" in asked:
    asked = asked - {"dit"} | {name for name in there if name.startswith("dit_")}
  # A model may well have no image tower and no preview, and callers ask for what there is.
  asked -= {"clip", "preview"} - set(there) - set(described["config"])
  unknown = sorted(asked - set(there))
  if unknown:
    raise ValueError(
      f"{folder} has no part {', '.join(map(repr, unknown))}; it has: {', '.join(there)}."
    )
  return tuple(name for name in there if name in asked)


def count_experts(parts: Iterable[str]) -> int:
  """How many of the parts are an expert of the DiT."""
  return sum(name.startswith("dit_") for name in parts)


def tokenizer_of(folder: Path, record: Mapping[str, str], verify: bool) -> Path:
  """The file that the record of a tokenizer names. verify: compare it with its checksum."""
  file = Path(os.path.normpath(folder.absolute() / record["file"]))
  if not file.is_file():
    raise FileNotFoundError(f"{folder}: {file} is not there: copy the bundle again.")
  if verify and checksum(file) != record["sha256"]:
    raise ValueError(
      f"{file} differs from its checksum in {folder / DESCRIPTION}: copy the bundle again."
    )
  return file


def tokenizer_record(file: str) -> dict[str, str] | None:
  """The record of a tokenizer that the bundle has as its own; None = of no file."""
  if not file:
    return None
  if not Path(file).is_file():
    raise FileNotFoundError(f"the tokenizer {file} is not there: point card.tokenizer to the file.")
  return {"file": TOKENIZER, "sha256": checksum(Path(file))}


def check_space(path: Path, needed: int) -> None:
  """ValueError where the disk of a path has fewer bytes free than needed."""
  there = path.parent
  while not there.exists():
    there = there.parent
  free = shutil.disk_usage(there).free
  if needed > free:
    raise ValueError(
      f"saving to {path} takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room, or "
      "save elsewhere."
    )


def _tuples(value: Any) -> Any:
  """JSON as it was before: lists were tuples."""
  if isinstance(value, list):
    return tuple(_tuples(item) for item in value)
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return value
