"""Training cases encoded once, in memory-mapped files, and the marks of the parts that made them.

made_by.json                        marks of the VAE and of the tokenizer
latents.npy  known.npy  ids.npy     a row per case
done_<first>                        a finished shard, written last
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_videoreason.axes import Params
from jax_videoreason.folders import atomic
from jax_videoreason.records import checksum, read_json, write_json

SHARD = 250  # cases
MADE_BY = "made_by.json"


def vae_mark(config: Mapping[str, Any], params: Params) -> str:
  """sha256 of a VAE, the same for its float32 and its bfloat16 copy; config: without `dtype`."""
  digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    value = np.asarray(jnp.asarray(leaf, jnp.bfloat16))
    digest.update(f"{jax.tree_util.keystr(path)} {value.shape}".encode())
    digest.update(np.ascontiguousarray(value).view(np.uint8).data)
  return digest.hexdigest()


def marks(config: Mapping[str, Any], params: Params, tokenizer: str | Path) -> dict[str, str]:
  """What latents and token ids depend on."""
  without = {key: value for key, value in config.items() if key != "dtype"}
  return {"vae": vae_mark(without, params), "tokenizer": checksum(Path(tokenizer))}


def check(made_by: Mapping[str, str], other: Mapping[str, str], whose: str, remedy: str) -> None:
  """ValueError where `other`, the marks of `whose`, are not those of what made the latents."""
  differ = [name for name in made_by if made_by[name] != other.get(name)]
  if differ:
    raise ValueError(
      f"the {' and the '.join(differ)} of {whose} "
      f"{'is' if len(differ) == 1 else 'are'} not what the latents were made with: {remedy}."
    )


class Encoded:
  """The files of `count` cases: latents and the known latents (F H W C each), token ids (X)."""

  def __init__(self, folder: Path, count: int, latent: tuple[int, ...], text_length: int) -> None:
    self.folder, self.count = folder, count
    self.shapes = {
      "latents": ((count, *latent), np.float16),
      "known": ((count, *latent), np.float16),
      "ids": ((count, text_length), np.int16),
    }

  def create(self, made_by: Mapping[str, str]) -> None:
    """Makes the files, or goes on with those that the same parts began.

    ValueError: others began them, or for another number of cases.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    if any(self.folder.glob("done_*")) or (self.folder / MADE_BY).exists():
      check(self.made_by(), made_by, "--work", f"remove {self.folder}, or use another --work")
    else:
      write_json(self.folder / MADE_BY, dict(made_by))
    for name, (shape, dtype) in self.shapes.items():
      path = self.folder / f"{name}.npy"
      if path.exists():
        self._opened(name, "r")
      else:
        with atomic(path) as part:
          np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape).flush()

  def made_by(self) -> dict[str, str]:
    """The marks of the VAE and the tokenizer; ValueError where they are not known."""
    if not (self.folder / MADE_BY).exists():
      raise ValueError(
        f"{self.folder} has no {MADE_BY}, so nobody knows which VAE made its latents: run the "
        "stage 'encode' with another --work."
      )
    return read_json(self.folder / MADE_BY)

  def open(self, *, write: bool = False) -> dict[str, np.ndarray]:
    """The memory-mapped arrays. ValueError: they are not there, not whole, or of another size."""
    arrays = {name: self._opened(name, "r+" if write else "r") for name in self.shapes}
    if not write and self.missing():
      raise ValueError(
        f"{self.folder} lacks {len(self.missing())} shards of {SHARD} cases: run the stage "
        "'encode' to its end first."
      )
    return arrays

  def _opened(self, name: str, mode: Literal["r", "r+"]) -> np.ndarray:
    path, (shape, _) = self.folder / f"{name}.npy", self.shapes[name]
    if not path.exists():
      raise ValueError(f"{path} is missing: run the stage 'encode' first.")
    try:
      array = np.load(path, mmap_mode=mode)
    except (ValueError, EOFError) as error:
      raise ValueError(f"{path} is damaged: remove {self.folder} and encode again.") from error
    if array.shape != shape:
      raise ValueError(
        f"{path} holds {array.shape}, wanted {shape}: give the same --cases, or another --work."
      )
    return array

  def missing(self) -> list[int]:
    """The first cases of the shards that are not finished."""
    return [s for s in range(0, self.count, SHARD) if not (self.folder / f"done_{s}").exists()]

  def finish(self, first: int) -> None:
    (self.folder / f"done_{first}").touch()


def rows_of(number: int, batch: int, count: int) -> np.ndarray:
  """The cases of batch `number`, in rising order; every epoch has an order of its own, which
  depends on its number alone."""
  epoch, place = divmod(number, count // batch)
  order = np.random.default_rng([13, epoch]).permutation(count)
  return np.sort(order[place * batch : (place + 1) * batch])
