"""The tensors of the CLIP image tower in the original Wan and in the transformers naming."""

import re
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

from jax_videoreason.models.clip import CLIPConfig

from .engine import Row, regex

Naming = Literal["original", "transformers"]
Tensor = TypeVar("Tensor")

# original, transformers, ours; {L} is the layer. Each is a weight and a bias. The original keeps
# queries, keys and values in one tensor, which `prepared` cuts.
DENSE = (
  ("transformer.{L}.attn.to_q", "encoder.layers.{L}.self_attn.q_proj", "blocks/q"),
  ("transformer.{L}.attn.to_k", "encoder.layers.{L}.self_attn.k_proj", "blocks/k"),
  ("transformer.{L}.attn.to_v", "encoder.layers.{L}.self_attn.v_proj", "blocks/v"),
  ("transformer.{L}.attn.proj", "encoder.layers.{L}.self_attn.out_proj", "blocks/o"),
  ("transformer.{L}.mlp.0", "encoder.layers.{L}.mlp.fc1", "blocks/up"),
  ("transformer.{L}.mlp.2", "encoder.layers.{L}.mlp.fc2", "blocks/down"),
)
LAYER_NORM = (
  ("pre_norm", "pre_layrnorm", "norm_in"),
  ("transformer.{L}.norm1", "encoder.layers.{L}.layer_norm1", "blocks/norm1"),
  ("transformer.{L}.norm2", "encoder.layers.{L}.layer_norm2", "blocks/norm2"),
)
PATCHES = "o c p q -> (c p q) o"
TENSOR: Mapping[Naming, tuple[tuple[str, str, str], ...]] = {
  "original": (
    ("cls_embedding", "whole", "1 1 d -> d"),
    ("pos_embedding", "position", "1 x d -> x d"),
    ("patch_embedding.weight", "patch_embed/kernel", PATCHES),
  ),
  "transformers": (
    ("embeddings.class_embedding", "whole", "d -> d"),
    ("embeddings.position_embedding.weight", "position", "x d -> x d"),
    ("embeddings.patch_embedding.weight", "patch_embed/kernel", PATCHES),
  ),
}
# What stands before every key of the tower: in the original, and in files of transformers before 5.
PREFIXES = ("visual.", "vision_model.")
FUSED = re.compile(r"transformer\.\d+\.attn\.to_qkv\.(weight|bias)")


def prepared(
  tensors: Mapping[str, Tensor], cut: Callable[[Tensor, int, int], Tensor]
) -> dict[str, Tensor]:
  """The tensors under the keys that `table` reads.

  cut(tensor, i, n): the i-th of n equal pieces along the first axis.
  """
  made: dict[str, Tensor] = {}
  for key, tensor in tensors.items():
    for prefix in PREFIXES:
      key = key.removeprefix(prefix)
    if FUSED.fullmatch(key):
      for i, name in enumerate("qkv"):
        made[key.replace("to_qkv", f"to_{name}")] = cut(tensor, i, 3)
    else:
      made[key] = tensor
  return made


def table(naming: Naming) -> tuple[Row, ...]:
  """The rows of a naming for `engine.moves`, for tensors that are `prepared`."""
  if naming not in TENSOR:
    raise ValueError(f"naming {naming!r}, wanted 'original' or 'transformers'.")
  rows = list(TENSOR[naming])
  for name, pattern, pairs in (("kernel", "o i -> i o", DENSE), ("scale", "d -> d", LAYER_NORM)):
    for old, new, ours in pairs:
      key = old if naming == "original" else new
      rows += [
        (f"{key}.weight", f"{ours}/{name}", pattern),
        (f"{key}.bias", f"{ours}/bias", "o -> o"),
      ]
  return tuple((regex(key), ours, pattern) for key, ours, pattern in rows)


def ignored(config: CLIPConfig) -> tuple[str, ...]:
  """Regexes of keys that have no place in the tower: its last layer, what follows it, the text."""
  last = config.layers
  return (
    rf"(transformer|encoder\.layers)\.{last}\..*",
    r"(post_norm|post_layernorm)\..*",
    r"head|head\..*|textual\..*|log_scale|embeddings\.position_ids",
  )
