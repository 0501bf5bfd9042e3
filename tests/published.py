"""Small random checkpoints as the hub has them, for the tests of the conversion."""

import dataclasses
import hashlib
import json
import os

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jax_videoreason.convert import clip, engine, umt5, vae, wan
from jax_videoreason.models import FAMILIES, wan22_vae
from jax_videoreason.models.clip import CLIPConfig
from jax_videoreason.models.umt5 import UMT5Config
from jax_videoreason.models.wan import WanConfig
from jax_videoreason.models.wan21_vae import WanVAEConfig
from jax_videoreason.tokenizer import train_word_tokenizer

DIT = WanConfig(
  width=128, ffn_width=32, heads=1, layers=2, in_channels=36, out_channels=16, text_width=16,
  freq_dim=8, image_input="concat",
)  # fmt: skip
VAE = WanVAEConfig(base_width=2, blocks=1)
# As the 5B model and Wan2.1 image to video have them.
VAE22 = WanVAEConfig(
  base_width=2, decoder_width=4, blocks=1, z_channels=48, mean=wan22_vae.MEAN, std=wan22_vae.STD,
  fold=2, residual=True,
)  # fmt: skip
CLIP = CLIPConfig(width=80, ffn_width=32, heads=1, layers=2, image=28, patch=14)
TEXT = UMT5Config(
  vocab=48, width=16, head_width=4, heads=2, ffn_width=24, layers=2, buckets=32, dtype="float32"
)
CONFIG = {"model_type": "i2v", "dim": 128, "ffn_dim": 32, "num_heads": 1, "num_layers": 2}
CONFIG |= {"in_dim": 36, "out_dim": 16, "freq_dim": 8, "eps": 1e-6}
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of every repository that is published


def tensors(kind, config, table, seed, dtype=np.float32):
  """A published part: random tensors under the keys that a table reads."""
  rng = np.random.default_rng(seed)
  tree = abstract(kind, config)
  shapes = engine.leaves(tree)
  sizes = dict(zip(("pf", "ph", "pw"), DIT.patch, strict=True), p=CLIP.patch, q=CLIP.patch)
  made = {}
  for move in engine.moves_back(table, tree):
    shape = shapes[move.target].shape[0 if move.layer is None else 1 :]
    value = move.back(rng.normal(size=shape).astype(np.float32), **sizes)
    made[move.source] = np.ascontiguousarray(value.astype(dtype))
  return made


def shards(folder, given, count, stem="diffusion_pytorch_model"):
  """Writes tensors over several files and their index, as the hub has them."""
  folder.mkdir(parents=True, exist_ok=True)
  keys = sorted(given)
  files = {k: f"{stem}-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, k in enumerate(keys)}
  for name in set(files.values()):
    save_file({k: given[k] for k in keys if files[k] == name}, folder / name)
  index = {"metadata": {"total_size": sum(t.nbytes for t in given.values())}, "weight_map": files}
  (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def abstract(kind, config):
  return FAMILIES["wan21"].parts[kind].abstract(config)


def parts():
  """Part -> tensors in the original naming."""
  return {
    "dit_0": tensors("dit", DIT, wan.table("original"), 0),
    "dit_1": tensors("dit", DIT, wan.table("original"), 1),
    "vae": tensors("vae", VAE, vae.table(VAE, "original"), 2),
    "text": tensors("text", TEXT, umt5.table("original"), 3, ml_dtypes.bfloat16),
  }


def clip_original():
  """The image tower as the original has it: one tensor for three, a layer more, and the text."""
  wide = dataclasses.replace(CLIP, layers=CLIP.layers + 1)
  made = {}
  for key, value in tensors("clip", wide, clip.table("original"), 5).items():
    made[f"visual.{key}"] = value
  for layer in range(wide.layers):
    for kind in ("weight", "bias"):
      stem = f"visual.transformer.{layer}.attn.to_"
      made[f"{stem}qkv.{kind}"] = np.concatenate([made.pop(f"{stem}{n}.{kind}") for n in "qkv"])
  one = np.ones(CLIP.width, np.float32)
  made |= {"visual.post_norm.weight": one, "visual.post_norm.bias": one, "visual.head": one}
  return made | {"textual.ids": np.arange(3), "log_scale": np.array(1, np.float32)}


def write_original(root, given):
  """Two experts in three shards each, VAE and text encoder as single files."""
  for part, name in (("dit_0", "high_noise_model"), ("dit_1", "low_noise_model")):
    shards(root / name, given[part], 3)
    (root / name / "config.json").write_text(json.dumps(CONFIG))
  save_file(given["vae"], root / "Wan2.1_VAE.safetensors")
  save_file(given["text"], root / "models_t5_umt5-xxl-enc-bf16.safetensors")
  words = root / "google" / "umt5-xxl" / "tokenizer.json"
  words.parent.mkdir(parents=True)
  words.write_text(train_word_tokenizer(["sort the bars"]), encoding="utf-8")
  return root


def publish(cache, repository, folder):
  """A folder as a snapshot: links with the published names to blobs with hashes for names."""
  store = cache / f"models--{repository.replace('/', '--')}"
  (store / "refs").mkdir(parents=True)
  (store / "blobs").mkdir()
  (store / "refs" / "main").write_text(COMMIT)
  for file in filter(os.path.isfile, folder.rglob("*")):
    blob = store / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    blob.write_bytes(file.read_bytes())
    link = store / "snapshots" / COMMIT / file.relative_to(folder)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
