"""A flat bucket as a file system, for trying what a mounted bucket asks of the commands.

    python scripts/pod/bucket.py STORE MOUNT [--rename-dir-limit 1000000]

It follows what the documentation of Cloud Storage FUSE says of a bucket without a hierarchical
namespace: an object is a whole file, made where the file is closed or synced; a folder is an object
of its own and is renamed only where it holds no more files than the limit, one by one; nothing is
cached, and a lock is known to this mount alone. STORE holds the objects, one file each, and may
be mounted several times, as on several hosts. Needs FUSE on Linux and `pip install mfusepy`.
"""

import argparse
import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote

import mfusepy

BLOCK = 4096
ROOM = 2**40  # blocks that are said to be free


class Bucket(mfusepy.Operations):
  """Paths are those below the mount; a key is one without the first slash, a folder's ends with /.

  staged: open file -> [key, the file with its content, whether it was written]. growing: key -> the
  content of the file that is being written under it.
  """

  def __init__(self, store: Path, limit: int):
    self.store, self.limit = store, limit
    self.scratch = Path(tempfile.mkdtemp(prefix=f"{store.name}.", dir=store.parent))
    self.staged: dict[int, list] = {}
    self.growing: dict[str, Path] = {}
    self.opened = 0

  def destroy(self, path):
    shutil.rmtree(self.scratch)

  # objects

  def _object(self, key: str) -> Path:
    return self.store / quote(key, safe="")

  def _put(self, key: str, content: Path | None = None) -> None:
    part = self.scratch / "part"
    part.write_bytes(b"" if content is None else content.read_bytes())
    os.replace(part, self._object(key))

  def _below(self, path: str) -> list[str]:
    """The keys of what a folder holds, at any depth."""
    start = f"{path.strip('/')}/".lstrip("/")
    keys = (unquote(file.name) for file in self.store.iterdir())
    return [key for key in keys if key.startswith(start) and key != start]

  def _is_folder(self, path: str) -> bool:
    return path == "/" or self._object(path[1:] + "/").exists()

  def _found(self, path: str) -> Path:
    file = self.growing.get(path[1:], self._object(path[1:]))
    if not file.exists():
      raise mfusepy.FuseOSError(errno.ENOENT)
    return file

  # folders

  def getattr(self, path, fh=None):
    if self._is_folder(path):
      return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
    found = self._found(path).stat()
    times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), found.st_mtime)
    return {"st_mode": stat.S_IFREG | 0o644, "st_nlink": 1, "st_size": found.st_size, **times}

  def readdir(self, path, fh):
    depth = len(path.rstrip("/"))
    return [".", "..", *{f"/{key}"[depth + 1 :].split("/")[0] for key in self._below(path)}]

  def mkdir(self, path, mode):
    if self._is_folder(path) or self._object(path[1:]).exists():
      raise mfusepy.FuseOSError(errno.EEXIST)
    self._put(path[1:] + "/")

  def rmdir(self, path):
    if self._below(path):
      raise mfusepy.FuseOSError(errno.ENOTEMPTY)
    self._object(path[1:] + "/").unlink()

  def rename(self, old, new):
    if not self._is_folder(old):
      if self._is_folder(new):
        raise mfusepy.FuseOSError(errno.EISDIR)
      return self._rename(old[1:], new[1:])
    below = self._below(old)
    if self._is_folder(new) and self._below(new):
      raise mfusepy.FuseOSError(errno.ENOTEMPTY)
    if len(below) > self.limit:
      raise mfusepy.FuseOSError(errno.EMFILE)
    for key in [*below, old[1:] + "/"]:
      self._rename(key, new[1:] + key[len(old) - 1 :])

  def _rename(self, old: str, new: str) -> None:
    self._put(new, self._found("/" + old))
    self._object(old).unlink()
    for entry in self.staged.values():
      entry[0] = new if entry[0] == old else entry[0]
    if old in self.growing:
      self.growing[new] = self.growing.pop(old)

  # files

  def create(self, path, mode, fi=None):
    self._put(path[1:])
    return self._open(path, keeps=False)

  def open(self, path, flags):
    return self._open(path, keeps=not flags & os.O_TRUNC, writes=flags & os.O_ACCMODE != 0)

  def _open(self, path: str, *, keeps: bool, writes: bool = True) -> int:
    self.opened += 1
    content = self.scratch / str(self.opened)
    content.write_bytes(self._found(path).read_bytes() if keeps else b"")
    self.staged[self.opened] = [path[1:], content, not keeps]
    if writes:
      self.growing[path[1:]] = content
    return self.opened

  def read(self, path, size, offset, fh):
    with self.staged[fh][1].open("rb") as file:
      file.seek(offset)
      return file.read(size)

  def write(self, path, data, offset, fh):
    with self.staged[fh][1].open("r+b") as file:
      file.seek(offset)
      file.write(data)
    self.staged[fh][2] = True
    return len(data)

  def truncate(self, path, length, fh=None):
    used = self._open(path, keeps=True) if fh is None else fh
    os.truncate(self.staged[used][1], length)
    self.staged[used][2] = True
    if fh is None:
      self.flush(path, used)
      self.release(path, used)

  def flush(self, path, fh):
    key, content, written = self.staged[fh]
    if written:
      self._put(key, content)
      self.staged[fh][2] = False

  def fsync(self, path, datasync, fh):
    self.flush(path, fh)

  def release(self, path, fh):
    key, content, _ = self.staged.pop(fh)
    if self.growing.get(key) == content:
      self.growing.pop(key)
    content.unlink()

  def unlink(self, path):
    self._found(path)
    self._object(path[1:]).unlink()

  def chmod(self, path, mode):
    """A bucket has no modes."""

  def chown(self, path, uid, gid):
    """A bucket has no owners of files."""

  def utimens(self, path, times=None):
    """A bucket keeps the time of the last write."""

  def statfs(self, path):
    return {
      "f_bsize": BLOCK,
      "f_frsize": BLOCK,
      **dict.fromkeys(("f_blocks", "f_bfree", "f_bavail"), ROOM),
    }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("store", type=Path)
  parser.add_argument("mount", type=Path)
  parser.add_argument("--rename-dir-limit", type=int, default=0)
  args = parser.parse_args()
  for folder in (args.store, args.mount):
    folder.mkdir(parents=True, exist_ok=True)
  bucket = Bucket(args.store.resolve(), args.rename_dir_limit)
  never = {"attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0}
  mfusepy.FUSE(bucket, str(args.mount), foreground=True, nothreads=True, **never)


if __name__ == "__main__":
  main()
