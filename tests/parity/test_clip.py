"""The image tower agrees with transformers on the same weights, and the table is a bijection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from jax_videoreason.convert import clip as tables
from jax_videoreason.convert.engine import Faults, fill, moves
from jax_videoreason.models import FAMILIES
from jax_videoreason.models.clip import MEAN, STD, CLIPConfig, CLIPTower

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = CLIPConfig(width=32, ffn_width=48, heads=4, layers=2, image=28, patch=7)


def abstract(config):
  return FAMILIES["wan21"].parts["clip"].abstract(config)


@pytest.fixture(scope="session")
def reference():
  torch.manual_seed(0)
  model = transformers.CLIPVisionModel(
    transformers.CLIPVisionConfig(
      hidden_size=CONFIG.width,
      intermediate_size=CONFIG.ffn_width,
      num_hidden_layers=CONFIG.layers + 1,
      num_attention_heads=CONFIG.heads,
      image_size=CONFIG.image,
      patch_size=CONFIG.patch,
      hidden_act="gelu",
    )
  ).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.copy_(0.3 * torch.randn_like(weight) + ("norm" in name and "weight" in name))
  return model


def numpy_cut(tensor, i, n):
  return np.split(tensor, n)[i]


def converted(model):
  """Their weights in our tree."""
  tensors = {key: value.numpy() for key, value in model.state_dict().items()}
  return fill(
    tables.prepared(tensors, numpy_cut), tables.table("transformers"), abstract(CONFIG),
    tables.ignored(CONFIG),
  )  # fmt: skip


def test_tokens_before_the_last_layer(reference):
  """1e-4 on values of about 10: both sum in float32, in another order."""
  images = np.random.default_rng(0).uniform(0, 1, (2, 28, 28, 3)).astype(np.float32)
  pixels = rearrange((images - np.float32(MEAN)) / np.float32(STD), "r h w c -> r c h w")
  with torch.no_grad():
    states = reference(torch.tensor(pixels), output_hidden_states=True).hidden_states
  wanted = states[-2].numpy()
  ours = jax.jit(CLIPTower(CONFIG).apply)({"params": converted(reference)}, jnp.asarray(images))
  assert ours.shape == (2, 17, 32)
  np.testing.assert_allclose(ours, wanted, atol=1e-4)
  assert np.abs(wanted - states[-1].numpy()).max() > 1e-2  # the last layer is one too many


def test_the_normalisation_is_that_of_the_processor():
  processor = transformers.CLIPImageProcessor()
  assert (tuple(processor.image_mean), tuple(processor.image_std)) == (MEAN, STD)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_both_ages_of_transformers_files(reference, prefix):
  """Published files have a prefix before every key, which transformers 5 no longer writes."""
  given = {
    prefix + key.removeprefix("vision_model."): value.numpy()
    for key, value in reference.state_dict().items()
  }
  made = fill(
    tables.prepared(given, numpy_cut), tables.table("transformers"), abstract(CONFIG),
    tables.ignored(CONFIG),
  )  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, made, converted(reference))


def original(reference):
  """The same weights under the names of the original file, queries, keys and values in one."""
  theirs = {k.removeprefix("vision_model."): v.numpy() for k, v in reference.state_dict().items()}
  made = {
    "visual.cls_embedding": theirs["embeddings.class_embedding"][None, None],
    "visual.pos_embedding": theirs["embeddings.position_embedding.weight"][None],
    "visual.patch_embedding.weight": theirs["embeddings.patch_embedding.weight"],
    "visual.head": np.zeros((CONFIG.width, 8), np.float32),
    "textual.token_embedding.weight": np.zeros((4, 4), np.float32),
    "log_scale": np.zeros((), np.float32),
  }
  names = [("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm")]
  for i in range(CONFIG.layers + 1):
    old, new = f"transformer.{i}", f"encoder.layers.{i}"
    names += [(f"{old}.norm{n}", f"{new}.layer_norm{n}") for n in (1, 2)]
    names += [(f"{old}.mlp.0", f"{new}.mlp.fc1"), (f"{old}.mlp.2", f"{new}.mlp.fc2")]
    names += [(f"{old}.attn.proj", f"{new}.self_attn.out_proj")]
    for kind in ("weight", "bias"):
      parts = [theirs[f"{new}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
      made[f"visual.{old}.attn.to_qkv.{kind}"] = np.concatenate(parts)
  for old, new in names:
    for kind in ("weight", "bias"):
      made[f"visual.{old}.{kind}"] = theirs[f"{new}.{kind}"]
  return made


def test_the_original_naming_fills_the_same_tree(reference):
  given = tables.prepared(original(reference), numpy_cut)
  made = fill(given, tables.table("original"), abstract(CONFIG), tables.ignored(CONFIG))
  jax.tree.map(np.testing.assert_array_equal, made, converted(reference))


def test_a_key_of_another_model_is_named(reference):
  given = tables.prepared({**original(reference), "visual.extra": np.zeros(3)}, numpy_cut)
  with pytest.raises(Faults, match="extra: no row matches"):
    moves(given, tables.table("original"), abstract(CONFIG), tables.ignored(CONFIG))


def test_the_published_size_has_the_tensors_of_transformers():
  config = CLIPConfig()
  with torch.device("meta"):
    model = transformers.CLIPVisionModel(
      transformers.CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
        image_size=224, patch_size=14, hidden_act="gelu",
      )
    )  # fmt: skip
  state = {key: value for key, value in model.state_dict().items() if "position_ids" not in key}
  given = tables.prepared(state, lambda tensor, i, n: tensor.chunk(n)[i])
  found = moves(given, tables.table("transformers"), abstract(config), tables.ignored(config))
  left_out = 16 + 2  # one layer, the norm after it
  assert len(found) == len(state) - left_out
  assert sum(value.numel() for value in state.values()) == 630_766_080
