"""A bundle as a diffusers folder: read back it is the same; damaged, or without room, refused."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import helpers
from jax_videoreason import bundles, checkpoint, cli, folders, records
from jax_videoreason.convert import export, reader, wan
from published import CLIP, DIT, clip_original, shards, tensors


@pytest.fixture(scope="session")
def converted(original, tmp_path_factory):
  """Two experts, and a text encoder in bfloat16, in the layout that `convert` writes."""
  out = tmp_path_factory.mktemp("bundles") / "a14b"
  assert cli.main(["convert", str(original), "--out", str(out)]) == 0
  return out


@pytest.fixture
def refused(capsys, tmp_path):
  def run(source, *more, out=None):
    out = out or tmp_path / "out"
    said = helpers.refusal(capsys, source, out, "--to=diffusers", *more)
    assert not list(out.parent.glob(".*"))
    return said

  return run


def leaves(bundle):
  described = json.loads((bundle / "bundle.json").read_text())
  return {name: tree for name, tree in described["leaves"].items() if name != "preview"}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["mini", "a14b"])
def test_there_and_back_changes_no_bit(which, converted, tmp_path):
  bundle = bundles.find("mini") if which == "mini" else converted
  given = "mini" if which == "mini" else str(converted)
  folder, again = tmp_path / "hub", tmp_path / "again"
  words = ["convert", given, "--out", str(folder), "--to=diffusers", "--verify"]
  assert cli.main(words) == 0
  assert cli.main(["convert", str(folder), "--out", str(again), "--verify"]) == 0
  assert leaves(again) == leaves(bundle)
  ours, theirs = bundles.describe(again), bundles.describe(bundle)
  assert ours.card.boundary == theirs.card.boundary
  assert ours.card.latents == theirs.card.latents
  for part in ("vae", "text"):
    one, two = (getattr(bundle.modules, part).config for bundle in (ours, theirs))
    # `mini` computes in float32 from weights in bfloat16; a folder of diffusers cannot say so.
    assert dataclasses.replace(one, dtype=two.dtype) == two


def test_the_layout_of_the_hub(converted, tmp_path):
  out = tmp_path / "hub"
  export.write(converted, out, shard_bytes=150_000)
  index = json.loads((out / "model_index.json").read_text())
  assert index["_class_name"] == "WanImageToVideoPipeline"
  assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
  assert index["boundary_ratio"] == 0.9
  config = json.loads((out / "transformer" / "config.json").read_text())
  assert (config["num_layers"], config["attention_head_dim"], config["in_channels"]) == (2, 128, 36)
  named = json.loads(
    (out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text()
  )
  files = sorted(set(named["weight_map"].values()))
  assert (
    len(files) > 2 and files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
  )
  found = reader.headers(reader.files_in(out / "transformer"))
  assert found.keys() == named["weight_map"].keys()
  assert found["blocks.1.attn2.to_out.0.weight"].shape == (128, 128)
  assert reader.headers(reader.files_in(out / "text_encoder"))["shared.weight"].dtype == "bfloat16"
  assert sorted(os.listdir(tmp_path)) == ["hub"]


@pytest.mark.slow
def test_the_image_tower_there_and_back(tmp_path):
  """Its last layer, which no bundle has, is written as one that changes nothing."""
  wide = dataclasses.replace(DIT, clip_width=CLIP.width)
  source, folder = tmp_path / "i2v", tmp_path / "hub"
  shards(source, tensors("dit", wide, wan.table("original"), 4), 2)
  save_file(clip_original(), source / "models_clip_open-clip.safetensors")
  for words in (
    [str(source), f"--out={tmp_path / 'one'}", "--parts=dit,clip"],
    [str(tmp_path / "one"), f"--out={folder}", "--to=diffusers", "--verify"],
    [str(folder), f"--out={tmp_path / 'two'}", "--parts=dit,clip", "--verify"],
  ):
    assert cli.main(["convert", *words]) == 0
  assert leaves(tmp_path / "two") == leaves(tmp_path / "one")
  one, two = (bundles.describe(tmp_path / name).modules.clip.config for name in ("one", "two"))
  assert one == two == CLIP
  found = reader.headers(reader.files_in(folder / "image_encoder"))
  assert not reader.read(found["vision_model.encoder.layers.2.mlp.fc2.weight"]).any()


def test_the_plan_writes_nothing(converted, tmp_path, capsys):
  assert cli.main(["convert", str(converted), "--to=diffusers", "--dry-run"]) == 0
  said = capsys.readouterr().out
  assert "transformer_2/" in said and "bfloat16" in said


def test_a_destination_that_exists_is_kept_unless_redone(converted, tmp_path, refused):
  out = tmp_path / "out"
  out.mkdir()
  (out / "mine.txt").write_text("")
  assert "exists already" in refused(converted, out=out)
  assert "has no model_index.json, and --redo replaces" in refused(converted, "--redo", out=out)
  assert (out / "mine.txt").exists()
  (out / "model_index.json").write_text("{}")
  words = ["convert", str(converted), "--out", str(out), "--to=diffusers", "--redo"]
  assert cli.main(words) == 0
  assert not (out / "mine.txt").exists()
  assert os.listdir(tmp_path) == ["out"]


def test_an_export_replaces_another_where_folders_are_not_renamed(
  converted, tmp_path, flat, monkeypatch
):
  out = tmp_path / "out"
  words = ["convert", str(converted), "--out", str(out), "--to=diffusers"]
  assert cli.main(words) == 0
  sums = {p: records.checksum(p) for p in sorted(out.rglob("*"))}
  (out / "mine.txt").write_text("")
  assert cli.main([*words, "--redo"]) == 0
  assert {p: records.checksum(p) for p in sorted(out.rglob("*"))} == sums
  assert os.listdir(tmp_path) == ["out"]

  def stopped(path):
    if path == out:
      raise KeyboardInterrupt
    folders.remove(path)

  monkeypatch.setattr(export, "remove", stopped)
  assert cli.main([*words, "--redo"]) != 0
  assert (out / "vae").exists() and not (out / "model_index.json").exists()


def test_a_second_export_to_a_folder_is_refused_meanwhile(converted, tmp_path, capsys):
  words = ["convert", str(converted), "--out", str(tmp_path / "out"), "--to=diffusers"]
  with folders.held_beside(tmp_path / "out"):
    assert cli.main(words) == cli.BAD_INPUT
  assert f"another command works in {tmp_path / 'out'}:" in capsys.readouterr().err
  assert not os.listdir(tmp_path)


def test_a_damaged_bundle(converted, tmp_path, refused):
  copy = shutil.copytree(converted, tmp_path / "copy")
  chunk = copy / "dit_1/blocks.mlp.up.kernel/c/0/0/0"
  data = bytearray(chunk.read_bytes())
  data[5] ^= 1
  chunk.write_bytes(data)
  assert "leaf dit_1/blocks/mlp/up/kernel in" in refused(copy)
  chunk.unlink()
  assert "leaf blocks/mlp/up/kernel cannot be read from" in refused(copy)


def test_the_last_leaf_is_checked_too(converted, tmp_path, refused):
  copy = shutil.copytree(converted, tmp_path / "copy")
  last = sorted((copy / "text").glob("token_embedding/c/*/*"))[-1]
  last.write_bytes(bytes(last.stat().st_size))
  assert "leaf text/token_embedding in" in refused(copy)


def test_what_is_no_bundle_of_this_version(converted, tmp_path, refused):
  assert "no bundle" in refused(tmp_path / "nothing")
  copy = shutil.copytree(converted, tmp_path / "copy")
  file = copy / "bundle.json"
  described = json.loads(file.read_text())
  file.write_text(json.dumps({**described, "format": 99}))
  assert "has format 99, this version" in refused(copy)


def test_a_disk_that_is_too_small_is_said_before(converted, tmp_path, monkeypatch, refused):
  monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
  assert "0.00 GB are free: make room" in refused(converted)
  assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up(converted, tmp_path, monkeypatch, refused):
  def full(_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  assert "could not be written (No space left on device): free some space" in refused(converted)
  assert os.listdir(tmp_path) == []


def test_options_of_the_other_direction(converted, refused):
  assert "--dtype is for --to bundle" in refused(converted, "--dtype=bf16")


def test_positions_that_diffusers_does_not_have(converted, tmp_path, refused):
  copy = shutil.copytree(converted, tmp_path / "copy")
  file = copy / "bundle.json"
  described = records.read_mapping(file)
  described["config"]["dit"]["theta"] = 256.0
  file.write_text(json.dumps(described))
  assert "theta 256, diffusers has 10000 alone" in refused(copy)


@pytest.mark.slow
def test_a_part_in_another_bundle_is_followed(converted, tmp_path):
  """A bundle that shares its VAE is exported whole."""
  bundle = checkpoint.load("mini")
  checkpoint.save(bundle, tmp_path / "second", shared_with="mini")
  out = export.write(tmp_path / "second", tmp_path / "hub")
  found = reader.headers(reader.files_in(out / "vae"))
  gamma = reader.read(found["decoder.norm_out.gamma"])
  np.testing.assert_array_equal(
    gamma.reshape(-1), np.asarray(bundle.vae["decoder"]["norm_out"]["scale"])
  )
