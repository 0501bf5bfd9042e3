"""Low-rank updates of a transformer, merged tensor by tensor on its way into the bundle.

Reads the names of DiffSynth, of PEFT and of kohya (musubi-tuner: `lora_unet_blocks_0_ffn_2`), with
A [r, in] and B [out, r]: W' = W + alpha * scale * B A, where scale is the file's own alpha over its
rank, 1 where it has none.
"""

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from . import hub, wan
from .engine import Faults, Move
from .reader import Header, Settings, headers, metadata, read, settings

ORDERS = ("fp32", "bf16")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIDES = {"lora_A": "a", "lora_down": "a", "lora_B": "b", "lora_up": "b"}
KEY = re.compile(r"(?P<name>.+)\.(?P<side>lora_A|lora_B|lora_down|lora_up)(\.default)?(\.weight)?")
PREFIX = re.compile(
  r"(base_model\.model\.|pipe\.|diffusion_model\.|transformer(_2)?\.|model\.|dit2?\.)+"
)
FLAT = "lora_unet_"  # kohya's prefix, before names with underscores for dots
NOTES = "lora_adapter_metadata"  # what diffusers writes into the header
Target = tuple[str, int | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
  """What was asked for; given: "high=FILE" and "low=FILE", or "FILE" for a single transformer.

  order: "fp32" merges in float32, "bf16" rounds as DiffSynth does when it fuses.
  """

  given: tuple[str, ...] = ()
  alpha: float = 1.0
  order: str = "fp32"

  def __post_init__(self):
    if not math.isfinite(self.alpha):
      raise Faults([f"a LoRA of alpha {self.alpha}, wanted a finite number."])
    if self.order not in ORDERS:
      raise Faults([f"LoRA order {self.order!r}, wanted one of {', '.join(ORDERS)}."])
    for address in self.addresses:
      if not address.startswith(hub.SCHEME):
        _check_file(Path(address))
      elif not hub.names_file(address):
        raise Faults([f"{address} names no file: --lora wants hf://owner/name/file."])

  @property
  def addresses(self) -> list[str]:
    """The files, without the experts they are for."""
    return [_split(word)[1] for word in self.given]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
  """What one tensor is changed by."""

  a: Header
  b: Header
  scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
  """The updates of one file, by the leaf and layer that they change."""

  file: Path
  part: str
  updates: Mapping[Target, Update]

  @property
  def ranks(self) -> list[int]:
    return sorted({update.a.shape[0] for update in self.updates.values()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
  """The updates of a plan; called on every tensor of the source before it is moved."""

  loras: tuple[Lora, ...] = ()
  alpha: float = 1.0
  order: str = "fp32"

  def __call__(self, part: str, move: Move, tensor: np.ndarray) -> np.ndarray:
    for lora in self.loras:
      update = lora.updates.get((move.target, move.layer))
      if lora.part == part and update is not None:
        tensor = merged(tensor, update, self.alpha, self.order)
    return tensor

  def described(self, lora: Lora) -> str:
    """What a bundle remembers of it."""
    return f"{lora.file.name} (LoRA merged into {lora.part}, alpha {self.alpha:g}, {self.order})"


def assign(given: Sequence[str], experts: int) -> list[tuple[str, Path]]:
  """(part, file) of each "high=F", "low=F" or, for a model with one expert, "F"."""
  names = {"high": "dit_0", "low": "dit_1"} if experts == 2 else {"": "dit_0"}
  found = []
  for word in given:
    name, file = _split(word)
    if name not in names:
      wanted = "high=FILE or low=FILE: the model has two experts" if experts == 2 else "FILE alone"
      raise Faults([f"--lora={word}, wanted --lora={wanted}."])
    found.append((names[name], hub.local(file)))
  return found


def _split(word: str) -> tuple[str, str]:
  """(expert, file) of "high=F" and "low=F"; ("", F) of "F"."""
  name, equals, file = word.partition("=")
  return (name, file) if equals and name in ("high", "low") else ("", word)


def _check_file(file: Path) -> None:
  if not file.is_file():
    raise Faults([f"{file} is not there: --lora wants a file."])


def load(file: Path, part: str, moves: Sequence[Move], tensors: Mapping[str, Header]) -> Lora:
  """A LoRA for a transformer; moves, tensors: of the transformer.

  Faults: half a pair, ranks that differ, a tensor that the base lacks or has in another shape, two
    pairs or two alphas of one tensor, in whichever naming, an alpha without a pair.
  """
  _check_file(file)
  base = {(move.target, move.layer): tensors[move.source].shape for move in moves}
  found = headers([file])
  alphas: dict[Target | str, Header] = {}
  pairs: dict[str, dict[str, Header]] = defaultdict(dict)
  faults: list[str] = []
  for key, header in found.items():
    match = KEY.fullmatch(_plain(key))
    if key.endswith(".alpha"):
      name = _plain(key).removesuffix(".alpha")
      before = alphas.setdefault(_target(name) or name, header)
    elif match is not None:
      before = pairs[match["name"]].setdefault(SIDES[match["side"]], header)
    else:
      faults.append(f"{file}: {key} is no LoRA tensor: only low-rank updates are merged.")
      continue
    if before is not header:
      faults.append(_twice(file, before, header))
  overall = _overall_alpha(file)
  updates: dict[Target, Update] = {}
  strangers = []
  for name, pair in pairs.items():
    target = _target(name)
    own = alphas.pop(target or name, None)
    if target is None or target not in base:
      strangers.append(name)
      continue
    fault = _misfit(file, name, pair, base[target])
    if fault is not None:
      faults.append(fault)
      continue
    alpha = overall if own is None else _own_alpha(own)
    scale = 1.0 if alpha is None else alpha / pair["a"].shape[0]
    update = Update(a=pair["a"], b=pair["b"], scale=scale)
    before = updates.setdefault(target, update)
    if before is not update:
      faults.append(_twice(file, before.a, update.a))
  faults += [
    f"{file}: {header.key} has no lora_A and lora_B beside it: add them, or remove it."
    for header in alphas.values()
  ]
  if len(strangers) == len(pairs):
    first = f", first {strangers[0]}" if strangers else ""
    faults.append(f"{file} matches nothing in the transformer{first}: it is for another model.")
  elif strangers:
    faults.append(
      f"{file} has {len(strangers)} updates of tensors that the transformer lacks, first "
      f"{strangers[0]}: it is for another base."
    )
  if faults:
    raise Faults(faults)
  return Lora(file=file, part=part, updates=updates)


def merged(tensor: np.ndarray, update: Update, alpha: float, order: str) -> np.ndarray:
  """W + alpha * scale * B A.

  "fp32": in float32 throughout. "bf16": W, A and B are rounded first, then the product, its
  multiple and the sum; products are summed in float32, as on the devices that this imitates.
  """
  a, b = read(update.a), read(update.b)
  if order == "fp32":
    total = b.astype(np.float32) @ a.astype(np.float32)
    total *= np.float32(alpha * update.scale)
    total += tensor
    return total
  a = (a * a.dtype.type(update.scale)).astype(BFLOAT16).astype(np.float32)
  delta = (b.astype(BFLOAT16).astype(np.float32) @ a).astype(BFLOAT16)
  scaled = (delta.astype(np.float32) * np.float32(alpha)).astype(BFLOAT16)
  rounded = tensor.astype(BFLOAT16).astype(np.float32)
  return (rounded + scaled.astype(np.float32)).astype(BFLOAT16)


def _plain(key: str) -> str:
  """A key without the prefixes that trainers put before it."""
  match = PREFIX.match(key)
  return key[match.end() :] if match else key


def _target(name: str) -> Target | None:
  """The leaf and layer of a module's weight, in either naming, or flat as kohya's are."""
  flat = name.startswith(FLAT)
  weight = f"{name.removeprefix(FLAT)}_weight" if flat else f"{name}.weight"
  for row in (*wan.table("original"), *wan.table("diffusers")):
    match = re.fullmatch(row[0].replace(r"\.", "_") if flat else row[0], weight)
    if match:
      return row[1], int(match["L"]) if "L" in match.re.groupindex else None
  return None


def _twice(file: Path, one: Header, two: Header) -> str:
  return f"{file}: {one.key} and {two.key} are for the same tensor: keep one of them."


def _misfit(file: Path, name: str, pair: Mapping[str, Header], base: tuple[int, ...]) -> str | None:
  if len(pair) < 2:
    return f"{file}: {name} has only {next(iter(pair.values())).key}, wanted lora_A and lora_B."
  a, b = pair["a"].shape, pair["b"].shape
  if 0 in a + b:
    return f"{file}: {name} is empty, lora_A {a} and lora_B {b}."
  if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
    return f"{file}: the ranks of {name} differ, lora_A {a} and lora_B {b}."
  if (b[0], a[1]) != base:
    return f"{file}: {name} updates a {(b[0], a[1])} tensor, the base has {base}: another base?"
  return None


def _own_alpha(header: Header) -> float:
  """The number beside a pair."""
  value = read(header).astype(np.float64)
  if value.size != 1 or not np.isfinite(value).all():
    raise Faults([f"{header.file}: {header.key} is {value.tolist()}, wanted one finite number."])
  return float(value.item())


def _overall_alpha(file: Path) -> float | None:
  """The alpha of all updates, from the header or from the adapter_config.json of PEFT."""
  notes = metadata(file).get(NOTES)
  if notes is not None:
    try:
      values = {key.rpartition(".")[2]: value for key, value in json.loads(notes).items()}
    except (ValueError, AttributeError) as error:
      raise Faults([f"{file}: {NOTES} in its header is no JSON object: save it again."]) from error
    said = Settings(file=file, values=values)
  elif file.name.startswith("adapter_model"):
    said = settings(file.parent / "adapter_config.json")
  else:
    return None
  if said.values.get("use_rslora") or said.values.get("alpha_pattern"):
    raise Faults([f"{file} scales its updates by use_rslora or alpha_pattern: not supported yet."])
  return said.number("lora_alpha") if "lora_alpha" in said.values else None
