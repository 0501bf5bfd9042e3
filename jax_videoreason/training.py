"""Training of a small member of a family: losses and train step of its VAE and of its DiT."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_videoreason.axes import Array, Params
from jax_videoreason.pytrees import pytree
from jax_videoreason.schedules import sinusoid
from jax_videoreason.structs import Conditioning, Parts, key_of

BANDS = (0.0, 0.4, 0.7, 0.9, 1.0)


def compute_dtype(device: Any) -> str:
  """bfloat16 on devices that are known for units of it (TPU, NVIDIA since Ampere), else float32."""
  major = str(getattr(device, "compute_capability", "")).split(".")[0]  # ROCm says "gfx942"
  ampere = device.platform == "gpu" and major.isdigit() and int(major) >= 8
  return "bfloat16" if device.platform == "tpu" or ampere else "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
  """How a network is trained.

  shift: of the training sigmas, s*u/(1+(s-1)u) with u uniform over 1000 values, as at sampling.
  low, high: range of u; an expert is trained on its own part.
  drop_prompt: share of cases that see the empty prompt, so that guidance works.
  """

  steps: int
  batch: int
  learning_rate: float = 1e-3
  warmup: int = 200
  final_fraction: float = 0.05
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  ema: float = 0.999
  shift: float = 3.0
  low: float = 0.0
  high: float = 1.0
  drop_prompt: float = 0.1


@pytree
class TrainState:
  """What a checkpoint holds: step (scalar), params, their moving average, optimiser memory."""

  step: Array
  params: Any
  ema: Any
  optimiser: Any


def optimiser(settings: TrainSettings) -> optax.GradientTransformation:
  """AdamW with warm-up, cosine decay and a clipped gradient norm."""
  rate = optax.warmup_cosine_decay_schedule(
    0.0,
    settings.learning_rate,
    settings.warmup,
    max(settings.steps, settings.warmup + 1),
    settings.learning_rate * settings.final_fraction,
  )
  return optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay),
  )


def begin(params: Params, settings: TrainSettings) -> TrainState:
  """The state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=jax.tree.map(jnp.copy, params),
    ema=jax.tree.map(jnp.copy, params),
    optimiser=optimiser(settings).init(params),
  )


def make_step(
  loss: Callable[[Any, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]],
  settings: TrainSettings,
  seed: int,
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
  """A jitted train step for `loss(params, batch, key) -> (scalar, metrics)`.

  The key of a step is fold_in(key_of(seed), step), so a resumed training draws what an undisturbed
  one draws. A step whose loss or gradient is not finite leaves the state as it was and reports
  `finite` = False.
  """
  transform = optimiser(settings)

  def step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(key_of(seed), state.step)
    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, memory = transform.update(grads, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    count = state.step.astype(jnp.float32)
    decay = jnp.minimum(settings.ema, (1.0 + count) / (10.0 + count))
    ema = jax.tree.map(lambda a, b: decay * a + (1.0 - decay) * b, state.ema, params)
    after = TrainState(step=state.step + 1, params=params, ema=ema, optimiser=memory)
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    return after, {"loss": value, "grad_norm": norm, "finite": finite, **metrics}

  return jax.jit(step, donate_argnums=0)


def sigma_table(settings: TrainSettings, freq_dim: int) -> tuple[np.ndarray, np.ndarray]:
  """(P), (P 2 freq_dim): the 1000 training sigmas and their time rows, made in float64."""
  u = np.linspace(0.0, 1.0, 1001)[1:]
  u = u[(u > settings.low) & (u <= settings.high)]
  sigma = settings.shift * u / (1.0 + (settings.shift - 1.0) * u)
  rows = np.stack([sinusoid(1000.0 * sigma, freq_dim), sinusoid(0.0 * sigma, freq_dim)], axis=1)
  return sigma.astype(np.float32), rows.astype(np.float32)


def flow_loss(
  parts: Parts, settings: TrainSettings
) -> Callable[[Any, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]:
  """The flow-matching loss |v - (noise - x0)|^2 of DiT and text encoder, trained together.

  params: {"dit", "text"}. A batch has latents, known (R F H W C), known_mask (R F H W 4), ids and
  mask (R X), and the empty prompt, empty_ids and empty_mask (1 X). Metrics: the mean loss per
  sigma band of `BANDS`.
  """
  sigmas, rows = sigma_table(settings, parts.dit.config.freq_dim)

  def loss(params: Any, batch: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
    clean = batch["latents"].astype(jnp.float32)
    runs = clean.shape[0]
    pick_key, noise_key, drop_key = jax.random.split(key, 3)
    pick = jax.random.randint(pick_key, (runs,), 0, len(sigmas))
    sigma, time = jnp.asarray(sigmas)[pick], jnp.asarray(rows)[pick]
    noise = jax.random.normal(noise_key, clean.shape, jnp.float32)
    drop = jax.random.bernoulli(drop_key, settings.drop_prompt, (runs, 1))
    ids = jnp.where(drop, jnp.broadcast_to(batch["empty_ids"], batch["ids"].shape), batch["ids"])
    mask = jnp.where(
      drop, jnp.broadcast_to(batch["empty_mask"], batch["mask"].shape), batch["mask"]
    )
    text = parts.text.apply({"params": params["text"]}, ids, mask)
    text = jnp.where(mask[..., None], text, 0.0)

    level = sigma[:, None, None, None, None]
    noisy = (1.0 - level) * clean + level * noise
    known, known_mask = batch["known"].astype(jnp.float32), batch["known_mask"]
    cond = Conditioning(text=text[None], known=known, known_mask=known_mask)
    velocity = parts.dit.apply({"params": params["dit"]}, noisy, time, cond)[0][0]
    each = jnp.mean(jnp.square(velocity - (noise - clean)), axis=(1, 2, 3, 4))
    band = jnp.digitize(sigma, jnp.asarray(BANDS[1:-1]))
    share = jax.nn.one_hot(band, len(BANDS) - 1, axis=0)
    bands = jnp.sum(share * each[None, :], axis=1) / jnp.maximum(jnp.sum(share, axis=1), 1.0)
    return jnp.mean(each), {"bands": bands, "band_counts": jnp.sum(share, axis=1)}

  return loss


def vae_loss(
  vae: Any, kl_weight: float
) -> Callable[[Any, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]:
  """L1 + L2 of the reconstruction and a small KL; a batch has video, R T height width 3, -1..1."""

  def loss(params: Any, batch: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
    video = batch["video"]
    mean, logvar = vae.apply({"params": params}, video, method="encode_moments")
    logvar = jnp.clip(logvar, -20.0, 5.0)
    sample = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)
    again = vae.apply({"params": params}, sample, method="decode_values")
    wrong = again - video
    l1, l2 = jnp.mean(jnp.abs(wrong)), jnp.mean(jnp.square(wrong))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    return l1 + l2 + kl_weight * kl, {"l1": l1, "l2": l2, "kl": kl}

  return loss


def preview_loss(
  preview: Any, *, end: int, weight: float
) -> Callable[[Any, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]:
  """Mean squared difference of a `PreviewDecoder` from the frames of the VAE.

  A batch has latents, R F H W C, normalised, and video, R T height width 3, -1..1, which the VAE
  made of them. end, weight: the last `end` frames, where most answers stand, count `weight` times.
  """

  def loss(params: Any, batch: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
    del key
    video = batch["video"]
    wrong = jnp.square(preview.apply({"params": params}, batch["latents"]) - video)
    frames = jnp.mean(wrong, axis=(0, 2, 3, 4))
    weights = jnp.ones(video.shape[1]).at[-end:].set(weight)
    return jnp.sum(weights * frames) / jnp.sum(weights), {"l2": jnp.mean(frames)}

  return loss


def deepen(params: Params, layers: int) -> Params:
  """The DiT's params grown to `layers` layers, evenly spaced, that compute what they computed.

  A new layer is a copy of the one before it whose three output projections are zero, so it adds
  nothing to the residual stream and learns from there (Net2Net, Chen et al. 2016).
  Raises ValueError when the params have more layers than asked for.
  """
  have = params["blocks"]["modulation"].shape[0]
  if layers < have:
    raise ValueError(f"layers={layers} of a network with {have}: give at least as many.")
  source = np.arange(layers) * have // layers
  fresh = np.concatenate([[False], source[1:] == source[:-1]])

  def grow(path: Any, leaf: Array) -> Array:
    grown = jnp.asarray(leaf)[source]
    names = {key.key for key in path}
    if names & {"o", "down"}:
      return jnp.where(fresh.reshape(-1, *[1] * (grown.ndim - 1)), 0.0, grown)
    return grown

  return {**params, "blocks": jax.tree_util.tree_map_with_path(grow, params["blocks"])}
