"""Models too large for the machine: what a restore would put where, and a small one for real."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from helpers import FREQ, relative, tiny_bundle, tiny_inputs, tiny_schedule
from jax_videoreason import bundles, checkpoint, runs, sampler, schedules, sharding
from jax_videoreason.models import FAMILIES
from jax_videoreason.pytrees import leaves
from jax_videoreason.structs import Card, Conditioning, ModelBundle

FAMILY = FAMILIES["wan21"]


def described(root, name):
  """A bundle folder of a published model whose weights are not there."""
  variant = FAMILY.variants[name]
  parts = FAMILY.build(variant.configs)
  trees = FAMILY.abstract(parts)
  trees = {f"dit_{i}": trees["dit"] for i in range(variant.experts)} | {"text": trees["text"]}
  records = {
    part: {
      path: {"shape": list(leaf.shape), "dtype": "bfloat16", "sha256": ""}
      for path, leaf in leaves(tree).items()
    }
    for part, tree in trees.items()
  }
  card = Card(
    name=name, family="wan21", latents=FAMILY.latents(parts), text_length=512,
    boundary=variant.boundary,
  )  # fmt: skip
  bundle = ModelBundle(params=(), parts=parts, card=card)
  text = bundles.description(bundle, {part: part for part in trees}, records, None)
  for part in trees:
    (root / part).mkdir(parents=True)
  (root / "bundle.json").write_text(json.dumps(text))
  return root


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  return described(tmp_path_factory.mktemp("bundles") / "a14b", "wan22_i2v_a14b")


@pytest.fixture
def abstract_restore(monkeypatch):
  """Orbax is asked and answers with the shapes, dtypes and shardings it was asked for."""
  monkeypatch.setattr(checkpoint._Part, "_restore", lambda self, target, args: target)


def test_two_experts_of_14b_lie_over_four_devices(large, abstract_restore):
  """A quarter each: what stays whole on every device is under half a percent."""
  mesh = sharding.make_mesh(fsdp=4)
  loaded = checkpoint.load(large, parts=("dit",), mesh=mesh, verify=False)
  assert len(loaded.params) == 2
  for tree in loaded.params:
    found = jax.tree.leaves(tree)
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.bfloat16)}
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in found)
    total = sum(leaf.size for leaf in found)
    held = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in found)
    assert total == 14_288_901_184
    assert total / 4 <= held <= 1.005 * total / 4


def test_one_expert_is_loaded_alone_and_the_text_encoder_too(large, abstract_restore):
  mesh = sharding.make_mesh(fsdp=4)
  low = checkpoint.load(large, parts=("dit_1",), mesh=mesh, verify=False)
  assert low.params[0] is None
  assert low.params[1] is not None and low.text is None
  text = checkpoint.load(large, parts=("text",), mesh=mesh, dtype="float32", verify=False)
  assert text.params == (None, None)
  assert sum(leaf.size for leaf in jax.tree.leaves(text.text)) == 5_680_910_336
  assert {leaf.dtype.name for leaf in jax.tree.leaves(text.text)} == {"float32"}


def test_what_would_be_restored_denoises_at_full_size(large, abstract_restore):
  """81 frames at 480p, guided, both experts: by shape alone."""
  mesh = sharding.make_mesh(fsdp=4)
  bundle = checkpoint.load(large, parts=("dit",), mesh=mesh, verify=False)
  spec = bundle.card.latents
  grid = (*spec.grid(81, 480, 832), spec.channels)
  schedule = schedules.build(steps=2, boundary=bundle.card.boundary)
  shape = jax.ShapeDtypeStruct
  cond = Conditioning(
    text=shape((2, 1, 512, 4096), jnp.bfloat16),
    known=shape((1, *grid), jnp.float32),
    known_mask=shape((1, *grid[:3], 4), jnp.float32),
  )
  noise = runs.make_noise([0], grid)
  with jax.set_mesh(mesh):
    final, trace, _ = jax.eval_shape(
      lambda params, cond: sampler.denoise(
        ModelBundle(params=params, parts=bundle.parts, card=bundle.card), noise, cond, schedule
      ),
      bundle.params, cond,
    )  # fmt: skip
  assert final.shape == (1, 21, 60, 104, 16)
  assert trace.x0.shape == (2, 1, 21, 60, 104, 16)


@pytest.mark.slow
def test_a_small_model_on_four_devices_denoises_as_on_one(tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, "SMALL", 100)
  whole = tiny_bundle(experts=2)
  checkpoint.save(whole, tmp_path / "tiny")
  mesh = sharding.make_mesh(fsdp=4)
  loaded = checkpoint.load(tmp_path / "tiny", mesh=mesh)
  chex.assert_trees_all_equal(
    jax.tree.map(np.asarray, loaded.params), jax.tree.map(np.asarray, whole.params)
  )
  held = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(loaded.params)]
  assert sum(held) < 0.5 * sum(leaf.size for leaf in jax.tree.leaves(whole.params))
  noise, cond = tiny_inputs(1)
  schedule = tiny_schedule(2, boundary=0.9, freq_dim=FREQ)
  wanted, _, _ = sampler.denoise(whole, noise, cond, schedule)
  with jax.set_mesh(mesh):
    made, _, _ = sampler.denoise(loaded, noise, cond, schedule)
  assert relative(made, wanted) <= 1e-5
