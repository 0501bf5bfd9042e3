"""hf://owner/name, from a cache in the hub's own layout; nothing is asked of the network."""

import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from jax_videoreason import bundles, cli
from jax_videoreason.convert import hub
from published import COMMIT, parts, publish, write_original


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  root = tmp_path_factory.mktemp("hub")
  published = parts()
  publish(root / "cache", "Wan-AI/Tiny", write_original(root / "tiny", published))
  both = {**published, "dit_1": published["dit_0"]}
  publish(root / "cache", "Wan-AI/Same", write_original(root / "twice", both))
  (root / "one").mkdir()
  save_file(published["dit_0"], root / "one" / "dit.safetensors")
  publish(root / "cache", "Wan-AI/One", root / "one")
  return root / "cache"


@pytest.fixture
def offline(cache, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.slow
def test_a_repository_becomes_a_bundle(cache, tmp_path):
  """As a user has it: a command, and the cache named by the environment."""
  out = tmp_path / "out"
  words = [
    sys.executable,
    "-m",
    "jax_videoreason",
    "convert",
    "hf://Wan-AI/Tiny",
    "--out",
    str(out),
  ]
  settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(words, env={**os.environ, **settings}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  sources = dict(bundles.describe(out).card.sources)
  assert "high_noise_model/diffusion_pytorch_model-00001-of-00003.safetensors" in sources
  assert len(sources) == 8


def test_one_file_of_a_repository(offline, tmp_path):
  address = "hf://Wan-AI/One/dit.safetensors"
  assert cli.main(["convert", address, "--out", str(tmp_path / "out")]) == 0
  assert hub.local(f"hf://Wan-AI/One@{COMMIT}/dit.safetensors").read_bytes()


def test_a_path_is_left_alone():
  assert str(hub.local("some/where")) == "some/where"


def test_only_the_files_of_the_parts_are_asked_for(monkeypatch):
  asked = {}

  def snapshot(repository, revision, allow_patterns):
    asked.update(repository=repository, revision=revision, patterns=allow_patterns)
    return "/snapshot"

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
  assert str(hub.local("hf://Wan-AI/Wan2.2-TI2V-5B@main", ["dit", "vae"])) == "/snapshot"
  assert (asked["repository"], asked["revision"]) == ("Wan-AI/Wan2.2-TI2V-5B", "main")
  assert "Wan2.?_VAE.*" in asked["patterns"]
  assert not [pattern for pattern in asked["patterns"] if "t5" in pattern]


def test_a_dry_run_says_what_would_be_downloaded_and_downloads_nothing(monkeypatch, capsys):
  asked = []

  def file(name, size, cached):
    return SimpleNamespace(filename=name, file_size=size, will_download=not cached)

  def snapshot(repository, dry_run=False, **_):
    asked.append((repository, dry_run))
    return [file("vae/a.safetensors", 1_500_000_000, False), file("config.json", 100, True)]

  def single(repository, name, dry_run=False, **_):
    asked.append((f"{repository}/{name}", dry_run))
    return file(name, 250_000_000, False)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", single)
  words = ["convert", "hf://Wan-AI/Big", "--dry-run", "--lora=high=hf://me/mine/l.safetensors"]
  assert cli.main(words) == 0
  said = capsys.readouterr().out
  assert "vae/a.safetensors" in said and "config.json" not in said
  assert "1.750 GB would be downloaded" in said
  assert asked == [("Wan-AI/Big", True), ("me/mine/l.safetensors", True)]


def test_a_dry_run_of_a_process_that_imported_nothing_else(tmp_path):
  """huggingface_hub imports its own modules only when they are asked for."""
  program = """
import huggingface_hub, sys
huggingface_hub.snapshot_download = lambda *_, **__: []
from jax_videoreason.convert import hub
print(hub.lacking("hf://Wan-AI/Big"))
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.stdout == "[]\n", done.stderr


def test_what_a_library_of_the_hub_raises_is_one_sentence(monkeypatch, capsys, tmp_path):
  def snapshot(*_, **__):
    raise type("ProxyError", (Exception,), {})("403 Forbidden")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
  said = refusal(capsys, tmp_path, "hf://Wan-AI/Big")
  assert "hf://Wan-AI/Big cannot be had from the hub: 403 Forbidden." in said


def test_offline_a_dry_run_plans_what_is_cached(offline, capsys):
  assert cli.main(["convert", "hf://Wan-AI/Tiny", "--dry-run"]) == 0
  assert "original layout" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("more", "wanted"),
  [
    (["--parts=text"], "name dit among the parts"),
    (["--parts=foo"], "no part 'foo'"),
    (["--lora-alpha=nan"], "a LoRA of alpha nan"),
    (["--lora=high=hf://me/mine"], "hf://me/mine names no file: --lora wants hf://owner/name/file"),
    (["--lora=high=nowhere.safetensors"], "nowhere.safetensors is not there: --lora wants a file"),
  ],
)
def test_what_is_wrong_is_said_before_anything_is_downloaded(
  monkeypatch, capsys, tmp_path, more, wanted
):
  monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
  assert wanted in refusal(capsys, tmp_path, "hf://Wan-AI/Big", *more)
  out = tmp_path / "full"
  out.mkdir()
  assert cli.main(["convert", "hf://Wan-AI/Big", f"--out={out}"]) == cli.BAD_INPUT
  assert "full exists already" in capsys.readouterr().err
  assert cli.main(["convert", "hf://Wan-AI/Big", f"--out={out}", "--redo"]) == cli.BAD_INPUT
  assert "full has no bundle.json, and --redo replaces bundles alone" in capsys.readouterr().err


def refusal(capsys, tmp_path, address, *more):
  capsys.readouterr()
  assert cli.main(["convert", address, "--out", str(tmp_path / "out"), *more]) == cli.BAD_INPUT
  assert not (tmp_path / "out").exists()
  return capsys.readouterr().err


def test_experts_that_are_one_blob(offline, tmp_path, capsys):
  assert "hold the same weights" in refusal(capsys, tmp_path, "hf://Wan-AI/Same")


def test_what_the_cache_does_not_have(offline, tmp_path, capsys):
  said = refusal(capsys, tmp_path, "hf://Wan-AI/Unknown")
  assert "hf://Wan-AI/Unknown cannot be had from the hub" in said
  said = refusal(capsys, tmp_path, "hf://Wan-AI/One/none.safetensors")
  assert "none.safetensors cannot be had from the hub" in said


def test_addresses_that_are_none(tmp_path, capsys):
  for address in ("hf://", "hf://Wan-AI", "hf://Wan-AI/a b"):
    said = refusal(capsys, tmp_path, address)
    assert f"'{address}', wanted hf://owner/name or hf://owner/name/file." in said


def test_without_the_extra(monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  said = refusal(capsys, tmp_path, "hf://Wan-AI/Tiny")
  assert "pip install huggingface_hub" in said
