"""The nouns that travel between the floors: bundle, conditioning, noise, state, trace, sizes."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jax_videoreason.axes import Array, Params
from jax_videoreason.pytrees import pytree, static


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpec:
  """What a latent is: channels, pixels per latent cell, and the normalisation of each channel.

  stride: (frames, height, width); frames = 1 + stride[0] * (F - 1).
  patch: the patch of the DiT, (frames, height, width); T = F/pf * H/ph * W/pw.
  """

  channels: int
  stride: tuple[int, int, int]
  patch: tuple[int, int, int] = (1, 2, 2)

  def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(F, H, W) of a video; ValueError names what does not fit."""
    st, sh, sw = self.stride
    if frames < 1 or (frames - 1) % st:
      low = max(0, (frames - 1) // st) * st + 1
      raise ValueError(f"frames={frames}, wanted 1 + {st}k: use {low} or {low + st}.")
    for name, pixels, unit in (
      ("height", height, sh * self.patch[1]),
      ("width", width, sw * self.patch[2]),
    ):
      if pixels < unit or pixels % unit:
        low = max(unit, pixels // unit * unit)
        raise ValueError(
          f"{name}={pixels} pixels, wanted a multiple of {unit}: use {low} or {low + unit}."
        )
    return 1 + (frames - 1) // st, height // sh, width // sw

  def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(F, H, W, C) of a video's latents, for `runs.make_noise`; refuses what `grid` refuses."""
    return *self.grid(frames, height, width), self.channels

  def frames(self, latent_frames: int) -> int:
    """Pixel frames of `latent_frames`."""
    return 1 + self.stride[0] * (latent_frames - 1)

  def tokens(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """(f, h, w): the token grid of a latent grid; T = f * h * w."""
    (f, h, w), (pf, ph, pw) = grid, self.patch
    return f // pf, h // ph, w // pw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """The plain sizes of one problem (`axes.LETTERS`); frames, height and width are latent.

  N: 1 where heads are not told apart.
  """

  S: int
  R: int
  G: int
  L: int
  F: int
  H: int
  W: int
  C: int
  T: int
  D: int
  N: int = 1
  sites: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """The Linen modules of a bundle, hashable; None = the family has no such part."""

  dit: Any
  vae: Any = None
  text: Any = None
  clip: Any = None
  preview: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
  """What a bundle says of itself.

  boundary: sigma at which the second expert takes over (.875, .9); None with one expert.
  text_length: text tokens that the DiT attends to (512 for Wan).
  tokenizer: path of tokenizer.json, "" when the text part was not loaded.
  sources: (file name, sha256) of what the weights were made from.
  tables: (part, naming) of the conversion tables they went through; none = trained here.
  """

  name: str
  family: str
  latents: LatentSpec
  text_length: int
  boundary: float | None = None
  numerics: str = "official"
  tokenizer: str = ""
  sources: tuple[tuple[str, str], ...] = ()
  tables: tuple[tuple[str, str], ...] = ()


@pytree
class ModelBundle:
  """What `load` returns; passes through jit.

  params: DiT weights, (only,) or (high noise, low noise); an expert that is not loaded is None.
  vae, text, clip, preview: None = not loaded, or where `parts` has none either, the model has none.
  """

  params: tuple[Params | None, ...]
  vae: Params | None = None
  text: Params | None = None
  clip: Params | None = None
  preview: Params | None = None
  parts: Parts = static()
  card: Card = static()


@pytree
class Conditioning:
  """Everything the model is given that is not the latents.

  text: G R X D_text; G = 1 means unguided; padding rows are zero.
  known: R F H W C latents of given frames (zero frames encoded where nothing is given).
  known_mask: R F H W 4, 1 = given; one channel per pixel frame of a latent frame.
  clip: R X D_clip (Wan2.1 I2V).
  """

  text: Array
  known: Array | None = None
  known_mask: Array | None = None
  clip: Array | None = None


def key_of(seed: int) -> Array:
  """The typed key of a seed, of one generator whatever `jax_default_prng_impl` says.

  What another one (rbg) draws for a run varies with the batch.
  """
  return jax.random.key(seed, impl="threefry2x32")


@pytree
class Noise:
  """The noise of each run.

  keys: R typed PRNG keys, fold_in(key_of(0), seed number).
  start: R F H W C noise from elsewhere (parity); None = drawn from keys in float32.
  injected: S R F H W C the same for noise injected on the way.
  grid: (F, H, W, C) of the latents to draw.
  """

  keys: Array
  start: Array | None = None
  injected: Array | None = None
  grid: tuple[int, int, int, int] = static()


@pytree
class State:
  """Where a trajectory stands between two pieces; `sampler.moved` gives it other latents.

  latents, x0: R F H W C; x0 = the guess of the step before, 0 before the first.
  solver: the solver's memory, in which a multistep solver has its own copy of the latents.
  step: R int32, the step of the whole schedule that comes next, to which `denoise` holds the piece;
    -1 (before the first piece, after a held step) and None = any.
  """

  latents: Array
  x0: Array
  solver: dict[str, Array]
  step: Array | None = None


@pytree
class Trace:
  """What was kept; leading axis S; None = not asked for.

  sigma: S. finite: S R bool.
  latents, x0: S R F H W C, what the model saw at step s and its guess of the clean video.
  taps: 'attn_out/norm' -> S L G R ... (the steps, layers and branches asked for).
  solver: S R ..., the solver's memory before step s (`State.solver`); empty where not asked for.
  """

  sigma: Array
  finite: Array
  latents: Array | None = None
  x0: Array | None = None
  taps: dict[str, Array]
  solver: dict[str, Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerTrace:
  """The answers read from x0 at every step; made by `answers.read_steps`.

  sigma: S. steps: S int, the denoising step of each row.
  answer: S R objects, a str or an int, or None where nothing could be read.
  right: S R bool. score: S R, 0..1. strict: S R, 1.0 where the clip is a strict success, else 0.0,
    as `evaluate` counts it; NaN where it was written without.
  commitment: R int, the first row from which the answer equals the final one and stays; -1 = the
    final answer can't be read. commitment_sigma: R, NaN there.
  first_hit: R int, the first row with a right answer; -1 = never.
  flips: R int, changes of the answer between rows that could be read; to_right, to_wrong: how many
    of them went wrong -> right and right -> wrong.
  candidates, entropy, mass: S R, the soft reading: how many answers are visible, their entropy in
    bits, the share of their weight on right answers; the two NaN where nothing is visible.
  second: S R, 0..1, the share that the second most drawn answer has in the blend of answers; NaN
    where it was written without.
  task: R names; None = the run belongs to no task and has no answers.
  """

  sigma: np.ndarray
  steps: np.ndarray
  answer: np.ndarray
  right: np.ndarray
  score: np.ndarray
  strict: np.ndarray
  commitment: np.ndarray
  commitment_sigma: np.ndarray
  first_hit: np.ndarray
  flips: np.ndarray
  to_right: np.ndarray
  to_wrong: np.ndarray
  candidates: np.ndarray
  entropy: np.ndarray
  mass: np.ndarray
  second: np.ndarray
  task: tuple[str | None, ...]

  @property
  def early(self) -> np.ndarray:
    """S: the share of runs whose answer is right at the step (early readout)."""
    known = [name is not None for name in self.task]
    return self.right[:, known].mean(1) if any(known) else np.full(len(self.sigma), np.nan)
