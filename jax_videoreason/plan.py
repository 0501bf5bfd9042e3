"""What a command will need on a device kind, before it is paid for.

Of a command (`costs.Work`) the largest batch is laid out on the devices. For a TPU slice and for
this CPU the sampler itself is compiled ahead of time, with shapes in the place of weights (a slice
needs libtpu, the extra `pods`, and no TPU); for a GPU memory is arithmetic. Seconds are an estimate
everywhere: FLOPs over `SHARE` of the device's peak.
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
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_videoreason import attention, bundles, sampler, settings, sharding
from jax_videoreason.axes import Params
from jax_videoreason.decode import decoding_bytes
from jax_videoreason.edits import LETTERS, Intervention
from jax_videoreason.models import FAMILIES
from jax_videoreason.pytrees import leaves as leaves_of
from jax_videoreason.pytrees import nest
from jax_videoreason.schedules import Schedule
from jax_videoreason.settings import SampleSettings
from jax_videoreason.solvers import SOLVERS
from jax_videoreason.structs import Card, Conditioning, ModelBundle, Noise, Parts, Sizes, key_of
from jax_videoreason.taps import TapSpec, check_budget, tap_bytes

FITS = 0.92  # of the memory, for arguments, temporaries, outputs and code together
SPARE = 1.3  # compiled for a TPU, a program was seen to take up to 1.29 of the arithmetic
SHARE = 0.46  # of the peak that a whole step is assumed to reach
CLIP_TOKENS = 257
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
FULL = ("scale", "modulation")  # leaves that stay float32 in a bundle of bfloat16
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """platform: cpu, gpu, tpu. memory: bytes that a program may use. peak: bfloat16 FLOP/s.

  most: chips of the largest slice there is. like: whose peak it is.
  """

  platform: str
  memory: float
  peak: float
  most: int = 1
  like: str = ""


# Published peaks and sizes; the memory of a TPU is what a program can use of it. A chip of tpu7x is
# two devices.
CHIPS = {
  "v5e": Device(platform="tpu", memory=15.75 * GIB, peak=197e12, most=256),
  "v5p": Device(platform="tpu", memory=95e9, peak=459e12, most=6144),
  "v6e": Device(platform="tpu", memory=31.25 * GIB, peak=918e12, most=256),
  "tpu7x": Device(platform="tpu", memory=96e9, peak=1153e12, most=9216),
}
CARD_GB = 0.995 * GIB  # of a card's name: 81,559 MiB are an H100 80GB, 143,771 MiB an H200 141GB
# name -> (GB as sold, FLOP/s of dense bfloat16 matmuls); of one memory the last is taken
CARDS = {
  "rtx4090": ((24,), 165e12),
  "a100": ((40, 80), 312e12),
  "l40s": ((48,), 362e12),
  "h100": ((80,), 989e12),
  "h200": ((141,), 989e12),
  "b200": ((180,), 2250e12),
}
BY_MEMORY = {size: name for name, (sizes, _) in CARDS.items() for size in sizes}
CORE = 5e10  # FLOP/s of a CPU core in float32, a guess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """Where a program is to run: `count` devices of one kind; name as it was given."""

  name: str
  device: Device
  count: int


def target(name: str) -> Target:
  """ "v5p:2x2x4", "gpu:80GBx8", "gpu:a100-80GBx8" or "cpu". ValueError says what is known.

  The devices that a CPU is made to be share its memory and its cores.
  """
  kind, _, size = name.partition(":")
  if name == "cpu":
    count = len(jax.devices("cpu"))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rate = CORE * (os.cpu_count() or 1)
    device = Device(platform="cpu", memory=pages / count, peak=rate / SHARE / count, like="a guess")
    return Target(name=name, device=device, count=count)
  if kind in CHIPS and re.fullmatch(r"\d+(x\d+){1,2}", size):
    chips = math.prod(int(n) for n in size.split("x"))
    if not 1 <= chips <= CHIPS[kind].most:
      raise ValueError(f"--on={name} has {chips} chips, wanted 1 to {CHIPS[kind].most} of {kind}.")
    count = 2 * chips if kind == "tpu7x" else chips
    return Target(name=name, device=CHIPS[kind], count=count)
  names = "|".join(CARDS)
  card = re.fullmatch(rf"(?:({names})-?)?(?:([1-9]\d*)gb)?(?:x([1-9]\d*))?", size.lower())
  if kind == "gpu" and card and (card[1] or card[2]):
    memory = int(card[2]) if card[2] else CARDS[card[1]][0][0]
    like = card[1] or BY_MEMORY[min(BY_MEMORY, key=lambda known: abs(known - memory))]
    device = Device(platform="gpu", memory=memory * CARD_GB, peak=CARDS[like][1], like=like.upper())
    return Target(name=name, device=device, count=int(card[3] or 1))
  raise ValueError(
    f"--on={name}, wanted cpu, gpu:80GB, gpu:80GBx8, gpu:a100-80GB (cards: {', '.join(CARDS)}), or "
    f"a TPU slice such as v5p:2x2x4 ({', '.join(CHIPS)})."
  )


# The model as shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A bundle without weights: leaves of each expert by path, of the text encoder and the VAE."""

  parts: Parts
  card: Card
  experts: Sequence[Mapping[str, jax.ShapeDtypeStruct]]
  text: Mapping[str, jax.ShapeDtypeStruct]
  vae: Mapping[str, jax.ShapeDtypeStruct]


def model(name_or_path: str) -> Model:
  """Of a bundle, or by the name of its folder of a published model that is not here yet."""
  name = Path(name_or_path).name
  variants = [key for family in FAMILIES.values() for key in family.variants]
  if name not in bundles.shipped() and not Path(name_or_path).is_dir():
    known = [key for key in variants if name.startswith(key)]
    if known:
      return _published(name, max(known, key=len))
  described = bundles.describe(name_or_path)

  def leaves(part: str) -> dict[str, jax.ShapeDtypeStruct]:
    if part not in described.leaves:
      return {}
    compute = getattr(described.modules, part.split("_")[0]).config.dtype
    return {
      path: jax.ShapeDtypeStruct(record.shape, jnp.promote_types(record.dtype, compute))
      if jnp.issubdtype(record.dtype, jnp.floating)
      else jax.ShapeDtypeStruct(record.shape, record.dtype)
      for path, record in described.leaves[part].items()
    }

  return Model(
    parts=described.modules,
    card=described.card,
    experts=[leaves(f"dit_{number}") for number in range(described.experts)],
    text=leaves("text"),
    vae=leaves("vae"),
  )


@functools.cache
def _published(name: str, key: str) -> Model:
  family = next(family for family in FAMILIES.values() if key in family.variants)
  variant = family.variants[key]
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
    vae=leaves("vae"),
  )


def size_of(leaves: Mapping[str, jax.ShapeDtypeStruct], shares: int = 1) -> int:
  """Bytes of some leaves on one device, where so many store them; a leaf may lie whole on each."""
  total = 0
  for path, leaf in leaves.items():
    count = math.prod(leaf.shape)
    if sharding.shared_axis(path, leaf.shape, shares) is not None:
      count //= shares
    total += count * leaf.dtype.itemsize
  return total


# The problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """One batch of `runs` runs of a model.

  taps: None = those of the settings. guidance: as `sampler.denoise` takes it. resident: experts
  that are loaded at once, None = all. route: of keys and values between devices, None =
  `attention.choose_route`. decodes: when latents are decoded: "after" the DiT has been let go,
  "between" batches, with the DiT loaded, or "beside" the next batch. ending: frames at the end that
  are also decoded alone; None = none. edit: counts by its fields and sites, whose shapes are
  those of the problem. drops: of "latents" and "x0", what is not kept of every step.
  spreads: whether runs may lie on several devices side by side, which those of the ensemble of
  `vbvr generate` may not.
  """

  model: Model
  chosen: SampleSettings
  runs: int
  taps: TapSpec | None = None
  guidance: sampler.Guidance = "parallel"
  resident: int | None = None
  route: attention.Route | None = None
  decodes: Literal["after", "between", "beside"] = "after"
  ending: int | None = None
  edit: Intervention | None = None
  drops: tuple[Literal["latents", "x0"], ...] = ()
  spreads: bool = True

  @property
  def spec(self) -> TapSpec:
    asked = self.chosen.taps.spec() if self.taps is None else self.taps
    return dataclasses.replace(asked, **dict.fromkeys(self.drops, False))

  @property
  def experts(self) -> Sequence[Mapping[str, jax.ShapeDtypeStruct]]:
    """The experts that are loaded at once."""
    return self.model.experts[: self.resident]

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
      N=config.heads,
    )

  @property
  def edited(self) -> Intervention | None:
    """The edit as shapes, for these runs."""
    if self.edit is None:
      return None
    letters = {name: x for name in LETTERS if (x := getattr(self.edit, name)) is not None}
    return dataclasses.replace(
      self.edit,
      **{
        name: jax.ShapeDtypeStruct([getattr(self.sizes, n) for n in LETTERS[name]], x.dtype)
        for name, x in letters.items()
      },
    )

  def schedule(self) -> Schedule:
    return settings.schedule(self.chosen, self.model.card, self.model.parts)

  def flops(self) -> float:
    """Of one network evaluation (a run, a step, a guidance branch): matmuls and attention."""
    config, s = self.model.parts.dit.config, self.sizes
    words = self.model.card.text_length + (CLIP_TOKENS if config.clip_width else 0)
    square, ffn = config.width**2, config.width * config.ffn_width
    by_token = 2 * (6 * square + 2 * ffn)  # q k v o, q o of the text, up and down
    by_word = 2 * 2 * square
    scores = 4 * config.width * s.T * (s.T + words)
    return float(config.layers * (by_token * s.T + by_word * words + scores))

  @property
  def branches(self) -> int:
    """Guidance branches that are computed at once."""
    return 1 if self.guidance == "sequential" else self.sizes.G

  def activations(self) -> float:
    """Bytes that one run needs inside a block, all branches: residual, q k v, hidden of the ffn."""
    config, s = self.model.parts.dit.config, self.sizes
    each = jnp.dtype(config.dtype).itemsize
    return float(self.branches * s.T * (4 * s.D + each * (4 * s.D + config.ffn_width)))

  def keys_and_values(self, runs: int, shards: int, platform: str) -> float:
    """Bytes of those of `runs` that a device holds where tokens lie on `shards` devices.

    By the gathered route those of all tokens, by the ring its own block and the one that passes.
    """
    config, s = self.model.parts.dit.config, self.sizes
    keys = (self.branches, runs, s.T, config.heads, s.D // config.heads)
    dtype = jnp.dtype(config.dtype)
    if self.route == "ring" and platform == "gpu" and dtype.itemsize < 4:
      raise ValueError(
        f"--route=ring in {dtype} on a GPU, where cuDNN's sums are too coarse to join blocks by: "
        "leave it out, keys and values are gathered there."
      )
    each = dtype.itemsize
    route = self.route or attention.choose_route(platform, keys, each)
    return 2.0 * math.prod(keys) * each * (2 / shards if route == "ring" else 1)

  def latents(self) -> float:
    """Bytes of one run's latents, its guess, and the trace of both; of the solver's memory too,
    where it is kept."""
    s = self.sizes
    one = jax.ShapeDtypeStruct((1, s.F, s.H, s.W, s.C), jnp.float32)
    memory = jax.eval_shape(SOLVERS[self.chosen.solver].init, one) if self.spec.solver else {}
    kept = s.S * sum(math.prod(x.shape) * x.dtype.itemsize for x in memory.values())
    rows = s.S * (self.spec.latents + self.spec.x0)
    return 4.0 * math.prod(one.shape) * (2 + rows) + kept

  def edit_arrays(self) -> float:
    """Bytes of the edit itself, which lies whole on every device."""
    leaves = jax.tree.leaves(self.edited)
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves))

  def exchanged(self) -> float:
    """Bytes of what all runs hold at a site, as a device reads them where an edit inside the blocks
    mixes runs of several devices: as they are, and in float32. Any other edit takes less than what
    a block needs elsewhere.
    """
    if self.edit is None or self.edit.mix is None:
      return 0.0
    s, each = self.sizes, jnp.dtype(self.model.parts.dit.config.dtype).itemsize
    return float(self.branches * s.R * s.T * s.D * (each + 4))

  def decoding(self, tiles: str | None) -> float:
    """Bytes of a device while latents are decoded, beside all weights. tiles: as `decode` has."""
    s, made = self.sizes, self.model
    if made.parts.vae is None:
      return 0.0
    asked = (None,) if self.ending is None else (None, min(self.ending, self.chosen.frames))
    sizes = (s.R, s.F, s.H, s.W)
    return max(decoding_bytes(made.parts, made.card.latents, sizes, tiles, n) for n in asked)

  def kept(self) -> float:
    """Bytes of the taps of all runs."""
    return float(tap_bytes(self.spec, self.sizes, self.model.parts.dit.config.dtype))

  def check_taps(self) -> None:
    """ValueError where the taps of all runs are over the budget of the settings."""
    budget, dtype = self.chosen.taps.budget_gb * 1e9, self.model.parts.dit.config.dtype
    check_budget(self.spec, self.sizes, budget, dtype=dtype)


def arguments(problem: Problem, mesh: Mesh | None) -> tuple[ModelBundle, Noise, Conditioning]:
  """What `sampler.denoise` is called with, as shapes that know their place on the mesh."""
  s, made = problem.sizes, problem.model
  config = made.parts.dit.config

  def of(shape: Sequence[int], dtype: Any, spec: PartitionSpec) -> Any:
    place = None if mesh is None else NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=place)

  def weights(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    specs = {
      path: PartitionSpec() if mesh is None else sharding.partition(path, leaf.shape, mesh)
      for path, leaf in leaves.items()
    }
    return nest({path: of(leaf.shape, leaf.dtype, specs[path]) for path, leaf in leaves.items()})

  seed = PartitionSpec("seed")
  cells = (s.R, s.F, s.H, s.W)
  image = config.image_input != "none"
  key = jax.eval_shape(lambda: key_of(0)).dtype
  text = config.dtype if made.parts.text is None else made.parts.text.config.dtype
  left_out = (None,) * (len(made.experts) - len(problem.experts))
  params = (*(weights(leaves) for leaves in problem.experts), *left_out)
  bundle = ModelBundle(params=params, parts=made.parts, card=made.card)
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
  """What a batch takes, per device, in bytes.

  compiled: by the compiler, or by arithmetic. refused: what the compiler said where it found too
  little memory; the bytes are arithmetic then. text: weights of the text encoder, which are let go
  before the rest is loaded. vae: weights of the VAE, which stay. decode: what decoding takes beside
  weights, always by arithmetic. collectives: kind -> how often it stands in the program; a layer
  scan is counted once.
  """

  target: Target
  axes: Mapping[str, int]
  problem: Problem
  compiled: bool
  parameters: float
  latents: float
  taps: float
  temporaries: float
  arguments: float
  outputs: float
  text: float
  vae: float
  decode: float
  code: float = 0.0
  compile_seconds: float = 0.0
  collectives: Mapping[str, int] = dataclasses.field(default_factory=dict)
  refused: str | None = None

  @property
  def total(self) -> float:
    return self.arguments + self.temporaries + self.outputs + self.code + self.vae

  @property
  def decoding(self) -> float:
    """While latents are decoded, with what stays beside."""
    problem = self.problem
    if problem.decodes == "beside":
      return self.total + self.decode
    whole = len(problem.experts) == len(problem.model.experts)  # else none stays
    kept = self.parameters if problem.decodes == "between" and whole else 0.0
    return kept + self.vae + self.decode

  @property
  def most(self) -> float:
    return max(self.total, self.text, self.decoding)

  @property
  def room(self) -> float:
    return FITS * self.target.device.memory

  @property
  def fits(self) -> bool:
    return self.refused is None and self.most <= self.room

  @property
  def evaluations(self) -> int:
    s = self.problem.sizes
    return s.S * s.R * s.G

  @property
  def seconds_per_step(self) -> float:
    s = self.problem.sizes
    return seconds_of(self.problem.flops() * s.R * s.G, self.target)


def seconds_of(flops: float, where: Target) -> float:
  """Of all devices together, at `SHARE` of their peak."""
  return flops / (where.count * SHARE * where.device.peak)


def arithmetic(problem: Problem, where: Target, axes: Mapping[str, int]) -> Plan:
  """The plan without a compiler: weights, one block's activations, latents, trace, taps, edit.

  Where tokens are spread a device also holds keys and values of others; where weights are, one
  layer of them; where runs are and an edit mixes them, those of others.
  """
  spread, each = axes["fsdp"] * axes["context"], problem.runs // axes["seed"]
  weights, own = (
    sum(size_of(leaves, shares) for leaves in problem.experts) for shares in (1, axes["fsdp"])
  )
  active = each * problem.activations() / spread
  if spread > 1:
    active += problem.keys_and_values(each, spread, where.device.platform)
  if axes["fsdp"] > 1:  # what lies in shares is gathered
    shared = (weights - own) * axes["fsdp"] / (axes["fsdp"] - 1)
    active += shared / len(problem.experts) / problem.sizes.L
  if axes["seed"] > 1:
    active += problem.exchanged() / spread
  latents, taps = each * problem.latents(), problem.kept() / axes["seed"]
  return Plan(
    target=where,
    axes=dict(axes),
    problem=problem,
    compiled=False,
    parameters=own,
    latents=latents,
    taps=taps,
    temporaries=active,
    arguments=own + problem.edit_arrays(),
    outputs=latents + taps,
    text=size_of(problem.model.text, axes["fsdp"]),
    vae=size_of(problem.model.vae),
    decode=problem.decoding(problem.chosen.tiles),
  )


def most_runs(problem: Problem, where: Target, axes: Mapping[str, int]) -> int:
  """How many runs together fit by arithmetic, without the taps of a study; bytes grow evenly."""

  def told(each: int) -> Plan:
    runs = dataclasses.replace(problem, runs=each * axes["seed"], taps=problem.chosen.taps.spec())
    return arithmetic(runs, where, axes)

  one, two = told(1), told(2)
  of_one = two.total - one.total
  beside = one.decoding - one.total if problem.decodes == "beside" else 0.0
  if max(one.decoding, one.text) > one.room:
    return 0
  return max(0, int((one.room - beside - one.total + of_one) // of_one)) * axes["seed"]


def propose(problem: Problem, where: Target) -> dict[str, int]:
  """Axes for all devices: the most seeds side by side that fit, then as little fsdp.

  Where none fit, those that need the least memory. Where a compiler has the last word, there is
  room for what it adds to the arithmetic.
  """
  spare = 1.0 if where.device.platform == "gpu" else SPARE
  room = FITS * where.device.memory / spare

  def parts(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]

  for seed in reversed(parts(where.count) if problem.spreads else [1]):
    rest = where.count // seed
    if problem.runs % seed:
      continue
    for fsdp in parts(rest):
      axes = {"seed": seed, "fsdp": fsdp, "context": rest // fsdp}
      told = arithmetic(problem, where, axes)
      if told.most <= room:
        return axes
  return min(
    ({"seed": 1, "fsdp": fsdp, "context": where.count // fsdp} for fsdp in parts(where.count)),
    key=lambda axes: arithmetic(problem, where, axes).most,
  )


def make(problem: Problem, where: Target, axes: Mapping[str, int] | None = None) -> Plan:
  """The plan of one batch. ValueError: a mesh of another size, libtpu is lacking."""
  axes = propose(problem, where) if axes is None else dict(axes)
  if math.prod(axes.values()) != where.count:
    raise ValueError(
      f"a mesh of {spelled(axes)} takes {math.prod(axes.values())} devices, {where.name} has "
      f"{where.count}: give other sizes, or --on for the devices that it lies on."
    )
  if problem.runs % axes["seed"]:
    fewer = max(n for n in range(1, axes["seed"]) if problem.runs % n == 0)
    raise ValueError(
      f"{counted(problem.runs, 'run')} on seed={axes['seed']}, wanted a multiple: give other "
      f"seeds, cases or --config.batch, or seed={fewer} in --mesh on as many devices."
    )
  told = arithmetic(problem, where, axes)
  if where.device.platform == "gpu":
    return told
  mesh = _mesh(where, axes)
  began = time.monotonic()
  try:
    compiled = _compile(problem, mesh, where.device.platform)
  except jax.errors.JaxRuntimeError as error:
    if not str(error).startswith("RESOURCE_EXHAUSTED"):
      raise
    return dataclasses.replace(told, refused=_exceeded(str(error)))
  memory = compiled.memory_analysis()
  return dataclasses.replace(
    told,
    compiled=True,
    compile_seconds=time.monotonic() - began,
    temporaries=memory.temp_size_in_bytes,
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    collectives=Counter(re.findall(rf" ({KINDS})(?:-start)?\(", compiled.as_text())),
  )


def _exceeded(said: str) -> str:
  """The first sentence of what a compiler says about memory."""
  return " ".join(said.split()).removeprefix("RESOURCE_EXHAUSTED: ").partition(". ")[0]


def _mesh(where: Target, axes: Mapping[str, int]) -> Mesh:
  if where.device.platform == "cpu":
    return sharding.make_mesh(axes["seed"], axes["fsdp"], axes["context"])
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      f"compiling for {where.name} needs libtpu, which is not installed: pip install "
      "'jax-videoreason[pods]'."
    )
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=where.name)
  except jax.errors.JaxRuntimeError as error:
    said = " ".join(str(error).split())
    raise ValueError(f"libtpu does not describe {where.name}: {said}") from error
  return sharding.make_mesh(axes["seed"], axes["fsdp"], axes["context"], devices=described.devices)


def _compile(problem: Problem, mesh: Mesh, platform: str) -> Any:
  schedule, spec, guidance = problem.schedule(), problem.spec, problem.guidance
  everywhere = NamedSharding(mesh, PartitionSpec())
  edit = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), problem.edited
  )

  def denoise(
    bundle: ModelBundle,
    noise: Noise,
    cond: Conditioning,
    schedule: Schedule,
    edit: Intervention | None,
  ) -> Any:
    return sampler.denoise(bundle, noise, cond, schedule, edit, spec, guidance=guidance)

  with (
    jax.set_mesh(mesh),
    attention.compiling_for(platform),
    attention.by_route(problem.route),
  ):
    traced = jax.jit(denoise).trace(*arguments(problem, mesh), schedule, edit)
    return traced.lower(lowering_platforms=(platform,)).compile()


# In words


def counted(number: float, noun: str) -> str:
  """Such as "1 run" or "1,024 runs"."""
  return f"{number:,.0f} {noun}" + ("" if number == 1 else "s")


def spelled(axes: Mapping[str, int]) -> str:
  """Axes as --mesh takes them."""
  return ",".join(f"{name}={size}" for name, size in axes.items())
