"""What every layer holds at every step: norms, components, and the answer it would give."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from jax_videoreason import answers, guidance, metrics
from jax_videoreason.axes import spread
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.results import Claim, Result
from jax_videoreason.experiments.study import experiment
from jax_videoreason.reductions import signs
from jax_videoreason.sampler import impose, known_cells
from jax_videoreason.structs import Sizes, Trace
from jax_videoreason.taps import HEAD_SITES, SITES, TapSpec, tap_bytes
from jax_videoreason.tasks import draw

COLUMNS = 32  # of the projection by which layers are compared
TOP = 20  # channels whose variance is reported
DRAWN = 6  # of them, drawn as maps


def rise(rows: np.ndarray) -> np.ndarray:
  """Mean of the last third of the places minus that of the first."""
  third = max(1, rows.shape[-1] // 3)
  return rows[..., -third:].mean((-2, -1)) - rows[..., :third].mean((-2, -1))


def rise_before_last(rows: np.ndarray) -> np.ndarray:
  """`rise` without the last layer, which is compared with itself."""
  return rise(rows[..., : max(1, rows.shape[-1] - 1)])


def tapped(sizes: Sizes, *, site: str) -> TapSpec:
  """What is shown of a site at every step, and the norm of each layer's update."""
  if site in HEAD_SITES:
    joined = ", ".join(name for name in SITES if name not in HEAD_SITES)
    raise ValueError(f"site={site!r}, where the lens has no meaning: wanted one of {joined}.")
  of_site = ("channel_moments", "project", "lens")
  return TapSpec(
    sites=(site, "update"),
    reduce=("norm", *(f"{site}/{name}" for name in of_site)),
    branches=tuple(range(sizes.G)),
    directions=jnp.asarray(signs(COLUMNS, sizes.D), jnp.float32),
  )


@experiment(
  tasks=("maze", "pick", "select_largest"),
  claims=(
    Claim(
      number=8,
      says="early layers hold the background, later ones the objects",
      of="contrast",
      by=rise,
      statistic="norm on objects minus background, in deviations: last third of layers minus first",
      above=0.2,
      paper="objects from about layer 9 of 40 on",
    ),
    Claim(
      number=12,
      says="later layers consolidate: they grow like the last one",
      of="cka_last",
      by=rise_before_last,
      statistic="CKA with the last layer: last third of those before it minus first",
      above=0.1,
      paper="stated, no number",
    ),
    Claim(
      number=12,
      says="later layers consolidate: the answer read from them is the final one",
      of="lens_agrees",
      by=rise_before_last,
      statistic="share of runs where the layer lens gives the final answer: last third of the "
      "layers before the last one minus first",
      above=0.1,
      paper="stated, no number",
    ),
  ),
  cost=lambda sizes: 1 + 1 / sizes.S,
  taps=tapped,
  least={"lens_steps": 1},
)
def layer_maps(ctx: Context, *, lens_steps: int = 4, site: str = "resid_post") -> Result:
  """What does every layer hold at every step, and which answer would it give?

  All is reduced inside the scan, in the run itself: token norms, moments of the channels and a
  projection to 32 random directions of the residual stream, norms of each layer's update. The layer
  lens is the model's own output head on every layer, both guidance branches, so it gives a
  velocity, an x0 and an answer per layer and step. Contrast: token norms in deviations from the
  mean of their layer, on objects minus elsewhere, each token weighed by the share of its pixels
  that are of an object: of a colour of its own on the first frame, neither black, white nor grey,
  which are grounds and walls. Norms are also shown divided by the median of their layer.

  The last step runs once more to draw the three main components and the channels of most variance.

  Limits: the head was trained on the last layer alone, so the lens understates early layers. CKA
  and cosine are of projections, over tokens. Objects are sought where they stand on the first
  frame; a token larger than they are shows its ground too. A picture without objects has no
  contrast. Nothing is edited, so there is no identity control.
  """
  sizes = ctx.sizes
  shape = (sizes.F, *token_grid(ctx))
  taps = tapped(sizes, site=site)
  _, trace = ctx.denoise(taps=taps)
  kept = {name: np.asarray(value) for name, value in trace.taps.items()}
  own = {name: value[:, :, 0] for name, value in kept.items()}  # S L R ...
  norm, update = own[f"{site}/norm"], own["update/norm"]
  frame_norm = np.sqrt(reduce(norm**2, "s l r (f t) -> s l r f", "sum", f=sizes.F))
  variance = own[f"{site}/channel_moments"][..., 1, :]
  moments = np.sort(variance, axis=-1)
  deviations = (norm - norm.mean(-1, keepdims=True)) / np.maximum(norm.std(-1, keepdims=True), 1e-6)
  share = object_share(np.stack([case.first_frame for case in ctx.cases]), shape)
  contrast = beside_ground(deviations, share[None, None])
  projected = own[f"{site}/project"][..., None, None, :]  # S L R T 1 1 P
  flat = own[f"{site}/project"] / np.maximum(
    np.linalg.norm(own[f"{site}/project"], axis=-1, keepdims=True), 1e-6
  )
  steps = spread(sizes.S, lens_steps)
  guesses = lens_x0(ctx, trace, kept[f"{site}/lens"])
  final = ctx.read(np.asarray(trace.x0)[-1:]).answer[0]
  read = [ctx.read(guesses[step]) for step in steps]  # one row per layer
  last = sizes.S - 1
  channels = np.argsort(variance[last, :, 0].mean(0))[: -DRAWN - 1 : -1]
  one_hot = jnp.asarray(np.eye(sizes.D, dtype=np.float32)[channels])
  again = TapSpec(sites=(site,), reduce=("project", "pca3"), steps=(last,), directions=one_hot)
  _, end = ctx.resume(trace, last, None, again)
  components = np.asarray(end.taps[f"{site}/pca3"])[0, :, 0, 0]  # L T 3
  of_channel = np.asarray(end.taps[f"{site}/project"])[0, :, 0, 0]  # L T P
  middle = sizes.F // 2
  values: dict[str, Any] = {
    "norm": norm.mean(-1),
    "norm_of_update": update.mean(-1),
    "contrast": contrast.mean(0),
    "contrast_by_step": contrast,
    "layer_by_frame": frame_norm.mean(0),
    "temporal_energy": frame_norm.mean(1),
    "top_channels": moments[..., -TOP:].sum(-1) / moments.sum(-1),
    "channel_variance": moments[..., : -TOP - 1 : -1].mean(0),
    "cosine_last": (flat * flat[:, -1:]).sum(-1).mean((0, -1)),
    "cka_last": np.asarray(metrics.cka(projected, projected[:, -1:])).mean(0),
    "lens_x0": np.asarray(metrics.agreement(guesses, np.asarray(trace.x0)[-1:])),
    "lens_agrees": agrees(np.stack([answer.answer for answer in read]), final).mean(0),
    "lens_right": np.stack([answer.right for answer in read]).astype(float),
    "norm_map": picture(norm[last, :, 0], shape),
    "norm_map_over_median": picture(
      norm[last, :, 0] / np.median(norm[last, :, 0], axis=-1, keepdims=True), shape
    ),
    "update_map": picture(update[last, :, 0], shape),
    "channel_map": rearrange(of_channel, "l (f y x) p -> f l p y x", f=shape[0], y=shape[1])[
      middle
    ],
    "pca_map": rearrange(colours(components), "l (f y x) c -> l f y x c", f=shape[0], y=shape[1]),
  }
  axes = {name: AXES.get(name, ("step", "layer", "run")) for name in values}
  points = ctx.points | {"lens_step": steps, "channel": channels.tolist()}
  points |= {"rank": list(range(1, moments[..., -TOP:].shape[-1] + 1))}
  states = 4 * 2 * sizes.S * sizes.L * sizes.G * sizes.R * sizes.T * sizes.D
  note = (
    f"Taps of a batch: {tap_bytes(taps, sizes) / 1e6:.0f} MB; all hidden states would be "
    f"{states / 1e6:.0f} MB."
  )
  return Result(
    values=values,
    axes=axes,
    points=points,
    titles=TITLES,
    notes=(note,),
    signed=("contrast_by_step",),
  )


def token_grid(ctx: Context) -> tuple[int, int]:
  """(h, w) of the tokens of a latent frame."""
  f, h, w = ctx.tokens
  if f != ctx.sizes.F:
    raise ValueError(f"tokens span several latent frames ({f} of {ctx.sizes.F}); wanted one each.")
  return h, w


def object_share(pictures: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
  """R T: share of each token's pixels that are of an object, in every latent frame the same.

  pictures: first frames, uint8 (R height width 3). An object is what has a hue; black, white and
  grey are what tasks draw their grounds, floors and walls with.
  """
  f, h, w = shape
  objects = np.isin(draw.label(pictures), draw.HUES).astype(float)
  return np.tile(reduce(objects, "r (h a) (w b) -> r (h w)", "mean", h=h, w=w), f)


def beside_ground(value: np.ndarray, share: np.ndarray) -> np.ndarray:
  """Mean of value over objects minus that over the rest, along the last axis (tokens).

  share: of each token that is of an object. NaN where all is object, or nothing is.
  """
  return weighted_mean(value, share) - weighted_mean(value, 1 - share)


def weighted_mean(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
  """Mean over the last axis; NaN where nothing has weight."""
  total = weight.sum(-1)
  return (value * weight).sum(-1) / np.where(total > 0, total, np.nan)


def agrees(answer: np.ndarray, final: np.ndarray) -> np.ndarray:
  """... R: 1 where an answer is that of the final video, 0 elsewhere; NaN where that has none."""
  return np.where(answers.readable(final), answer == final, np.nan)


def lens_x0(ctx: Context, trace: Trace, lens: np.ndarray) -> np.ndarray:
  """S L R F H W C: the x0 that lens taps S L G R T (patch C) give, known cells in their place."""
  sigma = ctx.sigma[:-1].reshape(-1, *(1,) * 6)
  guesses = np.asarray(trace.latents)[:, None] - sigma * combined(ctx, lens)
  known = known_cells(ctx.bundle.parts.dit.config.image_input, ctx.cond)
  layers = jax.vmap(functools.partial(impose, known))
  return np.stack([np.asarray(layers(step)) for step in guesses])


def combined(ctx: Context, lens: np.ndarray) -> np.ndarray:
  """S L R F H W C: the guided velocity of lens taps S L G R T (patch C)."""
  pf, ph, pw = ctx.bundle.card.latents.patch
  _, h, w = ctx.tokens
  pattern = "s l g r (f h w) (pf ph pw c) -> s g l r (f pf) (h ph) (w pw) c"
  by_branch = rearrange(lens, pattern, h=h, w=w, pf=pf, ph=ph, pw=pw)
  scale = np.asarray(ctx.schedule.guidance)
  rows = [guidance.combine(v, s) for v, s in zip(by_branch, scale, strict=True)]
  return np.stack([np.asarray(row) for row in rows])


def picture(norm: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
  """L F y x of L T."""
  return rearrange(norm, "l (f y x) -> l f y x", f=shape[0], y=shape[1])


def colours(scores: np.ndarray) -> np.ndarray:
  """L T 3 uint8: each component from its smallest to its largest value."""
  low, high = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
  return (255 * (scores - low) / np.maximum(high - low, 1e-6)).astype(np.uint8)


PICTURE = ("layer", "latent_frame", "y", "x")
AXES = {
  "contrast": ("layer", "run"),
  "cka_last": ("layer", "run"),
  "cosine_last": ("layer", "run"),
  "channel_variance": ("layer", "run", "rank"),
  "channel_map": ("layer", "channel", "y", "x"),
  "layer_by_frame": ("layer", "run", "latent_frame"),
  "temporal_energy": ("step", "run", "latent_frame"),
  "lens_agrees": ("layer", "run"),
  "lens_right": ("lens_step", "layer", "run"),
  **dict.fromkeys(("norm_map", "norm_map_over_median", "update_map"), PICTURE),
  "pca_map": (*PICTURE, "rgb"),
}
TITLES = {
  "norm": "Mean token norm",
  "norm_of_update": "Mean token norm of the layer's update",
  "contrast": "Norm on objects minus background, in deviations",
  "contrast_by_step": "Norm on objects minus background, in deviations",
  "layer_by_frame": "Norm by layer and latent frame",
  "temporal_energy": "Energy by step and latent frame",
  "top_channels": f"Share of the variance in the {TOP} strongest channels",
  "channel_variance": f"Variance of the {TOP} strongest channels",
  "cosine_last": "Cosine with the last layer, over tokens",
  "cka_last": "CKA with the last layer",
  "lens_x0": "Layer lens: cosine of its x0 with the final video",
  "lens_agrees": "Layer lens: share of runs and steps with the final answer",
  "lens_right": "Layer lens: share of runs with a right answer",
  "norm_map": "Token norms at the last step, first run (each picture on its own scale)",
  "norm_map_over_median": "The same divided by the median of its layer (all on one scale)",
  "update_map": "Token norms of the layers' updates",
  "channel_map": "Channels of most variance, middle latent frame at the last step, first run",
  "pca_map": "Three main components as colours",
}
