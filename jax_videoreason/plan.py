"""What a command will need on a device kind, before it is paid for.

For a TPU slice and for this CPU the sampler itself is compiled ahead of time, with shapes in the
place of weights (a slice needs libtpu, the extra `pods`, and no TPU); for a GPU memory is
arithmetic. Seconds are an estimate everywhere: FLOPs over `SHARE` of the device's peak.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_videoreason import attention, checkpoint, sampler, schedules, sharding
from jax_videoreason.axes import Params
from jax_videoreason.models import FAMILIES
from jax_videoreason.pytrees import leaves as leaves_of
from jax_videoreason.pytrees import nest
from jax_videoreason.schedules import Schedule
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Card, Conditioning, ModelBundle, Noise, Parts, Sizes
from jax_videoreason.taps import TapSpec, tap_bytes

FITS = 0.92  # of the memory, for arguments, temporaries, outputs and code together
SHARE = 0.4  # of the peak that a whole step is assumed to reach
CLIP_TOKENS = 257
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
FULL = ("scale", "modulation")  # leaves that stay float32 in a bundle of bfloat16
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """platform: cpu, gpu, tpu. memory: bytes that a program may use. peak: bfloat16 FLOP/s."""

  platform: str
  memory: float
  peak: float


# Published peaks; the memory of a TPU is what a program can use of it.
CHIPS = {
  "v5e": Device(platform="tpu", memory=15.75 * GIB, peak=197e12),
  "v5p": Device(platform="tpu", memory=95e9, peak=459e12),
  "v6e": Device(platform="tpu", memory=31.25 * GIB, peak=918e12),
  "tpu7x": Device(platform="tpu", memory=96e9, peak=1153e12),  # two devices to a chip
}
CARDS = {24: 165e12, 40: 312e12, 48: 362e12, 80: 989e12, 96: 989e12, 141: 989e12}
CORE = 5e10  # FLOP/s of a CPU core in float32, a guess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """Where a program is to run: `count` devices of one kind; name as it was given."""

  name: str
  device: Device
  count: int


def target(name: str) -> Target:
  """ "v5p:2x2x4", "gpu:80GB", "gpu:80GBx8" or "cpu". ValueError says what is known."""
  kind, _, size = name.partition(":")
  if name == "cpu":
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rate = CORE * (os.cpu_count() or 1)
    device = Device(platform="cpu", memory=pages, peak=rate / SHARE)
    return Target(name=name, device=device, count=len(jax.devices("cpu")))
  if kind in CHIPS and re.fullmatch(r"\d+(x\d+){1,2}", size):
    chips = math.prod(int(n) for n in size.split("x"))
    count = 2 * chips if kind == "tpu7x" else chips
    return Target(name=name, device=CHIPS[kind], count=count)
  card = re.fullmatch(r"(\d+)GB(?:x(\d+))?", size)
  if kind == "gpu" and card and int(card[1]) > 0:
    memory = int(card[1])
    nearest = min(CARDS, key=lambda known: abs(known - memory))
    device = Device(platform="gpu", memory=memory * 1e9, peak=CARDS[nearest])
    return Target(name=name, device=device, count=int(card[2] or 1))
  raise ValueError(
    f"--on={name}, wanted cpu, gpu:80GB, gpu:80GBx8 (cards), or a TPU slice such as v5p:2x2x4 "
    f"({', '.join(CHIPS)})."
  )


# The model as shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A bundle without weights: leaves of each expert by path, and of the text encoder."""

  parts: Parts
  card: Card
  experts: Sequence[Mapping[str, jax.ShapeDtypeStruct]]
  text: Mapping[str, jax.ShapeDtypeStruct]


def model(name_or_path: str) -> Model:
  """Of a bundle, or by the name of its folder of a published model that is not here yet."""
  name = Path(name_or_path).name
  variants = {key: (f, v) for f in FAMILIES.values() for key, v in f.variants.items()}
  if name not in checkpoint.shipped() and not Path(name_or_path).is_dir():
    known = [key for key in variants if name.startswith(key)]
    if known:
      return _published(name, *variants[max(known, key=len)])
  described = checkpoint.describe(name_or_path)

  def leaves(part: str) -> dict[str, jax.ShapeDtypeStruct]:
    compute = getattr(described.modules, part.split("_")[0]).config.dtype
    return {
      path: jax.ShapeDtypeStruct(record.shape, jnp.promote_types(record.dtype, compute))
      if jnp.issubdtype(record.dtype, jnp.floating)
      else jax.ShapeDtypeStruct(record.shape, record.dtype)
      for path, record in described.leaves.get(part, {}).items()
    }

  experts = sorted(part for part in described.leaves if part.startswith("dit_"))
  return Model(
    parts=described.modules,
    card=described.card,
    experts=[leaves(part) for part in experts],
    text=leaves("text"),
  )


def _published(name: str, family: Any, variant: Any) -> Model:
  parts = family.build(variant.configs)
  trees = family.abstract(parts)

  def leaves(part: str) -> dict[str, jax.ShapeDtypeStruct]:
    half = getattr(variant, part).dtype == "bfloat16"
    found = {}
    for path, leaf in leaves_of(trees[part]).items():
      narrow = half and path.rpartition("/")[2] not in FULL
      found[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if narrow else leaf.dtype)
    return found

  return Model(
    parts=parts,
    card=Card(
      name=name,
      family=family.name,
      latents=family.latents(parts),
      text_length=512,
      boundary=variant.boundary,
    ),
    experts=[leaves("dit")] * variant.experts,
    text=leaves("text"),
  )


def size_of(leaves: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None = None) -> int:
  """Bytes of some leaves; on a mesh, of the share of one device."""
  total = 0
  for path, leaf in leaves.items():
    count = math.prod(leaf.shape)
    if mesh is not None and any(checkpoint.partition(path, leaf.shape, mesh)):
      count //= mesh.shape["fsdp"]
    total += count * leaf.dtype.itemsize
  return total


# The problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """One batch of `runs` runs of a model."""

  model: Model
  chosen: SampleSettings
  runs: int

  @property
  def grid(self) -> tuple[int, int, int, int]:
    latents, chosen = self.model.card.latents, self.chosen
    grid = latents.grid(chosen.frames, chosen.height, chosen.width)
    return (*grid, self.model.parts.dit.config.out_channels)

  @functools.cached_property
  def sizes(self) -> Sizes:
    f, h, w, c = self.grid
    config = self.model.parts.dit.config
    return Sizes(
      S=self.chosen.steps,
      R=self.runs,
      G=2 if self.chosen.guided else 1,
      L=config.layers,
      F=f,
      H=h,
      W=w,
      C=c,
      T=math.prod(self.model.card.latents.tokens((f, h, w))),
      D=config.width,
    )

  def schedule(self) -> Schedule:
    chosen, card = self.chosen, self.model.card
    return schedules.build(
      steps=chosen.steps,
      shift=chosen.shift,
      guidance=chosen.guidance[0] if len(chosen.guidance) == 1 else chosen.guidance,
      boundary=card.boundary if chosen.boundary is None else chosen.boundary,
      solver=chosen.solver,
      grid=chosen.grid,
      numerics=card.numerics,
      freq_dim=self.model.parts.dit.config.freq_dim,
    )

  def flops(self) -> float:
    """Of one network evaluation (a run, a step, a guidance branch): matmuls and attention."""
    config, s = self.model.parts.dit.config, self.sizes
    words = self.model.card.text_length + (CLIP_TOKENS if config.clip_width else 0)
    square, ffn = config.width**2, config.width * config.ffn_width
    by_token = 2 * (6 * square + 2 * ffn)  # q k v o, q o of the text, up and down
    by_word = 2 * 2 * square
    scores = 4 * config.width * s.T * (s.T + words)
    return float(config.layers * (by_token * s.T + by_word * words + scores))

  def activations(self) -> float:
    """Bytes that one run needs inside a block, all branches: residual, q k v, hidden of the ffn."""
    config, s = self.model.parts.dit.config, self.sizes
    each = jnp.dtype(config.dtype).itemsize
    return float(s.G * s.T * (4 * s.D + each * (4 * s.D + config.ffn_width)))


def arguments(problem: Problem, mesh: Mesh | None) -> tuple[ModelBundle, Noise, Conditioning]:
  """What `sampler.denoise` is called with, as shapes that know their place on the mesh."""
  s, made = problem.sizes, problem.model
  config = made.parts.dit.config

  def of(shape: Sequence[int], dtype: Any, spec: PartitionSpec) -> Any:
    place = None if mesh is None else NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=place)

  def weights(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    specs = {
      path: PartitionSpec() if mesh is None else checkpoint.partition(path, leaf.shape, mesh)
      for path, leaf in leaves.items()
    }
    return nest({path: of(leaf.shape, leaf.dtype, specs[path]) for path, leaf in leaves.items()})

  seed = PartitionSpec("seed")
  cells = (s.R, s.F, s.H, s.W)
  image = config.image_input != "none"
  key = jax.eval_shape(lambda: jax.random.key(0)).dtype
  text = made.parts.text.config.dtype
  bundle = ModelBundle(
    params=tuple(weights(leaves) for leaves in made.experts), parts=made.parts, card=made.card
  )
  words = (s.G, s.R, made.card.text_length, config.text_width)
  return (
    bundle,
    Noise(keys=of((s.R,), key, seed), grid=problem.grid),
    Conditioning(
      text=of(words, text, PartitionSpec(None, "seed")),
      known=of((*cells, s.C), jnp.float32, seed) if image else None,
      known_mask=of((*cells, 4), jnp.float32, seed) if image else None,
      clip=of((s.R, CLIP_TOKENS, config.clip_width), jnp.float32, seed)
      if config.clip_width
      else None,
    ),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What was found, per device, in bytes; `compiled` says whether by the compiler or arithmetic.

  text: weights of the text encoder, which are let go before the rest is loaded. collectives: kind
  -> how often it stands in the program; a layer scan is counted once.
  """

  target: Target
  axes: Mapping[str, int]
  runs: int
  steps: int
  compiled: bool
  compile_seconds: float
  parameters: float
  latents: float
  taps: float
  temporaries: float
  arguments: float
  outputs: float
  code: float
  text: float
  collectives: Mapping[str, int]
  evaluations: int
  flops: float
  seconds_per_step: float

  @property
  def total(self) -> float:
    return self.arguments + self.temporaries + self.outputs + self.code

  @property
  def fits(self) -> bool:
    return max(self.total, self.text) <= FITS * self.target.device.memory


def propose(problem: Problem, where: Target) -> dict[str, int]:
  """Axes for all devices: the most seeds side by side that leave room, then as little fsdp."""
  room = 0.8 * FITS * where.device.memory
  own = sum(size_of(leaves) for leaves in problem.model.experts)

  def parts(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]

  for seed in reversed(parts(where.count)):
    rest = where.count // seed
    if problem.runs % seed:
      continue
    for fsdp in parts(rest):
      active = problem.activations() * (problem.runs // seed) / rest
      if own / fsdp + active <= room:
        return {"seed": seed, "fsdp": fsdp, "context": rest // fsdp}
  return {"seed": 1, "fsdp": where.count, "context": 1}


def make(problem: Problem, where: Target, axes: Mapping[str, int] | None = None) -> Plan:
  """The plan of one batch. ValueError: a mesh of another size, libtpu is lacking."""
  axes = propose(problem, where) if axes is None else dict(axes)
  if math.prod(axes.values()) != where.count:
    raise ValueError(
      f"a mesh of {_text(axes)} takes {math.prod(axes.values())} devices, {where.name} has "
      f"{where.count}: give other sizes."
    )
  if problem.runs % axes["seed"]:
    raise ValueError(f"{problem.runs} runs on seed={axes['seed']}, wanted a multiple: give --runs.")
  s = problem.sizes
  spec = problem.chosen.taps.spec()
  cells = 4 * (s.R // axes["seed"]) * s.F * s.H * s.W * s.C
  share = {
    "latents": cells * (2 + 2 * s.S),
    "taps": tap_bytes(spec, s, problem.model.parts.dit.config.dtype) / axes["seed"],
  }
  work = {
    "runs": s.R,
    "steps": s.S,
    "evaluations": s.S * s.R * s.G,
    "flops": problem.flops(),
    "seconds_per_step": problem.flops() * s.R * s.G / (where.count * SHARE * where.device.peak),
  }
  if where.device.platform == "gpu":
    return _by_arithmetic(problem, where, axes, share, work)
  mesh = _mesh(where, axes)
  began = time.monotonic()
  compiled = _compile(problem, mesh, where.device.platform, spec)
  memory = compiled.memory_analysis()
  found = Counter(re.findall(rf" ({KINDS})(?:-start)?\(", compiled.as_text()))
  return Plan(
    target=where,
    axes=axes,
    compiled=True,
    compile_seconds=time.monotonic() - began,
    parameters=sum(size_of(leaves, mesh) for leaves in problem.model.experts),
    temporaries=memory.temp_size_in_bytes,
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    text=size_of(problem.model.text, mesh),
    collectives=dict(found),
    **share,
    **work,
  )


def _by_arithmetic(
  problem: Problem,
  where: Target,
  axes: Mapping[str, int],
  share: Mapping[str, float],
  work: Mapping[str, Any],
) -> Plan:
  own = sum(size_of(leaves) for leaves in problem.model.experts) / axes["fsdp"]
  rest = axes["fsdp"] * axes["context"]
  return Plan(
    target=where,
    axes=axes,
    compiled=False,
    compile_seconds=0.0,
    parameters=own,
    temporaries=problem.activations() * problem.runs / axes["seed"] / rest,
    arguments=own,
    outputs=share["latents"] + share["taps"],
    code=0.0,
    text=size_of(problem.model.text) / axes["fsdp"],
    collectives={},
    **share,
    **work,
  )


def _mesh(where: Target, axes: Mapping[str, int]) -> Mesh:
  if where.device.platform == "cpu":
    return sharding.make_mesh(axes["seed"], axes["fsdp"], axes["context"])
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      f"compiling for {where.name} needs libtpu, which is not installed: pip install "
      "'jax-videoreason[pods]'."
    )
  described = topologies.get_topology_desc(platform="tpu", topology_name=where.name)
  return sharding.make_mesh(axes["seed"], axes["fsdp"], axes["context"], devices=described.devices)


def _compile(problem: Problem, mesh: Mesh, platform: str, spec: TapSpec) -> Any:
  schedule = problem.schedule()

  def denoise(bundle: ModelBundle, noise: Noise, cond: Conditioning, schedule: Schedule) -> Any:
    return sampler.denoise(bundle, noise, cond, schedule, taps=spec)

  with jax.set_mesh(mesh), attention.compiling_for(platform):
    traced = jax.jit(denoise).trace(*arguments(problem, mesh), schedule)
    return traced.lower(lowering_platforms=(platform,)).compile()


def lines(plan: Plan, total: float) -> list[str]:
  """What is printed; total: network evaluations of the whole command."""
  device = plan.target.device
  source = "compiled ahead of time" if plan.compiled else "by arithmetic, an estimate"
  rows = {
    "parameters": plan.parameters,
    "latents and their trace": plan.latents,
    "taps": plan.taps,
    "temporaries": plan.temporaries,
    "arguments": plan.arguments,
    "outputs": plan.outputs,
    "program": plan.code,
    "text encoder, let go before": plan.text,
  }
  talk = ", ".join(f"{count} {kind}" for kind, count in sorted(plan.collectives.items())) or "none"
  batch = plan.seconds_per_step * plan.steps
  videos = total / plan.evaluations * plan.runs
  said = [f"{plan.target.name}: {plan.target.count} devices as {_text(plan.axes)}, {source}"]
  said += [f"  {name:<28} {_size(size):>12}" for name, size in rows.items() if size]
  said += [
    f"  {'of':<28} {_size(device.memory):>12}, of which {FITS:.0%} may be used: "
    + ("it fits" if plan.fits else "it does not fit"),
  ]
  if plan.compiled:
    said.append(f"collectives in the program: {talk}; compiled in {plan.compile_seconds:.0f} s")
  return [
    *said,
    f"{plan.runs} runs together: {plan.evaluations} network evaluations of {plan.flops:.3g} FLOPs; "
    f"the whole command: {total:.0f} evaluations, {videos:.0f} videos",
    f"estimated at {SHARE:.0%} of the peak: {_time(plan.seconds_per_step)} a step, "
    f"{_time(batch / plan.runs)} a video, {_time(batch * total / plan.evaluations)} in all",
  ]


def _size(size: float) -> str:
  return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _time(seconds: float) -> str:
  for unit, length in (("h", 3600), ("min", 60)):
    if seconds >= 2 * length:
      return f"{seconds / length:.1f} {unit}"
  return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _text(axes: Mapping[str, int]) -> str:
  return ",".join(f"{name}={size}" for name, size in axes.items())
