"""Bundles on disk: `bundle.json` beside one Orbax tree per part, a checksum for every leaf.

A folder holds dit_0/ [dit_1/] vae/ text/ clip/ preview/, which stock Orbax restores, and
tokenizer.json. A part may lie in another bundle, named by a relative path. Orbax is
imported here, and in fitting.py for the states of a training, nowhere else.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_videoreason.axes import Params
from jax_videoreason.folders import checksum
from jax_videoreason.models import FAMILIES
from jax_videoreason.pytrees import leaves as leaves_of
from jax_videoreason.pytrees import nest
from jax_videoreason.sharding import check_auto
from jax_videoreason.structs import Card, LatentSpec, ModelBundle, Parts
from jax_videoreason.version import __version__

FORMAT = 1
ASSETS = Path(__file__).resolve().parent / "assets"
DESCRIPTION = "bundle.json"
TOKENIZER = "tokenizer.json"
MODULES = ("dit", "vae", "text", "clip", "preview")  # the parts that have a config
OTHERS = ("vae", "text", "clip", "preview")  # the parts beside the experts of the DiT
SMALL = 2**16  # numbers; a smaller leaf is replicated
READ_BYTES = 2**30  # leaves are read for checking in groups of about so much


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
    return _experts(self.leaves)


def shipped() -> list[str]:
  """The names of the bundles inside the package."""
  return sorted(path.parent.name for path in ASSETS.glob(f"*/{DESCRIPTION}"))


def find(name_or_path: str | os.PathLike[str]) -> Path:
  """The folder of a shipped bundle, else the path. FileNotFoundError lists what is shipped."""
  if str(name_or_path) in shipped():
    return ASSETS / str(name_or_path)
  folder = Path(name_or_path)
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


def load(
  name_or_path: str | os.PathLike[str],
  parts: Sequence[str] | None = None,
  mesh: Mesh | None = None,
  dtype: Any = None,
  *,
  verify: bool = True,
) -> ModelBundle:
  """The bundle of a shipped name or of a folder.

  parts: of "dit" (all experts), "dit_0", "dit_1", "vae", "text", "clip", "preview"; None = all
    there are. "clip" and "preview" may be asked of a model that has none. What is not loaded is
    None in the bundle; `parts` of the bundle is always whole.
  mesh: restores every process's share of the leaves straight onto it (`partition`).
  dtype: of all floating leaves; None = as stored, widened where the config of the part computes
    in a wider one (bfloat16 weights of a float32 model become float32, which changes no number).
  verify: compare every leaf with its checksum; on several processes each checks a share.

  FileNotFoundError: no such bundle, a part's folder is missing. ValueError: a damaged or newer
  bundle.json, a part it does not have, leaves that contradict their config or their checksum, a
  mesh whose axes are not Auto.
  """
  check_auto(mesh)
  folder = find(name_or_path)
  described = _read_description(folder)
  names = _chosen(parts, described, folder)
  modules = _modules(described, folder)
  loaded = {}
  for name in names:
    _check_config(described, folder, name)
    module = getattr(modules, name.split("_")[0], None)
    wider = getattr(getattr(module, "config", None), "dtype", "float32")
    place = _Part(
      name=name,
      bundle=folder,
      folder=folder / described["parts"][name],
      leaves=described["leaves"][name],
    )
    if mesh is None:
      loaded[name] = place.on_device(dtype, wider, verify)
    else:
      if verify:
        place.check(jax.process_index(), jax.process_count())
      loaded[name] = place.on_mesh(mesh, dtype, wider)
  tokenizer = described.get("tokenizer") if "text" in names else None
  return ModelBundle(
    params=tuple(loaded.get(f"dit_{i}") for i in range(_experts(described["parts"]))),
    **{name: loaded.get(name) for name in OTHERS},
    parts=modules,
    card=_card(described, str(_tokenizer(folder, tokenizer, verify)) if tokenizer else ""),
  )


def save(
  bundle: ModelBundle,
  path: str | os.PathLike[str],
  *,
  dtype: Any = None,
  shared_with: str | os.PathLike[str] | None = None,
) -> Path:
  """Writes a bundle folder; it appears under its name only when it is whole.

  dtype: of all floating leaves on disk; None = as they are.
  shared_with: the folder of another bundle; a part whose leaves are equal to that bundle's, and
    the tokenizer if it is, are not written again but pointed to by a relative path.
  ValueError: the destination exists, an expert is not loaded, the leaves contradict the config of
  their module, or the disk is too small.
  """
  path = Path(os.path.abspath(path))
  if path.exists():
    raise ValueError(f"{path} exists already: remove it, or save under another name.")
  trees = _trees(bundle)
  records = {name: _records(tree, dtype) for name, tree in trees.items()}
  tokenizer = _tokenizer_record(bundle.card.tokenizer)
  parts = {name: name for name in trees}
  if shared_with is not None:
    other = find(shared_with)
    theirs = _read_description(other)
    relative = Path(os.path.relpath(other.resolve(), path.parent.resolve() / path.name))
    for name in trees:
      if theirs["leaves"].get(name) == records[name]:
        parts[name] = (relative / theirs["parts"][name]).as_posix()
    if tokenizer and (theirs.get("tokenizer") or {}).get("sha256") == tokenizer["sha256"]:
      tokenizer["file"] = (relative / theirs["tokenizer"]["file"]).as_posix()
  described = _describe(bundle, parts, records, tokenizer)
  for name in trees:
    _check_config(described, path, name)
  own = {name: tree for name, tree in trees.items() if parts[name] == name}
  check_space(path, sum(_bytes(record) for name in own for record in records[name].values()))

  partial = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
  try:
    partial.mkdir(parents=True)
    for name, tree in own.items():
      write_tree(partial / name, jax.tree.map(lambda leaf: _stored(leaf, dtype), tree))
    _write_description(partial, described, bundle.card.tokenizer)
    os.rename(partial, path)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return path


def partition(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """How a leaf is stored on the mesh: the axis of `shared_axis` over `fsdp`."""
  shared = shared_axis(path, shape, mesh.shape["fsdp"])
  if shared is None:
    return PartitionSpec()
  return PartitionSpec(*("fsdp" if axis == shared else None for axis in range(len(shape))))


def shared_axis(path: str, shape: Sequence[int], shares: int) -> int | None:
  """The axis along which a leaf is stored in shares: its longest that divides, if it is large.

  The L axis of a stacked leaf stays whole, for a layer is gathered at a time. None = it lies whole
  on every device.
  """
  axes = range(1 if "blocks" in path.split("/") else 0, len(shape))
  fitting = [axis for axis in axes if shape[axis] % shares == 0]
  if shares == 1 or len(axes) < 2 or int(np.prod(shape)) < SMALL or not fitting:
    return None
  return max(fitting, key=lambda axis: shape[axis])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
  """One tree on disk; leaves: path -> its record (shape, dtype, sha256)."""

  name: str
  bundle: Path
  folder: Path
  leaves: Mapping[str, Any]

  def __post_init__(self):
    if not self.folder.is_dir():
      raise FileNotFoundError(
        f"{self.bundle}: part {self.name!r} should lie in {self.folder}, which is not there: copy "
        "the bundle again, with the bundle it shares parts with beside it."
      )

  def on_device(self, dtype: Any, wider: str, verify: bool) -> Params:
    """Every leaf on the default device, read in groups so that the host holds few at a time."""
    flat = {}
    for path, value in self._on_host(list(self.leaves)):
      if verify:
        self._compare(path, value)
      flat[path] = jnp.asarray(value, _target(value.dtype, dtype, wider))
    return nest(flat)

  def on_mesh(self, mesh: Mesh, dtype: Any, wider: str) -> Params:
    """Every leaf on the mesh; a process reads the slices that its devices hold."""

    def abstract(path: str) -> jax.ShapeDtypeStruct:
      record = self.leaves[path]
      return jax.ShapeDtypeStruct(
        tuple(record["shape"]),
        _target(jnp.dtype(record["dtype"]), dtype, wider),
        sharding=NamedSharding(mesh, partition(path, record["shape"], mesh)),
      )

    target = nest({path: abstract(path) for path in self.leaves})
    args = jax.tree.map(
      lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), target
    )
    return self._restore(target, args)

  def check(self, share: int, shares: int) -> None:
    """ValueError names the first leaf of this share that differs from its checksum."""
    for path, value in self._on_host(list(self.leaves)[share::shares]):
      self._compare(path, value)

  def _on_host(self, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    groups: list[list[str]] = []
    room = 0
    for path in paths:
      size = _bytes(self.leaves[path])
      if size > room or not groups:
        groups.append([])
        room = READ_BYTES
      groups[-1].append(path)
      room -= size
    for group in groups:
      target = nest({path: 0 for path in group})
      args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
      yield from leaves_of(self._restore(target, args, alone=True)).items()

  def _restore(self, target: Any, args: Any, *, alone: bool = False) -> Any:
    """alone: other processes read other leaves, so this one must not wait for them."""
    among = _alone() if alone else ocp.options.MultiprocessingOptions()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=among)
    reader = ocp.Checkpointer(handler, multiprocessing_options=among)
    try:
      return reader.restore(
        self.folder.resolve(),
        args=ocp.args.PyTreeRestore(item=target, restore_args=args, partial_restore=True),
      )
    except jax.errors.JaxRuntimeError:  # no memory on the device, say: not the file's fault
      raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
      paths = list(leaves_of(target))
      if len(paths) > 1:
        for path in paths:  # once more, leaf by leaf, to name the one at fault
          self._restore(_pick(target, path), _pick(args, path), alone=alone)
      fault = f"leaf {self.name}/{paths[0]}" if len(paths) == 1 else f"part {self.name}"
      raise ValueError(
        f"{fault} cannot be read from {self.folder} ({type(error).__name__}): copy the bundle "
        "again."
      ) from error
    finally:
      reader.close()

  def _compare(self, path: str, value: np.ndarray) -> None:
    record = self.leaves[path]
    if list(value.shape) != record["shape"] or _digest(value) != record["sha256"]:
      raise ValueError(
        f"leaf {self.name}/{path} in {self.folder} differs from its checksum in "
        f"{self.bundle / DESCRIPTION}: copy the bundle again, or load it with verify=False."
      )


def _alone() -> ocp.options.MultiprocessingOptions:
  """What Orbax must know so that this process waits for no other one."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def write_tree(folder: Path, tree: Any, ocdbt: bool = True) -> None:
  """A tree of numpy arrays by Orbax, which this process writes alone.

  ocdbt: in one database, else a folder for each leaf.
  """
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=ocdbt, use_zarr3=True, multiprocessing_options=_alone()
  )
  with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as writer:
    writer.save(folder.resolve(), args=ocp.args.PyTreeSave(tree), force=True)
  # Orbax notes where it wrote, which says something about this machine and nothing to a reader.
  note = folder / "commit_success.txt"
  if note.is_file():
    note.write_text(f"Checkpoint commit was successful to {folder.name}", encoding="utf-8")


def read_tree(folder: Path) -> Any:
  """A whole tree in numpy, which this process reads alone, whoever wrote it.

  ValueError: there is none.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder} is missing: make it again, or copy it again.")
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
  with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
    found = reader.metadata(folder.resolve()).item_metadata
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree)
    return reader.restore(folder.resolve(), args=ocp.args.PyTreeRestore(restore_args=args))


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
  tokenizer = _tokenizer_record(bundle.card.tokenizer)
  described = _describe(bundle, {part: part for part in leaves}, records, tokenizer)
  for part in leaves:
    _check_config(described, folder, part)
  _write_description(folder, described, bundle.card.tokenizer)


def _write_description(folder: Path, described: Mapping[str, Any], tokenizer: str) -> None:
  """bundle.json, and the tokenizer where it is the bundle's own."""
  if described["tokenizer"] and described["tokenizer"]["file"] == TOKENIZER:
    shutil.copyfile(tokenizer, folder / TOKENIZER)
  text = json.dumps(described, indent=1) + "\n"
  (folder / DESCRIPTION).write_text(text, encoding="utf-8")


def _trees(bundle: ModelBundle) -> dict[str, Params]:
  missing = [f"dit_{i}" for i, tree in enumerate(bundle.params) if tree is None]
  if missing:
    raise ValueError(f"{', '.join(missing)} is not loaded: load every expert before saving.")
  trees = {f"dit_{i}": tree for i, tree in enumerate(bundle.params) if tree is not None}
  trees |= {n: tree for n in OTHERS if (tree := getattr(bundle, n)) is not None}
  return trees


def _describe(
  bundle: ModelBundle,
  parts: Mapping[str, str],
  records: Mapping[str, Any],
  tokenizer: Mapping[str, str] | None,
) -> dict[str, Any]:
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


def describe(name_or_path: str | os.PathLike[str]) -> Described:
  """What a bundle is, from its bundle.json alone; refuses as `load`."""
  folder = find(name_or_path)
  described = _read_description(folder)
  tokenizer = described.get("tokenizer")
  return Described(
    folder=folder,
    modules=_modules(described, folder),
    card=_card(described, str(_tokenizer(folder, tokenizer, True)) if tokenizer else ""),
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


def _read_description(folder: Path) -> dict[str, Any]:
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
  wanted = {"name", "family", "numerics", "boundary", "text_length", "latents", "sources", "config"}
  missing = sorted((wanted | {"parts", "leaves", "version"}) - described.keys())
  if missing or described["parts"].keys() != described["leaves"].keys():
    fault = f"no {', '.join(missing)}" if missing else "parts and leaves name different parts"
    raise ValueError(f"{file} is damaged ({fault}): copy the bundle again.")
  return described


def _card(described: Mapping[str, Any], tokenizer: str) -> Card:
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


def _modules(described: Mapping[str, Any], folder: Path) -> Parts:
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


def _check_config(described: Mapping[str, Any], folder: Path, name: str) -> None:
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


def _chosen(
  parts: Sequence[str] | None, described: Mapping[str, Any], folder: Path
) -> tuple[str, ...]:
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


def _experts(parts: Iterable[str]) -> int:
  return sum(name.startswith("dit_") for name in parts)


def _tokenizer(folder: Path, record: Mapping[str, str], verify: bool) -> Path:
  file = Path(os.path.normpath(folder.absolute() / record["file"]))
  if not file.is_file():
    raise FileNotFoundError(f"{folder}: {file} is not there: copy the bundle again.")
  if verify and checksum(file) != record["sha256"]:
    raise ValueError(
      f"{file} differs from its checksum in {folder / DESCRIPTION}: copy the bundle again."
    )
  return file


def _tokenizer_record(file: str) -> dict[str, str] | None:
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


def _target(stored: Any, dtype: Any, wider: str) -> Any:
  if not jnp.issubdtype(stored, jnp.floating):
    return stored
  return jnp.promote_types(stored, wider) if dtype is None else jnp.dtype(dtype)


def _stored(leaf: Any, dtype: Any) -> np.ndarray:
  value = np.asarray(leaf)
  return value.astype(_target(value.dtype, value.dtype if dtype is None else dtype, "float32"))


def _records(tree: Params, dtype: Any) -> dict[str, Any]:
  records = {}
  for path, leaf in leaves_of(tree).items():
    value = _stored(leaf, dtype)
    records[path] = {
      "shape": list(value.shape),
      "dtype": value.dtype.name,
      "sha256": _digest(value),
    }
  return records


def _digest(value: np.ndarray) -> str:
  """sha256 of the bytes in C order, little endian."""
  return hashlib.sha256(np.ascontiguousarray(value).view(np.uint8).data).hexdigest()


def _bytes(record: Mapping[str, Any]) -> int:
  return int(np.prod(record["shape"])) * jnp.dtype(record["dtype"]).itemsize


def _pick(tree: Any, path: str) -> dict[str, Any]:
  return nest({path: leaves_of(tree)[path]})


def _tuples(value: Any) -> Any:
  """JSON as it was before: lists were tuples."""
  if isinstance(value, list):
    return tuple(_tuples(item) for item in value)
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return value
