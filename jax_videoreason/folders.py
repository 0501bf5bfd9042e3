"""Folders and files that appear whole or not at all, whose they are, and what a full disk says."""

import contextlib
import errno
import fcntl
import math
import os
import re
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

STAGE = ".unfinished"
PART = ".part-"
MANIFEST = "manifest.json"  # what a folder holds, with checksums; written last
LOCK = "lock"  # held by the process that works in a folder
KINDS = (  # names that lie in a folder -> what it is, and how it is read; the first one counts
  (("runs.json",), "run", "open it by open_run"),
  (("sweep.json",), "sweep", "open it by open_sweep"),
  (("evaluation.json",), "evaluation", "open it by open_evaluation"),
  (("generation.json",), "set of videos", "`videoreason vbvr score` takes it"),
  (("table.json",), "table", "open its report.html"),
  (("result.json", "samples"), "set of scores", "`videoreason vbvr table` takes it"),
  (("result.json",), "study", "open it by open_study"),
)
ADDRESS = re.compile(r"([A-Za-z][\w.+-]+):/+(.*)", re.DOTALL)  # a Path has one slash left
# what is said where folders are not renamed, as by a mounted bucket without folders of its own
UNMOVED = (errno.EMFILE, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP)
PATIENCE = 1.0  # seconds until a folder counts as held: one that looks holds it for a moment


class NoLocksError(OSError):
  """A file system has no locks."""


def local(path: str | os.PathLike[str]) -> Path:
  """The path of a file or folder that is read or written here.

  ValueError: it is an address, as gs://bucket/runs, which would be taken for a folder named gs:.
  """
  if found := ADDRESS.fullmatch(os.fspath(path)):
    raise ValueError(
      f"{found[1]}://{found[2]} is an address, wanted the path of a file or folder: mount a bucket "
      "as a folder (docs/pods.md) and give its path; hf:// is for published weights alone, which "
      "`videoreason convert` reads."
    )
  return Path(path)


@contextlib.contextmanager
def held(
  folder: str | Path, *, needed: bool = True, named: Path | None = None, wait: bool = False
) -> Iterator[None]:
  """Holds the folder, which is made where it is lacking; a dead process holds nothing.

  A folder that was made and stays empty is removed where the block fails. needed: False = on a file
  system without locks it warns and goes on. named: what an error calls it, None = `folder`. wait:
  for another command that works in it, of which it warns.

  ValueError: another command works in it and not `wait`. OSError: it can't be made, or not be held.
  """
  folder = local(folder)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder} is a file, wanted a folder: choose another --out.")
  made = _missing_parents(folder)
  file = None
  try:
    with disk(folder):
      folder.mkdir(parents=True, exist_ok=True)
    try:
      file = _wait_for(folder, folder if named is None else named, wait)
    except NoLocksError as error:
      if needed:
        raise
      warnings.warn(f"{error} Until then start no second command in it.", stacklevel=3)
    yield
  except BaseException:
    _let_go(folder, file)
    for path in made:
      with contextlib.suppress(OSError):
        path.rmdir()
    raise
  _let_go(folder, file)


@contextlib.contextmanager
def held_beside(path: Path) -> Iterator[None]:
  """`held` for a block that makes the folder `path` at its end, in one move."""
  guard = path.with_name(f".{path.name}.lock")
  try:
    with held(guard, needed=False, named=path):
      yield
  finally:
    with contextlib.suppress(OSError):  # not where another one has it already
      guard.rmdir()


def _missing_parents(path: Path) -> list[Path]:
  """The folders that making `path` will make, innermost first."""
  made = []
  while not path.exists():
    made.append(path)
    path = path.parent
  return made


def _wait_for(folder: Path, named: Path, wait: bool) -> IO[str]:
  """The lock file, held; ValueError where another command keeps it and not `wait`."""
  until = time.monotonic() + PATIENCE
  while (file := _hold(folder)) is None:
    if time.monotonic() > until and wait:
      warnings.warn(f"another command works in {named}: this one waits for it.", stacklevel=4)
      until = math.inf
    elif time.monotonic() > until:
      raise ValueError(
        f"another command works in {named}: wait for it (of a sweep, `videoreason sweep --status` "
        "says how far it is), or choose another --out."
      )
    time.sleep(PATIENCE / 10)
  return file


def _let_go(folder: Path, file: IO[str] | None) -> None:
  if file is not None:
    with file:
      if not _is_foreign(folder / LOCK):
        (folder / LOCK).unlink(missing_ok=True)


def _is_foreign(lock: Path) -> bool:
  """Whether something that is called as a lock is none: ours are empty files."""
  try:
    found = lock.stat()
  except FileNotFoundError:
    return False
  return found.st_size > 0 or not stat.S_ISREG(found.st_mode)


def names_in(folder: Path) -> set[str]:
  """The names of what lies in a folder, which may be lacking; its own lock counts as nothing."""
  names = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
  return names if _is_foreign(folder / LOCK) else names - {LOCK}


def _hold(folder: Path) -> IO[str] | None:
  """The lock file, held; None where another holds it, or who held it has just removed it."""
  path = folder / LOCK
  with disk(folder):
    file = path.open("a")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
      return file
  except (BlockingIOError, FileNotFoundError):
    pass
  except OSError as error:
    file.close()
    raise NoLocksError(
      f"{folder} can't be held for one command alone ({error.strerror}): choose an --out on a file "
      "system that has locks."
    ) from error
  file.close()
  return None


def is_held(folder: Path) -> bool:
  """Whether a process works in the folder, which need not be writable; where no locks are, none."""
  try:
    file = (folder / LOCK).open()
  except FileNotFoundError:
    return False
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
      return isinstance(error, BlockingIOError)
  return False


def expect(folder: str | Path, what: str) -> None:
  """ValueError where a folder to be read is of another of the `KINDS` than `what`."""
  kind, reading = _kind(local(folder))
  if kind not in (None, what):
    raise ValueError(f"{folder} is {_a(kind)}, no {what}: {reading}.")


def refuse_other(out: str | Path, what: str) -> None:
  """ValueError where a folder to be written is of another of the `KINDS` than `what`."""
  kind, _ = _kind(local(out))
  if kind not in (None, what):
    raise ValueError(f"{out} holds {_a(kind)}, which no {what} replaces: choose another --out.")


def _kind(folder: Path) -> tuple[str | None, str]:
  for names, kind, reading in KINDS:
    if all((folder / name).exists() for name in names):
      return kind, reading
  return None, ""


def _a(kind: str | None) -> str:
  return f"{'an' if kind == 'evaluation' else 'a'} {kind}"


@contextlib.contextmanager
def whole(
  out: str | Path, *, what: str, owned: Callable[[str], Any], redo: bool = False
) -> Iterator[Path]:
  """Yields a folder to fill; its files move to `out` when the block ends well, else none is left.

  what: of which kind it will be; a folder of another one of the `KINDS` is refused. owned: whether
  a name in `out` is of the kind that is written here, so that `redo` replaces it; all other files
  are left alone. `out` is held meanwhile.

  Raises:
    ValueError: `out` is a file, holds something already and not `redo`, or another command works
      in it.
    OSError: `out` can't be written.
  """
  out = Path(out)
  refuse_other(out, what)
  _content(out, redo=redo)  # before a lock is written into what is not ours
  with held(out, needed=False), filled(out, owned=owned, redo=redo) as stage:
    yield stage


@contextlib.contextmanager
def filled(out: Path, *, owned: Callable[[str], Any], redo: bool = False) -> Iterator[Path]:
  """`whole` for a folder that is held."""
  there = _content(out, redo=redo)
  with staged(out) as stage:
    yield stage
  # stopped from here on, the stage stays: it tells that what lies beside it is half of a whole
  with disk(out):
    for name in there:
      if name.startswith(PART) or owned(name):
        remove(out / name)
    for item in sorted(stage.iterdir(), key=lambda p: (p.name == MANIFEST, p.name)):
      transfer(item, out / item.name)
    remove(stage)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
  """Yields an empty folder inside `out`, which is held; it is removed where the block fails."""
  stage = out / STAGE
  try:
    with disk(out):
      shutil.rmtree(stage, ignore_errors=True)
      stage.mkdir(parents=True)
    yield stage
  except BaseException:
    shutil.rmtree(stage, ignore_errors=True)
    raise


def _content(out: Path, *, redo: bool) -> list[str]:
  """What lies in `out`; ValueError unless it is empty or `redo`."""
  if out.exists() and not out.is_dir():
    raise ValueError(f"{out} is a file, wanted a folder: choose another --out.")
  with disk(out):
    there = sorted(names_in(out) - {STAGE})
  if there and not redo:
    more = f" and {len(there) - 1} more" if len(there) > 1 else ""
    raise ValueError(
      f"{out} is not empty (it has {there[0]}{more}): choose another --out, or give --redo to "
      "replace what was written there."
    )
  return there


def replaceable(
  there: Iterable[str], owned: Iterable[str], *, marks: Sequence[str], what: str, folder: Path
) -> list[str]:
  """The names that --redo removes of those that are there, `marks` last: they tell whose it is.

  owned: names that are written here. what: of which kind such content is, such as "evaluation".
  ValueError: some are there and neither one of `marks` nor the stage that a command leaves which is
  stopped while it moves files, so somebody else may have written them.
  """
  there = set(there)
  ours = sorted(there & set(owned), key=lambda name: (name in marks, name))
  if ours and ours[-1] not in marks and STAGE not in there:
    raise ValueError(
      f"{folder} has {ours[0]} and no {' or '.join(marks)}, so it holds no {what} that --redo may "
      "replace: choose another --out."
    )
  return ours


def spare(out: Path, read: Iterable[Path]) -> None:
  """ValueError when `out` is or holds something of `read`: --redo would delete what is read."""
  for path in read:
    if path.resolve().is_relative_to(out.resolve()):
      raise ValueError(f"--out {out} holds {path}, which is read: choose another --out.")


def name_of(folder: Path) -> str:
  """The name a folder has or will have, also while `whole` fills it."""
  path = folder.resolve()
  return path.parent.name if path.name == STAGE else path.name


@contextlib.contextmanager
def beside(path: str | Path, *, last: str = "") -> Iterator[Path]:
  """Yields a path to fill, a file or a folder; it becomes `path` when the block ends well.

  Else it is removed. last: as `transfer` takes it.
  """
  path = local(path)
  part = part_of(path)
  try:
    with disk(path):
      remove(part)
    yield part
    with disk(path):
      transfer(part, path, last=last)
  finally:
    with contextlib.suppress(OSError):
      remove(part)


def part_of(path: Path) -> Path:
  """Where `beside` has a file or a folder filled."""
  return path.with_name(f"{PART}{path.name}")


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
  """`beside` for a block that only writes: an OSError in it is said to be about `path`."""
  with disk(Path(path)), beside(path) as part:
    yield part


@contextlib.contextmanager
def disk(path: Path, *, full: str = "free some space or choose another --out") -> Iterator[None]:
  """Turns an error of the file system into an OSError of one sentence: place, reason, remedy.

  full: the remedy for a disk without room. TensorStore raises ValueError and gives the number of
  the error only inside its message.
  """
  try:
    yield
  except (OSError, ValueError) as error:
    found = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(found[1]) if found else getattr(error, "errno", None)
    if code is None:
      raise
    parts = path.parts
    place = Path(*parts[: parts.index(STAGE)]) if STAGE in parts else path
    remedy = "choose another --out"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      remedy = full
    elif code in UNMOVED and getattr(error, "filename2", None) is not None:  # of a rename
      remedy = f"of a mounted bucket, folders can't be renamed (docs/pods.md); else {remedy}"
    raise OSError(f"{place} could not be written ({os.strerror(code)}): {remedy}.") from error


def transfer(source: Path, target: Path, *, last: str = "") -> None:
  """Moves a file, which replaces another, or a folder to where none is, at once.

  Where folders can't be renamed, their files go one by one, `last` of these names at the end: it
  tells that the folder is whole.
  """
  try:
    source.replace(target)
  except OSError as error:
    if error.errno not in UNMOVED or not source.is_dir():
      raise
    target.mkdir(exist_ok=True)
    for item in sorted(source.iterdir(), key=lambda p: p.name == last):
      transfer(item, target / item.name)
    remove(source)


def remove(path: Path) -> None:
  """Removes a file, a link or a whole folder, if it is there."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # in a bucket it is gone with its last file
      if path.exists():
        shutil.rmtree(path)  # says why not
  else:
    path.unlink(missing_ok=True)
