"""Trains `mini`, a small member of the Wan family, on the project's own tasks, on CPU, GPU or TPU.

  python scripts/train_mini.py vae --work DIR       the VAE and its linear preview, then frozen
  python scripts/train_mini.py decoder --work DIR   the decoder longer, on all tasks; latents stay
  python scripts/train_mini.py encode --work DIR    cases -> memory-mapped latents, by workers
  python scripts/train_mini.py dit --work DIR       DiT and text encoder on those latents
  python scripts/train_mini.py score --bundle mini  score of unseen cases, beside the static clip
  python scripts/train_mini.py bundle --work DIR --out jax_videoreason/assets/mini
  python scripts/train_mini.py experts --work DIR --init mini --out DIR/mini_experts
                                                    the DiT continued as two experts, text frozen

With --init BUNDLE the stages vae and dit begin with the weights of a bundle (its depth grown, its
words kept) instead of random ones. Every stage may be killed and started again: finished shards and
the last checkpoint are kept in DIR. The log is DIR/<stage>.jsonl, the loss curve DIR/<stage>.png.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jax_videoreason import (
  checkpoint,
  conditioning,
  runs,
  sampler,
  schedules,
  tasks,
  training,
)
from jax_videoreason.conditioning import known_mask
from jax_videoreason.decode import decode, fit_preview
from jax_videoreason.models.umt5 import UMT5Config, UMT5Encoder
from jax_videoreason.models.wan import WanConfig, WanDiT
from jax_videoreason.models.wan21_vae import WanVAE, WanVAEConfig
from jax_videoreason.plots import loss_curve
from jax_videoreason.sharding import make_mesh
from jax_videoreason.structs import Card, Conditioning, LatentSpec, ModelBundle, Parts
from jax_videoreason.tasks import draw
from jax_videoreason.tokenizer import Tokenizer, train_word_tokenizer

SIZE, FRAMES, TEXT_LENGTH = 32, 17, 32
SHARES = {
  "maze": 0.26,
  "tictactoe": 0.16,
  "sort_bars": 0.16,
  "rotate": 0.16,
  "pick": 0.1,
  "select_largest": 0.08,
  "occlusion": 0.08,
}
EXPERTS_FROM = 0.9  # sigma at which the high-noise expert gives way to the low-noise one
SCENES = 0.25  # share of the VAE's clips that show moving shapes of no task
SHARD = 250
VAE = {
  "base_width": 8,
  "stages": (1, 2, 4),
  "blocks": 1,
  "temporal": (True, True),
  "z_channels": 16,
  "mean": (0.0,) * 16,
  "std": (1.0,) * 16,
}
TEXT = {
  "vocab": 512,
  "width": 64,
  "head_width": 16,
  "heads": 4,
  "ffn_width": 128,
  "layers": 2,
  "dtype": "float32",
}
DIT = {
  "width": 128,
  "ffn_width": 512,
  "heads": 4,
  "layers": 12,
  "in_channels": 36,
  "out_channels": 16,
  "text_width": 64,
  "image_input": "concat",
}


def case_of(number: int) -> tasks.Case:
  """Training case `number` of the mixture: the same on every machine."""
  names = list(SHARES)
  share = np.asarray([SHARES[name] for name in names])
  name = np.random.default_rng([7, number]).choice(names, p=share / share.sum())
  return tasks.load(str(name), size=SIZE, frames=FRAMES).generate("train", number)


def signed(frames: np.ndarray) -> np.ndarray:
  """uint8 -> float32 in [-1, 1]."""
  return frames.astype(np.float32) / 127.5 - 1.0


def grey_after_first(video: np.ndarray) -> np.ndarray:
  """The video the image conditioning encodes: the first frame, then mid-grey (0)."""
  given = np.zeros_like(video)
  given[:, 0] = video[:, 0]
  return given


def all_prompts(count: int) -> list[str]:
  """Prompts of every task, the held-out ones too: their words are known, their use is not."""
  loaded = [tasks.load(name, size=SIZE, frames=FRAMES) for name in tasks.TASKS]
  return sorted(
    {
      t.generate("heldout" if t.held_out else "train", n).prompt
      for t in loaded
      for n in range(count)
    }
  )


class Shards:
  """The memory-mapped files of the training cases, written in shards by worker processes."""

  def __init__(self, folder: Path, count: int, latent: tuple[int, ...]) -> None:
    self.folder, self.count = folder, count
    self.shapes = {
      "latents": ((count, *latent), np.float16),
      "known": ((count, *latent), np.float16),
      "ids": ((count, TEXT_LENGTH), np.int16),
    }

  def open(self, mode: str) -> dict[str, np.ndarray]:
    self.folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, (shape, dtype) in self.shapes.items():
      path = self.folder / f"{name}.npy"
      if mode == "create" and not path.exists():
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
      array = np.load(path, mmap_mode="r" if mode == "r" else "r+")
      if array.shape != shape:
        raise SystemExit(
          f"{path} holds {array.shape}, wanted {shape}: use another --work, or the same --cases."
        )
      arrays[name] = array
    return arrays

  def missing(self) -> list[int]:
    return [s for s in range(0, self.count, SHARD) if not (self.folder / f"done_{s}").exists()]


_worker: dict[str, Any] = {}


def start_worker(work: str, count: int, latent: tuple[int, ...]) -> None:
  """Loads the frozen VAE into a worker process, which leaves an accelerator to the training."""
  jax.config.update("jax_platforms", "cpu")
  bundle_parts, params = load_vae(Path(work))
  _worker["encode"] = jax.jit(
    lambda video: bundle_parts.vae.apply({"params": params}, video, method="encode")
  )
  _worker["shards"] = Shards(Path(work) / "latents", count, latent)
  _worker["arrays"] = _worker["shards"].open("r+")
  _worker["tokenizer"] = Tokenizer(Path(work) / "tokenizer.json")


def encode_shard(start: int) -> int:
  """Generates and encodes one shard of cases; its marker is written last."""
  shards, arrays = _worker["shards"], _worker["arrays"]
  stop = min(start + SHARD, shards.count)
  cases = [case_of(n) for n in range(start, stop)]
  ids, _ = _worker["tokenizer"].encode([c.prompt for c in cases], TEXT_LENGTH)
  arrays["ids"][start:stop] = ids
  for low in range(start, stop, 25):
    high = min(low + 25, stop)
    video = signed(np.stack([c.frames for c in cases[low - start : high - start]]))
    arrays["latents"][low:high] = np.asarray(_worker["encode"](video))
    arrays["known"][low:high] = np.asarray(_worker["encode"](grey_after_first(video)))
  for array in arrays.values():
    array.flush()
  (shards.folder / f"done_{start}").touch()
  return stop - start


def scene(number: int) -> np.ndarray:
  """uint8 (T, height, width, 3): discs, rectangles and lines in motion, so that the VAE can show
  tasks it was never trained on."""
  rng = np.random.default_rng([17, number])
  maps = np.full((FRAMES, SIZE, SIZE), rng.integers(len(draw.RGB)), np.int8)
  row, column = np.mgrid[:SIZE, :SIZE] + 0.5
  for _ in range(rng.integers(2, 9)):
    kind, colour, begins = rng.integers(3), rng.integers(len(draw.RGB)), rng.integers(-FRAMES, 12)
    centre, speed = rng.uniform(0, SIZE, 2), rng.normal(size=2) * rng.choice([0, 0.5, 1.5])
    radius, angle = rng.uniform(1, 7), rng.uniform(0, np.pi)
    for frame in range(max(begins, 0), FRAMES):
      y, x = row - centre[0] - speed[0] * frame, column - centre[1] - speed[1] * frame
      along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
      masks = (
        x**2 + y**2 <= radius**2,
        np.maximum(abs(x), abs(y)) <= radius,
        (abs(along) <= 3 * radius) & (abs(across) <= 0.7),
      )
      maps[frame, masks[kind]] = colour
  return draw.paint(maps)


def clips_of(numbers: range) -> np.ndarray:
  """uint8 (n, T, height, width, 3): what the VAE learns from, tasks in even shares and scenes."""
  names = list(SHARES)
  return np.stack(
    [
      scene(n)
      if np.random.default_rng([19, n]).random() < SCENES
      else tasks.load(names[n % len(names)], size=SIZE, frames=FRAMES).generate("train", n).frames
      for n in numbers
    ]
  )


def make_parts(vae: dict[str, Any]) -> Parts:
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return Parts(
    dit=WanDiT(WanConfig(**DIT, dtype=dtype)),
    vae=WanVAE(WanVAEConfig(**vae)),
    text=UMT5Encoder(UMT5Config(**TEXT)),
  )


def load_vae(work: Path) -> tuple[Any, Any]:
  """The modules with the frozen VAE's normalisation, and the VAE's weights."""
  config = json.loads((work / "vae_config.json").read_text())
  config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
  return make_parts(config), ocp.StandardCheckpointer().restore((work / "vae_frozen").absolute())


class Log:
  """JSON lines beside the weights, and the loss curve they make."""

  def __init__(self, work: Path, stage: str) -> None:
    self.path = work / f"{stage}.jsonl"

  def write(self, **row: Any) -> None:
    with self.path.open("a") as f:
      f.write(json.dumps(row) + "\n")

  def draw(self) -> None:
    rows = [json.loads(line) for line in self.path.read_text().splitlines()]
    rows = [r for r in rows if "loss" in r]
    if rows:
      loss_curve(
        self.path.with_suffix(".png"),
        [r["step"] for r in rows],
        {"loss": np.asarray([r["loss"] for r in rows])},
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A stage of the training: where it writes, what it optimises, on which batches, how long.

  data: whatever else decides the result, compared on resume. rows: leading axis of the arrays that
  are spread over the devices. watch: called with (step, state) every `every` steps, gives rows for
  the log.
  """

  stage: str
  work: Path
  loss: Any
  settings: training.TrainSettings
  batch_of: Callable[[int], dict[str, Any]]
  seed: int
  rows: int
  data: dict[str, Any]
  minutes: float = 1e9
  save_seconds: float = 120.0
  watch: Callable[[int, training.TrainState], Iterable[dict[str, Any]]] | None = None
  every: int = 2_000

  def described(self) -> dict[str, Any]:
    described = {**dataclasses.asdict(self.settings), "seed": self.seed, **self.data}
    return json.loads(json.dumps(described))


def restored(
  manager: ocp.CheckpointManager, step: int, like: training.TrainState
) -> training.TrainState:
  state: Any = manager.restore(step, args=ocp.args.StandardRestore(like))
  return state


def resumed(
  plan: Plan, manager: ocp.CheckpointManager, state: training.TrainState
) -> training.TrainState:
  """The newest checkpoint of the same training, or `state` where there is none."""
  record = plan.work / f"{plan.stage}_settings.json"
  wanted = plan.described()
  step = manager.latest_step()
  if step is None:
    record.write_text(json.dumps(wanted))
    return state
  before = json.loads(record.read_text())
  differ = [
    f"{key}={before.get(key)} (now {wanted.get(key)})"
    for key in sorted({*before, *wanted})
    if before.get(key) != wanted.get(key)
  ]
  if differ:
    raise SystemExit(
      f"{manager.directory} was trained with {', '.join(differ)}: give the same settings, or "
      "another --work."
    )
  return restored(manager, step, state)


def fit(plan: Plan, params: Any) -> training.TrainState:
  """Trains from the last checkpoint to `settings.steps`, or until `minutes` are over.

  Batches are spread over all devices; the next one is read while the devices work. A loss that is
  not finite ends the training with the last good checkpoint kept.
  """
  folder = (plan.work / f"{plan.stage}_state").absolute()
  manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))
  mesh = make_mesh(seed=jax.device_count())
  everywhere, spread = (NamedSharding(mesh, spec) for spec in (P(), P("seed")))
  state = resumed(plan, manager, jax.device_put(training.begin(params, plan.settings), everywhere))
  step = training.make_step(plan.loss, plan.settings, plan.seed)
  log, began, mark = Log(plan.work, plan.stage), time.time(), time.time()
  first, total = int(state.step), plan.settings.steps

  def placed(number: int) -> dict[str, Any]:
    return {
      name: jax.device_put(value, spread if len(value) == plan.rows else everywhere)
      for name, value in plan.batch_of(number).items()
    }

  bar = tqdm(total=total, initial=first, desc=plan.stage, unit="step", mininterval=5)
  with ThreadPoolExecutor(1) as reader:
    coming = reader.submit(placed, first)
    for number in range(first, total):
      batch = coming.result()
      state, metrics = step(state, batch)
      last = number + 1 == total or time.time() - began > 60 * plan.minutes
      if not last:
        coming = reader.submit(placed, number + 1)
      if not metrics["finite"]:
        manager.wait_until_finished()
        raise SystemExit(
          f"{plan.stage}: the loss is not finite at step {number}; the last good checkpoint is "
          f"{manager.latest_step()} in {folder}. Give another --work and a lower --learning-rate."
        )
      bar.update()
      if number % 50 == 49 or last:
        row = {k: np.asarray(v).tolist() for k, v in metrics.items()}
        seconds = time.time() - began
        speed = (number + 1 - first) / seconds
        log.write(step=number + 1, seconds=round(seconds, 1), per_second=round(speed, 2), **row)
        bar.set_postfix(loss=f"{row['loss']:.4f}")
      if time.time() - mark > plan.save_seconds or last:
        manager.save(number + 1, args=ocp.args.StandardSave(state))
        mark = time.time()
      if plan.watch is not None and (number % plan.every == plan.every - 1 or last):
        for row in plan.watch(number + 1, state):
          log.write(step=number + 1, **row)
        log.draw()
      if last:
        break
  bar.close()
  manager.close()
  log.draw()
  return state


def stage_vae(options: argparse.Namespace) -> None:
  work: Path = options.work
  count = options.vae_cases
  path = work / "clips.npy"
  if not path.exists():
    work.mkdir(parents=True, exist_ok=True)
    clips = np.lib.format.open_memmap(
      work / "clips.part.npy", mode="w+", dtype=np.uint8, shape=(count, FRAMES, SIZE, SIZE, 3)
    )
    ranges = [range(s, min(s + 100, count)) for s in range(0, count, 100)]
    with ProcessPoolExecutor(
      options.workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
      for numbers, part in tqdm(
        zip(ranges, pool.map(clips_of, ranges), strict=True), total=len(ranges), desc="clips"
      ):
        clips[numbers.start : numbers.stop] = part
    clips.flush()
    os.replace(work / "clips.part.npy", path)
  if not (work / "tokenizer.json").exists():
    (work / "tokenizer.json").write_text(train_word_tokenizer(all_prompts(options.prompt_cases)))
  clips = np.load(path, mmap_mode="r")
  parts = make_parts(VAE)

  def batch_of(number: int) -> dict[str, Any]:
    # Windows train four times as fast; whole clips at the end teach the long history.
    window, count = (9, 8) if number < 0.8 * options.steps else (FRAMES, 4)
    rng = np.random.default_rng([11, number])
    rows, low = rng.integers(len(clips), size=count), rng.integers(FRAMES - window + 1)
    return {"video": signed(np.stack([clips[r, low : low + window] for r in rows]))}

  if options.init:
    params = checkpoint.load(options.init, parts=("vae",)).vae
  else:
    params = jax.jit(lambda key: parts.vae.init(key, jnp.zeros((1, 5, SIZE, SIZE, 3)))["params"])(
      jax.random.key(0)
    )
  settings = training.TrainSettings(
    steps=options.steps,
    batch=8,
    learning_rate=options.learning_rate,
    warmup=100,
    weight_decay=0.0,
    ema=0.995,
  )
  plan = Plan(
    stage="vae",
    work=work,
    loss=training.vae_loss(parts.vae, 1e-5),
    settings=settings,
    batch_of=batch_of,
    seed=0,
    rows=8,
    data={"clips": count, "shares": SHARES, "init": options.init},
    minutes=options.minutes,
  )
  freeze_vae(work, parts, fit(plan, params).ema, clips)


def stage_decoder(options: argparse.Namespace) -> None:
  """Trains the decoder on, over all trained tasks; the encoder, so every latent, stays as it is."""
  work: Path = options.work
  parts, frozen = load_vae(work)
  names = [name for name, task in tasks.TASKS.items() if not task.held_out]

  def clip(number: int) -> np.ndarray:
    task = tasks.load(names[number % len(names)], size=SIZE, frames=FRAMES)
    return task.generate("train", number).frames

  def batch_of(number: int) -> dict[str, Any]:
    return {"video": signed(np.stack([clip(4 * number + i) for i in range(4)]))}

  def loss(params: Any, batch: Any, key: Any) -> Any:
    whole = {"params": {**frozen, "decoder": params}}
    latents = parts.vae.apply(whole, batch["video"], method="encode_moments")[0]
    again = parts.vae.apply(whole, jax.lax.stop_gradient(latents), method="decode_values")
    wrong = again - batch["video"]
    return jnp.mean(jnp.abs(wrong)) + jnp.mean(jnp.square(wrong)), {}

  settings = training.TrainSettings(
    steps=options.steps, batch=4, learning_rate=1e-3, warmup=20, weight_decay=0.0, ema=0.99
  )
  plan = Plan(
    stage="decoder",
    work=work,
    loss=loss,
    settings=settings,
    batch_of=batch_of,
    seed=2,
    rows=4,
    data={},
    minutes=options.minutes,
  )
  state = fit(plan, frozen["decoder"])
  clips = np.stack([clip(n) for n in range(512)])
  freeze_vae(work, parts, {**frozen, "decoder": state.ema}, clips, keep_scale=True)


def freeze_vae(
  work: Path, parts: Any, params: Any, clips: np.ndarray, keep_scale: bool = False
) -> None:
  """Measures the latents, writes the frozen VAE, fits the preview and says how close they are."""
  moments = jax.jit(lambda v: parts.vae.apply({"params": params}, v, method="encode_moments")[0])
  values = np.concatenate(
    [np.asarray(moments(signed(clips[i : i + 32]))) for i in range(0, 512, 32)]
  )
  config = parts.vae.config
  if keep_scale:
    mean, std = np.asarray(config.mean), np.asarray(config.std)
  else:
    mean, std = values.mean((0, 1, 2, 3)), values.std((0, 1, 2, 3))
  config = {**VAE, "mean": [float(x) for x in mean], "std": [float(x) for x in std]}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save((work / "vae_frozen").absolute(), params, force=True)
  (work / "vae_config.json").write_text(json.dumps(config))
  latents = (values - mean) / std
  preview = fit_preview(latents, clips[:512])
  np.savez(
    work / "preview.npz",
    **{"/".join(str(k.key) for k in p): v for p, v in jax.tree_util.tree_leaves_with_path(preview)},
  )
  decode = jax.jit(lambda z: parts.vae.apply({"params": params}, z, method="decode_values"))
  again = np.concatenate(
    [np.asarray(decode(jnp.asarray(values[i : i + 32]))) for i in range(0, 128, 32)]
  )
  wrong = np.clip(again, -1, 1) - signed(clips[:128])
  print(json.dumps({"vae_psnr": float(10 * np.log10(4 / np.mean(wrong**2)))}))


def stage_encode(options: argparse.Namespace) -> None:
  parts, _ = load_vae(options.work)
  shards = Shards(options.work / "latents", options.cases, latent_shape(parts))
  shards.open("create")
  missing = shards.missing()
  with ProcessPoolExecutor(
    options.workers,
    mp_context=multiprocessing.get_context("spawn"),
    initializer=start_worker,
    initargs=(str(options.work), options.cases, latent_shape(parts)),
  ) as pool:
    bar = tqdm(
      total=options.cases, initial=options.cases - len(missing) * SHARD, desc="encode", unit="case"
    )
    for done in pool.map(encode_shard, missing):
      bar.update(done)


def latent_shape(parts: Any) -> tuple[int, int, int, int]:
  spec = latent_spec(parts)
  return (*spec.grid(FRAMES, SIZE, SIZE), spec.channels)


def latent_spec(parts: Parts) -> LatentSpec:
  return LatentSpec(channels=parts.vae.config.z_channels, stride=parts.vae.config.stride)


def batches(options: argparse.Namespace, parts: Any) -> Callable[[int], dict[str, Any]]:
  """The batch of every step. Each epoch has an order that depends on its number alone."""
  data = Shards(options.work / "latents", options.cases, latent_shape(parts)).open("r")
  empty_ids, empty_mask = Tokenizer(options.work / "tokenizer.json").encode([""], TEXT_LENGTH)
  mask = np.asarray(known_mask(options.batch, latent_spec(parts).grid(FRAMES, SIZE, SIZE)))
  per_epoch = options.cases // options.batch

  def batch_of(number: int) -> dict[str, Any]:
    epoch, place = divmod(number, per_epoch)
    order = np.random.default_rng([13, epoch]).permutation(options.cases)
    rows = np.sort(order[place * options.batch : (place + 1) * options.batch])
    ids = data["ids"][rows].astype(np.int32)
    return {
      "latents": data["latents"][rows],
      "known": data["known"][rows],
      "known_mask": mask,
      "ids": ids,
      "mask": ids > 0,
      "empty_ids": empty_ids,
      "empty_mask": empty_mask,
    }

  return batch_of


def dit_plan(
  options: argparse.Namespace, parts: Any, stage: str, low: float = 0.0, high: float = 1.0
) -> Plan:
  """Flow matching on the encoded cases, over the part low..high of the training sigmas' u."""
  settings = training.TrainSettings(
    steps=options.steps,
    batch=options.batch,
    learning_rate=options.learning_rate,
    shift=options.shift,
    low=low,
    high=high,
  )
  return Plan(
    stage=stage,
    work=options.work,
    loss=training.flow_loss(parts, settings),
    settings=settings,
    batch_of=batches(options, parts),
    seed=1,
    rows=options.batch,
    data={"cases": options.cases, "shares": SHARES, "dit": DIT, "init": options.init},
    minutes=options.minutes,
    every=options.score_every,
  )


def stage_dit(options: argparse.Namespace) -> None:
  work: Path = options.work
  parts, _ = load_vae(work)
  shape = latent_shape(parts)
  params = grown_from(options.init, parts, shape, work) if options.init else begin_dit(parts, shape)

  def watch(step: int, state: training.TrainState) -> Iterable[dict[str, Any]]:
    return scores(bundle_of(work, parts, state.ema), list(SHARES), options)

  plan = dit_plan(options, parts, "dit")
  fit(dataclasses.replace(plan, watch=watch) if options.score_every else plan, params)


def stage_experts(options: argparse.Namespace) -> None:
  """The DiT of --init continued twice, above and below a sigma; everything else is shared."""
  bundle = checkpoint.load(options.init)
  u = EXPERTS_FROM / (options.shift - (options.shift - 1) * EXPERTS_FROM)
  trained = []
  for name, low, high in (("high", u, 1.0), ("low", 0.0, u)):
    plan = dit_plan(options, bundle.parts, f"dit_{name}", low, high)

    def loss(dit: Any, batch: Any, key: Any, whole: Any = plan.loss) -> Any:
      return whole({"dit": dit, "text": bundle.text}, batch, key)

    trained.append(fit(dataclasses.replace(plan, loss=loss), bundle.params[0]).ema)
  card = dataclasses.replace(bundle.card, name="mini_experts", boundary=EXPERTS_FROM)
  experts = dataclasses.replace(bundle, params=tuple(trained), card=card)
  checkpoint.save(experts, options.out, dtype="bfloat16", shared_with=options.init)


def grown_from(name: str, parts: Any, shape: tuple[int, ...], work: Path) -> Any:
  """The weights of a bundle, with more layers, and its words in the places of our tokenizer."""
  bundle, params = checkpoint.load(name), begin_dit(parts, shape)
  before, now = (
    json.loads(Path(path).read_text())["model"]["vocab"]
    for path in (bundle.card.tokenizer, work / "tokenizer.json")
  )
  kept = [word for word in now if word in before]
  embedding = params["text"]["token_embedding"]
  dit, text = bundle.params[0], bundle.text
  if dit is None or text is None:
    raise SystemExit(f"--init {name}: the bundle has no DiT or no text encoder.")
  embedding = embedding.at[np.asarray([now[w] for w in kept])].set(
    text["token_embedding"][np.asarray([before[w] for w in kept])]
  )
  return {
    "dit": training.deepen(dit, parts.dit.config.layers),
    "text": {**text, "token_embedding": embedding},
  }


def begin_dit(parts: Any, shape: tuple[int, ...]) -> Any:
  """Fresh weights of DiT and text encoder."""
  ids = jnp.zeros((1, TEXT_LENGTH), jnp.int32)
  latents = jnp.zeros((1, *shape))
  cond = Conditioning(
    text=jnp.zeros((1, 1, TEXT_LENGTH, parts.text.config.width)),
    known=latents,
    known_mask=jnp.asarray(known_mask(1, latent_spec(parts).grid(FRAMES, SIZE, SIZE))),
  )
  time = jnp.zeros((2, parts.dit.config.freq_dim))
  return {
    "dit": jax.jit(parts.dit.init)(jax.random.key(0), latents, time, cond)["params"],
    "text": jax.jit(parts.text.init)(jax.random.key(1), ids, ids == 0)["params"],
  }


def trained_bundle(work: Path) -> ModelBundle:
  """The bundle of the newest weights of a training that may still be running."""
  parts, _ = load_vae(work)
  manager = ocp.CheckpointManager((work / "dit_state").absolute())
  step = manager.latest_step()
  if step is None:
    raise SystemExit(f"{work}/dit_state holds no checkpoint: run the stage 'dit' first.")
  described = json.loads((work / "dit_settings.json").read_text())
  names = {field.name for field in dataclasses.fields(training.TrainSettings)}
  settings = training.TrainSettings(**{k: v for k, v in described.items() if k in names})
  state = training.begin(begin_dit(parts, latent_shape(parts)), settings)
  return bundle_of(work, parts, restored(manager, step, state).ema)


def bundle_of(work: Path, parts: Parts, weights: Any) -> ModelBundle:
  """The bundle of the frozen VAE with these weights, {"dit", "text"}, computing in float32."""
  preview: dict[str, Any] = {}
  for name, value in np.load(work / "preview.npz").items():
    node = preview
    *path, leaf = name.split("/")
    for key in path:
      node = node.setdefault(key, {})
    node[leaf] = jnp.asarray(value)
  card = Card(
    name="mini",
    family="wan21",
    latents=latent_spec(parts),
    text_length=TEXT_LENGTH,
    tokenizer=str((work / "tokenizer.json").absolute()),
  )
  exact = WanDiT(dataclasses.replace(parts.dit.config, dtype="float32"))
  return ModelBundle(
    params=(weights["dit"],),
    vae=load_vae(work)[1],
    text=weights["text"],
    preview=preview,
    parts=dataclasses.replace(parts, dit=exact),
    card=card,
  )


def scores(
  bundle: ModelBundle, names: Sequence[str], options: argparse.Namespace
) -> Iterable[dict[str, Any]]:
  """One row per task: scores of unseen cases, with guidance, beside the static clip."""
  grid = bundle.card.latents.grid(FRAMES, SIZE, SIZE)
  schedule = schedules.build(
    steps=options.score_steps,
    shift=options.sample_shift,
    guidance=options.guidance,
    freq_dim=bundle.parts.dit.config.freq_dim,
  )
  for name in names:
    task = tasks.load(name, size=SIZE, frames=FRAMES)
    cases = [task.generate("id", i) for i in range(options.score_cases)]
    cond = conditioning.encode(
      bundle, [c.prompt for c in cases], np.stack([c.first_frame for c in cases]), frames=FRAMES
    )
    noise = runs.make_noise([0] * len(cases), (*grid, bundle.card.latents.channels))
    latents, _, _ = sampler.denoise(bundle, noise, cond, schedule)
    frames = decode(bundle, latents)
    reached = [task.score(f, c.metadata) for f, c in zip(frames, cases, strict=True)]
    still = [np.repeat(c.first_frame[None], FRAMES, 0) for c in cases]
    row = {
      "score": [s.value for s in reached],
      "static": [task.score(f, c.metadata).value for f, c in zip(still, cases, strict=True)],
      "strict": [s.strict for s in reached],
      "right": [
        task.parse(f, c.metadata) in c.metadata["answers"]
        for f, c in zip(frames, cases, strict=True)
      ],
      "preservation": [s.preservation for s in reached],
      "process": [s.process for s in reached],
    }
    means = {key: round(float(np.mean(values)), 3) for key, values in row.items()}
    yield {"task": name, **means, "cases": len(cases)}


def stage_score(options: argparse.Namespace) -> None:
  bundle = checkpoint.load(options.bundle) if options.bundle else trained_bundle(options.work)
  for row in scores(bundle, options.tasks or list(SHARES), options):
    print(json.dumps(row), flush=True)


def stage_bundle(options: argparse.Namespace) -> None:
  checkpoint.save(trained_bundle(options.work), options.out, dtype="bfloat16")


STAGES = {
  "vae": stage_vae,
  "decoder": stage_decoder,
  "encode": stage_encode,
  "dit": stage_dit,
  "score": stage_score,
  "bundle": stage_bundle,
  "experts": stage_experts,
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("stage", choices=STAGES)
  parser.add_argument("--work", type=Path, help="where the state of the training lives")
  parser.add_argument("--bundle", help="score: a bundle instead of the training in --work")
  parser.add_argument("--init", help="vae, dit, experts: begin with the weights of this bundle")
  parser.add_argument("--out", type=Path, help="bundle, experts: where the bundle is written")
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
  parser.add_argument(
    "--minutes", type=float, default=1e9, help="stop with a checkpoint after so many"
  )
  parser.add_argument("--steps", type=int, default=8_000)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--cases", type=int, default=24_000, help="training cases that are encoded")
  parser.add_argument("--vae-cases", type=int, default=1_500)
  parser.add_argument("--prompt-cases", type=int, default=1_000, help="of each task, for the words")
  parser.add_argument("--learning-rate", type=float, default=1e-3)
  parser.add_argument("--shift", type=float, default=3.0, help="of the training sigmas")
  parser.add_argument("--sample-shift", type=float, default=5.0)
  parser.add_argument("--guidance", type=float, default=2.0)
  parser.add_argument("--score-every", type=int, default=2_000, help="steps; 0 = never")
  parser.add_argument("--score-cases", type=int, default=32)
  parser.add_argument("--score-steps", type=int, default=20)
  parser.add_argument("--tasks", nargs="*", choices=list(tasks.TASKS))
  options = parser.parse_args()
  if options.stage == "experts" and not options.init:
    parser.error("--init is needed: the bundle whose DiT is continued as two experts.")
  if options.stage in ("bundle", "experts") and not options.out:
    parser.error("--out is needed: the folder of the new bundle.")
  if options.work is None and not (options.stage == "score" and options.bundle):
    parser.error("--work is needed: the folder of the training.")
  if options.work is not None:
    options.work.mkdir(parents=True, exist_ok=True)
  STAGES[options.stage](options)


if __name__ == "__main__":
  main()
