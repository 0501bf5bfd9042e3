"""Checkpoints with the published keys at full size become bundles (scripts/make_golden.py keys).

The lists come from Wan's own code and from diffusers and transformers, not from our tables. Files
that have them are written as holes: a header that says everything and data that no disk holds.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import struct
from pathlib import Path

import pytest

from jax_videoreason.convert import bundle, detect
from jax_videoreason.models import FAMILIES
from jax_videoreason.tokenizer import train_word_tokenizer

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name.partition(".")[0] for path in GOLDEN.glob("*.keys.json"))
VARIANTS = {n: v for n, v in FAMILIES["wan21"].variants.items() if n.startswith("wan")}
# Between them they have every VAE, text encoder and image tower; the others differ in transformers.
WHOLE = ("wan21_i2v_14b", "wan22_ti2v_5b")
DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
# md5 of keys and shapes by which DiffSynth-Studio knows the published files (its `hash_model_file`;
# diffsynth/configs/model_configs.py at fed7b18, for the last one model_config.py at 84fb61aa).
FINGERPRINTS = {
  ("wan21_t2v_1_3b", "original"): "9269f8db9040a9d860eaca435be61814",
  ("wan21_t2v_14b", "original"): "aafcfd9672c3a2456dc46e1cb6e52c70",
  ("wan21_i2v_14b", "original"): "6bfcfb3b342cb286ce886889d519a77e",
  ("wan22_t2v_a14b", "original"): "aafcfd9672c3a2456dc46e1cb6e52c70",
  ("wan22_i2v_a14b", "original"): "5b013604280dd715f8457c6ed6d6a626",
  ("wan22_ti2v_5b", "original"): "1f5ab7703c6fc803fdded85ff040c316",
  ("wan21_vae", "original"): "ccc42284ea13e1ad04693284c7a09be6",
  ("wan22_vae", "original"): "e1de6c02cdac79f8b739f4d3698cd216",
  ("umt5_xxl", "original"): "9c8818c2cbea55eca56c7b447df170da",
  ("clip_vit_h", "original"): "5941c53e207d62f20f9025686193c40b",
  ("wan21_t2v_14b", "diffusers"): "cb104773c6c2cb6df4f9529ad5c60d0b",
}
# Keys that fill nothing, by part and layout: the layer of CLIP that Wan does not read, what follows
# it and the text tower; the second name that transformers has for one tensor.
UNREAD = {
  (
    "clip",
    "original",
  ): r"visual\.transformer\.31\..*|visual\.(post_norm.*|head)|textual\..*|log_.*",
  ("clip", "diffusers"): r"encoder\.layers\.31\..*|post_layernorm\..*",
  ("text", "diffusers"): r"encoder\.embed_tokens\.weight",
}


def listed(name, layout):
  """(config, key -> (dtype, shape)) of a published part; `{}` stands for the layers it counts."""
  said = json.loads((GOLDEN / f"{name}.keys.json").read_text())[layout]
  return said["config"], {
    key.replace("{}", str(i)): (dtype, shape)
    for key, (dtype, shape, count) in said["keys"].items()
    for i in range(count)
  }


def write(file, keys, mark=b""):
  """A safetensors file of full size that takes no room; mark: the end of its smallest tensor."""
  header, end = {}, 0
  for key, (dtype, shape) in sorted(keys.items(), key=lambda item: -math.prod(item[1][1])):
    name, size = DTYPES[dtype]
    start, end = end, end + math.prod(shape) * size
    header[key] = {"dtype": name, "shape": shape, "data_offsets": [start, end]}
  said = json.dumps(header).encode()
  file.parent.mkdir(parents=True, exist_ok=True)
  with file.open("wb") as opened:
    opened.write(struct.pack("<Q", len(said)) + said)
    opened.truncate(opened.tell() + end)
    opened.seek(-len(mark), os.SEEK_END)
    opened.write(mark)


def publish(root, layout, name):
  """The published checkpoint of a variant; returns part -> the name of its list."""
  variant, original = VARIANTS[name], layout == "original"
  vae, vae_file = "wan21_vae", "Wan2.1_VAE.safetensors"
  if name == "wan22_ti2v_5b":
    vae, vae_file = "wan22_vae", "Wan2.2_VAE.safetensors"
  transformers = ("transformer", "transformer_2")
  if original:
    transformers = detect.EXPERTS if variant.experts == 2 else (".",)
  weights, model = "diffusion_pytorch_model.safetensors", "model.safetensors"
  files = {f"dit_{i}": (name, f"{transformers[i]}/{weights}") for i in range(variant.experts)}
  files["vae"] = (vae, vae_file if original else f"vae/{weights}")
  text = "models_t5_umt5-xxl-enc-bf16.safetensors" if original else f"text_encoder/{model}"
  files["text"] = ("umt5_xxl", text)
  if variant.clip:
    clip = "models_clip_vit-h.safetensors" if original else f"image_encoder/{model}"
    files["clip"] = ("clip_vit_h", clip)
  for part, (list_name, file) in files.items():
    config, keys = listed(list_name, layout)
    write(root / file, keys, part.encode())
    if not original or part.startswith("dit"):
      (root / file).with_name("config.json").write_text(json.dumps(config))
  if not original:
    index = {"boundary_ratio": variant.boundary, "expand_timesteps": name == "wan22_ti2v_5b"}
    (root / "model_index.json").write_text(json.dumps(index))
  tokenizer = root / ("google/umt5-xxl" if original else "tokenizer") / "tokenizer.json"
  tokenizer.parent.mkdir(parents=True)
  tokenizer.write_text(train_word_tokenizer(["sort the bars"]), encoding="utf-8")
  return {part: list_name for part, (list_name, _) in files.items()}


@pytest.fixture
def root(tmp_path):
  yield tmp_path / "hub"
  shutil.rmtree(tmp_path / "hub")


def test_every_published_part_has_a_list():
  assert set(NAMES) == {*VARIANTS, "wan21_vae", "wan22_vae", "umt5_xxl", "clip_vit_h"}
  assert sum((GOLDEN / f"{name}.keys.json").stat().st_size for name in NAMES) < 200_000


@pytest.mark.parametrize(("name", "layout"), FINGERPRINTS)
def test_the_lists_are_those_of_the_published_files(name, layout):
  _, keys = listed(name, layout)
  both = [*keys, *(f"{key}:{'_'.join(map(str, shape))}" for key, (_, shape) in keys.items())]
  digest = hashlib.md5(",".join(sorted(both)).encode(), usedforsecurity=False).hexdigest()
  assert digest == FINGERPRINTS[name, layout]


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_checkpoint_is_recognised_and_fills_the_model(name, layout, root):
  """`plan` refuses a key without a row, a leaf filled twice or never, a shape that differs."""
  variant = VARIANTS[name]
  lists = publish(root, layout, name)
  source = detect.source(root, None if name in WHOLE else ("dit",))
  made = bundle.plan(source)
  assert (source.layout, source.boundary) == (layout, variant.boundary)
  assert set(source.parts) == {part for part in lists if name in WHOLE or part.startswith("dit")}
  for part, found in source.parts.items():
    wanted = variant.configs[part.split("_")[0]]
    assert dataclasses.replace(found.config, dtype=wanted.dtype) == wanted
    _, keys = listed(lists[part], layout)
    moved = {step.header.key for step in made.steps if step.part == part}
    unread = UNREAD.get((part, layout), "")
    assert {key for key in keys if not re.fullmatch(unread, key)} == moved
