"""The text encoder agrees with transformers on the same weights, and the table is a bijection."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason.convert import umt5 as tables
from jax_videoreason.convert.engine import fill, moves
from jax_videoreason.models.umt5 import UMT5Config, UMT5Encoder, distance_buckets

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = UMT5Config(
  vocab=128, width=32, head_width=8, heads=6, ffn_width=64, layers=3, dtype="float32"
)


@pytest.fixture(scope="session")
def reference():
  """heads * head_width = 48 is not the width, so that a transposed matrix cannot pass."""
  torch.manual_seed(0)
  model = transformers.UMT5EncoderModel(
    transformers.UMT5Config(
      vocab_size=CONFIG.vocab,
      d_model=CONFIG.width,
      d_kv=CONFIG.head_width,
      d_ff=CONFIG.ffn_width,
      num_layers=CONFIG.layers,
      num_heads=CONFIG.heads,
      relative_attention_num_buckets=CONFIG.buckets,
      relative_attention_max_distance=CONFIG.max_distance,
      feed_forward_proj="gated-gelu",
      dropout_rate=0.0,
    )
  ).eval()
  with torch.no_grad():  # initialisation leaves norms at 1 and the biases nearly alike
    for name, weight in model.named_parameters():
      if "norm" in name:
        weight.uniform_(0.5, 1.5)
      if "relative_attention_bias" in name:
        weight.normal_()
  return model


@pytest.fixture(scope="session")
def wanted():
  ids = jnp.zeros((1, 1), jnp.int32)
  return jax.eval_shape(UMT5Encoder(CONFIG).init, jax.random.key(0), ids, ids == 0)["params"]


def weights(reference):
  return {key: tensor.float().numpy() for key, tensor in reference.state_dict().items()}


@pytest.fixture(scope="session")
def params(reference, wanted):
  return fill(weights(reference), tables.table("transformers"), wanted, tables.IGNORE)


@pytest.fixture(scope="session")
def text():
  """Ids and masks of 3 prompts of 200, 77 and 1 tokens: beyond the largest distance of 128."""
  ids = np.random.default_rng(0).integers(1, CONFIG.vocab, (3, 200)).astype(np.int32)
  mask = np.arange(200)[None] < np.asarray([200, 77, 1])[:, None]
  return np.where(mask, ids, 0), mask


def states(reference, ids, mask):
  with torch.no_grad():
    out = reference(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long())
  return out.last_hidden_state.float().numpy()


def test_float32(reference, params, text):
  """1e-4 on values of about 3: both sum in float32, in another order; 5e-6 was seen."""
  ids, mask = text
  ours = np.asarray(jax.jit(UMT5Encoder(CONFIG).apply)({"params": params}, ids, mask))
  np.testing.assert_allclose(ours[mask], states(reference, ids, mask)[mask], atol=1e-4)


def test_bfloat16_errs_no_more_than_the_reference(reference, params, text):
  """Both against float32; 1.2 leaves room for roundings that fall differently."""
  ids, mask = text
  exact = states(reference, ids, mask)[mask]
  theirs = states(copy.deepcopy(reference).bfloat16(), ids, mask)[mask]
  config = UMT5Config(**(vars(CONFIG) | {"dtype": "bfloat16"}))
  halved = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
  ours = jax.jit(UMT5Encoder(config).apply)({"params": halved}, ids, mask)
  ours = np.asarray(ours[mask], np.float32)
  assert np.linalg.norm(ours - exact) <= 1.2 * np.linalg.norm(theirs - exact)


def test_buckets_are_those_of_transformers(reference):
  attention = reference.encoder.block[0].layer[0].SelfAttention
  position = torch.arange(600)
  theirs = attention._relative_position_bucket(position[None] - position[:, None])
  np.testing.assert_array_equal(distance_buckets(600, 32, 128), theirs.numpy())


def test_both_namings_fill_every_leaf_once(reference, wanted):
  theirs = weights(reference)
  found = moves(theirs, tables.table("transformers"), wanted, tables.IGNORE)
  original = {}
  for move in found:
    row = [row[2] for row in tables.TENSOR].index(move.target)
    original[f"{tables.TENSOR[row][0]}.weight".replace("{L}", str(move.layer))] = theirs[
      move.source
    ]
  assert len(found) == 2 + 10 * CONFIG.layers
  left = fill(original, tables.table("original"), wanted)
  right = fill(theirs, tables.table("transformers"), wanted, tables.IGNORE)
  jax.tree.map(np.testing.assert_array_equal, left, right)
