"""The tensors of the UMT5 encoder in the original Wan and in the transformers naming."""

from typing import Literal

from .engine import Row, regex

Naming = Literal["original", "transformers"]

# original, transformers, ours, pattern; {L} is the layer. Each is a weight.
SELF, FFN = "encoder.block.{L}.layer.0", "encoder.block.{L}.layer.1"
TENSOR = (
  ("token_embedding", "shared", "token_embedding", "v d -> v d"),
  ("norm", "encoder.final_layer_norm", "norm/scale", "d -> d"),
  ("blocks.{L}.norm1", f"{SELF}.layer_norm", "blocks/norm1/scale", "d -> d"),
  ("blocks.{L}.attn.q", f"{SELF}.SelfAttention.q", "blocks/attn/q/kernel", "o i -> i o"),
  ("blocks.{L}.attn.k", f"{SELF}.SelfAttention.k", "blocks/attn/k/kernel", "o i -> i o"),
  ("blocks.{L}.attn.v", f"{SELF}.SelfAttention.v", "blocks/attn/v/kernel", "o i -> i o"),
  ("blocks.{L}.attn.o", f"{SELF}.SelfAttention.o", "blocks/attn/o/kernel", "o i -> i o"),
  (
    "blocks.{L}.pos_embedding.embedding",
    f"{SELF}.SelfAttention.relative_attention_bias",
    "blocks/relative_bias",
    "buckets n -> buckets n",
  ),
  ("blocks.{L}.norm2", f"{FFN}.layer_norm", "blocks/norm2/scale", "d -> d"),
  ("blocks.{L}.ffn.gate.0", f"{FFN}.DenseReluDense.wi_0", "blocks/ffn/gate/kernel", "o i -> i o"),
  ("blocks.{L}.ffn.fc1", f"{FFN}.DenseReluDense.wi_1", "blocks/ffn/fc1/kernel", "o i -> i o"),
  ("blocks.{L}.ffn.fc2", f"{FFN}.DenseReluDense.wo", "blocks/ffn/fc2/kernel", "o i -> i o"),
)
# transformers may store its one embedding under both of its names.
IGNORE = (r"encoder\.embed_tokens\.weight",)


def table(naming: Naming) -> tuple[Row, ...]:
  """The rows of a naming for `engine.moves`, to be used with `IGNORE`."""
  if naming not in ("original", "transformers"):
    raise ValueError(f"naming {naming!r}, wanted 'original' or 'transformers'.")
  return tuple(
    (regex(f"{old if naming == 'original' else new}.weight"), ours, pattern)
    for old, new, ours, pattern in TENSOR
  )
