"""The model families: which modules make up a bundle, and how they are built from their configs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_videoreason.axes import Params
from jax_videoreason.models import wan
from jax_videoreason.models.clip import CLIPConfig, CLIPTower
from jax_videoreason.models.preview import PreviewConfig, PreviewDecoder
from jax_videoreason.models.umt5 import UMT5Config, UMT5Encoder
from jax_videoreason.models.variants import VARIANTS, Variant
from jax_videoreason.models.wan21_vae import WanVAE, WanVAEConfig
from jax_videoreason.structs import LatentSpec, Parts

FPS = 8  # of models that are like no published one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One part of a family: its config, its module, and its parameters as shapes and dtypes, which
  are found once for each config and must not be changed."""

  config: type
  module: Callable[[Any], Any]
  abstract: Callable[[Any], Params]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """Part name ("dit", "vae", "text", "clip", "preview") -> Part; the published models by their
  short names."""

  name: str
  parts: Mapping[str, Part]
  variants: Mapping[str, Variant]

  def build(self, configs: Mapping[str, Any]) -> Parts:
    """The modules of the parts that have a config, given as an object or as its settings.

    ValueError names a part the family does not have; TypeError a setting its config does not have.
    """
    unknown = sorted(configs.keys() - self.parts.keys())
    if unknown:
      raise ValueError(
        f"family {self.name} has no part {', '.join(unknown)}; it has: {', '.join(self.parts)}."
      )
    modules = {}
    for name, config in configs.items():
      part = self.parts[name]
      made = part.config(**config) if isinstance(config, Mapping) else config
      modules[name] = part.module(made)
    return Parts(**modules)

  def abstract(self, parts: Parts) -> dict[str, Params]:
    """Part name -> its parameter tree as shapes and dtypes; nothing is allocated."""
    modules = {name: getattr(parts, name) for name in self.parts}
    return {
      name: self.parts[name].abstract(module.config)
      for name, module in modules.items()
      if module is not None
    }

  def latents(self, parts: Parts) -> LatentSpec:
    """What a latent of these modules is."""
    vae, dit = parts.vae.config, parts.dit.config
    return LatentSpec(channels=vae.z_channels, stride=vae.stride, patch=dit.patch)

  def fps(self, latents: LatentSpec) -> int:
    """Frames per second of a model's videos: those of the published models with such latents, which
    share a VAE; `FPS` where there is none."""
    known = {self.latents(self.build(v.configs)): v.fps for v in self.variants.values()}
    return known.get(latents, FPS)


@functools.cache
def _vae_params(config: WanVAEConfig) -> Params:
  step, high, wide = config.stride

  def init() -> Params:
    return WanVAE(config).init(jax.random.key(0), jnp.zeros((1, 1 + step, high, wide, 3)))["params"]

  return jax.eval_shape(init)


@functools.cache
def _text_params(config: UMT5Config) -> Params:
  def init() -> Params:
    ids = jnp.zeros((1, 1), jnp.int32)
    return UMT5Encoder(config).init(jax.random.key(0), ids, ids == 0)["params"]

  return jax.eval_shape(init)


@functools.cache
def _clip_params(config: CLIPConfig) -> Params:
  def init() -> Params:
    images = jnp.zeros((1, config.image, config.image, 3))
    return CLIPTower(config).init(jax.random.key(0), images)["params"]

  return jax.eval_shape(init)


@functools.cache
def _preview_params(config: PreviewConfig) -> Params:
  def init() -> Params:
    latents = jnp.zeros((1, 1, 1, 1, config.z_channels))
    return PreviewDecoder(config).init(jax.random.key(0), latents)["params"]

  return jax.eval_shape(init)


WAN_PARTS = {
  "dit": Part(config=wan.WanConfig, module=wan.WanDiT, abstract=wan.abstract_params),
  "vae": Part(config=WanVAEConfig, module=WanVAE, abstract=_vae_params),
  "text": Part(config=UMT5Config, module=UMT5Encoder, abstract=_text_params),
  "clip": Part(config=CLIPConfig, module=CLIPTower, abstract=_clip_params),
  "preview": Part(config=PreviewConfig, module=PreviewDecoder, abstract=_preview_params),
}

FAMILIES: dict[str, Family] = {
  "wan21": Family(name="wan21", parts=WAN_PARTS, variants=VARIANTS),
}
