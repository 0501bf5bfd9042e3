"""What the tokens of a video look like after some layers, as the official token tool shows them.

Everything is reduced inside the sampler (`taps`); no hidden state leaves it. The branch is the one
with the prompt, the site the output of a block.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange, reduce
from numpy.typing import ArrayLike

from jax_videoreason.folders import atomic
from jax_videoreason.taps import TapSpec

SITE = "resid_post"
REDUCE = ("norm", "frame_norm", "channel_moments", "pca3", "top_channels")
FILE = "tokens.npz"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
  """Of one sample; S all steps, K those whose maps are kept, L the layers asked for.

  energy: S L F, length of each latent frame over its tokens and channels. length: S L, mean length
  of a token. norm: K L F H W, length of each token (H, W of the patches). pca: K L F H W 3, each
  token on the three main axes of its layer and step. variance: K L D, of each channel over all
  tokens. top: K L F H W 6, the channels that vary most; channels: K L 6, their numbers.
  """

  steps: np.ndarray
  layers: np.ndarray
  sigma: np.ndarray
  energy: np.ndarray
  length: np.ndarray
  norm: np.ndarray
  pca: np.ndarray
  variance: np.ndarray
  top: np.ndarray
  channels: np.ndarray

  @property
  def explained(self) -> np.ndarray:
    """K L: the share of the variance that the three axes hold."""
    held = reduce(np.square(self.pca), "k l f h w c -> k l f h w", "sum").mean((2, 3, 4))
    return held / np.maximum(self.variance.sum(-1), np.finfo(np.float32).tiny)


def taps(layers: Sequence[int], *, x0: bool) -> TapSpec:
  """What the sampler keeps for it; no layers = nothing of the tokens."""
  if not layers:
    return TapSpec(latents=False, x0=x0)
  return TapSpec(sites=(SITE,), reduce=REDUCE, layers=tuple(layers), latents=False, x0=x0)


def of_piece(
  found: Mapping[str, ArrayLike], first: int, steps: Sequence[int]
) -> dict[str, np.ndarray]:
  """What is kept of the taps of a piece of a run, S L G R ..., without G.

  first: the step it begins with. steps: of the whole run, those whose maps are kept.
  """
  norm, energy, moments, pca, top = (
    np.asarray(found[f"{SITE}/{name}"])[:, :, 0] for name in REDUCE
  )
  rows = [step - first for step in steps if first <= step < first + len(norm)]
  return {
    "energy": energy,
    "length": norm.mean(-1),
    "norm": norm[rows],
    "pca": pca[rows],
    "variance": moments[rows][..., 1, :],
    "top": top[rows][..., :-1, :],
    "channels": top[rows][..., -1, :].astype(np.int32),
  }


def of_run(
  pieces: Sequence[Mapping[str, np.ndarray]],
  run: int,
  grid: tuple[int, int, int],
  *,
  layers: Sequence[int],
  steps: Sequence[int],
  sigma: np.ndarray,
) -> Tokens:
  """One run of the pieces that `of_piece` left. grid: token frames, rows, columns."""
  of = {name: np.concatenate([piece[name][:, :, run] for piece in pieces]) for name in pieces[0]}

  def on_grid(name: str) -> np.ndarray:
    f, h, w = grid
    return rearrange(of[name], "k l (f h w) ... -> k l f h w ...", f=f, h=h, w=w)

  return Tokens(
    steps=np.asarray(steps, np.int32),
    layers=np.asarray(layers, np.int32),
    sigma=np.asarray(sigma, np.float32),
    energy=of["energy"],
    length=of["length"],
    norm=on_grid("norm"),
    pca=on_grid("pca"),
    variance=of["variance"],
    top=on_grid("top"),
    channels=of["channels"],
  )


def write(path: Path, tokens: Tokens) -> None:
  """Writes the numbers as an .npz file with the fields of `Tokens`."""
  fields = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(Tokens)}
  with atomic(path) as part, part.open("wb") as file:
    np.savez_compressed(file, **fields)
