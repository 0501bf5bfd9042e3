"""Trains `mini`, a small member of the Wan family, on the project's own tasks, on CPU, GPU or TPU.

  python scripts/train_mini.py vae --work DIR       the VAE and its linear preview, then frozen
  python scripts/train_mini.py decoder --work DIR   the decoder longer, on all tasks; latents stay
  python scripts/train_mini.py encode --work DIR    cases -> memory-mapped latents, by workers
  python scripts/train_mini.py dit --work DIR       DiT and text encoder on those latents
  python scripts/train_mini.py score --bundle mini  score of unseen cases, beside the static clip
  python scripts/train_mini.py bundle --work DIR --out jax_videoreason/assets/mini

Every stage may be killed and started again: finished shards and the last checkpoint are kept in
DIR. The log is DIR/<stage>.jsonl, the loss curve DIR/<stage>.png.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from jax_videoreason import tasks, training
from jax_videoreason.conditioning import known_mask
from jax_videoreason.models.umt5 import UMT5Config, UMT5Encoder
from jax_videoreason.models.wan import WanConfig, WanDiT
from jax_videoreason.models.wan21_vae import WanVAE, WanVAEConfig
from jax_videoreason.structs import Card, LatentSpec, ModelBundle, Parts
from jax_videoreason.tokenizer import Tokenizer, train_word_tokenizer

SIZE, FRAMES, TEXT_LENGTH = 32, 17, 32
SHARES = {
  "maze": 0.2,
  "tictactoe": 0.2,
  "pick": 0.22,
  "select_largest": 0.22,
  "occlusion": 0.16,
}
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
  "layers": 8,
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
  """Loads the frozen VAE into a worker process."""
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


def clips_of(numbers: range) -> np.ndarray:
  """uint8 (n, T, height, width, 3)."""
  return np.stack([case_of(n).frames for n in numbers])


def make_parts(vae: dict[str, Any]) -> Parts:
  return Parts(
    dit=WanDiT(WanConfig(**DIT)),
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
    from jax_videoreason.plots import loss_curve

    rows = [json.loads(line) for line in self.path.read_text().splitlines()]
    rows = [r for r in rows if "loss" in r]
    if rows:
      loss_curve(
        self.path.with_suffix(".png"),
        [r["step"] for r in rows],
        {"loss": np.asarray([r["loss"] for r in rows])},
      )


def fit(
  stage: str,
  work: Path,
  loss: Any,
  params: Any,
  settings: training.TrainSettings,
  batch_of: Any,
  seed: int,
  minutes: float,
) -> training.TrainState:
  """Trains from the last checkpoint to `settings.steps`, or until `minutes` are over."""
  described = json.loads(json.dumps({"settings": dataclasses.asdict(settings), "seed": seed}))
  folder = (work / f"{stage}_state").absolute()
  manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))
  state = training.begin(params, settings)
  record = work / f"{stage}_settings.json"
  if manager.latest_step() is not None:
    before = json.loads(record.read_text())
    flat, wanted = ({**d["settings"], "seed": d["seed"]} for d in (before, described))
    differ = [
      f"{k}={flat.get(k)} (now {wanted.get(k)})" for k in wanted if flat.get(k) != wanted.get(k)
    ]
    if differ:
      raise SystemExit(
        f"{folder} was trained with {', '.join(differ)}: give the same settings, or another --work."
      )
    state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
  record.write_text(json.dumps(described))
  step = training.make_step(loss, settings, seed)
  log, began, mark = Log(work, stage), time.time(), time.time()
  first = int(state.step)
  bar = tqdm(total=settings.steps, initial=first, desc=stage, unit="step", mininterval=5)
  metrics: dict[str, Any] = {}
  for number in range(first, settings.steps):
    state, metrics = step(state, batch_of(number))
    bar.update()
    last = number + 1 == settings.steps or time.time() - began > 60 * minutes
    if number % 50 == 49 or last:
      row = {k: np.asarray(v).tolist() for k, v in metrics.items()}
      if not row["finite"]:
        raise SystemExit(
          f"{stage}: the loss is not finite at step {number}; the last good checkpoint is "
          f"{manager.latest_step()} in {folder}. Lower the learning rate and start again."
        )
      log.write(step=number + 1, seconds=round(time.time() - began, 1), **row)
      bar.set_postfix(loss=f"{row['loss']:.4f}")
    if time.time() - mark > 120 or last:
      manager.save(number + 1, args=ocp.args.StandardSave(state))
      manager.wait_until_finished()
      mark = time.time()
    if last:
      break
  bar.close()
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
    prompts = {case_of(n).prompt for n in range(options.prompt_cases)}
    (work / "tokenizer.json").write_text(train_word_tokenizer(sorted(prompts)))
  clips = np.load(path, mmap_mode="r")
  parts = make_parts(VAE)

  def batch_of(number: int) -> dict[str, Any]:
    # Windows train four times as fast; whole clips at the end teach the long history.
    window, count = (9, 8) if number < 0.8 * options.steps else (FRAMES, 4)
    rng = np.random.default_rng([11, number])
    rows, low = rng.integers(len(clips), size=count), rng.integers(FRAMES - window + 1)
    return {"video": signed(np.stack([clips[r, low : low + window] for r in rows]))}

  params = jax.jit(lambda key: parts.vae.init(key, jnp.zeros((1, 5, SIZE, SIZE, 3)))["params"])(
    jax.random.key(0)
  )
  settings = training.TrainSettings(
    steps=options.steps, batch=8, learning_rate=2e-3, warmup=100, weight_decay=0.0, ema=0.995
  )
  state = fit(
    "vae", work, training.vae_loss(parts.vae, 1e-5), params, settings, batch_of, 0, options.minutes
  )
  freeze_vae(work, parts, state.ema, clips)


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
  state = fit("decoder", work, loss, frozen["decoder"], settings, batch_of, 2, options.minutes)
  clips = np.stack([clip(n) for n in range(512)])
  freeze_vae(work, parts, {**frozen, "decoder": state.ema}, clips, keep_scale=True)


def freeze_vae(
  work: Path, parts: Any, params: Any, clips: np.ndarray, keep_scale: bool = False
) -> None:
  """Measures the latents, writes the frozen VAE, fits the preview and says how close they are."""
  from jax_videoreason.decode import fit_preview

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


def latent_shape(parts: Any) -> tuple[int, ...]:
  spec = latent_spec(parts)
  return (*spec.grid(FRAMES, SIZE, SIZE), spec.channels)


def latent_spec(parts: Parts) -> LatentSpec:
  return LatentSpec(channels=parts.vae.config.z_channels, stride=parts.vae.config.stride)


def stage_dit(options: argparse.Namespace) -> None:
  work: Path = options.work
  parts, _ = load_vae(work)
  shape = latent_shape(parts)
  data = Shards(work / "latents", options.cases, shape).open("r")
  empty_ids, empty_mask = Tokenizer(work / "tokenizer.json").encode([""], TEXT_LENGTH)
  mask = np.asarray(known_mask(options.batch, shape[:3]))
  settings = training.TrainSettings(
    steps=options.steps,
    batch=options.batch,
    learning_rate=options.learning_rate,
    shift=options.shift,
  )

  def batch_of(number: int) -> dict[str, Any]:
    # Every epoch has its own order, which depends on nothing but the number of the step.
    per_epoch = options.cases // options.batch
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

  fit(
    "dit",
    work,
    training.flow_loss(parts, settings),
    begin_dit(parts, shape),
    settings,
    batch_of,
    1,
    options.minutes,
  )


def begin_dit(parts: Any, shape: tuple[int, ...]) -> Any:
  """Fresh weights of DiT and text encoder."""
  from jax_videoreason.structs import Conditioning

  ids = jnp.zeros((1, TEXT_LENGTH), jnp.int32)
  latents = jnp.zeros((1, *shape))
  cond = Conditioning(
    text=jnp.zeros((1, 1, TEXT_LENGTH, parts.text.config.width)),
    known=latents,
    known_mask=jnp.asarray(known_mask(1, shape[:3])),
  )
  time = jnp.zeros((2, parts.dit.config.freq_dim))
  return {
    "dit": jax.jit(parts.dit.init)(jax.random.key(0), latents, time, cond)["params"],
    "text": jax.jit(parts.text.init)(jax.random.key(1), ids, ids == 0)["params"],
  }


def trained_bundle(work: Path) -> ModelBundle:
  """The bundle of the newest weights of a training that may still be running."""
  parts, vae = load_vae(work)
  manager = ocp.CheckpointManager((work / "dit_state").absolute())
  step = manager.latest_step()
  if step is None:
    raise SystemExit(f"{work}/dit_state holds no checkpoint: run the stage 'dit' first.")
  described = json.loads((work / "dit_settings.json").read_text())["settings"]
  state = training.begin(begin_dit(parts, latent_shape(parts)), training.TrainSettings(**described))
  state = manager.restore(step, args=ocp.args.StandardRestore(state))
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
  return ModelBundle(
    params=(state.ema["dit"],),
    vae=vae,
    text=state.ema["text"],
    preview=preview,
    parts=parts,
    card=card,
  )


def stage_score(options: argparse.Namespace) -> None:
  """Scores unseen cases of every trained task, with guidance."""
  from jax_videoreason import checkpoint, conditioning, runs, sampler, schedules
  from jax_videoreason.decode import decode

  bundle = checkpoint.load(options.bundle) if options.bundle else trained_bundle(options.work)
  grid = bundle.card.latents.grid(FRAMES, SIZE, SIZE)
  for name in options.tasks or list(SHARES):
    task = tasks.load(name, size=SIZE, frames=FRAMES)
    cases = [task.generate("id", i) for i in range(options.score_cases)]
    cond = conditioning.encode(
      bundle, [c.prompt for c in cases], np.stack([c.first_frame for c in cases]), frames=FRAMES
    )
    noise = runs.make_noise([0] * len(cases), (*grid, bundle.card.latents.channels))
    schedule = schedules.build(
      steps=options.score_steps,
      shift=options.sample_shift,
      guidance=options.guidance,
      freq_dim=bundle.parts.dit.config.freq_dim,
    )
    latents, _, _ = sampler.denoise(bundle, noise, cond, schedule)
    frames = decode(bundle, latents)
    scores = [task.score(f, c.metadata) for f, c in zip(frames, cases, strict=True)]
    static = [
      task.score(np.repeat(c.first_frame[None], FRAMES, 0), c.metadata).value for c in cases
    ]
    right = [
      task.parse(f, c.metadata) in c.metadata["answers"] for f, c in zip(frames, cases, strict=True)
    ]
    print(
      json.dumps(
        {
          "task": name,
          "score": round(float(np.mean([s.value for s in scores])), 3),
          "static": round(float(np.mean(static)), 3),
          "strict": round(float(np.mean([s.strict for s in scores])), 3),
          "right": round(float(np.mean(right)), 3),
          "preservation": round(float(np.mean([s.preservation for s in scores])), 3),
          "process": round(float(np.mean([s.process for s in scores])), 3),
          "cases": len(cases),
        }
      ),
      flush=True,
    )


def stage_bundle(options: argparse.Namespace) -> None:
  from jax_videoreason import checkpoint

  checkpoint.save(trained_bundle(options.work), options.out, dtype="bfloat16")


STAGES = {
  "vae": stage_vae,
  "decoder": stage_decoder,
  "encode": stage_encode,
  "dit": stage_dit,
  "score": stage_score,
  "bundle": stage_bundle,
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("stage", choices=STAGES)
  parser.add_argument("--work", type=Path, help="where the state of the training lives")
  parser.add_argument("--bundle", help="score: a bundle instead of the training in --work")
  parser.add_argument("--out", type=Path, help="bundle: where the bundle is written")
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
  parser.add_argument(
    "--minutes", type=float, default=1e9, help="stop with a checkpoint after so many"
  )
  parser.add_argument("--steps", type=int, default=8_000)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--cases", type=int, default=24_000, help="training cases that are encoded")
  parser.add_argument("--vae-cases", type=int, default=1_500)
  parser.add_argument("--prompt-cases", type=int, default=3_000)
  parser.add_argument("--learning-rate", type=float, default=1e-3)
  parser.add_argument("--shift", type=float, default=3.0, help="of the training sigmas")
  parser.add_argument("--sample-shift", type=float, default=5.0)
  parser.add_argument("--guidance", type=float, default=2.0)
  parser.add_argument("--score-cases", type=int, default=32)
  parser.add_argument("--score-steps", type=int, default=20)
  parser.add_argument("--tasks", nargs="*", choices=list(tasks.TASKS))
  options = parser.parse_args()
  if options.work is None and not (options.stage == "score" and options.bundle):
    parser.error("--work is needed: the folder of the training.")
  if options.work is not None:
    options.work.mkdir(parents=True, exist_ok=True)
  STAGES[options.stage](options)


if __name__ == "__main__":
  main()
