"""The tensors of the Wan transformer in the original and in the diffusers naming."""

from typing import Literal

from .engine import Row, regex

Naming = Literal["original", "diffusers"]

# Our leaves that a conversion to bfloat16 leaves in float32, as every reference but DiffSynth does:
# they are small, and the residual stream is scaled by them.
KEPT = r"time_embed/.*|.*norm[^/]*/.*|.*modulation"

# original, diffusers, ours; {L} is the layer. Each is a weight and a bias.
DENSE = (
  ("text_embedding.0", "condition_embedder.text_embedder.linear_1", "text_embed/up"),
  ("text_embedding.2", "condition_embedder.text_embedder.linear_2", "text_embed/down"),
  ("time_embedding.0", "condition_embedder.time_embedder.linear_1", "time_embed/up"),
  ("time_embedding.2", "condition_embedder.time_embedder.linear_2", "time_embed/down"),
  ("time_projection.1", "condition_embedder.time_proj", "time_project"),
  ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj", "clip_embed/up"),
  ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", "clip_embed/down"),
  ("head.head", "proj_out", "head"),
  ("blocks.{L}.self_attn.q", "blocks.{L}.attn1.to_q", "blocks/self_attn/q"),
  ("blocks.{L}.self_attn.k", "blocks.{L}.attn1.to_k", "blocks/self_attn/k"),
  ("blocks.{L}.self_attn.v", "blocks.{L}.attn1.to_v", "blocks/self_attn/v"),
  ("blocks.{L}.self_attn.o", "blocks.{L}.attn1.to_out.0", "blocks/self_attn/o"),
  ("blocks.{L}.cross_attn.q", "blocks.{L}.attn2.to_q", "blocks/cross_attn/q"),
  ("blocks.{L}.cross_attn.k", "blocks.{L}.attn2.to_k", "blocks/cross_attn/k"),
  ("blocks.{L}.cross_attn.v", "blocks.{L}.attn2.to_v", "blocks/cross_attn/v"),
  ("blocks.{L}.cross_attn.o", "blocks.{L}.attn2.to_out.0", "blocks/cross_attn/o"),
  ("blocks.{L}.cross_attn.k_img", "blocks.{L}.attn2.add_k_proj", "blocks/cross_attn/k_clip"),
  ("blocks.{L}.cross_attn.v_img", "blocks.{L}.attn2.add_v_proj", "blocks/cross_attn/v_clip"),
  ("blocks.{L}.ffn.0", "blocks.{L}.ffn.net.0.proj", "blocks/mlp/up"),
  ("blocks.{L}.ffn.2", "blocks.{L}.ffn.net.2", "blocks/mlp/down"),
)
# Norms: the weight is our scale. Layer norms with a bias; the original numbers the
# cross-attention norm 3, diffusers numbers it 2.
LAYER_NORM = (
  ("blocks.{L}.norm3", "blocks.{L}.norm2", "blocks/norm_cross"),
  ("img_emb.proj.0", "condition_embedder.image_embedder.norm1", "clip_norm"),
  ("img_emb.proj.4", "condition_embedder.image_embedder.norm2", "clip_norm_out"),
)
RMS_NORM = (
  ("blocks.{L}.self_attn.norm_q", "blocks.{L}.attn1.norm_q", "blocks/self_attn/norm_q"),
  ("blocks.{L}.self_attn.norm_k", "blocks.{L}.attn1.norm_k", "blocks/self_attn/norm_k"),
  ("blocks.{L}.cross_attn.norm_q", "blocks.{L}.attn2.norm_q", "blocks/cross_attn/norm_q"),
  ("blocks.{L}.cross_attn.norm_k", "blocks.{L}.attn2.norm_k", "blocks/cross_attn/norm_k"),
  (
    "blocks.{L}.cross_attn.norm_k_img",
    "blocks.{L}.attn2.norm_added_k",
    "blocks/cross_attn/norm_k_clip",
  ),
)
TENSOR = (
  (
    "patch_embedding.weight",
    "patch_embedding.weight",
    "patch_embed/kernel",
    "o c pf ph pw -> (c pf ph pw) o",
  ),
  ("patch_embedding.bias", "patch_embedding.bias", "patch_embed/bias", "o -> o"),
  ("head.modulation", "scale_shift_table", "head/modulation", "1 two d -> two d"),
  (
    "blocks.{L}.modulation",
    "blocks.{L}.scale_shift_table",
    "blocks/modulation",
    "1 six d -> six d",
  ),
)


def table(naming: Naming) -> tuple[Row, ...]:
  """The rows of a naming for `engine.moves`; CLIP rows are there for every variant."""
  if naming not in ("original", "diffusers"):
    raise ValueError(f"naming {naming!r}, wanted 'original' or 'diffusers'.")
  rows: list[tuple[str, str, str, str]] = list(TENSOR)
  for old, new, ours in DENSE:
    rows.append((f"{old}.weight", f"{new}.weight", f"{ours}/kernel", "o i -> i o"))
    rows.append((f"{old}.bias", f"{new}.bias", f"{ours}/bias", "o -> o"))
  for old, new, ours in LAYER_NORM:
    rows.append((f"{old}.weight", f"{new}.weight", f"{ours}/scale", "d -> d"))
    rows.append((f"{old}.bias", f"{new}.bias", f"{ours}/bias", "d -> d"))
  for old, new, ours in RMS_NORM:
    rows.append((f"{old}.weight", f"{new}.weight", f"{ours}/scale", "d -> d"))
  return tuple(
    (regex(old if naming == "original" else new), ours, pattern) for old, new, ours, pattern in rows
  )
