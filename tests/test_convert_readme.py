"""Every conversion in the README, as a new user types it, on small repositories of those names."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import huggingface_hub.constants
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_videoreason import bundles, cli
from jax_videoreason.convert import umt5, vae, wan
from jax_videoreason.tokenizer import train_word_tokenizer
from published import (
  CLIP,
  CONFIG,
  DIT,
  TEXT,
  VAE,
  VAE22,
  clip_original,
  publish,
  shards,
  tensors,
)

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.slow]

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
COMMANDS = re.findall(r"^videoreason convert (hf://.*)", README, re.MULTILINE)
LAYER = "blocks.1.self_attn.q"


def pth(file, given):
  """As the original has them: pickles."""

  def tensor(value):
    if value.dtype == ml_dtypes.bfloat16:
      return torch.from_numpy(value.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(value))

  torch.save({key: tensor(value) for key, value in given.items()}, file)


def write_one(root, dit, images, count, settings):
  """One transformer in the root, the rest as pickles beside it."""
  given = tensors("dit", dit, wan.table("original"), 8)
  if count == 1:
    root.mkdir()
    save_file(given, root / "diffusion_pytorch_model.safetensors")
  else:
    shards(root, given, count)
  (root / "config.json").write_text(json.dumps({**CONFIG, **settings}))
  name = "Wan2.2_VAE.pth" if images.fold == 2 else "Wan2.1_VAE.pth"
  pth(root / name, tensors("vae", images, vae.table(images, "original"), 9))
  beside(root)
  if dit.clip_width is not None:
    tower = clip_original()
    pth(root / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", tower)
  return root


def write_two(root, dit, settings):
  """Two experts, the rest as pickles."""
  for seed, name in enumerate(("high_noise_model", "low_noise_model")):
    shards(root / name, tensors("dit", dit, wan.table("original"), seed), 3)
    (root / name / "config.json").write_text(json.dumps({**CONFIG, **settings}))
  pth(root / "Wan2.1_VAE.pth", tensors("vae", VAE, vae.table(VAE, "original"), 9))
  beside(root)
  return root


def beside(root):
  pth(root / "models_t5_umt5-xxl-enc-bf16.pth", text("original"))
  words = root / "google" / "umt5-xxl" / "tokenizer.json"
  words.parent.mkdir(parents=True)
  words.write_text(train_word_tokenizer(["sort the bars"]), encoding="utf-8")
  (root / "assets").mkdir()
  (root / "assets" / "logo.png").write_bytes(b"")


def text(naming):
  return tensors("text", TEXT, umt5.table(naming), 3, ml_dtypes.bfloat16)


def write_diffusers(root):
  """Two experts in the folders of diffusers, as VBVR-Wan2.2 has them."""
  for seed, name in enumerate(("transformer", "transformer_2")):
    shards(root / name, tensors("dit", DIT, wan.table("diffusers"), seed), 3)
  shards(root / "vae", tensors("vae", VAE, vae.table(VAE, "diffusers"), 2), 1)
  shards(root / "text_encoder", text("transformers"), 2, "model")
  (root / "model_index.json").write_text(
    json.dumps({"boundary_ratio": 0.9, "transformer_2": ["diffusers", "WanTransformer3DModel"]})
  )
  (root / "tokenizer").mkdir()
  words = train_word_tokenizer(["sort the bars"])
  (root / "tokenizer" / "tokenizer.json").write_text(words, encoding="utf-8")
  return root


def write_lora(root, *names):
  root.mkdir()
  for seed, name in enumerate(names):
    draw = np.random.default_rng(seed).standard_normal
    pair = {"A": draw((4, 128), np.float32), "B": draw((128, 4), np.float32)}
    save_file({f"{LAYER}.lora_{s}.default.weight": v for s, v in pair.items()}, root / name)
  return root


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
  root = tmp_path_factory.mktemp("published")
  plain = dataclasses.replace(DIT, in_channels=16, image_input="none")
  wide = dataclasses.replace(DIT, clip_width=CLIP.width)
  five = dataclasses.replace(DIT, in_channels=48, out_channels=48, image_input="overwrite")
  t2v = {"model_type": "t2v", "in_dim": 16}
  ti2v = {"model_type": "ti2v", "in_dim": 48, "out_dim": 48}
  made = {
    "Wan-AI/Wan2.2-TI2V-5B": write_one(root / "5b", five, VAE22, 3, ti2v),
    "Wan-AI/Wan2.1-T2V-1.3B": write_one(root / "1_3b", plain, VAE, 1, t2v),
    "Wan-AI/Wan2.1-T2V-14B": write_one(root / "14b", plain, VAE, 6, t2v),
    "Wan-AI/Wan2.1-I2V-14B-480P": write_one(root / "480", wide, VAE, 7, {}),
    "Wan-AI/Wan2.1-I2V-14B-720P": write_one(root / "720", wide, VAE, 7, {}),
    "Wan-AI/Wan2.2-T2V-A14B": write_two(root / "t2v", plain, t2v),
    "Wan-AI/Wan2.2-I2V-A14B": write_two(root / "i2v", DIT, {}),
    "Video-Reason/VBVR-Wan2.2": write_diffusers(root / "vbvr"),
    "Video-Reason/VBVR-Wan2.2-diffsynth": write_lora(
      root / "lora22", "high_noise_lora.safetensors", "low_noise_lora.safetensors"
    ),
    "Video-Reason/VBVR-Wan2.1-diffsynth": write_lora(root / "lora21", "lora.safetensors"),
  }
  for name, folder in made.items():
    publish(root / "cache", name, folder)
  return root / "cache"


def test_every_published_repository_is_there():
  named = set(re.findall(r"hf://([\w.-]+/[\w.-]+)", " ".join(COMMANDS)))
  assert len(named) == 10


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_makes_a_bundle(command, hub, tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
  monkeypatch.chdir(tmp_path)
  words = shlex.split(command)
  assert cli.main(["convert", *words]) == 0
  out = Path(words[words.index("--out") + 1])
  described = bundles.describe(out)
  lora = [name for name, _ in described.card.sources if "LoRA merged" in name]
  assert len(lora) == command.count("--lora ")
  modules = described.modules
  assert modules.vae is not None and modules.text is not None
  assert (modules.clip is not None) == ("Wan2.1-I2V" in command)
  two = "A14B" in command or "VBVR-Wan2.2" in command
  assert (described.card.boundary is not None) == two
  if two:
    assert described.card.boundary == (0.875 if "T2V" in command else 0.9)
