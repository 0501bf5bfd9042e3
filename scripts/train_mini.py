"""Trains `mini`, a small member of the Wan family, on the project's own tasks, on CPU, GPU or TPU.

  python scripts/train_mini.py vae --work DIR       the VAE, then frozen
  python scripts/train_mini.py encode --work DIR    cases -> memory-mapped latents, by workers
  python scripts/train_mini.py dit --work DIR       DiT and text encoder on those latents
  python scripts/train_mini.py bundle --work DIR --out jax_videoreason/assets/mini
  python scripts/train_mini.py preview --work DIR --init BUNDLE --out DIR/mini
                                                    BUNDLE with a small decoder, from its own runs
  python scripts/train_mini.py experts --work DIR --init mini --out DIR/mini_experts
                                                    the DiT continued as two experts, text frozen

With --init BUNDLE the stages vae and dit begin with the weights of a bundle (its depth grown, its
words kept) instead of random ones. Every stage may be killed and started again: finished shards and
the last checkpoint are kept in DIR. DIR/<stage>.jsonl and DIR/<stage>.png show the loss, also per
band of sigma, and scores of unseen cases that `videoreason evaluate` does not ask. On several hosts
that share DIR (as `jax_videoreason.distributed` finds them) vae, dit and experts are data parallel:
start the same command on all.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_videoreason import (
  baselines,
  bundles,
  checkpoint,
  conditioning,
  console,
  distributed,
  encoded,
  evaluate,
  fitting,
  plots,
  runs,
  sampler,
  schedules,
  tasks,
  training,
)
from jax_videoreason.conditioning import known_mask
from jax_videoreason.decode import decode, preview_explained
from jax_videoreason.folders import atomic, beside
from jax_videoreason.models.preview import PreviewConfig, PreviewDecoder
from jax_videoreason.models.umt5 import UMT5Config, UMT5Encoder
from jax_videoreason.models.wan import WanConfig, WanDiT
from jax_videoreason.models.wan21_vae import WanVAE, WanVAEConfig
from jax_videoreason.records import read_json, write_json
from jax_videoreason.structs import Card, Conditioning, LatentSpec, ModelBundle, Parts, key_of
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
CLIPS_AT_ONCE = (8, 4)  # a batch of the VAE: windows, then whole clips
SCENES = 0.25  # share of the VAE's clips that show moving shapes of no task
ASKED = 32  # cases of each task that `evaluate` asks by itself
WATCHED_FROM = 100_000  # index of the first watched case: `evaluate` asks those from 0 on
BANDS = [f"sigma {a:g} to {b:g}" for a, b in zip(training.BANDS, training.BANDS[1:], strict=False)]
VAE = {
  "base_width": 8,
  "stages": (1, 2, 4),
  "blocks": 1,
  "temporal": (True, True),
  "z_channels": 16,
  "mean": (0.0,) * 16,
  "std": (1.0,) * 16,
}
PREVIEW = {"width": 64, "blocks": 2}
SHARD_RUNS = 32  # of training cases, of which all steps are kept
SHARD_ARRAYS = ("latents", "video")
PREVIEW_END = {"end": 2, "weight": 4.0}  # most tasks are answered in the last two frames
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


def even_case_of(number: int) -> tasks.Case:
  """Training case `number` where all tasks have the same share."""
  names = list(SHARES)
  name = names[number % len(names)]
  return tasks.load(name, size=SIZE, frames=FRAMES).generate("train", number)


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


_worker: dict[str, Any] = {}


def start_worker(work: str, count: int) -> None:
  """Loads the frozen VAE into a worker process, which leaves an accelerator to the training."""
  jax.config.update("jax_platforms", "cpu")
  parts, params = load_vae(Path(work))
  _worker["encode"] = jax.jit(
    lambda video: parts.vae.apply({"params": params}, video, method="encode")
  )
  _worker["cases"] = encoded_cases(Path(work), count, parts)
  _worker["arrays"] = _worker["cases"].open(write=True)
  _worker["tokenizer"] = Tokenizer(Path(work) / "tokenizer.json")


def encode_shard(start: int) -> int:
  """Generates and encodes one shard of cases; its marker is written last."""
  arrays = _worker["arrays"]
  stop = min(start + encoded.SHARD, _worker["cases"].count)
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
  _worker["cases"].finish(start)
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
  return np.stack(
    [
      scene(n) if np.random.default_rng([19, n]).random() < SCENES else even_case_of(n).frames
      for n in numbers
    ]
  )


def make_parts(vae: dict[str, Any]) -> Parts:
  return Parts(
    dit=computing(WanConfig(**DIT)),
    vae=WanVAE(WanVAEConfig(**vae)),
    text=UMT5Encoder(UMT5Config(**TEXT)),
  )


def computing(config: WanConfig) -> WanDiT:
  """The network as it is trained: in bfloat16 where the device has it."""
  return WanDiT(dataclasses.replace(config, dtype=training.compute_dtype(jax.devices()[0])))


def load_vae(work: Path) -> tuple[Any, Any]:
  """The modules with the frozen VAE's normalisation, and the VAE's weights."""
  config = read_json(work / "vae_config.json")
  config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
  params = jax.tree.map(jnp.asarray, checkpoint.read_tree(work / "vae_frozen"))
  return make_parts(config), params


def marks_of(parts: Parts, vae: Any, tokenizer: str | Path) -> dict[str, str]:
  """What tells the VAE and the tokenizer of a folder or of a bundle from others."""
  return encoded.marks(dataclasses.asdict(parts.vae.config), vae, tokenizer)


def encoded_cases(work: Path, count: int, parts: Parts) -> encoded.Encoded:
  return encoded.Encoded(work / "latents", count, latent_shape(parts), TEXT_LENGTH)


def fit(stage: fitting.Stage, params: Any) -> training.TrainState:
  """`fitting.fit` with a bar and a picture."""

  def show(rows: list[dict[str, Any]]) -> None:
    losses = [row for row in rows if "loss" in row]
    if not losses:
      return
    bands = np.array([row.get("bands", [None] * len(BANDS)) for row in losses], float)
    scored = sorted({row["task"] for row in rows if "task" in row})
    plots.training_curves(
      stage.log.with_suffix(".png"),
      [row["step"] for row in losses],
      {
        "loss": np.array([row["loss"] for row in losses]),
        **{
          name: band for name, band in zip(BANDS, bands.T, strict=True) if np.isfinite(band).any()
        },
      },
      {
        task: [(row["step"], row["score"]) for row in rows if row.get("task") == task]
        for task in scored
      },
    )

  with console.progress(stage.settings.steps, stage.name, "step") as advance:
    return fitting.fit(stage, params, advance=advance, show=show)


def prepare_clips(options: argparse.Namespace) -> np.ndarray:
  """The VAE's training clips, memory-mapped, and a tokenizer beside them; process 0 makes both."""
  path, words = options.work / "clips.npy", options.work / "tokenizer.json"
  count = options.vae_cases
  if jax.process_index() == 0 and not path.exists():
    ranges = [range(s, min(s + 100, count)) for s in range(0, count, 100)]
    with (
      beside(path) as part,
      ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool,
      console.progress(count, "clips", "clip") as advance,
    ):
      clips = np.lib.format.open_memmap(
        part, mode="w+", dtype=np.uint8, shape=(count, FRAMES, SIZE, SIZE, 3)
      )
      for numbers, made in zip(ranges, pool.map(clips_of, ranges), strict=True):
        clips[numbers.start : numbers.stop] = made
        advance(len(numbers))
      clips.flush()
  if jax.process_index() == 0 and not words.exists():
    with atomic(words) as part:
      part.write_text(train_word_tokenizer(all_prompts(options.prompt_cases)))
  distributed.meet("clips")
  clips = np.load(path, mmap_mode="r")
  if len(clips) != count:
    raise ValueError(
      f"{path} holds {len(clips)} clips and --vae-cases={count}: give the same, or another --work."
    )
  return clips


def stage_vae(options: argparse.Namespace) -> None:
  clips = prepare_clips(options)
  parts = make_parts(VAE)

  def batch_of(number: int) -> dict[str, Any]:
    # Windows train four times as fast; whole clips at the end teach the long history.
    early = number < 0.8 * options.steps
    window, count = (9, CLIPS_AT_ONCE[0]) if early else (FRAMES, CLIPS_AT_ONCE[1])
    rng = np.random.default_rng([11, number])
    rows, low = rng.integers(len(clips), size=count), rng.integers(FRAMES - window + 1)
    return {"video": signed(np.stack([clips[r, low : low + window] for r in rows]))}

  if options.init:
    params = checkpoint.load(options.init, parts=("vae",)).vae
  else:
    params = jax.jit(lambda key: parts.vae.init(key, jnp.zeros((1, 5, SIZE, SIZE, 3)))["params"])(
      key_of(0)
    )
  settings = training.TrainSettings(
    steps=options.steps,
    batch=CLIPS_AT_ONCE[0],
    learning_rate=options.learning_rate,
    warmup=100,
    weight_decay=0.0,
    ema=0.995,
  )
  stage = fitting.Stage(
    name="vae",
    folder=options.work,
    loss=training.vae_loss(parts.vae, 1e-5),
    settings=settings,
    batch_of=batch_of,
    seed=0,
    rows=math.gcd(*CLIPS_AT_ONCE),
    data={
      "clips": len(clips),
      "shares": SHARES,
      "scenes": SCENES,
      "vae": VAE,
      "init": begun_from(options),
    },
    minutes=options.minutes,
  )
  trained = fit(stage, params).ema
  if jax.process_index() == 0:
    freeze_vae(options.work, parts, trained, clips)


def freeze_vae(work: Path, parts: Parts, params: Any, clips: np.ndarray) -> None:
  """Measures the latents, writes the frozen VAE and says how close its videos are."""
  moments = jax.jit(lambda v: parts.vae.apply({"params": params}, v, method="encode_moments")[0])
  clips = clips[:512]
  values = np.concatenate(
    [np.asarray(moments(signed(clips[i : i + 32]))) for i in range(0, len(clips), 32)]
  )
  mean, std = values.mean((0, 1, 2, 3)), values.std((0, 1, 2, 3))
  config = {**VAE, "mean": [float(x) for x in mean], "std": [float(x) for x in std]}
  write_json(work / "vae_config.json", config)
  checkpoint.write_tree(work / "vae_frozen", jax.tree.map(np.asarray, params))
  decode = jax.jit(lambda z: parts.vae.apply({"params": params}, z, method="decode_values"))
  again = np.concatenate(
    [np.asarray(decode(jnp.asarray(values[i : i + 32]))) for i in range(0, len(values[:128]), 32)]
  )
  wrong = np.clip(again, -1, 1) - signed(clips[:128])
  print(json.dumps({"vae_psnr": float(10 * np.log10(4 / np.mean(wrong**2)))}))


def stage_encode(options: argparse.Namespace) -> None:
  parts, vae = load_vae(options.work)
  cases = encoded_cases(options.work, options.cases, parts)
  cases.create(marks_of(parts, vae, options.work / "tokenizer.json"))
  missing = cases.missing()
  with (
    ProcessPoolExecutor(
      options.workers,
      mp_context=multiprocessing.get_context("spawn"),
      initializer=start_worker,
      initargs=(str(options.work), options.cases),
    ) as pool,
    console.progress(len(missing), "encode", "shard") as advance,
  ):
    for _ in pool.map(encode_shard, missing):
      advance(1)


def latent_shape(parts: Any) -> tuple[int, int, int, int]:
  return latent_spec(parts).shape(FRAMES, SIZE, SIZE)


def latent_spec(parts: Parts) -> LatentSpec:
  return LatentSpec(channels=parts.vae.config.z_channels, stride=parts.vae.config.stride)


def batches(
  options: argparse.Namespace, cases: encoded.Encoded, parts: Parts
) -> Callable[[int], dict[str, Any]]:
  """The batch of every step."""
  data = cases.open()
  empty_ids, empty_mask = Tokenizer(options.work / "tokenizer.json").encode([""], TEXT_LENGTH)
  mask = np.asarray(known_mask(options.batch, latent_spec(parts).grid(FRAMES, SIZE, SIZE)))

  def batch_of(number: int) -> dict[str, Any]:
    rows = encoded.rows_of(number, options.batch, options.cases)
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


def dit_stage(
  options: argparse.Namespace, parts: Parts, name: str, low: float = 0.0, high: float = 1.0
) -> fitting.Stage:
  """Flow matching on the encoded cases, over the part low..high of the training sigmas' u.

  ValueError: the latents of --work were made with another VAE or tokenizer than it has, or they are
  fewer than a batch.
  """
  if options.batch > options.cases:
    raise ValueError(
      f"--batch={options.batch} of --cases={options.cases}: no case comes twice in an epoch, give "
      f"at most --batch={options.cases}."
    )
  settings = training.TrainSettings(
    steps=options.steps,
    batch=options.batch,
    learning_rate=options.learning_rate,
    shift=options.shift,
    low=low,
    high=high,
  )
  cases = encoded_cases(options.work, options.cases, parts)
  made_by = cases.made_by()
  own_parts, vae = load_vae(options.work)
  own = marks_of(own_parts, vae, options.work / "tokenizer.json")
  encoded.check(made_by, own, str(options.work), "encode the cases again, in another --work")
  return fitting.Stage(
    name=name,
    folder=options.work,
    loss=training.flow_loss(parts, settings),
    settings=settings,
    batch_of=batches(options, cases, parts),
    seed=1,
    rows=options.batch,
    data={
      "cases": options.cases,
      "shares": SHARES,
      "dit": DIT,
      "dtype": parts.dit.config.dtype,
      "text": TEXT,
      "made_by": made_by,
      "init": begun_from(options),
    },
    minutes=options.minutes,
    every=options.score_every,
  )


def begun_from(options: argparse.Namespace) -> str | None:
  """The fingerprint of the bundle of --init."""
  return bundles.fingerprint(options.init) if options.init else None


def stage_dit(options: argparse.Namespace) -> None:
  work: Path = options.work
  parts, vae = load_vae(work)
  stage = dit_stage(options, parts, "dit")
  shape = latent_shape(parts)
  params = grown_from(options, parts, shape, stage) if options.init else begin_dit(parts, shape)

  def watch(step: int, weights: Any) -> Iterable[dict[str, Any]]:
    return scores(bundle_of(work, parts, vae, weights), options)

  fit(dataclasses.replace(stage, watch=watch) if options.score_every else stage, params)


def stage_experts(options: argparse.Namespace) -> None:
  """The DiT of --init continued twice, above and below a sigma; everything else is shared."""
  bundle = checkpoint.load(options.init)
  parts = dataclasses.replace(bundle.parts, dit=computing(bundle.parts.dit.config))
  u = EXPERTS_FROM / (options.shift - (options.shift - 1) * EXPERTS_FROM)
  trained = []
  for name, low, high in (("high", u, 1.0), ("low", 0.0, u)):
    stage = dit_stage(options, parts, f"dit_{name}", low, high)
    check_init(options, bundle, stage)

    def loss(dit: Any, batch: Any, key: Any, whole: Any = stage.loss) -> Any:
      return whole({"dit": dit, "text": bundle.text}, batch, key)

    trained.append(fit(dataclasses.replace(stage, loss=loss), bundle.params[0]).ema)
  card = dataclasses.replace(bundle.card, name="mini_experts", boundary=EXPERTS_FROM)
  experts = dataclasses.replace(bundle, params=tuple(trained), card=card)
  if jax.process_index() == 0:
    checkpoint.save(experts, options.out, dtype="bfloat16", shared_with=options.init)


def check_init(options: argparse.Namespace, bundle: ModelBundle, stage: fitting.Stage) -> None:
  """ValueError where the bundle of --init saw latents or words of another kind."""
  encoded.check(
    stage.data["made_by"],
    marks_of(bundle.parts, bundle.vae, bundle.card.tokenizer),
    f"--init {options.init}",
    "encode the cases with its VAE and tokenizer, or, for the stage dit, say --other-vae to have "
    "its DiT learn the new ones",
  )


def grown_from(
  options: argparse.Namespace, parts: Parts, shape: tuple[int, ...], stage: fitting.Stage
) -> Any:
  """The weights of --init, with more layers, and its words in the places of our tokenizer."""
  bundle, params = checkpoint.load(options.init), begin_dit(parts, shape)
  if not options.other_vae:
    check_init(options, bundle, stage)
  before, now = (
    json.loads(Path(path).read_text())["model"]["vocab"]
    for path in (bundle.card.tokenizer, options.work / "tokenizer.json")
  )
  kept = [word for word in now if word in before]
  embedding = params["text"]["token_embedding"]
  dit, text = bundle.params[0], bundle.text
  if dit is None or text is None:
    raise ValueError(f"--init {options.init}: the bundle has no DiT or no text encoder.")
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
    "dit": jax.jit(parts.dit.init)(key_of(0), latents, time, cond)["params"],
    "text": jax.jit(parts.text.init)(key_of(1), ids, ids == 0)["params"],
  }


def trained_bundle(work: Path) -> ModelBundle:
  """The bundle of the newest weights of a training that may still be running."""
  parts, vae = load_vae(work)
  trained = fitting.newest("dit", work, begin_dit(parts, latent_shape(parts))).ema
  return bundle_of(work, parts, vae, trained)


def bundle_of(work: Path, parts: Parts, vae: Any, weights: Any) -> ModelBundle:
  """The bundle of the frozen VAE with these weights, {"dit", "text"}, computing in float32."""
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
    vae=vae,
    text=weights["text"],
    parts=dataclasses.replace(parts, dit=exact),
    card=card,
  )


def scores(bundle: ModelBundle, options: argparse.Namespace) -> Iterable[dict[str, Any]]:
  """One row per task: marks of unseen cases, with guidance, beside the static clip."""
  shape = bundle.card.latents.shape(FRAMES, SIZE, SIZE)
  schedule = schedules.build(
    steps=options.score_steps,
    shift=options.sample_shift,
    guidance=options.guidance,
    freq_dim=bundle.parts.dit.config.freq_dim,
  )
  for name in SHARES:
    task = tasks.load(name, size=SIZE, frames=FRAMES)
    cases = watched_cases(task, options.score_cases)
    cond = conditioning.encode(
      bundle, [c.prompt for c in cases], np.stack([c.first_frame for c in cases]), frames=FRAMES
    )
    noise = runs.make_noise([0] * len(cases), shape)
    latents, _, _ = sampler.denoise(bundle, noise, cond, schedule)
    own, still = (
      baselines.mean(
        [baselines.mark(task, f, c.metadata) for f, c in zip(clips, cases, strict=True)]
      )
      for clips in (
        decode(bundle, latents),
        [baselines.still(c.first_frame, FRAMES) for c in cases],
      )
    )
    names = ("score", "strict", "right", "preservation", "process")
    row = {key: round(getattr(own, key), 3) for key in names}
    yield {"task": name, **row, "static": round(still.score, 3), "cases": len(cases)}


def watched_cases(task: tasks.Task, count: int) -> list[tasks.Case]:
  """Unseen cases of no problem that `evaluate` asks unless told to ask more: what was watched is no
  test any more."""
  asked = {case.metadata["hash"] for case in evaluate.cases_of(task, "id", ASKED, "both")}
  drawn = evaluate.cases_of(task, "id", 4 * count, "both", first=WATCHED_FROM)
  return [case for case in drawn if case.metadata["hash"] not in asked][:count]


def stage_bundle(options: argparse.Namespace) -> None:
  checkpoint.save(trained_bundle(options.work), options.out, dtype="bfloat16")


def stage_preview(options: argparse.Namespace) -> None:
  """The bundle of --init with a decoder that shows what its VAE shows, learnt from its own runs."""
  if options.cases < 2 * SHARD_RUNS:
    raise ValueError(
      f"--cases={options.cases}: the last {SHARD_RUNS} runs are kept to compare with, give at "
      f"least --cases={2 * SHARD_RUNS}."
    )
  if options.out.exists():
    raise ValueError(f"{options.out} exists already: remove it, or give another --out.")
  bundle = checkpoint.load(options.init)
  spec = bundle.card.latents
  decoder = PreviewDecoder(PreviewConfig(stride=spec.stride, z_channels=spec.channels, **PREVIEW))
  *taught, held = x0_shards(options, bundle)
  cells = jnp.zeros((1, *latent_shape(bundle.parts)))
  fresh = jax.jit(decoder.init)(key_of(2), cells)["params"]
  learnt = fit(preview_stage(options, decoder, taught), fresh).ema
  parts = dataclasses.replace(bundle.parts, preview=decoder)
  checkpoint.save(
    dataclasses.replace(bundle, preview=learnt, parts=parts), options.out, dtype="bfloat16"
  )
  shown = checkpoint.load(options.out, parts=("vae", "preview"))
  print(json.dumps({"preview_explained": preview_explained(shown, held["latents"])}))


def preview_stage(
  options: argparse.Namespace, decoder: PreviewDecoder, shards: list[dict[str, np.ndarray]]
) -> fitting.Stage:
  """Whole videos of any step and run of the shards, as the VAE shows them."""

  def batch_of(number: int) -> dict[str, Any]:
    rng = np.random.default_rng([23, number])
    drawn = [
      (shards[rng.integers(len(shards))], rng.integers(options.score_steps), run)
      for run in rng.integers(SHARD_RUNS, size=options.batch)
    ]
    latents, video = (
      np.stack([shard[name][step, run] for shard, step, run in drawn]) for name in SHARD_ARRAYS
    )
    return {"latents": latents, "video": signed(video)}

  return fitting.Stage(
    name="preview",
    folder=options.work,
    loss=training.preview_loss(decoder, **PREVIEW_END),
    settings=training.TrainSettings(
      steps=options.steps,
      batch=options.batch,
      learning_rate=options.learning_rate,
      warmup=100,
      weight_decay=0.0,
      ema=0.995,
    ),
    batch_of=batch_of,
    rows=options.batch,
    seed=2,
    data={
      "cases": options.cases,
      "sampled": sampled_as(options),
      "preview": PREVIEW,
      "end": PREVIEW_END,
    },
    minutes=options.minutes,
  )


def sampled_as(options: argparse.Namespace) -> dict[str, Any]:
  """What decides the runs of `x0_shards`."""
  return {
    "steps": options.score_steps,
    "shift": options.sample_shift,
    "guidance": options.guidance,
    "runs": SHARD_RUNS,
    "tasks": list(SHARES),
    "video": [FRAMES, SIZE, SIZE],
    "init": begun_from(options),
  }


def x0_shards(options: argparse.Namespace, bundle: ModelBundle) -> list[dict[str, np.ndarray]]:
  """Shards of `SHARD_RUNS` runs of training cases: the normalised x0 of every step, float32, and
  its video by the VAE, uint8, both S R ..., memory-mapped; made where they are lacking."""
  asked = json.dumps(sampled_as(options), sort_keys=True)
  folder = options.work / f"x0_{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
  shape, firsts = latent_shape(bundle.parts), range(0, options.cases - SHARD_RUNS + 1, SHARD_RUNS)
  files = [{name: folder / f"{name}_{first:06}.npy" for name in SHARD_ARRAYS} for first in firsts]
  lacking = [
    (first, paths)
    for first, paths in zip(firsts, files, strict=True)
    if not all(path.exists() for path in paths.values())
  ]
  of_step = 4 * math.prod(shape) + 3 * FRAMES * SIZE * SIZE
  bundles.check_space(folder, len(lacking) * SHARD_RUNS * options.score_steps * of_step)
  folder.mkdir(exist_ok=True)
  schedule = schedules.build(
    steps=options.score_steps,
    shift=options.sample_shift,
    guidance=options.guidance,
    freq_dim=bundle.parts.dit.config.freq_dim,
    boundary=bundle.card.boundary,
  )
  with console.progress(len(lacking), "x0", "shard") as advance:
    for first, paths in lacking:
      cases = [even_case_of(first + n) for n in range(SHARD_RUNS)]
      cond = conditioning.encode(
        bundle, [c.prompt for c in cases], np.stack([c.first_frame for c in cases]), frames=FRAMES
      )
      noise = runs.make_noise([c.index for c in cases], shape)
      x0 = np.asarray(sampler.denoise(bundle, noise, cond, schedule)[1].x0)
      for path, value in zip(paths.values(), (x0, decode(bundle, x0)), strict=True):
        with atomic(path) as part, part.open("wb") as file:
          np.save(file, value)
      advance(1)
  return [{name: np.load(path, mmap_mode="r") for name, path in paths.items()} for paths in files]


STAGES = {
  "vae": stage_vae,
  "encode": stage_encode,
  "dit": stage_dit,
  "bundle": stage_bundle,
  "preview": stage_preview,
  "experts": stage_experts,
}


TOGETHER = ("vae", "dit", "experts")  # stages that several processes may share


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("stage", choices=STAGES)
  parser.add_argument("--work", type=Path, required=True, help="where the training lives")
  parser.add_argument(
    "--init", help="vae, dit, preview, experts: begin with the weights of this bundle"
  )
  parser.add_argument(
    "--other-vae", action="store_true", help="dit: --init saw latents of another VAE or other words"
  )
  parser.add_argument("--out", type=Path, help="bundle, preview, experts: where it is written")
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
  parser.add_argument(
    "--minutes", type=float, default=math.inf, help="stop with a checkpoint after so many"
  )
  parser.add_argument("--steps", type=int, default=8_000)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--cases", type=int, default=24_000, help="encoded; preview: sampled")
  parser.add_argument("--vae-cases", type=int, default=1_500)
  parser.add_argument("--prompt-cases", type=int, default=1_000, help="of each task, for the words")
  parser.add_argument("--learning-rate", type=float, default=1e-3)
  parser.add_argument("--shift", type=float, default=3.0, help="of the training sigmas")
  parser.add_argument("--sample-shift", type=float, default=5.0)
  parser.add_argument("--guidance", type=float, default=2.0)
  parser.add_argument("--score-every", type=int, default=2_000, help="steps; 0 = never")
  parser.add_argument("--score-cases", type=int, default=32)
  parser.add_argument("--score-steps", type=int, default=20)
  options = parser.parse_args()
  if options.stage in ("preview", "experts") and not options.init:
    parser.error("--init is needed: the bundle that is continued.")
  if options.stage in ("bundle", "preview", "experts") and not options.out:
    parser.error("--out is needed: the folder of the new bundle.")
  try:
    _, processes = distributed.initialize()
    if processes > 1 and options.stage not in TOGETHER:
      raise ValueError(f"{options.stage} takes one process, there are {processes}: start one.")
    distributed.meet("start")  # CPUs wait 30 s for a first meeting, and long for one that follows
    options.work.mkdir(parents=True, exist_ok=True)
    STAGES[options.stage](options)
    distributed.meet("ended")  # the first one may have much left to write
  except (ValueError, OSError, FloatingPointError) as error:
    print(f"train_mini: {error}", file=sys.stderr)
    status = 1 if isinstance(error, FloatingPointError) else 2
    distributed.leave(status)
    return status
  except BaseException:
    if jax.distributed.is_initialized():
      traceback.print_exc()
      distributed.leave(1)
    raise
  return 0


if __name__ == "__main__":
  sys.exit(main())
