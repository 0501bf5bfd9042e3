"""Run folders on disk: write one piece by piece, open it again with `open_run(DIR)`.

A run folder holds R runs (one case, seed and edit each) that went through one schedule of S steps:

    manifest.json      resolved config, command, versions, device, git revision, and the sha256 of
                       every data file and of itself; `undecoded` = the steps whose x0 is
                       outstanding, with frames, videos and answers, where a run is denoised and
                       no more (`decoding`); `arrays` = the names of those in trace.zarr
    runs.json          what each run is: R objects {case, task, split, index, seed, prompt,
                       metadata}; `seed` and `prompt` must be there, a run of no task has no more
    final_latents.npy  R F H W C float32
    trace.zarr/        zarr v3 group, arrays with named dimensions:
      sigma            S
      finite           S R bool, False = a number of that step is not finite
      latents, x0      S R F H W C, what the model saw at the step, its guess of the clean video
      frames           S' R frames height width rgb uint8, x0 through the VAE; attribute `steps` =
                       the S' steps shown
      taps/SITE/REDUCTION   S' L G R ...; attributes `steps`, `layers`, `branches` = what was asked
    answers.json       the answer read from x0 at every step (`AnswerTrace`), for runs of a task
    first_<run>.png    the given first frame          video_<run>.mp4   the final video
    first_<run>.npy    the same where it is not 8-bit: height width 3 float32 about -1..1
    shown_<run>.png    the picture that an image tower was shown, where it is another one
    x0_<run>.png, figures/, report.html    drawn from the above by `report.render`, not in the
                       checksums

A chunk of the trace is one step of as many runs as fit in 1 MB, at least one. A folder appears
whole or not at all (`run_folder`).
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from jax_videoreason import arrays, media, tables
from jax_videoreason.arrays import StoredArray
from jax_videoreason.folders import (
  LOCK,
  STAGE,
  atomic,
  beside,
  disk,
  expect,
  held,
  local,
  name_of,
  part_of,
  refuse_other,
  remove,
  staged,
  transfer,
  whole,
)
from jax_videoreason.records import (
  checksum,
  damaged,
  every,
  plain,
  read_json,
  read_mapping,
  sealed,
  vouched,
  write_json,
)
from jax_videoreason.structs import AnswerTrace, Trace
from jax_videoreason.taps import TapSpec
from jax_videoreason.version import __version__

FORMAT = 1
CHUNK_BYTES = 1 << 20
LATENT_AXES = ("step", "run", "latent_frame", "latent_height", "latent_width", "channel")
FRAME_AXES = ("step", "run", "frame", "height", "width", "rgb")
TAP_AXES = ("step", "layer", "branch", "run")
UNDECODED, ARRAYS = "undecoded", "arrays"  # entries of a manifest
DRAWN = re.compile(r"x0_\d+\.png|report\.html|figures")
OWNED = re.compile(
  r"(manifest|runs|answers)\.json|final_latents\.npy|trace\.zarr|report\.html|figures"
  r"|(first|shown|x0)_\d+\.png|first_\d+\.npy|video_\d+\.mp4"
)
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "tensorstore", "orbax-checkpoint", "av", "matplotlib")


# Writing


def run_folder(
  out: str | Path, *, redo: bool = False, first: bool = True
) -> AbstractContextManager[Path]:
  """A folder to fill (`folders.whole`); `redo` replaces the files of the run that lies there.

  first: False for the other processes that fill it, of which the first makes and moves it.
  ValueError: as `folders.whole`, or a run lies there whose videos are outstanding and not `redo`.
  """
  if not first:
    return contextlib.nullcontext(Path(out) / STAGE)
  if redo:
    _check_ours(Path(out))
  elif _is_manifest(mark := Path(out) / "manifest.json") and UNDECODED in read_json(mark):
    raise ValueError(
      f"{out} holds a run that is denoised and not decoded: `videoreason report {out}` makes its "
      "videos; else choose another --out, or give --redo to denoise it again."
    )
  return whole(out, what="run", owned=OWNED.fullmatch, redo=redo)


def _check_ours(out: Path) -> None:
  """ValueError where no run wrote the files that `redo` would remove."""
  refuse_other(out, "run")
  there = {item.name for item in out.iterdir()} if out.is_dir() else set()
  lost = sorted(filter(OWNED.fullmatch, there))
  # a killed command leaves its stage until all files are moved
  if lost and not there & {STAGE, "trace.zarr"} and not _is_manifest(out / "manifest.json"):
    raise ValueError(
      f"{out} has {lost[0]} and no manifest of a run, so it holds nothing that --redo may replace: "
      "choose another --out."
    )


def _is_no_frame(name: str) -> bool:
  """Whether a file of a trace is not of what `decoding` brings, which may have been cut short."""
  return not name.startswith("frames/")


def _is_manifest(path: Path) -> bool:
  try:
    found = read_json(path)
  except ValueError:
    return False
  return isinstance(found, dict) and {"format", "files"} <= found.keys()


def write_final_latents(folder: str | Path, latents: Any) -> None:
  """Writes `final_latents.npy`, R F H W C float32."""
  _write_npy(Path(folder) / "final_latents.npy", latents)


def write_runs(folder: str | Path, runs: Sequence[Mapping[str, Any]]) -> None:
  """Writes `runs.json`; each run has at least `seed` and `prompt`."""
  for number, run in enumerate(runs):
    missing = {"seed", "prompt"} - run.keys()
    if missing:
      lacks = " and no ".join(sorted(missing))
      raise ValueError(f"run {number} has no {lacks}: every run needs both.")
  write_json(Path(folder) / "runs.json", [plain(run) for run in runs])


def write_videos(folder: str | Path, frames: np.ndarray, *, fps: int = 8) -> None:
  """Writes `video_<run>.mp4`; frames: R frames height width 3 uint8."""
  for run, video in enumerate(frames):
    media.write_mp4(Path(folder) / f"video_{run}.mp4", video, fps=fps)


def write_first_frames(folder: str | Path, first_frames: np.ndarray) -> None:
  """Writes `first_<run>.png`; first_frames: R height width 3 uint8."""
  for run, first in enumerate(first_frames):
    media.write_png(Path(folder) / f"first_{run}.png", first)


def write_given(
  folder: str | Path, run: int, first_frame: np.ndarray | None, shown: np.ndarray | None
) -> None:
  """Writes what conditioned a run and `first_<run>.png` does not hold, for `Run.given`.

  first_frame: height width 3, uint8 or float32. shown: a picture uint8 of any size, None = it too.
  """
  if first_frame is not None and first_frame.dtype != np.uint8:
    _write_npy(Path(folder) / f"first_{run}.npy", first_frame)
  if shown is not None and (first_frame is None or not np.array_equal(shown, first_frame)):
    media.write_png(Path(folder) / f"shown_{run}.png", shown)


def write_manifest(
  folder: str | Path,
  *,
  config: Mapping[str, Any],
  command: Sequence[str],
  device: str,
  checksums: Mapping[str, str] | None = None,
  **more: Any,
) -> dict[str, Any]:
  """Writes `manifest.json`, last of all: it holds the checksums of every data file and of itself.

  config: the resolved configuration. command: the words typed. device: its name, as jax gives it.
  checksums: name -> that of a folder in which not every file counts. more: further entries
  (`model`, `seconds`, `evaluations`, ...), kept as they are.
  """
  folder, known = Path(folder), checksums or {}
  manifest = {
    "format": FORMAT,
    "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": list(command),
    "device": device,
    "revision": revision(),
    "versions": {
      "jax_videoreason": __version__,
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in PACKAGES},
    },
    **plain(more),
    "config": plain(config),
    **({ARRAYS: _arrays(trace)} if (trace := folder / "trace.zarr").is_dir() else {}),
    "files": {
      item.name: known[item.name] if item.name in known else checksum(item)
      for item in sorted(folder.iterdir())
      if not DRAWN.fullmatch(item.name) and item.name not in ("manifest.json", LOCK)
    },
  }
  write_json(folder / "manifest.json", sealed(manifest))
  return manifest


def _arrays(trace: Path) -> list[str]:
  return sorted(arrays.open_group(trace))


@contextlib.contextmanager
def decoding(run: "Run", *, check: bool = False, **more: Any) -> Iterator[Path]:
  """Yields a folder for what is outstanding of a run: trace.zarr with frames, videos, answers.

  They become part of the run's folder, which is held, when the block ends well, and its manifest
  says so last of all; else they are removed, and the run stays as it was. check: look first whether
  the run is what its manifest says, whose checksums are then written anew. more: further entries of
  the manifest.

  Raises:
    ValueError: another command works in the folder, or a file of the run is damaged.
    OSError: it can't be written.
  """
  began = time.monotonic()
  frames = run.path / "trace.zarr" / "frames"
  with held(run.path, needed=False):
    with disk(run.path):
      remove(frames)  # of a call that was stopped before the manifest was written
    if check:
      run.verify()
    with staged(run.path) as stage:
      yield stage
      with disk(run.path):
        transfer(stage / "trace.zarr" / "frames", frames)
        remove(stage / "trace.zarr")
        made = [run.path / item.name for item in stage.iterdir()]
        for path in made:
          transfer(stage / path.name, path)
        remove(stage)
    manifest = {name: value for name, value in run.manifest.items() if name != UNDECODED}
    manifest |= plain(more)
    manifest["seconds"] = round(manifest.get("seconds", 0) + time.monotonic() - began, 1)
    sums = {item.name: checksum(item) for item in (frames.parent, *made)}
    manifest["files"] = dict(sorted((manifest["files"] | sums).items()))
    manifest[ARRAYS] = _arrays(frames.parent)
    write_json(run.path / "manifest.json", sealed(manifest))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceWriter:
  """Where the pieces of a trace go; made by `create_trace`."""

  path: Path
  steps: int
  runs: int
  taps: TapSpec
  process: tuple[int, int] = (0, 1)

  def write(self, piece: Trace, *, at_step: int = 0, at_run: int = 0) -> None:
    """Writes the rows of `piece` from step `at_step` and run `at_run` of the whole trace.

    Tap rows go to the steps of the writer's `taps` that lie inside the piece. Of several processes
    each writes its share of the steps, so no two write one chunk; all must be given the piece.
    """
    count, batch = np.shape(piece.finite)
    steps = slice(at_step, at_step + count)
    runs = slice(at_run, at_run + batch)
    if steps.stop > self.steps or runs.stop > self.runs:
      raise ValueError(
        f"the piece ends at step {steps.stop} and run {runs.stop}, the trace has {self.steps} "
        f"steps and {self.runs} runs: create it with the sizes of the whole."
      )
    if self.process[0] == 0:  # one chunk each
      self._put("sigma", ("step",), (self.steps,), piece.sigma, (steps,))
      self._put("finite", ("step", "run"), (self.steps, self.runs), piece.finite, (steps, runs))
    for name, value in (("latents", piece.latents), ("x0", piece.x0)):
      if value is not None:
        shape = (self.steps, self.runs, *np.shape(value)[2:])
        self._put_rows(name, LATENT_AXES, shape, value, (steps, runs))
    kept = range(self.steps) if self.taps.steps is None else self.taps.steps
    inside = [row for row, step in enumerate(kept) if steps.start <= step < steps.stop]
    for name, value in piece.taps.items():
      shape = np.shape(value)
      if shape[0] != len(inside):
        raise ValueError(
          f"tap {name} brings {shape[0]} rows for steps {steps.start}.."
          f"{steps.stop - 1}, of which {len(inside)} are kept: give create_trace the "
          "TapSpec with the steps of the whole schedule."
        )
      if inside:
        reduction = name.rpartition("/")[2]
        rest = (f"{reduction}_{axis}" for axis in range(len(shape) - 4))
        layers = range(shape[1]) if self.taps.layers is None else self.taps.layers
        self._put_rows(
          f"taps/{name}",
          (*TAP_AXES, *rest),
          (len(kept), *shape[1:3], self.runs, *shape[4:]),
          value,
          (slice(inside[0], inside[-1] + 1), slice(None), slice(None), runs),
          steps=list(kept),
          layers=list(layers),
          branches=list(self.taps.branches),
        )

  def write_frames(
    self, frames: np.ndarray, *, at_row: int | None = None, steps: Sequence[int] | None = None
  ) -> None:
    """Writes x0 as pixels, S' R frames height width 3 uint8.

    steps: the S' steps shown, None = all. at_row: the one of them that is given, R frames height
    width 3; None = all are.
    """
    shown = list(range(self.steps)) if steps is None else [int(s) for s in steps]
    rows = slice(None)
    if at_row is not None:
      frames, rows = frames[None], slice(at_row, at_row + 1)
    elif len(shown) != len(frames):
      raise ValueError(
        f"frames has {len(frames)} rows for {len(shown)} steps: give one row a step."
      )
    self._put(
      "frames",
      FRAME_AXES,
      (len(shown), *frames.shape[1:]),
      np.asarray(frames, np.uint8),
      (rows,),
      steps=shown,
    )

  def _put_rows(
    self,
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    value: Any,
    where: tuple[slice, ...],
    **attributes: Any,
  ) -> None:
    """`_put` of this process's share of the first axis, whose chunks are one row."""
    number, count = self.process
    low, high = (len(value) * part // count for part in (number, number + 1))
    if low < high:
      rows = slice(where[0].start + low, where[0].start + high)
      self._put(name, axes, shape, value[low:high], (rows, *where[1:]), **attributes)

  def _put(
    self,
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    value: Any,
    where: tuple[slice, ...],
    **attributes: Any,
  ) -> None:
    chunk = _chunk(axes, shape, np.asarray(value).itemsize)
    arrays.put(self.path, name, axes, value, shape=shape, where=where, chunk=chunk, **attributes)


@contextlib.contextmanager
def create_trace(
  folder: str | Path,
  *,
  steps: int,
  runs: int,
  taps: TapSpec | None = None,
  process: tuple[int, int] = (0, 1),
) -> Iterator[TraceWriter]:
  """Yields a writer for `trace.zarr` in `folder`, which appears there when the block ends well.

  steps, runs: S and R of the whole; pieces may come in any order.
  taps: what was asked for, with `steps` as rows of the whole schedule.
  process: (number, count) of those that write together; the first one makes the folder they write
  to and moves it when its block ends, so they must meet after it began and before it ends.
  """
  path, first = Path(folder) / "trace.zarr", process[0] == 0
  spec = TapSpec() if taps is None else taps
  with beside(path) if first else contextlib.nullcontext(part_of(path)) as part:
    if first:
      with disk(path):
        arrays.group(part)
    yield TraceWriter(path=part, steps=steps, runs=runs, taps=spec, process=process)


# Answers


def write_answers(folder: str | Path, answers: AnswerTrace) -> None:
  """Writes `answers.json`; an answer is a str, an int or None."""
  record = {f.name: getattr(answers, f.name) for f in dataclasses.fields(answers)}
  write_json(Path(folder) / "answers.json", plain(record))


def read_answers(path: str | Path) -> AnswerTrace:
  """Reads `answers.json`."""
  record = read_json(Path(path))
  kinds: dict[str, type] = {"answer": object, "right": bool}
  kinds |= dict.fromkeys(("sigma", "score", "commitment_sigma"), float)
  kinds |= dict.fromkeys(("candidates", "entropy", "mass", "second", "strict"), float)
  try:
    unknown = np.full(np.shape(record["candidates"]), np.nan)
    record = {"second": unknown, "strict": unknown, **record}  # earlier versions wrote none
    columns = {
      f.name: np.array(record[f.name], kinds.get(f.name, int))
      for f in dataclasses.fields(AnswerTrace)
      if f.name != "task"
    }
    return AnswerTrace(task=tuple(record["task"]), **columns)
  except (KeyError, TypeError, ValueError) as error:
    raise damaged(Path(path)) from error


# Reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A run folder, read lazily; made by `open_run`.

  sigma: S. finite: S R. latents, x0: S R F H W C. frames: S' R frames height width 3, x0 as
  pixels. None = not kept. taps: 'attn_out/norm' -> S' L G R .... runs: what each of the R runs is.
  answers: None = no run belongs to a task.
  """

  path: Path
  manifest: dict[str, Any]
  runs: list[dict[str, Any]]
  sigma: np.ndarray
  finite: np.ndarray
  latents: StoredArray | None
  x0: StoredArray | None
  frames: StoredArray | None
  taps: dict[str, StoredArray]
  answers: AnswerTrace | None

  @property
  def name(self) -> str:
    """The name of the folder, also while it is being filled."""
    return name_of(self.path)

  @property
  def undecoded(self) -> list[int] | None:
    """The steps whose x0 is to be decoded, with the final video; None = nothing is outstanding."""
    return self.manifest.get(UNDECODED)

  @property
  def final_latents(self) -> np.ndarray:
    """R F H W C float32."""
    return _read_npy(vouched(self.path, "final_latents.npy"))

  def first(self, run: int) -> Path | None:
    """The given first frame of a run, a PNG."""
    return self._file(f"first_{run}.png")

  def given(self, run: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What conditioned a run, to the bit: first frame, and the picture shown where it is another.

    height width 3, uint8; or the frame float32 about -1..1.
    """
    exact, first, shown = (
      path if path.is_file() else None
      for path in (
        vouched(self.path, name)
        for name in (f"first_{run}.npy", f"first_{run}.png", f"shown_{run}.png")
      )
    )
    frame = None if first is None else media.read_image(first)
    return (
      frame if exact is None else _read_npy(exact),
      None if shown is None else media.read_image(shown),
    )

  def video(self, run: int) -> Path | None:
    """The final video of a run, an MP4."""
    return self._file(f"video_{run}.mp4")

  def strip(self, run: int) -> Path | None:
    """The film strip of a run, a PNG: rows steps, columns frames."""
    return self._file(f"x0_{run}.png")

  def verify(self) -> None:
    """Compares every data file with its checksum; ValueError names those that differ."""
    faults = []
    counts = every if self.undecoded is None else _is_no_frame
    for name, wanted in self.manifest["files"].items():
      path = self.path / name
      if not path.exists():
        faults.append(f"{name} is missing")
      elif checksum(path, counts) != wanted:
        faults.append(f"{name} differs from its checksum")
    if faults:
      said = ", ".join(faults)
      raise ValueError(f"{self.path}: {said}; run it again, or copy the folder again.")

  def table(self) -> list[dict[str, Any]]:
    """One row per run and step: what the run is, step, sigma, finite, answer, right, score."""
    rows = []
    answers = self.answers
    row_of = {} if answers is None else {int(s): i for i, s in enumerate(answers.steps)}
    for r, run in enumerate(self.runs):
      said = {k: run.get(k) for k in ("case", "task", "split", "index", "seed", "prompt")}
      for s, sigma in enumerate(self.sigma):
        row = {"run": r, **said, "step": s, "sigma": float(sigma)}
        row["finite"] = bool(self.finite[s, r])
        if answers is not None:
          i = row_of.get(s)
          read = i is not None and answers.task[r] is not None
          row["answer"] = answers.answer[i, r] if read else None
          row["right"] = bool(answers.right[i, r]) if read else None
          row["score"] = float(answers.score[i, r]) if read else None
        rows.append(row)
    return rows

  def to_pandas(self) -> Any:
    """`table()` as a pandas DataFrame."""
    return tables.frame(self.table(), otherwise=".table()")

  def _file(self, name: str) -> Path | None:
    path = self.path / name
    return path if path.is_file() else None


def open_run(folder: str | Path) -> Run:
  """Opens a run folder; arrays are read when indexed, wherever the process works by then.

  Raises:
    ValueError: the folder is not there, is not a run, or a file of it is missing or damaged.
  """
  folder = local(folder)
  if not folder.is_dir():
    raise ValueError(f"there is no folder {folder}: give the --out of a run.")
  expect(folder, "run")
  if not (folder / "manifest.json").is_file():
    raise ValueError(
      f"{folder} has no manifest.json, so it is not a finished run: give the --out of a run."
    )
  manifest = read_json(folder / "manifest.json")
  written = manifest.get("format") if isinstance(manifest, dict) else None
  if written != FORMAT:
    raise ValueError(
      f"{folder} has format {written}, this version ({__version__}) reads run folders of format "
      f"{FORMAT}: upgrade jax-videoreason, or give the --out of a run."
    )
  manifest = read_mapping(folder / "manifest.json", "config", "files")
  runs = read_json(vouched(folder, "runs.json"))
  root = folder / "trace.zarr"
  found = arrays.open_group(root)
  for name in {"sigma", "finite", *manifest.get(ARRAYS, ())}:
    if name not in found:
      raise damaged(root / name)
  if found["finite"].shape[1] != len(runs):
    raise ValueError(
      f"{folder}: runs.json names {len(runs)} runs, trace.zarr has "
      f"{found['finite'].shape[1]}; run it again, or copy the folder again."
    )
  size = (len(found["sigma"]), len(runs))
  for name in ("finite", "latents", "x0"):
    if name in found and found[name].shape[:2] != size:
      raise damaged(root / name)
  answers = vouched(folder, "answers.json")
  return Run(
    path=folder.resolve(),
    manifest=manifest,
    runs=runs,
    sigma=found["sigma"][:],
    finite=found["finite"][:],
    latents=found.get("latents"),
    x0=found.get("x0"),
    frames=found.get("frames"),
    taps={n.removeprefix("taps/"): a for n, a in found.items() if n.startswith("taps/")},
    answers=read_answers(answers) if answers.is_file() else None,
  )


# Details


def _write_npy(path: Path, value: Any) -> None:
  """Writes an array as float32; np.save forgets the errno of a full disk."""
  array = np.ascontiguousarray(value, np.float32)
  header = np.lib.format.header_data_from_array_1_0(array)
  with atomic(path) as part, part.open("wb") as file:
    np.lib.format.write_array_header_1_0(file, header)
    file.write(array.data)


def _read_npy(path: Path) -> np.ndarray:
  try:
    return np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise damaged(path) from error


def _chunk(axes: tuple[str, ...], shape: tuple[int, ...], itemsize: int) -> list[int]:
  """One step of as many runs as fit in `CHUNK_BYTES`; `sigma` and `finite` are one chunk."""
  if len(shape) <= 2:
    return [max(n, 1) for n in shape]
  run = axes.index("run")
  of_run = itemsize * math.prod(n for i, n in enumerate(shape) if i not in (0, run))
  chunk = [max(n, 1) for n in shape]
  chunk[0] = 1
  chunk[run] = max(1, min(shape[run], CHUNK_BYTES // max(of_run, 1)))
  return chunk


def revision() -> str | None:
  """The git revision of a checkout, with a + where tracked files differ; None when installed."""
  root = Path(__file__).resolve().parent.parent
  if not (root / ".git").exists() or shutil.which("git") is None:
    return None
  git = ["git", "-C", str(root)]
  head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
  if head.returncode:
    return None
  changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
  return head.stdout.strip() + ("+" if changed else "")
