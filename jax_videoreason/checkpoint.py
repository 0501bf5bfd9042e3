"""The weights of a bundle: one Orbax tree per part, a checksum for every leaf.

A folder holds dit_0/ [dit_1/] vae/ text/ clip/ preview/, which stock Orbax restores, beside what
`bundles` describes. A part may lie in another bundle. Orbax is imported here, and in fitting.py
for the states of a training, nowhere else.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding

from jax_videoreason import bundles
from jax_videoreason.axes import Params
from jax_videoreason.folders import disk, local
from jax_videoreason.pytrees import leaves as leaves_of
from jax_videoreason.pytrees import nest
from jax_videoreason.sharding import check_auto, partition
from jax_videoreason.structs import ModelBundle

READ_BYTES = 2**30  # leaves are read for checking in groups of about so much


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
  folder = bundles.find(name_or_path)
  with bundles.understood(folder):
    described = bundles.read_description(folder)
    names = bundles.chosen_parts(parts, described, folder)
    modules = bundles.modules_of(described, folder)
    card = bundles.card_of(described, "")
    for name in names:
      bundles.check_config(described, folder, name)
    places = [
      _Part(
        name=name,
        bundle=folder,
        folder=folder / described["parts"][name],
        leaves=described["leaves"][name],
      )
      for name in names
    ]
  loaded = {}
  with _without_late_reads():
    for place in places:
      name = place.name
      module = getattr(modules, name.split("_")[0], None)
      wider = getattr(getattr(module, "config", None), "dtype", "float32")
      if mesh is None:
        loaded[name] = place.on_device(dtype, wider, verify)
      else:
        if verify:
          place.check(jax.process_index(), jax.process_count())
        loaded[name] = place.on_mesh(mesh, dtype, wider)
  tokenizer = described.get("tokenizer") if "text" in names else None
  with bundles.understood(folder):
    file = str(bundles.tokenizer_of(folder, tokenizer, verify)) if tokenizer else ""
  return ModelBundle(
    params=tuple(loaded.get(f"dit_{i}") for i in range(bundles.count_experts(described["parts"]))),
    **{name: loaded.get(name) for name in bundles.OTHERS},
    parts=modules,
    card=dataclasses.replace(card, tokenizer=file),
  )


@contextlib.contextmanager
def _without_late_reads() -> Iterator[None]:
  """Where one leaf can't be read, Orbax closes the loop that waits for the others; each of these
  then reports that, by a traceback that hides the fault."""
  before = sys.unraisablehook

  def report(found: Any) -> None:
    error = found.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
      before(found)

  sys.unraisablehook = report
  try:
    yield
  finally:
    sys.unraisablehook = before


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
  their module, or the disk is too small. OSError: it can't be written.
  """
  path = Path(os.path.abspath(local(path)))
  if path.exists():
    raise ValueError(f"{path} exists already: remove it, or save under another name.")
  trees = _trees(bundle)
  records = {name: _records(tree, dtype) for name, tree in trees.items()}
  tokenizer = bundles.tokenizer_record(bundle.card.tokenizer)
  parts = {name: name for name in trees}
  if shared_with is not None:
    other = bundles.find(shared_with)
    theirs = bundles.read_description(other)
    relative = Path(os.path.relpath(other.resolve(), path.parent.resolve() / path.name))
    for name in trees:
      if theirs["leaves"].get(name) == records[name]:
        parts[name] = (relative / theirs["parts"][name]).as_posix()
    if tokenizer and (theirs.get("tokenizer") or {}).get("sha256") == tokenizer["sha256"]:
      tokenizer["file"] = (relative / theirs["tokenizer"]["file"]).as_posix()
  described = bundles.description(bundle, parts, records, tokenizer)
  for name in trees:
    bundles.check_config(described, path, name)
  own = {name: tree for name, tree in trees.items() if parts[name] == name}
  bundles.check_space(
    path, sum(_bytes(record) for name in own for record in records[name].values())
  )

  partial = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
  try:
    with disk(path, full="make room, or save elsewhere"):
      partial.mkdir(parents=True)
      for name, tree in own.items():
        write_tree(partial / name, jax.tree.map(lambda leaf: _stored(leaf, dtype), tree))
      bundles.write_description(partial, described, bundle.card.tokenizer)
      os.rename(partial, path)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
  """One tree on disk; leaves: path -> its record (shape, dtype, sha256)."""

  name: str
  bundle: Path
  folder: Path
  leaves: Mapping[str, Any]

  def __post_init__(self):
    for record in self.leaves.values():
      if not isinstance(record["sha256"], str) or _bytes(record) < 0:
        raise TypeError(f"{record} describes no leaf")
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
        f"{self.bundle / bundles.DESCRIPTION}: copy the bundle again, or load it with verify=False."
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


def _trees(bundle: ModelBundle) -> dict[str, Params]:
  missing = [f"dit_{i}" for i, tree in enumerate(bundle.params) if tree is None]
  if missing:
    raise ValueError(f"{', '.join(missing)} is not loaded: load every expert before saving.")
  trees = {f"dit_{i}": tree for i, tree in enumerate(bundle.params) if tree is not None}
  trees |= {n: tree for n in bundles.OTHERS if (tree := getattr(bundle, n)) is not None}
  return trees


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
