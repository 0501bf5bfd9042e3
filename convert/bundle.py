"""A checkpoint becomes a bundle: the plan, its streaming execution, and its verification."""

import dataclasses
import hashlib
import itertools
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jax_videoreason.leaves import LeafWriter, read_blocks
from jax_videoreason.models import FAMILIES
from jax_videoreason.structs import Card, LatentSpec, ModelBundle, Parts
from jax_videoreason.version import __version__

from . import kinds, lora, wan
from .detect import Source
from .engine import Faults, Move, compact, leaves, moves, same_bits
from .reader import Header, read

TEXT_LENGTH = 512
HASHED_BYTES = 2**24  # at a time
AHEAD_BYTES = 3 * 10**8  # a larger tensor is alone in memory
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One tensor of the source and the slice it fills."""

  part: str
  move: Move
  header: Header


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """All that a conversion will do; target: part -> path -> shape and dtype."""

  source: Source
  steps: tuple[Step, ...]
  target: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]
  parts: Parts
  latents: LatentSpec
  numerics: str
  dtype: str | None
  merge: lora.Merge

  @property
  def files(self) -> list[Path]:
    """Every file that is read."""
    weights = {step.header.file for step in self.steps}
    return sorted(weights | {low_rank.file for low_rank in self.merge.loras})

  @property
  def read_bytes(self) -> int:
    return sum(step.header.nbytes for step in self.steps)

  @property
  def written_bytes(self) -> int:
    return sum(
      int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
      for part in self.target.values()
      for leaf in part.values()
    )

  @property
  def fingerprint(self) -> str:
    """Differs when the sources or what is made of them differ."""
    said: list[Any] = [__version__, repr(self.parts), self.numerics, self.dtype]
    said += [self.merge.alpha, self.merge.order]
    for low_rank in self.merge.loras:
      scales = [[*at, update.scale] for at, update in low_rank.updates.items()]
      said.append([low_rank.part, str(low_rank.file), scales])
    for file in self.files:
      stat = file.stat()
      said.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    for step in self.steps:
      dtype = self.target[step.part][step.move.target].dtype
      said.append([step.part, dataclasses.astuple(step.move), step.header.file.name, str(dtype)])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def plan(
  source: Source,
  *,
  dtype: str | None = None,
  numerics: str | None = None,
  loras: lora.Wanted | None = None,
) -> Plan:
  """The plan of a conversion. Faults says what does not fit, of all parts at once.

  dtype: "bf16" or "fp32" of the transformer and the text encoder; None = as in the source. VAE and
    CLIP tower keep their own; in bf16, the leaves of `wan.KEPT` stay in fp32.
  numerics: None = those of the layout.
  loras: what is merged into the transformers.
  """
  chosen = numerics or ("diffusers" if source.layout == "diffusers" else "official")
  faults: list[str] = []
  steps: list[Step] = []
  target: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
  configs: dict[str, Any] = {}
  low_rank: list[lora.Lora] = []
  asked = loras or lora.Wanted()
  files = lora.assign(asked.given, sum(part.startswith("dit") for part in source.parts))
  for part, found in source.parts.items():
    kind = part.split("_")[0]
    try:
      shapes = kinds.abstract(found, kind)
    except Faults as error:
      faults += error.faults
      continue
    try:
      made = moves(found.tensors, found.table, shapes, found.ignore)
    except Faults as error:
      faults += [f"{found.place}: {fault}" for fault in error.faults]
      continue
    for _, file in filter(lambda given, part=part: given[0] == part, files):
      try:
        low_rank.append(lora.load(file, part, made, found.tensors))
      except Faults as error:
        faults += error.faults
    dtypes: dict[str, np.dtype] = {}
    for move in made:
      header = found.tensors[move.source]
      steps.append(Step(part=part, move=move, header=header))
      given = _dtype_of(kind, move.target, header.dtype, dtype)
      dtypes[move.target] = np.promote_types(dtypes.get(move.target, given), given)
    target[part] = {
      path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path]) for path, leaf in leaves(shapes).items()
    }
    changes: dict[str, Any] = {"dtype": _compute(target[part])}
    if kind == "dit":
      changes["numerics"] = chosen
    configs.setdefault(kind, dataclasses.replace(found.config, **changes))
  if faults:
    raise Faults(faults)
  return Plan(
    latents=source.latents,
    source=source,
    steps=tuple(steps),
    target=target,
    parts=FAMILIES[kinds.FAMILY].build(configs),
    numerics=chosen,
    dtype=dtype,
    merge=lora.Merge(loras=tuple(low_rank), alpha=asked.alpha, order=asked.order),
  )


def write(
  made: Plan,
  out: Path,
  *,
  redo: bool = False,
  check: bool = False,
  advance: Callable[[int], Any] = lambda _: None,
) -> Path:
  """Carries a plan out, or goes on with it; `advance` is told of bytes of the source.

  check: read both sides again and compare before the bundle appears.
  """
  out = Path(out)
  with LeafWriter(out, made.target, plan=made.fingerprint, redo=redo) as writer:
    # The sources are hashed beside the conversion: neither keeps a core and the disk busy alone.
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
      asked = [file for file in made.files if str(file) not in writer.notes]
      hashed = {file: pool.submit(_sha256, file, stop) for file in asked}
      try:
        lacking = []
        for step in made.steps:
          if writer.has(step.part, step.move.target, step.move.layer):
            advance(step.header.nbytes)
          else:
            lacking.append(step)
        for step, value in _values(made, lacking):
          writer.write(step.part, step.move.target, step.move.layer, value)
          del value
          advance(step.header.nbytes)
        writer.settle()
        for file, digest in hashed.items():
          writer.note(str(file), digest.result())
      finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    _refuse_equal_experts(made, writer)
    if check:
      verify(made, writer.folder)
    return writer.commit(_described(made, out.name, writer.notes))


def verify(
  made: Plan,
  folder: Path,
  *,
  advance: Callable[[int], Any] = lambda _: None,
) -> None:
  """Reads every tensor of the source and its slice in the bundle; Faults names what differs."""
  faults = []
  for step, wanted in _values(made, made.steps):
    found = read_blocks(folder / step.part, step.move.target, step.move.layer)
    if not all(same_bits(wanted[rows], block) for rows, block in found):
      layer = "" if step.move.layer is None else f"[{step.move.layer}]"
      faults.append(
        f"{step.part}/{step.move.target}{layer} differs from {step.header.key} in "
        f"{step.header.file}."
      )
    del wanted
    advance(step.header.nbytes)
  if faults:
    raise Faults(faults)


def _values(made: Plan, steps: Sequence[Step]) -> Iterator[tuple[Step, np.ndarray]]:
  """What each step writes, the next one read and turned while the caller writes this one.

  The caller lets go of a value before it asks for the next: two are in memory at most, and of large
  ones only one.
  """
  with ThreadPoolExecutor(1) as pool:
    coming = None
    for step, after in itertools.zip_longest(steps, steps[1:]):
      value = value_of(made, step) if coming is None else coming.result()
      coming = None
      if after is not None and max(step.header.nbytes, after.header.nbytes) <= AHEAD_BYTES:
        coming = pool.submit(value_of, made, after)
      yield step, value
      del value


def value_of(made: Plan, step: Step) -> np.ndarray:
  """What a step writes: the tensor with its updates, moved, and cast last."""
  tensor = made.merge(step.part, step.move, read(step.header))
  dtype = made.target[step.part][step.move.target].dtype
  return compact(step.move(tensor), dtype)


def summary(made: Plan) -> list[tuple[str, str, str, int, str, str]]:
  """A row per part: part, where it lies, naming, tensors, dtypes, GB on disk."""
  rows = []
  for part, found in made.source.parts.items():
    sizes: dict[str, int] = defaultdict(int)
    for leaf in made.target[part].values():
      dtype = np.dtype(leaf.dtype)
      sizes[dtype.name] += int(np.prod(leaf.shape, dtype=np.int64)) * dtype.itemsize
    rows.append(
      (
        part,
        str(found.place),
        found.naming,
        sum(step.part == part for step in made.steps),
        " ".join(sorted(sizes, key=lambda name: -sizes[name])),
        f"{sum(sizes.values()) / 1e9:.3f}",
      )
    )
  for low_rank in made.merge.loras:
    ranks = "rank " + ", ".join(map(str, low_rank.ranks))
    tensors = 2 * len(low_rank.updates)
    rows.append((f"{low_rank.part} + LoRA", str(low_rank.file), ranks, tensors, "", ""))
  return rows


def _described(made: Plan, name: str, hashes: Mapping[str, str]) -> ModelBundle:
  """The bundle without its weights."""
  root = made.source.root if made.source.root.is_dir() else made.source.root.parent
  named = {
    file: file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
    for file in made.files
  } | {low_rank.file: made.merge.described(low_rank) for low_rank in made.merge.loras}
  card = Card(
    name=name,
    family=kinds.FAMILY,
    latents=made.latents,
    text_length=TEXT_LENGTH,
    boundary=made.source.boundary,
    numerics=made.numerics,
    tokenizer=str(made.source.tokenizer or ""),
    sources=tuple((name, hashes[str(file)]) for file, name in named.items()),
    tables=tuple((part, found.naming) for part, found in made.source.parts.items()),
  )
  return ModelBundle(params=(), parts=made.parts, card=card)


def _refuse_equal_experts(made: Plan, writer: LeafWriter) -> None:
  """A LoRA on both may not make them equal either."""
  if "dit_1" in made.target and all(
    writer.sha256("dit_0", path) == writer.sha256("dit_1", path) for path in made.target["dit_0"]
  ):
    high, low = (made.source.parts[part].place for part in ("dit_0", "dit_1"))
    raise Faults(
      [
        f"{high} and {low} have the same weights after the conversion: give each its own weights "
        "or LoRA, or --dtype=fp32."
      ]
    )


def _dtype_of(kind: str, path: str, given: np.dtype, asked: str | None) -> np.dtype:
  if asked is None or kind in ("vae", "clip"):
    return given
  if asked == "bf16" and kind == "dit" and re.fullmatch(wan.KEPT, path):
    return DTYPES["fp32"]
  return DTYPES[asked]


def _compute(target: Mapping[str, jax.ShapeDtypeStruct]) -> str:
  """What a part computes in: bfloat16 where most of its bytes are."""
  sizes: dict[str, int] = defaultdict(int)
  for leaf in target.values():
    sizes[np.dtype(leaf.dtype).name] += int(np.prod(leaf.shape, dtype=np.int64))
  return "bfloat16" if max(sizes, key=lambda name: sizes[name]) == "bfloat16" else "float32"


def _sha256(file: Path, stop: threading.Event) -> str:
  """Of a file of many gigabytes; an interruption need not wait for its end."""
  digest = hashlib.sha256()
  with file.open("rb", buffering=0) as stream:
    while not stop.is_set() and (block := stream.read(HASHED_BYTES)):
      digest.update(block)
  return digest.hexdigest()
