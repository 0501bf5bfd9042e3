"""Models whose inner life is known: what an experiment must find, and must not find elsewhere.

A toy has the sites and taps of the real models. Its stream has two halves: the latents, and a
memory that is empty until the layer `carrier` writes the picture of the first frame into it. A rule
makes the guess x0 of the memory. A case is a picture whose left or right side is lit; the answer is
the side that is lit on the last frame.
"""

import dataclasses
from collections.abc import Callable
from typing import cast

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jax_videoreason.edits import edit_site, layer_edits
from jax_videoreason.experiments.context import Setting
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Card, Conditioning, LatentSpec, ModelBundle, Parts, Sizes
from jax_videoreason.taps import SITES, TapAids, empty_buffers, layer_slots, record
from jax_videoreason.tasks import Case, Task
from jax_videoreason.tasks.base import Score

F, H, W, C = 3, 4, 4, 2
FREQ = 16
SIDES = ("left", "right")


def lit(side):
  """H W: one side bright, the other dark."""
  picture = np.full((H, W), -1.0)
  picture[:, : W // 2] = 1.0
  return picture if side == "left" else -picture


# Rules: (latents R F H W C, sigma, memory G R F H W C) -> x0 G R F H W C


def truth(latents, sigma, memory):
  """The picture, at every step."""
  return memory


def side_of(latents):
  """R 1 1 1 1: +1 where the left of channel 0 is brighter, else -1."""
  x = latents[..., 0].mean(axis=(1, 2))
  difference = x[:, : W // 2].mean(1) - x[:, W // 2 :].mean(1)
  return jnp.where(difference > 0, 1.0, -1.0)[:, None, None, None, None]


def read_late(latents, sigma, memory):
  """The picture while sigma is above .55; from then on the side that the latents show."""
  left = jnp.asarray(lit("left"), jnp.float32)[None, None, :, :, None]
  seen = jnp.broadcast_to(side_of(latents) * left, latents.shape)
  return jnp.where(sigma > 0.55, memory, seen[None])


def needs_frames(latents, sigma, memory):
  """The picture where the video has all its frames; a shorter one stays dark."""
  return memory if latents.shape[1] >= F else -1 + 0 * memory


def right_is_dark(latents, sigma, memory):
  """The picture where its left is lit; the others show no side."""
  return jnp.where(side_of(memory[0])[None] > 0, memory, 0.01 * memory)


def both_then_one(latents, sigma, memory):
  """Both sides lit, the wrong one brighter, while sigma is above .55; then the picture."""
  return jnp.where(sigma > 0.55, 0.7 - 0.3 * memory, memory)


def of_the_noise(latents, sigma, memory):
  """The side that the noise says at every step: half of the seeds are wrong."""
  left = jnp.asarray(lit("left"), jnp.float32)[None, None, :, :, None]
  return jnp.broadcast_to(side_of(latents) * left, latents.shape)[None] + 0 * memory


def bent(latents, sigma, memory):
  """Another guess at every step, which bends the way: a solver's memory shows."""
  return jnp.tanh(2 * latents)[None] + 0 * memory


def leaning(latents, sigma, memory):
  """The side that the latents show together with a weak hint of the picture: some seeds err."""
  left = jnp.asarray(lit("left"), jnp.float32)[None, None, :, :, None]
  hint = 0.1 * memory[0, :, :, :, :, :1]
  side = side_of(latents[..., :1] + hint * sigma)
  return jnp.broadcast_to(side * left, latents.shape)[None] + 0 * memory


@dataclasses.dataclass(frozen=True)
class ToyConfig:
  layers: int = 4
  width: int = 2 * C
  heads: int = 1
  out_channels: int = C
  text_width: int = 3
  freq_dim: int = FREQ
  image_input: str = "concat"
  dtype: str = "float32"
  clip_width: None = None


@dataclasses.dataclass(frozen=True)
class ToyDiT:
  """carrier: the layer that writes the picture into the memory; None = the head reads it past all
  layers."""

  config: ToyConfig = ToyConfig()
  rule: Callable = truth
  carrier: int | None = 2

  def apply(self, variables, latents, time, cond, edits=None, taps=None, slots=None):
    c = self.config
    (g, r), f = cond.text.shape[:2], latents.shape[1]
    lowest = 10000.0 ** -(1 - 2 / FREQ)
    sigma = jnp.arcsin(time[0, -1]) / lowest / 1000
    tokens = f * H * W
    picture = jnp.broadcast_to(cond.known[:, :1], latents.shape)

    def flat(x):
      return jnp.broadcast_to(x.reshape(1, r, tokens, C), (g, r, tokens, C))

    def velocity(h):
      memory = h[..., C:].reshape(g, r, f, H, W, C)
      if self.carrier is None:
        memory = memory + picture[None]
      return (latents[None] - self.rule(latents, sigma, memory)) / sigma

    h = jnp.concatenate([flat(latents), jnp.zeros((g, r, tokens, C))], -1)
    aids, buffers = None, {}
    if taps is not None and taps.sites:
      taps = dataclasses.replace(taps, steps=None)

      def head(h):
        return velocity(h).reshape(g, r, tokens, C)

      aids = TapAids(grid=(f, H, W), head=head)
      sizes = Sizes(S=1, R=r, G=g, L=c.layers, F=f, H=H, W=W, C=C, T=tokens, D=c.width, sites=SITES)
      buffers = empty_buffers(taps, sizes, aids)
      slots = jnp.asarray(layer_slots(taps, c.layers) if slots is None else slots)
    for layer in range(c.layers):
      own = None if edits is None else layer_edits(edits, layer)

      def at(name, value, buffers, own=own, layer=layer):
        value = edit_site(value, own, name)
        if taps is not None and slots is not None and aids is not None:
          buffers = record(buffers, name, value, taps, slots[layer], aids)
        return value, buffers

      h, buffers = at("resid_pre", h, buffers)
      before = h
      written = jnp.concatenate([jnp.zeros_like(flat(picture)), flat(picture)], -1)
      updates = {
        "attn_out": written if layer == self.carrier else jnp.zeros_like(h),
        "cross_out": jnp.zeros_like(h),
        "mlp_out": jnp.zeros_like(h),
      }
      for name, update in updates.items():
        update, buffers = at(name, update, buffers)
        h = h + update
      h, buffers = at("resid_post", h, buffers)
      _, buffers = at("update", h - before, buffers)
    return velocity(h), buffers


@dataclasses.dataclass(frozen=True)
class Sides:
  """The task; a case is right when its lit side stays lit. Cases have a counterpart.

  Its left side counts as hidden after the first frame.
  """

  frames: int = F
  name = "sides"
  held_out = False

  def generate(self, split, index, side=None):
    side = SIDES[index % 2] if side is None else side
    picture = pixels(np.repeat(lit(side)[None, ..., None], self.frames, axis=0))
    metadata = {
      "task": "sides", "split": split, "index": index, "answers": [side], "answer": side, "k": 1,
      "hash": f"{index}{side}", "frames": self.frames, "problem": {"side": side},
    }  # fmt: skip
    return Case(
      task="sides", split=split, index=index, first_frame=picture[0], prompt="", frames=picture,
      metadata=metadata,
    )  # fmt: skip

  def case(self, metadata):
    return self.generate(metadata["split"], metadata["index"], metadata["answer"])

  def counterpart(self, case):
    other = SIDES[1 - SIDES.index(case.metadata["answer"])]
    return self.generate(case.split, case.index, other)

  def hidden(self, problem):
    return [(problem["side"], (0, 0, H, W // 2), np.arange(self.frames) > 0)]

  def parts(self, labels, problem):
    return None

  def halves(self, frames):
    x = (frames[-1, ..., 0].astype(float) - 128) / 100
    return {"left": float(x[:, : W // 2].mean()), "right": float(x[:, W // 2 :].mean())}

  def parse(self, frames, metadata):
    halves = self.halves(frames)
    best = max(halves, key=lambda side: halves[side])
    return best if abs(halves["left"] - halves["right"]) > 0.2 else None

  def judge(self, frames, metadata):
    return self.score(frames, metadata), self.parse(frames, metadata)

  def candidates(self, frames, metadata):
    return {side: float(np.clip(value, 0, 1)) for side, value in self.halves(frames).items()}

  def score(self, frames, metadata):
    right = float(self.parse(frames, metadata) in metadata["answers"])
    return Score(value=right, preservation=1.0, final=right, process=right, strict=right == 1)


def pixels(x):
  """... F H W C -> uint8 ... F H W 3: channel 0 as grey."""
  grey = np.clip(128 + 100 * np.asarray(x)[..., :1], 0, 255).astype(np.uint8)
  return np.repeat(grey, 3, axis=-1)


def shown(x):
  """... F H W C -> the pixels of one video after the other."""
  return map(pixels, rearrange(np.asarray(x), "... f h w c -> (...) f h w c"))


def encode(chosen, cases):
  count = len(cases)
  first = np.stack([lit(case.metadata["answer"]) for case in cases])
  known = np.zeros((count, chosen.frames, H, W, C), np.float32)
  known[:, 0] = first[..., None]
  mask = jnp.zeros((count, chosen.frames, H, W, 4)).at[:, 0].set(1.0)
  return Conditioning(text=jnp.zeros((1, count, 2, 3)), known=jnp.asarray(known), known_mask=mask)


def setting(rule: Callable = truth, carrier: int | None = 2, *, steps=10, seeds=(0,), **changes):
  """A Setting around the toy with shift 1: sigma falls from 1 to 0 in equal steps."""
  card = Card(
    name="toy", family="toy", latents=LatentSpec(channels=C, stride=(1, 1, 1), patch=(1, 1, 1)),
    text_length=2,
  )  # fmt: skip
  dit = ToyDiT(rule=rule, carrier=carrier)
  bundle = ModelBundle(params=({},), parts=Parts(dit=dit), card=card)
  chosen = SampleSettings(
    checkpoint="toy", frames=F, height=H, width=W, steps=steps, shift=1.0, guidance=(1.0,),
    seeds=tuple(seeds), **changes,
  )  # fmt: skip
  return Setting(
    bundle=bundle, chosen=chosen, encode=encode, decode=shown,
    load_task=lambda name, chosen: cast(Task, Sides(chosen.frames)),
  )  # fmt: skip


def cases(count):
  return [Sides().generate("id", index) for index in range(count)]
