"""Checkpoints become bundles: recognised, whole, resumable, and refused in one sentence."""

import dataclasses
import errno
import fcntl
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc

import chex
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import helpers
from jax_videoreason import bundles, checkpoint, cli, leaves
from jax_videoreason.convert import bundle, clip, detect, engine, reader, umt5, vae, wan
from jax_videoreason.tokenizer import train_word_tokenizer
from published import (
  CLIP,
  CONFIG,
  DIT,
  TEXT,
  VAE,
  VAE22,
  abstract,
  clip_original,
  shards,
  tensors,
)  # fmt: skip


@pytest.fixture
def source(original, tmp_path):
  """A checkpoint that a test may damage."""
  return shutil.copytree(original, tmp_path / "source")


@pytest.fixture(scope="session")
def converted(original, tmp_path_factory):
  out = tmp_path_factory.mktemp("bundles") / "a14b"
  assert cli.main(["convert", str(original), "--out", str(out), "--verify"]) == 0
  return out


@pytest.fixture
def refused(capsys, tmp_path):
  """What a conversion is answered, one line; nothing may be left under the destination's name."""

  def run(source, *more, out=None):
    return helpers.refusal(capsys, source, out or tmp_path / "out", *more)

  return run


def test_the_original_layout_becomes_a_bundle(converted, published):
  loaded = checkpoint.load(converted)
  for expert in (0, 1):
    given = published[f"dit_{expert}"]
    wanted = engine.fill(given, wan.table("original"), abstract("dit", DIT))
    chex.assert_trees_all_equal(loaded.params[expert], wanted)
  card = loaded.card
  assert (card.name, card.boundary, card.numerics) == ("a14b", 0.9, "official")
  assert (card.latents.channels, card.latents.stride) == (16, (4, 8, 8))
  assert dict(card.tables) == dict.fromkeys(("dit_0", "dit_1", "vae", "text"), "original")
  assert loaded.parts.dit.config == DIT
  assert loaded.parts.vae.config == VAE
  assert loaded.parts.text.config == dataclasses.replace(TEXT, dtype="bfloat16")
  assert loaded.text["token_embedding"].dtype == ml_dtypes.bfloat16
  assert len(card.sources) == 8
  assert card.sources[0][0] == "Wan2.1_VAE.safetensors"


def test_stock_orbax_restores_it(converted, published):
  wanted = engine.fill(published["vae"], vae.table(VAE, "original"), abstract("vae", VAE))
  chex.assert_trees_all_equal(ocp.PyTreeCheckpointer().restore(converted / "vae"), wanted)
  stacked = json.loads((converted / "dit_0/blocks.mlp.up.kernel/zarr.json").read_text())
  assert stacked["chunk_grid"]["configuration"]["chunk_shape"] == [1, 128, 32]


def test_it_is_restored_onto_a_mesh(converted):
  from jax_videoreason.sharding import make_mesh

  mesh = make_mesh(fsdp=4)
  on_mesh, plain = (checkpoint.load(converted, parts=("dit_1",), mesh=m) for m in (mesh, None))
  chex.assert_trees_all_equal(on_mesh.params[1], plain.params[1])


def test_a_leaf_of_zeros_is_there(published, tmp_path):
  """Zarr leaves out chunks that equal the fill value; Orbax reads that as a missing file."""
  given = {key: np.zeros_like(value) for key, value in published["dit_0"].items()}
  save_file(given, tmp_path / "zeros.safetensors")
  words = ["convert", str(tmp_path / "zeros.safetensors"), "--out", str(tmp_path / "out")]
  assert cli.main(words) == 0
  assert not np.asarray(checkpoint.load(tmp_path / "out").params[0]["head"]["bias"]).any()


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model."])
def test_a_single_file(published, tmp_path, prefix):
  given = {prefix + key: value for key, value in published["dit_0"].items()}
  save_file(given, tmp_path / "one.safetensors")
  found = detect.source(tmp_path / "one.safetensors")
  assert found.parts["dit_0"].config == DIT
  assert len(bundle.plan(found).steps) == len(given)


def test_bf16_keeps_norms_and_modulation(original, published):
  made = bundle.plan(detect.source(original), dtype="bf16")
  target = made.target["dit_0"]
  assert target["blocks/self_attn/q/kernel"].dtype == ml_dtypes.bfloat16
  kept = {path for path, leaf in target.items() if leaf.dtype == np.float32}
  assert {"blocks/modulation", "head/modulation", "time_embed/up/kernel"} <= kept
  assert {path.split("/")[0] for path in kept} == {"blocks", "head", "time_embed"}
  assert made.parts.dit.config.dtype == made.parts.text.config.dtype == "bfloat16"
  assert {leaf.dtype for leaf in made.target["vae"].values()} == {np.dtype(np.float32)}


def test_dry_run_writes_nothing(original, tmp_path, capsys):
  assert cli.main(["convert", str(original), "--dry-run", "--parts=dit,vae"]) == 0
  said = capsys.readouterr().out
  assert "2 layers, 128 wide" in said
  assert "two experts, boundary 0.9" in said
  assert "text" not in said.replace("text_", "")


class Killed(BaseException):
  """Stands for a kill: no handler catches it."""


@pytest.mark.parametrize(
  ("after", "torn"),
  [
    pytest.param(1, False, marks=pytest.mark.slow),
    pytest.param(2, True, marks=pytest.mark.slow),
    (9, False),
    (60, True),
    pytest.param(70, False, marks=pytest.mark.slow),
  ],
)
def test_it_goes_on_where_it_was_killed(single, converted, tmp_path, monkeypatch, after, torn):
  """Killed between a chunk and its line in the journal, the worst moment there is.

  After the last of 69 there is still the checksum of the source to be noted.
  """
  out, lines = tmp_path / "out", []
  note, write = leaves.LeafWriter._note, leaves.LeafWriter.write

  def dying(self, entry):
    lines.append(entry)
    if len(lines) > after:
      raise Killed
    note(self, entry)

  monkeypatch.setattr(leaves.LeafWriter, "_note", dying)
  with pytest.raises(Killed):
    cli.main(["convert", str(single), "--out", str(out)])
  assert not out.exists()
  if torn:
    with (tmp_path / ".out.part" / leaves.JOURNAL).open("a") as journal:
      journal.write('{"slice": ["dit_')

  written = []

  def counting(self, part, path, layer, value):
    written.append((part, path, layer))
    write(self, part, path, layer, value)

  monkeypatch.setattr(leaves.LeafWriter, "_note", note)
  monkeypatch.setattr(leaves.LeafWriter, "write", counting)
  assert cli.main(["convert", str(single), "--out", str(out)]) == 0
  total = len(bundle.plan(detect.source(single)).steps)
  assert len(written) == total - (after - 1)  # the first line is the plan's
  ours, whole = (json.loads((f / "bundle.json").read_text()) for f in (out, converted))
  assert ours["leaves"]["dit_0"] == whole["leaves"]["dit_0"]
  checkpoint.load(out)


@pytest.mark.slow
def test_another_conversion_does_not_go_on_with_it(single, tmp_path, monkeypatch, refused):
  def dying(*_):
    raise Killed

  monkeypatch.setattr(leaves.LeafWriter, "write", dying)
  with pytest.raises(Killed):
    cli.main(["convert", str(single), "--out", str(tmp_path / "out")])
  assert "the beginning of another conversion" in refused(single, "--dtype=bf16")
  monkeypatch.undo()
  words = ["convert", str(single), "--out", str(tmp_path / "out"), "--dtype=bf16", "--redo"]
  assert cli.main(words) == 0
  assert cli.main(words) == 0
  assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("redo", [(), ("--redo",)])
def test_a_destination_being_written_is_left_alone(single, tmp_path, refused, redo):
  plan = bundle.plan(detect.source(single))
  part, path = "dit_0", "head/bias"
  value = np.ones(plan.target[part][path].shape, np.float32)
  with leaves.LeafWriter(tmp_path / "out", plan.target, plan=plan.fingerprint) as writer:
    writer.write(part, path, None, value)
    writer.settle()
    assert "is being written by another process" in refused(single, *redo)
    written = leaves.read_slice(writer.folder / part, path, None)
    np.testing.assert_array_equal(written, value)


def test_without_locks_nobody_is_waited_for(single, monkeypatch, refused):
  def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", flock)
  assert "has no locks (No locks available): choose an --out" in refused(single)


def test_one_that_ended_just_before_is_not_written_over(single, tmp_path, monkeypatch, refused):
  """It moved its folder away after this process had looked, and before this one had the lock."""
  words = ["convert", str(single), "--out", str(tmp_path / "out")]
  lock = fcntl.flock

  def late(*args):
    monkeypatch.setattr(fcntl, "flock", lock)
    assert cli.main(words) == 0
    lock(*args)

  monkeypatch.setattr(fcntl, "flock", late)
  assert cli.main(words) == cli.BAD_INPUT
  assert os.listdir(tmp_path) == ["out"]
  checkpoint.load(tmp_path / "out")


@pytest.mark.slow
def test_an_interrupted_redo_goes_on(single, tmp_path, monkeypatch):
  """And until it ends, what it replaces is there."""
  words = ["convert", str(single), "--out", str(tmp_path / "out")]
  assert cli.main(words) == 0
  write, written = leaves.LeafWriter.write, []

  def dying(self, *args):
    if len(written) == 5:
      self.settle()
      raise Killed
    counting(self, *args)

  def counting(self, *args):
    written.append(args[:3])
    write(self, *args)

  monkeypatch.setattr(leaves.LeafWriter, "write", dying)
  redo = [*words, "--redo", "--dtype=bf16"]
  with pytest.raises(Killed):
    cli.main(redo)
  assert bundles.describe(tmp_path / "out").modules.dit.config.dtype == "float32"
  monkeypatch.setattr(leaves.LeafWriter, "write", counting)
  assert cli.main(redo) == 0
  assert len(written) == len(set(written)) == len(bundle.plan(detect.source(single)).steps)
  assert bundles.describe(tmp_path / "out").modules.dit.config.dtype == "bfloat16"
  assert os.listdir(tmp_path) == ["out"]


def test_a_journal_of_zeros_is_begun_again_only_if_asked(single, tmp_path, refused):
  """What some file systems leave of a file when the machine goes down."""
  part = tmp_path / ".out.part"
  part.mkdir()
  (part / leaves.JOURNAL).write_bytes(bytes(40) + b"\n")
  assert "holds the beginning of another conversion: give --redo" in refused(single)
  assert cli.main(["convert", str(single), "--out", str(tmp_path / "out"), "--redo"]) == 0
  assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_fills_up_is_survived(single, tmp_path, refused):
  old = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, old[1]))
  try:
    assert "File too large): make room and start again" in refused(single)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
  assert cli.main(["convert", str(single), "--out", str(tmp_path / "out"), "--verify"]) == 0


def test_a_disk_that_is_too_small_is_said_before(original, tmp_path, monkeypatch, refused):
  free = type("Usage", (), {"free": 1000})
  monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
  assert "0.00 GB are free: make room" in refused(original)
  assert os.listdir(tmp_path) == []


def test_verify_finds_a_changed_bundle(original, converted, tmp_path, refused):
  copy = shutil.copytree(converted, tmp_path / "copy")
  assert cli.main(["convert", str(original), "--out", str(copy), "--verify"]) == 0
  chunk = copy / "dit_1/blocks.mlp.up.kernel/c/1/0/0"
  data = bytearray(chunk.read_bytes())
  data[5] ^= 1
  chunk.write_bytes(data)
  said = refused(original, "--verify", out=copy)
  assert "dit_1/blocks/mlp/up/kernel[1] differs from blocks.1.ffn.0.weight in" in said


@pytest.mark.slow
def test_verify_makes_no_copy_of_what_it_compares(source, tmp_path, monkeypatch):
  """Beside the tensor as it is read and as it is written, only blocks of it."""
  monkeypatch.setattr(leaves, "CHUNK_BYTES", 2**20)
  wide = dataclasses.replace(TEXT, vocab=2**18)
  given = tensors("text", wide, umt5.table("original"), 3, ml_dtypes.bfloat16)
  save_file(given, source / "models_t5_umt5-xxl-enc-bf16.safetensors")
  words = ["convert", str(source), "--out", str(tmp_path / "out"), "--dtype=fp32"]
  assert cli.main(words) == 0
  plan = bundle.plan(detect.source(source), dtype="fp32")
  read = 2**18 * wide.width * 2
  tracemalloc.start()
  bundle.verify(plan, tmp_path / "out")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < read + 2 * read + 8 * 2**20


def test_a_destination_that_exists(original, converted, refused):
  assert "exists already" in refused(original, out=converted)


def shard(root, number, expert="high_noise_model"):
  return root / expert / f"diffusion_pytorch_model-{number:05d}-of-00003.safetensors"


def test_faults_of_all_parts_come_at_once(source, refused):
  shard(source, 2).unlink()
  file = shard(source, 1, "low_noise_model")
  file.write_bytes(file.read_bytes()[:-10])
  (source / "Wan2.1_VAE.safetensors").unlink()
  said = refused(source)
  assert "convert: 3 faults." in said
  assert "high_noise_model/diffusion_pytorch_model-00002-of-00003.safetensors is missing" in said
  assert f"{file} is truncated or has a wrong header" in said
  assert "has no Wan2.?_VAE.safetensors or Wan2.?_VAE.pth" in said


def test_a_missing_shard_without_an_index(source, refused):
  (source / "high_noise_model/diffusion_pytorch_model.safetensors.index.json").unlink()
  shard(source, 3).unlink()
  assert "00003-of-00003.safetensors is missing" in refused(source)


@pytest.mark.parametrize(
  "damaged", [b"", b"{}", struct.pack("<Q", 9) + b"no header"], ids=["empty", "short", "header"]
)
def test_a_wrong_header(source, refused, damaged):
  shard(source, 2).write_bytes(damaged)
  assert f"{shard(source, 2)} is truncated or has a wrong header" in refused(source)


def rewritten(file, change):
  given = change(dict(reader_tensors(file)))
  save_file(given, file)


def reader_tensors(file):
  return {key: reader.read(header) for key, header in reader.headers([file]).items()}


def test_keys_missing_extra_and_of_a_wrong_shape(source, published, refused):
  """The index goes too, for it would name the missing key before the table does."""
  for expert in ("high_noise_model", "low_noise_model"):
    (source / expert / "diffusion_pytorch_model.safetensors.index.json").unlink()

  def change(given):
    gone, wide = "blocks.0.cross_attn.norm_q.weight", "blocks.0.self_attn.k.weight"
    left = {key: value for key, value in given.items() if key != gone}
    assert len(left) < len(given) and wide in given
    return {**left, wide: np.zeros((128, 5), np.float32), "extra.weight": np.zeros(3, np.float32)}

  rewritten(shard(source, 1), change)
  said = refused(source)
  assert "convert: 3 faults." in said
  assert "high_noise_model: extra.weight: no row matches." in said
  assert "(5, 128) given, (128, 128) wanted." in said
  assert "blocks/cross_attn/norm_q/scale: layers 0 never filled." in said
  rewritten(shard(source, 1), lambda given: {**given, "head.head.bias": np.zeros(3, np.int8)})
  assert "head.head.bias is I8, wanted one of F64" in refused(source)


@pytest.mark.parametrize("stem", ["encoder.downsamples.", "encoder.downsamples.2."])
def test_a_vae_without_one_of_its_stages(tmp_path, refused, stem):
  dit = dataclasses.replace(DIT, in_channels=48, out_channels=48, image_input="overwrite")
  shards(tmp_path / "5b", tensors("dit", dit, wan.table("original"), 6), 1)
  given = tensors("vae", VAE22, vae.table(VAE22, "original"), 7)
  left = {key: value for key, value in given.items() if not key.startswith(stem)}
  save_file(left, tmp_path / "5b" / "Wan2.2_VAE.safetensors")
  said = refused(tmp_path / "5b", "--parts=dit,vae")
  assert "Wan2.2_VAE.safetensors: the " in said and "a shard may be missing" in said


def test_an_index_that_contradicts_its_shards(source, refused):
  index = source / "high_noise_model/diffusion_pytorch_model.safetensors.index.json"
  said = json.loads(index.read_text())
  said["weight_map"]["ghost.weight"] = shard(source, 1).name
  index.write_text(json.dumps(said))
  assert "has no ghost.weight" in refused(source)
  index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
  assert "wanted files beside it" in refused(source)


def test_experts_that_are_one(source, refused):
  shutil.rmtree(source / "low_noise_model")
  shutil.copytree(source / "high_noise_model", source / "low_noise_model")
  assert "hold the same weights" in refused(source)
  shutil.rmtree(source / "low_noise_model")
  os.symlink(source / "high_noise_model", source / "low_noise_model")
  assert "hold the same weights" in refused(source)
  (source / "low_noise_model").unlink()
  assert "low_noise_model is missing" in refused(source)


@pytest.mark.slow
def test_experts_that_rounding_makes_one(source, published, tmp_path, refused):
  """They differ in a digit that bfloat16 does not have."""
  near = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in published["dit_0"].items()}
  for name, given in (("high", near), ("low", dict(near))):
    folder = source / f"{name}_noise_model"
    shutil.rmtree(folder)
    if name == "low":
      given["head.head.weight"] = given["head.head.weight"] * np.float32(1 + 1e-6)
    shards(folder, given, 1)
    (folder / "config.json").write_text(json.dumps(CONFIG))
  assert "have the same weights after the conversion" in refused(source, "--dtype=bf16")
  assert cli.main(["convert", str(source), f"--out={tmp_path / 'fine'}"]) == 0


def test_a_bundle_of_a_newer_version(original, converted, tmp_path, refused):
  copy = shutil.copytree(converted, tmp_path / "copy")
  described = json.loads((copy / "bundle.json").read_text())
  (copy / "bundle.json").write_text(json.dumps({**described, "format": 99}))
  assert "has format 99, this version" in refused(original, "--verify", out=copy)


def test_pickles_without_pytorch(source, monkeypatch, refused):
  (source / "Wan2.1_VAE.safetensors").rename(source / "Wan2.1_VAE.pth")
  monkeypatch.setitem(sys.modules, "torch", None)
  assert "Wan2.1_VAE.pth is a PyTorch file and torch is missing" in refused(source)


# The command with a pause after every slice, so that a signal finds it in the middle.
SLOW = """
import signal, sys, time
from jax_videoreason import cli, leaves

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

note = leaves.LeafWriter._note

def slowly(writer, entry):
  note(writer, entry)
  time.sleep(0.05)

leaves.LeafWriter._note = slowly
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(tmp_path):
  """A real SIGKILL in the middle, and a real Ctrl-C after it."""
  config = dataclasses.replace(DIT, layers=8)
  save_file(tensors("dit", config, wan.table("original"), 0), tmp_path / "dit.safetensors")
  words = [sys.executable, "-c", SLOW, "convert", str(tmp_path / "dit.safetensors")]
  words += ["--out", str(tmp_path / "out"), "--verify"]
  journal = tmp_path / ".out.part" / leaves.JOURNAL
  lines = 0
  for signal_sent, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, cli.INTERRUPTED)):
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (
      not journal.exists() or journal.read_text().count("\n") < lines + 8
    ):
      time.sleep(0.01)
    process.send_signal(signal_sent)
    assert process.wait(60) == status
    assert not (tmp_path / "out").exists()
    assert journal.read_text().count("\n") >= lines + 8
    lines = journal.read_text().count("\n")
  assert subprocess.run(words, capture_output=True).returncode == 0
  checkpoint.load(tmp_path / "out")


def test_configs_that_contradict(source, refused):
  config = source / "low_noise_model" / "config.json"
  config.write_text(json.dumps({**CONFIG, "num_layers": 4}))
  assert "config.json says num_layers=4, the tensors 2." in refused(source)
  config.write_text(json.dumps({**CONFIG, "model_type": "t2v"}))
  assert "says model_type=t2v, the transformer reads 36 channels." in refused(source)
  config.write_text(json.dumps({**CONFIG, "num_heads": 2}))
  assert "do not belong together: heads 1 and 2." in refused(source)
  config.write_text(json.dumps({**CONFIG, "_name_or_path": "wan/high_noise_model"}))
  assert "the experts are exchanged" in refused(source)
  config.write_text("{")
  assert f"{config} cannot be read" in refused(source)


@pytest.mark.parametrize(
  ("key", "value", "wanted"),
  [
    ("num_heads", 0, "a whole number from 1 up"),
    ("num_heads", "one", "a whole number from 1 up"),
    ("num_heads", None, "a whole number from 1 up"),
    ("num_heads", 1.5, "a whole number from 1 up"),
    ("num_heads", True, "a whole number from 1 up"),
    ("eps", "small", "a number over 0"),
    ("eps", None, "a number over 0"),
    ("eps", -1.0, "a number over 0"),
  ],
)
def test_values_in_a_config_that_cannot_be_meant(source, refused, key, value, wanted):
  config = source / "high_noise_model" / "config.json"
  config.write_text(json.dumps({**CONFIG, key: value}))
  assert f"{config} says {key}={json.dumps(value)}, wanted {wanted}." in refused(source)
  assert not (source.parent / ".out.part").exists()


@pytest.mark.parametrize(
  ("part", "key", "value", "wanted"),
  [
    ("vae", "latents_mean", None, "a list of numbers"),
    ("vae", "latents_std", "one", "a list of numbers"),
    ("vae", "latents_mean", [0] * 15 + ["0"], "a list of numbers"),
    ("vae", "latents_std", [0.0] * 16, "numbers over 0"),
    ("text_encoder", "relative_attention_max_distance", "far", "a whole number from 1 up"),
    ("image_encoder", "num_attention_heads", 0, "a whole number from 1 up"),
    ("image_encoder", "layer_norm_eps", [], "a number over 0"),
    (".", "boundary_ratio", "high", "a number over 0"),
    (".", "boundary_ratio", 900.0, "at most 1"),
  ],
)
def test_values_in_the_configs_of_diffusers(diffusers, refused, part, key, value, wanted):
  file = diffusers / part / ("model_index.json" if part == "." else "config.json")
  said = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps({**said, key: value}))
  answer = refused(diffusers)
  assert f"{file} says {key}={json.dumps(value)}, wanted " in answer and wanted in answer


@pytest.fixture(scope="session")
def in_diffusers(tmp_path_factory):
  """Two experts that read image tokens, in the layout of diffusers."""
  root = tmp_path_factory.mktemp("diffusers") / "hub"
  wide = dataclasses.replace(DIT, clip_width=CLIP.width)
  for seed, name in enumerate(("transformer", "transformer_2")):
    shards(root / name, tensors("dit", wide, wan.table("diffusers"), seed), 1)
  shards(root / "vae", tensors("vae", VAE, vae.table(VAE, "diffusers"), 2), 1)
  shards(root / "text_encoder", tensors("text", TEXT, umt5.table("transformers"), 3), 1, "model")
  tower = dataclasses.replace(CLIP, layers=CLIP.layers + 1)
  shards(root / "image_encoder", tensors("clip", tower, clip.table("transformers"), 5), 1, "model")
  (root / "model_index.json").write_text("{}")
  (root / "tokenizer").mkdir()
  words = train_word_tokenizer(["sort the bars"])
  (root / "tokenizer" / "tokenizer.json").write_text(words, encoding="utf-8")
  return root


@pytest.fixture
def diffusers(in_diffusers, tmp_path):
  """The same, which a test may damage."""
  return shutil.copytree(in_diffusers, tmp_path / "hub")


def test_a_text_encoder_or_tokenizer_of_another_model(source, published, refused):
  words = source / "google" / "umt5-xxl" / "tokenizer.json"
  many = " ".join(f"word{n}" for n in range(99))
  words.write_text(train_word_tokenizer([many]), encoding="utf-8")
  assert "ids, the text encoder 48 rows" in refused(source)
  words.unlink()
  assert "tokenizer.json is missing" in refused(source)
  save_file(published["vae"], source / "models_t5_umt5-xxl-enc-bf16.safetensors")
  assert "a UMT5 encoder wanted" in refused(source)


@pytest.fixture
def i2v(source, tmp_path):
  """Wan2.1 image to video: one transformer, and the CLIP tower in one file with its text."""
  root = tmp_path / "Wan2.1-I2V-14B-480P"
  wide = dataclasses.replace(DIT, clip_width=CLIP.width)
  shards(root, tensors("dit", wide, wan.table("original"), 4), 2)
  (root / "config.json").write_text(json.dumps(CONFIG))
  for name in ("Wan2.1_VAE.safetensors", "models_t5_umt5-xxl-enc-bf16.safetensors", "google"):
    shutil.move(source / name, root / name)
  save_file(clip_original(), root / "models_clip_open-clip-xlm-roberta-large.safetensors")
  return root


@pytest.mark.slow
def test_the_image_tower(i2v, tmp_path):
  """Its last layer and the text tower are not read; queries, keys and values are cut apart."""
  out = tmp_path / "out"
  assert cli.main(["convert", str(i2v), "--out", str(out), "--verify", "--dtype=bf16"]) == 0
  loaded = checkpoint.load(out)
  assert loaded.parts.clip.config == CLIP
  fused = clip_original()["visual.transformer.1.attn.to_qkv.weight"]
  np.testing.assert_array_equal(loaded.clip["blocks"]["k"]["kernel"][1], fused[80:160].T)
  assert loaded.parts.dit.config.clip_width == 80
  assert loaded.clip["norm_in"]["scale"].dtype == np.float32


def test_an_image_tower_that_does_not_belong(i2v, original, refused):
  file = next(i2v.glob("models_clip*"))
  narrow = {k: v for k, v in clip_original().items() if k != "visual.transformer.0.norm1.weight"}
  save_file(narrow, file)
  assert "blocks/norm1/scale: layers 0 never filled." in refused(i2v)
  narrow["visual.transformer.0.attn.to_qkv.bias"] = np.zeros(7, np.float32)
  save_file(narrow, file)
  assert "to_qkv.bias is (7,), wanted a first axis of 3 pieces" in refused(i2v)
  file.unlink()
  assert "has no models_clip*.safetensors or models_clip*.pth" in refused(i2v)
  assert cli.main(["convert", str(i2v), "--dry-run", "--parts=dit,vae,text"]) == 0
  assert "reads no CLIP tokens" in refused(original, "--parts=dit,clip")


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_the_vae_of_48_channels(naming, source, tmp_path):
  """The 5B model: the first frame overwrites latents of 48 channels, sixteen pixels a side."""
  changes = dict(in_channels=48, out_channels=48, image_input="overwrite")
  dit = dataclasses.replace(DIT, **changes)
  given = tensors("dit", dit, wan.table(naming), 6)
  images = tensors("vae", VAE22, vae.table(VAE22, naming), 7)
  root = tmp_path / "5b"
  if naming == "original":
    shards(root, given, 3)
    settings = {**CONFIG, "model_type": "ti2v", "in_dim": 48, "out_dim": 48}
    (root / "config.json").write_text(json.dumps(settings))
    save_file(images, root / "Wan2.2_VAE.safetensors")
  else:
    shards(root / "transformer", given, 3)
    shards(root / "vae", images, 2)
    (root / "model_index.json").write_text(json.dumps({"expand_timesteps": True}))
  words = ["convert", str(root), "--out", str(tmp_path / "out"), "--parts=dit,vae", "--verify"]
  assert cli.main(words) == 0
  loaded = checkpoint.load(tmp_path / "out")
  assert loaded.parts.vae.config == VAE22
  assert loaded.parts.dit.config.image_input == "overwrite"
  assert loaded.card.latents.stride == (4, 16, 16)
  wanted = engine.fill(images, vae.table(VAE22, naming), abstract("vae", VAE22))
  chex.assert_trees_all_equal(loaded.vae, wanted)


def test_latents_of_unknown_pixels_are_refused_before_anything_is_written(tmp_path, refused):
  odd = dataclasses.replace(DIT, in_channels=20, out_channels=8)
  save_file(tensors("dit", odd, wan.table("original"), 0), tmp_path / "odd.safetensors")
  said = refused(tmp_path / "odd.safetensors")
  assert "odd.safetensors: latents of 8 channels, and no VAE that says how many pixels" in said
  assert os.listdir(tmp_path) == ["odd.safetensors"]


def test_what_is_no_checkpoint(tmp_path, converted, refused):
  assert "is not there" in refused(tmp_path / "nothing")
  assert "is no checkpoint" in refused(tmp_path)
  assert "is a bundle already" in refused(converted)
  (tmp_path / "notes.txt").write_text("")
  assert "wanted a file ending in .safetensors or .pth" in refused(tmp_path / "notes.txt")
  assert "did you mean 'vae'" in refused(converted, "--parts=dit,vea")


@pytest.mark.slow
@pytest.mark.torch
def test_pickles_hold_tensors_or_are_refused(source, published, tmp_path, refused):
  torch = pytest.importorskip("torch")
  (source / "models_t5_umt5-xxl-enc-bf16.safetensors").unlink()
  (source / "Wan2.1_VAE.safetensors").unlink()
  text, images = source / "models_t5_umt5-xxl-enc-bf16.pth", source / "Wan2.1_VAE.pth"

  def tensor(value):
    made = torch.from_numpy(np.array(value, np.float32))
    return made.bfloat16() if value.dtype == ml_dtypes.bfloat16 else made

  torch.save({key: tensor(value) for key, value in published["vae"].items()}, images)
  whole = {key: tensor(value) for key, value in published["text"].items()}
  torch.save(whole, text)
  words = ["convert", str(source), "--out", str(tmp_path / "pth"), "--verify"]
  assert cli.main(words) == 0
  loaded = checkpoint.load(tmp_path / "pth", parts=("vae", "text"))
  wanted = engine.fill(published["vae"], vae.table(VAE, "original"), abstract("vae", VAE))
  chex.assert_trees_all_equal(loaded.vae, wanted)
  assert loaded.text["token_embedding"].dtype == ml_dtypes.bfloat16

  torch.save({**whole, "optimizer": shutil}, text, pickle_module=ModulePickle)
  assert f"{text} holds more than tensors and is not opened" in refused(source)
  torch.save({**whole, "step": 3}, text)
  assert "step is int, wanted a floating tensor" in refused(source)
  name = next(iter(whole))
  torch.save({**whole, name: whole[name].float().to_sparse()}, text)
  assert f"{text}: {name} is torch.float32 (sparse_coo, cpu), wanted a floating" in refused(source)
  torch.save({**whole, 3: whole[name]}, text)
  assert f"{text}: 3 is no name of a tensor." in refused(source)
  torch.save([whole], text)
  assert f"{text} holds a list, wanted a dict of tensors" in refused(source)
  torch.save(whole, text)
  text.write_bytes(text.read_bytes()[:-200])
  assert f"{text} is truncated or no PyTorch file" in refused(source)
  torch.save(whole, text, _use_new_zipfile_serialization=False)
  assert f"{text} is no PyTorch file of version 1.6 or later" in refused(source)
  with tarfile.open(text, "w") as tar:  # as PyTorch before 0.1.10 wrote them
    tar.addfile(tarfile.TarInfo("storages"))
  assert f"{text} is no PyTorch file of version 1.6 or later" in refused(source)


class ModulePickle:
  """Pickles a module as a call to its importer, as an attacker would any call."""

  class Pickler(pickle._Pickler):
    def reducer_override(self, value):
      return (os.path.basename, ("a/b",)) if value is shutil else NotImplemented

  dump, dumps, load = pickle.dump, pickle.dumps, pickle.load


def test_redo_replaces_nothing_but_a_bundle(single, tmp_path, refused):
  (tmp_path / "home").mkdir()
  (tmp_path / "home" / "mine.txt").write_text("")
  said = refused(single, "--redo", out=tmp_path / "home")
  assert "home has no bundle.json, and --redo replaces bundles alone" in said
  assert os.listdir(tmp_path) == ["home"] and (tmp_path / "home" / "mine.txt").exists()


def test_redo_never_deletes_what_is_read(single, refused):
  said = refused(single, "--redo", out=single.parent)
  assert "which is read: choose another --out." in said
  assert single.exists()
