"""The official VBVR-EvalKit, run unchanged from the folder where the user has it.

Its `run_evaluation.py` (task-specific score alone) is called once per video, in a virtual
environment that holds what it needs and nothing else, so that an evaluator that hangs or raises
costs one sample and is named. (`evaluate.py` of the same toolkit reports another number.)

Source: Video-Reason/VBVR-EvalKit, commit 275472f. Under OpenCV 5 or NumPy 2, which its requirements
allow, some evaluators raise and the ground truth gets 0; hence the pins.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_videoreason.folders import disk
from jax_videoreason.vbvr.samples import Sample

ENTRY = "run_evaluation.py"
PINS = {
  "numpy": "1.26.4",
  "opencv-python-headless": "4.10.0.84",
  "pillow": "11.3.0",
  "tqdm": "4.67.1",
  "imageio": "2.37.0",
  "imageio-ffmpeg": "0.6.0",
}
COMMIT = "275472f"
DIGEST = "b025583b5e83718ec69ed790e3123ab41dd89e27a8b5de56d46f4b4bc810027e"
LIMIT = 300.0  # seconds that one sample may take
COUNT = """
import sys
from vbvr_bench.utils import get_frame_count, get_video_frames
video, most = sys.argv[1], 100  # frames that its evaluators read
print(len(get_video_frames(video, max_frames=most)), min(get_frame_count(video), most))
"""
INSTALL_LIMIT = 1800


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalKit:
  """The toolkit and the environment it runs in.

  digest: sha256 over the names and contents of its Python files. known: it is commit COMMIT.
  versions: of the packages of `PINS` in the environment.
  """

  path: Path
  python: Path
  digest: str
  known: bool
  versions: Mapping[str, str]

  @property
  def said(self) -> dict[str, Any]:
    """What stands beside every number."""
    return {
      "entry": ENTRY,
      "commit": COMMIT if self.known else None,
      "digest": self.digest,
      "versions": dict(self.versions),
    }


def default_environment() -> Path:
  """Where `--setup` puts the environment unless told otherwise."""
  cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  return Path(cache) / "jax_videoreason" / "evalkit"


def setup(environment: Path) -> None:
  """Makes the virtual environment with the pinned packages, or completes it.

  ValueError: pip could not install them. OSError: the folder can't be written.
  """
  with disk(environment, full="free some space or choose another --environment"):
    venv.create(environment, with_pip=True)
  words = ["-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
  words += [f"{name}=={version}" for name, version in PINS.items()]
  done = subprocess.run(
    [str(python_of(environment)), *words],
    capture_output=True,
    text=True,
    timeout=INSTALL_LIMIT,
    check=False,
    env=clean_environment(),
  )
  if done.returncode:
    raise ValueError(
      f"pip could not install the EvalKit's packages into {environment} "
      f"({_last_line(done.stderr)}): see that Python {sys.version_info[0]}.{sys.version_info[1]} "
      "and a package index are there, and give --setup again."
    )


def python_of(environment: Path) -> Path:
  return environment / "bin" / "python"


def open_evalkit(path: str | Path, environment: Path, *, other: bool = False) -> EvalKit:
  """The toolkit at `path`, after all checks.

  other: take another version than COMMIT, and say so beside the numbers.

  Raises:
    ValueError: no EvalKit there, another version, or an environment that lacks the pinned packages.
  """
  path = Path(path)
  if not (path / ENTRY).is_file() or not (path / "vbvr_bench" / "evaluators").is_dir():
    raise ValueError(
      f"{path} is no VBVR-EvalKit: wanted the folder with {ENTRY} and vbvr_bench/ "
      "(git clone of Video-Reason/VBVR-EvalKit)."
    )
  digest = digest_of(path)
  if digest != DIGEST and not other:
    raise ValueError(
      f"{path} is another version of the EvalKit than commit {COMMIT} (its files have sha256 "
      f"{digest[:12]}, wanted {DIGEST[:12]}): check that commit out, or give --other-evalkit, "
      "which marks the scores."
    )
  python = python_of(environment)
  if not python.is_file():
    raise ValueError(
      f"there is no environment for the EvalKit at {environment}: `videoreason vbvr score --setup` "
      "makes it."
    )
  versions = installed(python)
  wrong = [
    f"{name} {versions.get(name, 'missing')}, wanted {version}"
    for name, version in PINS.items()
    if versions.get(name) != version
  ]
  if wrong:
    raise ValueError(
      f"the environment {environment} has {'; '.join(wrong)}: `videoreason vbvr score --setup` "
      "mends it."
    )
  return EvalKit(
    path=path.resolve(),
    python=python.absolute(),
    digest=digest,
    known=digest == DIGEST,
    versions=versions,
  )


def digest_of(path: Path) -> str:
  """sha256 over the names and contents of the Python files that a score depends on."""
  digest = hashlib.sha256()
  for file in (path / ENTRY, *sorted((path / "vbvr_bench").rglob("*.py"))):
    content = file.read_bytes().replace(b"\r\n", b"\n")  # a checkout may have changed them
    digest.update(f"{file.relative_to(path).as_posix()} {len(content)}\n".encode() + content)
  return digest.hexdigest()


def installed(python: Path) -> dict[str, str]:
  """The versions of the packages of `PINS` in an environment; what lacks is left out."""
  code = (
    "import importlib.metadata as m, json, sys\n"
    "found = {str(d.metadata['Name']).lower(): d.version for d in m.distributions()}\n"
    "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
  )
  done = subprocess.run(
    [str(python), "-c", code, *PINS],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    env=clean_environment(),
  )
  if done.returncode:
    raise ValueError(
      f"{python} does not run ({_last_line(done.stderr)}): remove its folder and give --setup."
    )
  return dict(json.loads(done.stdout))


def clean_environment() -> dict[str, str]:
  """The environment of the EvalKit: nothing of ours, no files left in its folder, one thread."""
  own = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "VIRTUAL_ENV"}
  return {
    **own,
    "PYTHONHASHSEED": "0",
    "PYTHONNOUSERSITE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUTF8": "1",
    "OMP_NUM_THREADS": "1",
    "OPENCV_FOR_THREADS_NUM": "1",
  }


def check_frames(kit: EvalKit, video: Path, limit: float) -> None:
  """ValueError for a video of which the EvalKit does not decode every frame that it reads.

  Its evaluators leave such frames out and score the others, most of them with 0 where none is left.
  limit: seconds.
  """
  words = ["-c", COUNT, str(video.resolve())]
  try:
    done = _run(kit, words, limit, kit.path)
  except subprocess.TimeoutExpired as error:
    raise ValueError(f"the EvalKit did not read the video within {limit:g} seconds") from error
  if done.returncode:
    raise ValueError(f"the EvalKit can't read the video: {_last_line(done.stderr)}")
  decoded, read = map(int, done.stdout.split()[-2:])
  if decoded != read or not decoded:
    raise ValueError(
      f"{decoded} of {read} frames decode in the EvalKit, wanted all: encode the video anew, "
      "as H.264 in yuv420p"
    )


def score(kit: EvalKit, root: Path, sample: Sample, video: Path, limit: float) -> dict[str, Any]:
  """{score, error, seconds, faculty} of one video; error None = the evaluator gave the score.

  root: the benchmark's folder. limit: seconds.
  """
  began = time.monotonic()
  with tempfile.TemporaryDirectory(prefix="vbvr-") as scratch:
    model = Path(scratch) / "model"
    place = model / f"{sample.key}.mp4"
    place.parent.mkdir(parents=True)
    place.symlink_to(video.resolve())
    words = [str(kit.path / ENTRY), "--model_path", str(model), "--gt_base", str(root.resolve())]
    words += ["--output_dir", str(Path(scratch) / "results"), "--device", "cpu"]
    found: dict[str, Any]
    try:
      done = _run(kit, words, limit, Path(scratch))
    except subprocess.TimeoutExpired:
      found = _failed(f"the evaluator gave no answer within {limit:g} seconds")
    else:
      found = _result(Path(scratch) / "results" / "model_vbvr_results.json", done)
  return {**found, "seconds": round(time.monotonic() - began, 2)}


def _run(
  kit: EvalKit, words: Sequence[str], limit: float, cwd: Path
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [str(kit.python), *words],
    capture_output=True,
    text=True,
    errors="replace",
    timeout=limit,
    check=False,
    cwd=cwd,
    env=clean_environment(),
  )


def _result(path: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
  if done.returncode:
    return _failed(f"{ENTRY} failed: {_last_line(done.stderr)}")
  if not path.is_file():
    return _failed("the EvalKit has no evaluator for this task")
  samples = json.loads(path.read_text(encoding="utf-8"))["samples"]
  if len(samples) != 1:
    return _failed(f"the EvalKit returned {len(samples)} samples, wanted 1")
  value, error = samples[0]["score"], samples[0].get("error")
  if error is not None:
    return _failed(f"the evaluator raised: {' '.join(str(error).split())}")
  if not isinstance(value, int | float) or not 0 <= value <= 1:
    return _failed(f"the evaluator returned {value!r}, wanted a score in 0..1")
  return {"score": float(value), "error": None, "faculty": str(samples[0]["category"])}


def _failed(error: str) -> dict[str, Any]:
  return {"score": None, "error": error, "faculty": None}


def _last_line(text: str) -> str:
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return lines[-1] if lines else "no message"
