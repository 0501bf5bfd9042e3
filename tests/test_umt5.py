"""The text encoder: masks, positions, layers, and the published size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason.models.common import RMSNorm
from jax_videoreason.models.umt5 import Layer, UMT5Config, UMT5Encoder, distance_buckets

CONFIG = UMT5Config(
  vocab=40, width=24, head_width=8, heads=2, ffn_width=32, layers=3, dtype="float32"
)


@pytest.fixture(scope="session")
def encoder():
  module = UMT5Encoder(CONFIG)
  ids = jax.random.randint(jax.random.key(1), (3, 10), 1, 40)
  mask = jnp.arange(10)[None] < jnp.asarray([10, 6, 1])[:, None]
  params = jax.jit(module.init)(jax.random.key(0), ids, mask)["params"]
  return jax.jit(lambda ids, mask: module.apply({"params": params}, ids, mask)), params, ids, mask


def test_padding_changes_nothing(encoder):
  apply, _, ids, mask = encoder
  states = apply(ids, mask)
  noise = jnp.where(mask, ids, 40 - ids)
  np.testing.assert_array_equal(states[mask], apply(noise, mask)[mask])
  alone = apply(ids[1:2, :6], mask[1:2, :6])
  np.testing.assert_allclose(states[1, :6], alone[0], atol=1e-5)


def test_order_of_tokens_matters_in_both_directions(encoder):
  apply, _, ids, mask = encoder
  changed = apply(ids.at[0, 9].set(ids[0, 9] % 39 + 1), mask)
  before = apply(ids, mask)
  assert np.all(np.abs(changed[0] - before[0]).max(-1) > 1e-6)
  swapped = apply(ids[:, jnp.asarray([1, 0, *range(2, 10)])], mask)
  assert np.all(np.abs(swapped[0, 2:] - before[0, 2:]).max(-1) > 1e-4)


@pytest.mark.slow
def test_scan_is_the_loop_over_layers(encoder):
  apply, params, ids, mask = encoder
  x = params["token_embedding"][ids]
  buckets = distance_buckets(10, CONFIG.buckets, CONFIG.max_distance)
  for layer in range(CONFIG.layers):
    own = jax.tree.map(lambda leaf, at=layer: leaf[at], params["blocks"])
    x = Layer(CONFIG).apply({"params": own}, x, buckets, mask)
  x = RMSNorm().apply({"params": params["norm"]}, x)
  np.testing.assert_allclose(apply(ids, mask), x, atol=1e-5)


def test_buckets_follow_the_definition():
  buckets = distance_buckets(300, 32, 128)
  assert buckets[5, 5] == 0
  assert buckets[20, :21][::-1][:8].tolist() == list(range(8))  # keys before the query
  assert buckets[0, 1:8].tolist() == [17, 18, 19, 20, 21, 22, 23]
  for distance in range(8, 300):
    far = min(15, 8 + math.floor(math.log2(distance / 8) * 2 + 1e-6))
    assert buckets[distance, 0] == far and buckets[0, distance] == 16 + far


def test_an_id_outside_of_the_vocabulary_is_not_finite(encoder):
  apply, _, ids, mask = encoder
  assert not np.isfinite(apply(ids.at[0, 0].set(40), mask)[0]).any()


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_stays_close(encoder):
  apply, params, ids, mask = encoder
  module = UMT5Encoder(UMT5Config(**(vars(CONFIG) | {"dtype": "bfloat16"})))
  states = module.apply({"params": params}, ids, mask)
  assert states.dtype == jnp.bfloat16
  exact = np.asarray(apply(ids, mask)[mask])
  error = np.linalg.norm(np.asarray(states[mask], np.float32) - exact) / np.linalg.norm(exact)
  assert error < 2e-2


def test_states_at_initialisation_have_unit_scale_and_gradients_reach_every_leaf(encoder):
  apply, params, ids, mask = encoder
  assert 0.5 < float(apply(ids, mask).std()) < 2.0

  def loss(params):
    states = UMT5Encoder(CONFIG).apply({"params": params}, ids, mask)
    return jnp.sum(jnp.where(mask[..., None], states, 0.0)[..., 0] ** 2)

  for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
    assert np.isfinite(leaf).all() and np.any(leaf)


def test_the_published_size():
  module = UMT5Encoder(UMT5Config())
  ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 512), jnp.bool_)
  states, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), ids, mask)
  assert states.shape == (1, 512, 4096) and states.dtype == jnp.bfloat16
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 5_680_910_336
