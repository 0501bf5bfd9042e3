"""Checkpoints that diffusers itself saves and loads: converted, and written back.

Two programs in float32 that sum in another order: 2e-5 relative L2 for random weights that are
larger than published ones, 1e-5 for `mini` as the project promises.
"""

import json

import jax
import numpy as np
import pytest
from einops import rearrange

from jax_videoreason import checkpoint, cli
from jax_videoreason.models.clip import MEAN as CLIP_MEAN
from jax_videoreason.models.clip import STD as CLIP_STD
from jax_videoreason.structs import Conditioning
from jax_videoreason.tokenizer import Tokenizer, train_word_tokenizer

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

TEXT = 20
VARIANTS = {
  "t2v": dict(in_channels=16, experts=2),
  "i2v": dict(in_channels=36, experts=2),
  "ti2v": dict(in_channels=48, out_channels=48, experts=1),
  "clip": dict(in_channels=36, experts=1, image_dim=32, added_kv_proj_dim=48),
}
SOME = ["i2v", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t2v", "ti2v", "clip"))]
WAN22 = dict(
  decoder_base_dim=16, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
  scale_factor_spatial=16, latents_mean=[0.1] * 48, latents_std=[0.7] * 48,
)  # fmt: skip


def relative(ours, theirs):
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def randomised(model):
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter == 1))
  return model.eval()


def transformer(in_channels, out_channels=16, **more):
  from diffusers import WanTransformer3DModel

  return randomised(
    WanTransformer3DModel(
      num_attention_heads=2, attention_head_dim=24, in_channels=in_channels,
      out_channels=out_channels, text_dim=TEXT, freq_dim=32, ffn_dim=64, num_layers=2, **more,
    )
  )  # fmt: skip


def pipeline(variant):
  import transformers
  from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
  )

  torch.manual_seed(0)
  asked = dict(VARIANTS[variant])
  dits = [transformer(**asked) for _ in range(asked.pop("experts"))]
  more = {}
  if variant == "clip":
    more["image_encoder"] = randomised(
      transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
          hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
          image_size=28, patch_size=14, hidden_act="gelu",
        )
      )
    )  # fmt: skip
  text = transformers.UMT5EncoderModel(
    transformers.UMT5Config(
      vocab_size=64, d_model=TEXT, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
      feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )
  )  # fmt: skip
  words = transformers.PreTrainedTokenizerFast(
    tokenizer_object=_words(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
  )
  kind = WanPipeline if variant in ("t2v", "ti2v") else WanImageToVideoPipeline
  vae = AutoencoderKLWan(
    base_dim=8, num_res_blocks=1, **(WAN22 if variant == "ti2v" else dict(z_dim=16))
  )
  return kind(
    tokenizer=words,
    text_encoder=randomised(text),
    vae=with_mild_norms(vae),
    scheduler=UniPCMultistepScheduler(
      prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ),
    transformer=dits[0],
    transformer_2=dits[1] if len(dits) == 2 else None,
    boundary_ratio=0.9 if len(dits) == 2 else None,
    expand_timesteps=variant == "ti2v",
    **more,
  )


def with_mild_norms(vae):
  """Random convolutions as diffusers makes them, and norms that are not all one."""
  with torch.no_grad():
    for name, value in vae.named_parameters():
      if name.endswith("gamma"):
        value.uniform_(0.5, 1.5)
  return vae.eval()


def _words():
  import tokenizers

  return tokenizers.Tokenizer.from_str(train_word_tokenizer(["sort the bars by height"]))


@pytest.fixture(scope="module", params=SOME)
def saved(request, tmp_path_factory):
  """(variant, pipeline, the folder it was saved to, its bundle)."""
  made = pipeline(request.param)
  root = tmp_path_factory.mktemp(request.param)
  made.save_pretrained(root / "hub", max_shard_size="100KB")
  assert len(list((root / "hub" / "transformer").glob("*.safetensors"))) > 2
  words = ["convert", str(root / "hub"), "--out", str(root / "bundle"), "--verify"]
  assert cli.main(words) == 0
  return request.param, made, root / "hub", root / "bundle"


def velocities(bundle, expert, theirs, text_tokens=7, t=937.0):
  """Ours and theirs of the same random latents, text and known frame."""
  from diffusers.models.embeddings import Timesteps

  c = bundle.parts.dit.config
  draw = np.random.default_rng(0).standard_normal
  latents, known = (draw((1, 3, 6, 10, c.out_channels), np.float32) for _ in range(2))
  mask = np.zeros((1, 3, 6, 10, 4), np.float32)
  mask[:, 0] = 1
  images = None if c.clip_width is None else draw((1, 5, c.clip_width), np.float32)
  text_tokens = text_tokens if images is None else 512  # diffusers cuts the image tokens off there
  text = draw((1, 1, text_tokens, c.text_width), np.float32)
  time = Timesteps(c.freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)(
    torch.tensor([t, 0.0])
  ).numpy()
  cond = Conditioning(text=text, known=known, known_mask=mask, clip=images)
  apply = jax.jit(bundle.parts.dit.apply)
  ours, _ = apply({"params": bundle.params[expert]}, latents, time, cond)
  seen, timestep = latents, np.full((1,), t, np.float32)
  if c.image_input == "concat":
    seen = np.concatenate([latents, mask, known], -1)
  if c.image_input == "overwrite":
    seen = np.where(mask[..., :1] > 0, known, latents)
    timestep = np.full((1, 3, 3, 5), t, np.float32)
    timestep[:, 0] = 0
    timestep = rearrange(timestep, "r f h w -> r (f h w)")
  with torch.no_grad():
    out = theirs(
      hidden_states=torch.tensor(rearrange(seen, "r f h w c -> r c f h w")),
      timestep=torch.tensor(timestep),
      encoder_hidden_states=torch.tensor(text[0]),
      encoder_hidden_states_image=None if images is None else torch.tensor(images),
      return_dict=False,
    )[0].numpy()
  return ours[0], rearrange(out, "r c f h w -> r f h w c")


def test_the_velocity_is_that_of_diffusers(saved):
  _, made, _, folder = saved
  bundle = checkpoint.load(folder)
  assert bundle.parts.dit.config.numerics == "diffusers"
  experts = [dit for dit in (made.transformer, made.transformer_2) if dit is not None]
  assert len(bundle.params) == len(experts)
  for expert, theirs in enumerate(experts):
    assert relative(*velocities(bundle, expert, theirs)) <= 2e-5


def test_the_experts_are_not_exchanged(saved):
  variant, made, _, folder = saved
  if made.transformer_2 is None:
    assert checkpoint.load(folder, parts=["dit"]).card.boundary is None
    return
  bundle = checkpoint.load(folder, parts=["dit"])
  assert bundle.card.boundary == 0.9
  assert relative(*velocities(bundle, 0, made.transformer_2)) > 0.1, variant


def test_the_text_encoder_and_its_tokenizer(saved):
  _, made, hub, folder = saved
  bundle = checkpoint.load(folder, parts=["dit", "text"])
  text_agrees(bundle, made, "sort the bars")
  index = json.loads((hub / "model_index.json").read_text())
  assert (bundle.parts.dit.config.image_input == "overwrite") == index["expand_timesteps"]


def test_the_vae_and_the_image_tower(saved):
  """Each kind of VAE once; that of 48 channels is the 5B model's."""
  variant, made, _, folder = saved
  bundle = checkpoint.load(folder, parts=["vae", "clip"])
  assert (bundle.clip is not None) == (variant == "clip")
  if variant in ("t2v", "ti2v"):
    vae_agrees(bundle, made)
  if bundle.clip is not None:
    images = np.random.default_rng(2).uniform(0, 1, (1, 28, 28, 3)).astype(np.float32)
    ours = bundle.parts.clip.apply({"params": bundle.clip}, images)
    seen = (images - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    with torch.no_grad():
      pixels = torch.tensor(rearrange(seen, "r h w c -> r c h w"))
      states = made.image_encoder(pixels, output_hidden_states=True).hidden_states
    assert relative(ours, states[-2].numpy()) <= 2e-5


def text_agrees(bundle, made, prompt):
  ids, mask = Tokenizer(bundle.card.tokenizer).encode([prompt], 8)
  read = made.tokenizer(prompt, padding="max_length", max_length=8)["input_ids"]
  assert ids.tolist() == [read]
  ours = jax.jit(bundle.parts.text.apply)({"params": bundle.text}, ids, mask)
  with torch.no_grad():
    theirs = made.text_encoder(
      torch.tensor(ids), torch.tensor(mask, dtype=torch.long)
    ).last_hidden_state
  assert relative(np.asarray(ours)[mask], theirs.numpy()[mask]) <= 2e-5


def vae_agrees(bundle, made):
  vae, params = bundle.parts.vae, {"params": bundle.vae}
  side = 2 * vae.config.stride[1]
  video = np.random.default_rng(1).uniform(-1, 1, (1, 5, side, side, 3)).astype(np.float32)
  latents = jax.jit(lambda x: vae.apply(params, x, None, method="encode"))(video)
  ours = jax.jit(lambda z: vae.apply(params, z, None, method="decode"))(latents)
  with torch.no_grad():
    seen = torch.tensor(rearrange(video, "r f h w c -> r c f h w"))
    z = made.vae.encode(seen).latent_dist.mode()
    pixels = made.vae.decode(z).sample.numpy()
  mean, std = (np.array(made.vae.config[name]) for name in ("latents_mean", "latents_std"))
  wanted = (rearrange(z.numpy(), "r c f h w -> r f h w c") - mean) / std
  np.testing.assert_allclose(latents, wanted, atol=1e-4)
  np.testing.assert_allclose(ours, rearrange(pixels, "r c f h w -> r f h w c"), atol=1e-4)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
  """`mini` as diffusers loads it."""
  from diffusers import WanImageToVideoPipeline

  out = tmp_path_factory.mktemp("mini") / "hub"
  assert cli.main(["convert", "mini", "--out", str(out), "--to=diffusers", "--verify"]) == 0
  return WanImageToVideoPipeline.from_pretrained(out).to(torch.float32)


def test_mini_written_back_gives_the_same_velocity(mini):
  assert relative(*velocities(checkpoint.load("mini"), 0, mini.transformer, 32)) <= 1e-5


@pytest.mark.slow
def test_mini_written_back_has_the_same_text_encoder_vae_and_tokenizer(mini):
  bundle = checkpoint.load("mini")
  text_agrees(bundle, mini, "the red dot falls")
  vae_agrees(bundle, mini)


def test_a_lora_gives_what_diffusers_gives_with_its_weights_merged(tmp_path):
  """Merged by PyTorch in float32 on the reference's side."""
  from safetensors.torch import save_file

  made = pipeline("i2v")
  made.save_pretrained(tmp_path / "hub", max_shard_size="100KB")
  words = []
  for name, expert in (("high", made.transformer), ("low", made.transformer_2)):
    stored = {}
    for layer, block in enumerate(expert.blocks):
      for key, module in (
        ("self_attn.q", block.attn1.to_q), ("cross_attn.v", block.attn2.to_v),
        ("ffn.0", block.ffn.net[0].proj), ("ffn.2", block.ffn.net[2]),
      ):  # fmt: skip
        wide, narrow = module.weight.shape
        a, b = torch.randn(3, narrow) * 0.3, torch.randn(wide, 3) * 0.3
        stored[f"blocks.{layer}.{key}.lora_A.default.weight"] = a
        stored[f"blocks.{layer}.{key}.lora_B.default.weight"] = b
        with torch.no_grad():
          module.weight += 0.8 * b @ a
    save_file(stored, tmp_path / f"{name}.safetensors")
    words.append(f"--lora={name}={tmp_path / name}.safetensors")
  out = tmp_path / "bundle"
  assert cli.main(["convert", str(tmp_path / "hub"), "--out", str(out), "--parts=dit", *words,
                   "--lora-alpha=0.8"]) == 0  # fmt: skip
  bundle = checkpoint.load(out)
  for expert, theirs in enumerate((made.transformer, made.transformer_2)):
    assert relative(*velocities(bundle, expert, theirs)) <= 2e-5


def test_a_lora_with_kohyas_names_gives_what_diffusers_makes_of_it(tmp_path):
  """Every module of a block, each with an alpha of its own."""
  from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers
  from safetensors.torch import save_file

  made = pipeline("i2v")
  made.save_pretrained(tmp_path / "hub", max_shard_size="100KB")
  wide, narrow, stored = 48, 64, {}
  for layer in range(2):
    sizes = {f"{kind}_attn_{name}": (wide, wide) for kind in ("self", "cross") for name in "qkvo"}
    for i, (name, (rows, columns)) in enumerate(
      (sizes | {"ffn_0": (narrow, wide), "ffn_2": (wide, narrow)}).items()
    ):
      module = f"lora_unet_blocks_{layer}_{name}"
      stored[f"{module}.lora_down.weight"] = torch.randn(3, columns) * 0.3
      stored[f"{module}.lora_up.weight"] = torch.randn(rows, 3) * 0.3
      stored[f"{module}.alpha"] = torch.tensor(1.0 + i)
  save_file(stored, tmp_path / "lora.safetensors")
  theirs = _convert_musubi_wan_lora_to_diffusers(dict(stored))
  for key in [key for key in theirs if key.endswith("lora_A.weight")]:
    name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
    with torch.no_grad():
      weight = made.transformer.get_submodule(name).weight
      weight += theirs[key.replace("lora_A", "lora_B")] @ theirs[key]
  assert cli.main(["convert", str(tmp_path / "hub"), "--out", str(tmp_path / "bundle"),
                   "--parts=dit", f"--lora=high={tmp_path / 'lora.safetensors'}"]) == 0  # fmt: skip
  bundle = checkpoint.load(tmp_path / "bundle")
  assert relative(*velocities(bundle, 0, made.transformer)) <= 2e-5
