"""Bundles come back as they were saved, stock Orbax reads them, and every fault is named."""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections import namedtuple
from types import SimpleNamespace
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from helpers import tiny_bundle
from jax_videoreason import bundles, checkpoint, records, sharding
from jax_videoreason.models import FAMILIES
from jax_videoreason.models.preview import PreviewConfig, PreviewDecoder
from jax_videoreason.structs import LatentSpec, ModelBundle

VAE = {
  "base_width": 4,
  "z_channels": 4,
  "stages": (1, 2),
  "blocks": 1,
  "temporal": (True,),
  "mean": (0.5,) * 4,
  "std": (2.0,) * 4,
}
TEXT = {
  "vocab": 11, "width": 12, "head_width": 4, "heads": 2, "ffn_width": 16, "layers": 2,
  "dtype": "float32",
}  # fmt: skip


def random_like(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), tree)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> ModelBundle:
  """Two experts, VAE, text encoder, preview and tokenizer."""
  tiny = tiny_bundle(experts=2)
  family = FAMILIES["wan21"]
  parts = family.build({"dit": tiny.parts.dit.config, "vae": VAE, "text": TEXT})
  shapes = family.abstract(parts)
  tokenizer = tmp_path_factory.mktemp("source") / "any.json"
  tokenizer.write_text('{"words": "Zürich"}', encoding="utf-8")
  card = dataclasses.replace(
    tiny.card,
    latents=LatentSpec(channels=4, stride=(2, 2, 2)),
    tokenizer=str(tokenizer),
    sources=(("dit.safetensors", "00ff"),),
  )
  one, two = tiny.params
  return ModelBundle(
    params=(one, jax.tree.map(lambda leaf: leaf + 1, two)),
    vae=random_like(shapes["vae"], 1),
    text=random_like(shapes["text"], 2),
    preview={"kernel": jnp.ones((4, 12)), "order": jnp.arange(3, dtype=jnp.int32)},
    parts=parts,
    card=card,
  )


@pytest.fixture(scope="session")
def saved(whole, tmp_path_factory):
  return checkpoint.save(whole, tmp_path_factory.mktemp("bundles") / "whole")


@pytest.fixture
def copy(saved, tmp_path):
  """A bundle that a test may damage."""
  return shutil.copytree(saved, tmp_path / "copy")


def edit(folder, change):
  file = folder / "bundle.json"
  described = records.read_mapping(file)  # without its checksum, as an earlier version wrote it
  change(described)
  file.write_text(json.dumps(described))


def snapshot(folder):
  return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_a_bundle_comes_back(whole, saved):
  loaded = checkpoint.load(saved)
  chex.assert_trees_all_equal_shapes_and_dtypes(loaded.params, whole.params)
  for name in ("params", "vae", "text", "preview"):
    chex.assert_trees_all_equal(getattr(loaded, name), getattr(whole, name))
  assert loaded.clip is None
  assert loaded.parts == whole.parts
  assert hash(loaded.parts) == hash(whole.parts)
  assert loaded.card == dataclasses.replace(whole.card, tokenizer=str(saved / "tokenizer.json"))
  assert '"Zürich"' in (saved / "tokenizer.json").read_text(encoding="utf-8")
  assert isinstance(jax.tree.leaves(loaded.params)[0], jax.Array)


def test_loading_writes_nothing(saved):
  before = snapshot(saved)
  checkpoint.load(saved)
  checkpoint.load(saved, mesh=sharding.make_mesh(fsdp=4))
  assert snapshot(saved) == before


def test_stock_orbax_restores_every_part(whole, saved):
  for part, tree in [("dit_1", whole.params[1]), ("vae", whole.vae), ("text", whole.text)]:
    for reader in (ocp.PyTreeCheckpointer(), ocp.StandardCheckpointer()):
      chex.assert_trees_all_equal(reader.restore(saved / part), jax.tree.map(np.asarray, tree))


def test_parts_are_loaded_alone(whole, saved):
  low = checkpoint.load(saved, parts=("dit_1",))
  assert low.params[0] is None
  chex.assert_trees_all_equal(low.params[1], whole.params[1])
  assert low.vae is low.text is low.preview is None
  assert low.card.tokenizer == ""
  assert low.parts == whole.parts
  front = checkpoint.load(saved, parts=("text", "clip", "vae"))
  assert front.params == (None, None)
  assert front.text is not None
  assert front.vae is not None
  assert front.card.tokenizer
  both = checkpoint.load(saved, parts="dit")
  assert all(tree is not None for tree in both.params)


@pytest.mark.slow
def test_bfloat16_on_disk_and_any_dtype_in_memory(whole, saved, tmp_path):
  """A float32 model widens its weights, which changes no number; integers are left alone."""
  small = checkpoint.save(whole, tmp_path / "small", dtype="bfloat16")
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole.params)
  chex.assert_trees_all_equal(checkpoint.load(small, dtype="bfloat16").params, rounded)
  loaded = checkpoint.load(small)
  chex.assert_trees_all_equal(
    loaded.params, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
  )
  assert loaded.preview["kernel"].dtype == jnp.float32
  assert loaded.preview["order"].dtype == jnp.int32
  again = checkpoint.save(loaded, tmp_path / "again", dtype="bfloat16")
  one, two = (json.loads((f / "bundle.json").read_text())["leaves"] for f in (small, again))
  assert one == two


def test_a_bfloat16_model_keeps_its_weights(tmp_path):
  tiny = tiny_bundle(dtype="bfloat16")
  mixed = dataclasses.replace(tiny, params=(jax.tree.map(_bf16_kernels, tiny.params[0]),))
  loaded = checkpoint.load(checkpoint.save(mixed, tmp_path / "mixed"))
  chex.assert_trees_all_equal_shapes_and_dtypes(loaded.params, mixed.params)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16", "float32"}


def _bf16_kernels(leaf):
  return leaf.astype(jnp.bfloat16) if leaf.ndim > 2 else leaf


def test_bundles_are_compact_and_name_no_machine(whole, tmp_path):
  """Random bfloat16 weights of the size of a small model, in few files."""
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(8, 256, 512)).astype(np.float32)
  heavy = dataclasses.replace(whole, preview={"kernel": kernel})
  folder = checkpoint.save(heavy, tmp_path / "heavy", dtype="bfloat16")
  files = [path for path in (folder / "preview").rglob("*") if path.is_file()]
  assert len(files) <= 12
  assert sum(path.stat().st_size for path in files) < 0.85 * kernel.size * 2
  for path in folder.rglob("*"):
    if path.is_file():
      assert str(tmp_path).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("verify", [True, False])
def test_weights_lie_over_fsdp(whole, saved, monkeypatch, verify):
  monkeypatch.setattr(sharding, "SMALL", 1000)
  mesh = sharding.make_mesh(fsdp=4)
  loaded = checkpoint.load(saved, mesh=mesh, verify=verify)
  chex.assert_trees_all_equal(
    jax.tree.map(np.asarray, loaded.params), jax.tree.map(np.asarray, whole.params)
  )
  kernel = loaded.params[0]["blocks"]["self_attn"]["q"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 6, 24)
  assert loaded.params[0]["blocks"]["self_attn"]["q"]["bias"].is_fully_replicated
  halved = checkpoint.load(saved, ("dit_0",), mesh, "bfloat16", verify=verify)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(halved.params[0])} == {"bfloat16"}


def test_how_a_leaf_is_cut():
  mesh = sharding.make_mesh(fsdp=4)
  cut = {
    ("blocks/self_attn/q/kernel", (40, 5120, 5120)): (None, "fsdp", None),
    ("blocks/ffn/up/kernel", (40, 5120, 13824)): (None, None, "fsdp"),
    ("blocks/self_attn/q/bias", (40, 5120)): (),
    ("patch_embed/kernel", (144, 5120)): (None, "fsdp"),
    ("token_embedding", (256384, 4096)): ("fsdp", None),
    ("head/kernel", (5, 7)): (),
    ("odd/kernel", (333, 333)): (),
  }
  for (path, shape), wanted in cut.items():
    assert tuple(sharding.partition(path, shape, mesh)) == wanted
  assert tuple(sharding.partition("a/kernel", (512, 512), sharding.make_mesh(seed=4))) == ()


def test_a_part_may_lie_in_another_bundle(whole, saved, tmp_path):
  home = tmp_path / "home"
  shutil.copytree(saved, home / "first")
  one = dataclasses.replace(whole, params=whole.params[1:])
  checkpoint.save(one, home / "second", shared_with=home / "first")
  described = json.loads((home / "second" / "bundle.json").read_text())
  assert described["parts"] == {
    "dit_0": "dit_0",  # the low noise expert is not the first one's dit_0
    "vae": "../first/vae",
    "text": "../first/text",
    "preview": "../first/preview",
  }
  assert sorted(os.listdir(home / "second")) == ["bundle.json", "dit_0"]
  moved = home.rename(tmp_path / "elsewhere")
  loaded = checkpoint.load(moved / "second")
  chex.assert_trees_all_equal(loaded.vae, whole.vae)
  assert loaded.card.tokenizer == str(moved / "first" / "tokenizer.json")
  (moved / "first").rename(moved / "renamed")
  with pytest.raises(FileNotFoundError, match=r"part 'vae' should lie in .*first/vae"):
    checkpoint.load(moved / "second", parts=("vae",))
  checkpoint.load(moved / "second", parts=("dit",))


@pytest.mark.slow
def test_a_preview_comes_with_its_config_or_not_at_all(whole, tmp_path):
  config = PreviewConfig(stride=(2, 2, 2), z_channels=4, width=6, blocks=1)
  parts = dataclasses.replace(whole.parts, preview=PreviewDecoder(config))
  tree = random_like(FAMILIES["wan21"].abstract(parts)["preview"], 3)
  seeing = dataclasses.replace(whole, parts=parts, preview=tree)
  back = checkpoint.load(checkpoint.save(seeing, tmp_path / "seeing"), parts=("preview",))
  chex.assert_trees_all_equal(back.preview, tree)
  assert back.parts.preview == parts.preview
  without = checkpoint.save(dataclasses.replace(seeing, preview=None), tmp_path / "blind")
  blind = checkpoint.load(without, parts=("vae", "preview"))
  assert blind.parts.preview is None and blind.preview is None
  wider = PreviewDecoder(dataclasses.replace(config, width=8))
  wrong = dataclasses.replace(seeing, parts=dataclasses.replace(parts, preview=wider))
  with pytest.raises(ValueError, match="was written with width=6, the config says width=8"):
    checkpoint.save(wrong, tmp_path / "wrong")


def test_a_shared_part_that_was_replaced_is_noticed(whole, saved, tmp_path):
  shutil.copytree(saved, tmp_path / "first")
  checkpoint.save(whole, tmp_path / "second", shared_with=tmp_path / "first")
  shutil.rmtree(tmp_path / "first")
  other = dataclasses.replace(whole, vae=jax.tree.map(lambda leaf: leaf + 1, whole.vae))
  checkpoint.save(other, tmp_path / "first")
  with pytest.raises(ValueError, match=r"leaf vae/\S+ in \S+first/vae differs from its checksum"):
    checkpoint.load(tmp_path / "second", parts=("vae",))


def test_a_failed_save_leaves_nothing(whole, tmp_path, monkeypatch):
  write, calls = checkpoint.write_tree, []

  def fail_on_the_second(folder, tree):
    calls.append(folder)
    if len(calls) == 2:
      raise OSError("the disk went away")
    write(folder, tree)

  monkeypatch.setattr(checkpoint, "write_tree", fail_on_the_second)
  with pytest.raises(OSError, match="went away"):
    checkpoint.save(whole, tmp_path / "new")
  assert list(tmp_path.iterdir()) == []


def test_where_folders_are_not_renamed_nothing_is_saved_and_the_reason_stands_there(
  whole, tmp_path, flat
):
  with pytest.raises(OSError, match=r"new could not be written .*bucket.*docs/pods\.md"):
    checkpoint.save(whole, tmp_path / "new")
  assert list(tmp_path.iterdir()) == []


def test_what_save_refuses(whole, saved, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r"whole exists already: remove it"):
    checkpoint.save(whole, saved)
  half = dataclasses.replace(whole, params=(whole.params[0], None))
  with pytest.raises(ValueError, match=r"dit_1 is not loaded"):
    checkpoint.save(half, tmp_path / "half")
  wrong = dataclasses.replace(whole, vae={"encoder": jnp.ones(3)})
  with pytest.raises(ValueError, match=r"leaves of vae contradict the config"):
    checkpoint.save(wrong, tmp_path / "wrong")
  lost = dataclasses.replace(whole, card=dataclasses.replace(whole.card, tokenizer="/no/such"))
  with pytest.raises(FileNotFoundError, match=r"tokenizer /no/such is not there"):
    checkpoint.save(lost, tmp_path / "lost")
  usage = namedtuple("usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
  with pytest.raises(ValueError, match=r"takes 0.00 GB, 0.00 GB are free: make room"):
    checkpoint.save(whole, tmp_path / "full")
  assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_tells_weights_and_not_folders_apart(whole, saved, copy, tmp_path):
  assert bundles.fingerprint(copy) == bundles.fingerprint(saved)
  assert bundles.fingerprint("mini") == bundles.fingerprint(bundles.find("mini"))
  grown = jax.tree.map(lambda leaf: leaf + 1, whole.vae)
  other = checkpoint.save(dataclasses.replace(whole, vae=grown), tmp_path / "other")
  assert bundles.fingerprint(other) != bundles.fingerprint(saved)


def test_no_such_bundle(tmp_path, monkeypatch):
  monkeypatch.setattr(bundles, "ASSETS", tmp_path)
  for name in ("mini", "mini_experts"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "bundle.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match=r"no bundle 'maxi'.*mini, mini_experts"):
    checkpoint.load("maxi")
  assert bundles.find("mini") == tmp_path / "mini"
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match=r"empty has no bundle.json"):
    checkpoint.load(tmp_path / "empty")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda d: d.pop("format"), r"bundle.json is damaged \('format'\)"),
    (lambda d: d.update(format=2), r"has format 2, this version .* reads 1: upgrade"),
    (lambda d: d.pop("leaves"), r"bundle.json is damaged \(no leaves\)"),
    (lambda d: d["parts"].pop("vae"), r"damaged \(parts and leaves name different parts\)"),
    (lambda d: d.update(family="ltx"), r"of family 'ltx'; this version knows: wan21"),
    (lambda d: d["config"]["vae"].update(tiles=4), r"does not fit this version .*'tiles'"),
    (
      lambda d: d["config"]["dit"].update(layers=2),
      r"copy was written with layers=3, the config says layers=2. Change the config, or convert",
    ),
    (
      lambda d: d["config"]["text"].update(vocab=12),
      r"copy was written with vocab=11, the config says vocab=12",
    ),
    (
      lambda d: d["config"]["vae"].update(stages=[1, 4]),
      r"leaves of vae contradict the config, first \S+: \(.*\) is there, \(.*\) is asked for",
    ),
    (
      lambda d: d["leaves"]["text"]["norm/scale"].update(sha256="0"),
      r"leaf text/norm/scale in \S+copy/text differs from its checksum in \S+bundle.json",
    ),
    (lambda d: d["tokenizer"].update(sha256="0"), r"tokenizer.json differs from its checksum"),
    (lambda d: d["tokenizer"].pop("sha256"), r"bundle.json is damaged \(KeyError: 'sha256'\)"),
    (lambda d: d["latents"].update(strode=1), r"bundle.json is damaged \(TypeError: .*'strode'"),
    (lambda d: d["leaves"]["text"].update({"norm/scale": 3}), r"bundle.json is damaged \(TypeErr"),
    (
      lambda d: d["leaves"]["text"]["norm/scale"].pop("sha256"),
      r"bundle.json is damaged \(KeyError: 'sha256'\)",
    ),
    (
      lambda d: d["leaves"]["text"]["norm/scale"].update(dtype="Float32"),
      r"bundle.json is damaged \(TypeError: .*'Float32'",
    ),
    (lambda d: d["config"].update(dit=3), r"bundle.json .*: (copy the|upgrade)"),
  ],
)
def test_what_load_refuses(copy, change, message):
  edit(copy, change)
  with pytest.raises(ValueError, match=message):
    checkpoint.load(copy)


def test_no_bit_of_a_description_turns_over_unseen(copy):
  path = copy / "bundle.json"
  whole, described = path.read_bytes(), bundles.describe(copy)
  for place in range(0, len(whole), 97):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with contextlib.suppress(ValueError):
      assert bundles.describe(copy) == described  # white space


@pytest.mark.parametrize("name", bundles.shipped())
def test_a_checksum_of_the_description_changes_no_fingerprint(name, tmp_path):
  folder = bundles.find(name)
  assert json.loads((folder / "bundle.json").read_text())[records.SUM]
  described = records.read_mapping(folder / "bundle.json")
  (tmp_path / "bundle.json").write_text(json.dumps(described, indent=1) + "\n")
  assert bundles.fingerprint(tmp_path) == records.checksum(tmp_path / "bundle.json")
  assert bundles.fingerprint(tmp_path) == bundles.fingerprint(name)


def test_a_checksum_is_held_on_a_mesh_too(copy):
  edit(copy, lambda d: d["leaves"]["dit_1"]["head/bias"].update(sha256="0"))
  mesh = sharding.make_mesh(fsdp=2)
  with pytest.raises(ValueError, match=r"leaf dit_1/head/bias .*verify=False"):
    checkpoint.load(copy, mesh=mesh)
  checkpoint.load(copy, mesh=mesh, verify=False)
  checkpoint.load(copy, parts=("dit_0",), mesh=mesh)


def test_a_part_that_is_not_there(copy):
  with pytest.raises(ValueError, match=r"has no part 'dit_2', 'vea'; it has: dit_0, dit_1, vae"):
    checkpoint.load(copy, parts=("dit_2", "vea"))
  shutil.rmtree(copy / "vae")
  with pytest.raises(FileNotFoundError, match=r"part 'vae' should lie in \S+, which is not there"):
    checkpoint.load(copy)
  (copy / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"tokenizer.json is not there"):
    checkpoint.load(copy, parts=("text",))


def test_reads_that_are_given_up_after_a_fault_print_nothing(copy, monkeypatch):
  told = []
  monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(str(found.exc_value)))

  def restore(*_, **__):
    for text in ("Event loop is closed", "another one"):
      sys.unraisablehook(cast(Any, SimpleNamespace(exc_value=RuntimeError(text))))
    raise ValueError("no such leaf")

  monkeypatch.setattr(ocp.Checkpointer, "restore", restore)
  with pytest.raises(ValueError, match=r"leaf vae/\S+ cannot be read from \S+copy/vae"):
    checkpoint.load(copy, parts=("vae",))
  assert set(told) == {"another one"}


def test_damaged_json_and_damaged_bytes(copy):
  data = max((copy / "dit_0").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 0xFF
  data.write_bytes(content)
  with pytest.raises(ValueError, match=r"leaf dit_0/\S+ .*copy the bundle again"):
    checkpoint.load(copy, parts=("dit_0",))
  data.unlink()
  with pytest.raises(ValueError, match=r"leaf dit_0/\S+ cannot be read from \S+copy/dit_0"):
    checkpoint.load(copy, parts=("dit_0",))
  (copy / "bundle.json").write_text('{"format": 1,')
  with pytest.raises(ValueError, match=r"bundle.json is damaged \(Expecting"):
    checkpoint.load(copy)


@pytest.mark.parametrize("name", bundles.shipped())
def test_shipped_bundles_load(name):
  bundle = checkpoint.load(name)
  assert bundle.card.name == name
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(bundle))
