"""WanDiT against diffusers' WanTransformer3DModel on random weights moved by the tables.

Tolerance 2e-5 relative L2: two float32 programs that sum in another order (about 1e-6 per layer);
the sinusoid is the reference's own, so its float32 error of 2e-5 at t near 1000 is on both sides.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange, repeat

from jax_videoreason import rope
from jax_videoreason.convert import engine, wan
from jax_videoreason.models.common import NUMERICS, RMSNorm, modulate
from jax_videoreason.models.wan import WanConfig, WanDiT, abstract_params
from jax_videoreason.schedules import sinusoid
from jax_videoreason.structs import Conditioning

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

WIDTH, TEXT = 48, 20
VARIANTS = {
  "t2v": dict(in_channels=6, image_input="none"),
  "i2v": dict(in_channels=16, image_input="concat"),
  "ti2v": dict(in_channels=6, image_input="overwrite"),
  "clip": dict(in_channels=16, image_input="concat", clip_width=20),
}


def relative(ours, theirs):
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def config(variant, layers, **more):
  return WanConfig(
        width=WIDTH, heads=2, ffn_width=64, layers=layers, out_channels=6, text_width=TEXT,
        freq_dim=32, numerics="diffusers", **VARIANTS[variant], **more,
    )  # fmt: skip


def reference(c):
  from diffusers import WanTransformer3DModel

  torch.manual_seed(0)
  clip = {} if c.clip_width is None else dict(image_dim=c.clip_width, added_kv_proj_dim=c.width)
  model = WanTransformer3DModel(
        num_attention_heads=c.heads, attention_head_dim=c.width // c.heads,
        in_channels=c.in_channels, out_channels=c.out_channels, text_dim=c.text_width,
        freq_dim=c.freq_dim, ffn_dim=c.ffn_width, num_layers=c.layers, eps=c.epsilon, **clip,
    ).eval()  # fmt: skip
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter == 1))
  return model


def converted(model, c):
  tensors = {key: value.numpy() for key, value in model.state_dict().items()}
  return engine.fill(tensors, wan.table("diffusers"), abstract_params(c))


def both(variant, layers, grid=(3, 6, 10), t=937.0, **more):
  """Our velocity and theirs, G R F H W C, of two branches of two runs."""
  from diffusers.models.embeddings import Timesteps

  c = config(variant, layers, **more)
  model, (f, h, w), branches, runs = reference(c), grid, 2, 2
  draw = np.random.default_rng(0).standard_normal
  latents = draw((runs, f, h, w, 6), np.float32)
  known = draw((runs, f, h, w, 6), np.float32)
  mask = np.zeros((runs, f, h, w, 4), np.float32)
  mask[:, 0] = 1
  clip = None if c.clip_width is None else draw((runs, 5, c.clip_width), np.float32)
  text = draw((branches, runs, 512 if clip is not None else 7, TEXT), np.float32)
  time = Timesteps(c.freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)(
    torch.tensor([t, 0.0])
  ).numpy()

  cond = Conditioning(text=text, known=known, known_mask=mask, clip=clip)
  ours, _ = jax.jit(WanDiT(c).apply)({"params": converted(model, c)}, latents, time, cond)

  seen, timestep = latents, np.full((runs,), t, np.float32)
  if c.image_input == "concat":
    seen = np.concatenate([latents, mask, known], -1)
  if c.image_input == "overwrite":
    seen = np.where(mask[..., :1] > 0, known, latents)
    timestep = np.full((runs, f, h // 2, w // 2), t, np.float32)
    timestep[:, 0] = 0
    timestep = rearrange(timestep, "r f h w -> r (f h w)")
  stacked = repeat(seen, "r f h w c -> (g r) c f h w", g=branches)
  images = (
    {}
    if clip is None
    else dict(
      encoder_hidden_states_image=torch.tensor(repeat(clip, "r x d -> (g r) x d", g=branches))
    )
  )
  with torch.no_grad():
    theirs = model(
            hidden_states=torch.tensor(stacked),
            timestep=torch.tensor(repeat(timestep, "r ... -> (g r) ...", g=branches)),
            encoder_hidden_states=torch.tensor(rearrange(text, "g r x d -> (g r) x d")),
            return_dict=False, **images,
        )[0].numpy()  # fmt: skip
  return ours, rearrange(theirs, "(g r) c f h w -> g r f h w c", g=branches)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(variant, layers):
  ours, theirs = both(variant, layers)
  assert ours.dtype == jnp.float32
  assert relative(ours, theirs) <= 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_of_the_text(variant):
  c = config(variant, 3)
  model = reference(c)
  text = np.random.default_rng(0).standard_normal((2, 2, 7, TEXT), np.float32)
  ours = jax.jit(WanDiT(c).cross_keys, static_argnums=2)(converted(model, c), text, (0, 1, 2))
  with torch.no_grad():
    embedded = model.condition_embedder.text_embedder(torch.tensor(text))
    theirs = [b.attn2.norm_k(b.attn2.to_k(embedded)).numpy() for b in model.blocks]
  assert relative(ours, np.stack(theirs)) <= 2e-5


@pytest.mark.parametrize("grid", [(1, 2, 2), (5, 2, 14), (2, 10, 6)])
def test_odd_grids(grid):
  assert relative(*both("i2v", 1, grid)) <= 2e-5


def test_epsilon_is_that_of_every_norm():
  assert relative(*both("i2v", 1, epsilon=1e-2)) <= 2e-5


def test_time_matters():
  """The comparison would not pass by leaving the timestep out."""
  early, late = both("t2v", 1, t=937.0)[0], both("t2v", 1, t=300.0)[0]
  assert relative(early, late) > 1e-2


@pytest.mark.parametrize("head_width", [24, 64, 128])
def test_rotary_tables_are_diffusers_tables_to_the_last_bit(head_width):
  from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

  grid = (3, 5, 7)
  cos, sin = WanRotaryPosEmbed(head_width, (1, 2, 2), 1024)(torch.zeros(1, 1, 3, 10, 14))
  ours = rope.tables(grid, head_width)
  np.testing.assert_array_equal(ours[0], cos[0, :, 0, 0::2].numpy())
  np.testing.assert_array_equal(ours[1], sin[0, :, 0, 1::2].numpy())


def their_norm(stack, x, weight):
  """The norm of queries and keys, of bfloat16 x."""
  if stack == "diffusers":
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)
  unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
  # Wan keeps the weight in float32 unless it is told --convert_model_dtype
  return unit.type_as(x) * (weight.float() if stack == "official" else weight)


def their_modulation(stack, x, shift, scale):
  """What attention, MLP and head see of bfloat16 x."""
  if stack != "diffsynth":
    x, shift, scale = x.float(), shift.float(), scale.float()
  unit = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
  return (unit * (1 + scale) + shift).bfloat16()


@pytest.mark.parametrize("stack", NUMERICS)
def test_norm_and_modulation_round_where_the_stack_does(stack):
  """To the bit."""
  draw = np.random.default_rng(0).standard_normal
  x, weight, shift, scale = (
    torch.tensor(draw(shape, np.float32)).bfloat16()
    for shape in ((64, WIDTH), WIDTH, (1, WIDTH), (1, WIDTH))
  )
  ours = {
    name: jnp.asarray(value.float().numpy(), jnp.bfloat16)
    for name, value in dict(x=x, weight=weight, shift=shift, scale=scale).items()
  }
  places = NUMERICS[stack]
  queries = jnp.dtype(jnp.float32 if places.queries else jnp.bfloat16)
  norm = RMSNorm(1e-6, places.scale_before_rounding, queries)
  normed = norm.apply({"params": {"scale": ours["weight"].astype(jnp.float32)}}, ours["x"])
  dtype = jnp.dtype(jnp.float32 if places.modulation else jnp.bfloat16)
  moved = modulate(ours["x"], ours["shift"], ours["scale"], dtype, 1e-6).astype(jnp.bfloat16)
  for got, wanted in (
    (normed, their_norm(stack, x, weight)),
    (moved, their_modulation(stack, x, shift, scale)),
  ):
    assert jnp.finfo(got.dtype).bits == torch.finfo(wanted.dtype).bits
    np.testing.assert_array_equal(got.astype(jnp.float32), wanted.float().numpy())


def outside_autocast(module):
  """`module` in float32 whatever surrounds it."""
  inner = module.forward

  def forward(*given):
    with torch.autocast("cpu", enabled=False):
      return inner(*(x.float() if isinstance(x, torch.Tensor) else x for x in given))

  module.forward = forward


def half(model, stack):
  """The reference as a stack runs it in bfloat16: (the model, whether its inputs are bfloat16)."""
  if stack == "diffsynth":  # everything
    return model.to(torch.bfloat16), True
  if stack == "official":  # weights and residual stream stay, matmuls do not, time and head do
    embedder = model.condition_embedder
    for module in (embedder.time_embedder, embedder.time_proj, model.proj_out):
      outside_autocast(module)
    model.patch_embedding.register_forward_hook(lambda module, given, out: out.float())
    return model, False
  for name, module in model.named_modules():  # diffusers: what `_keep_in_fp32_modules` names
    kept = ("time_embedder", "norm1", "norm2", "norm3", "norm_out")
    if isinstance(module, torch.nn.Linear | torch.nn.Conv3d | torch.nn.RMSNorm) and not any(
      part in name for part in kept
    ):
      module.to(torch.bfloat16)
  return model, True


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["official", "diffusers", "diffsynth"])
def test_bfloat16_is_as_near_to_float32_as_the_reference_is(stack):
  """The two round in different orders, so each is judged by its distance to the float32 result."""
  c = dataclasses.replace(config("i2v", 2), numerics=stack)
  model = reference(c)
  params = converted(model, c)
  draw = np.random.default_rng(1).standard_normal
  latents, known = (draw((1, 2, 4, 6, 6), np.float32) for _ in range(2))
  mask = np.ones((1, 2, 4, 6, 4), np.float32)
  text = draw((1, 1, 7, TEXT), np.float32)
  t = np.array([936.0, 0.0])  # a bfloat16 number
  cond = Conditioning(text=text, known=known, known_mask=mask)
  time = sinusoid(t, c.freq_dim, stack)
  ours, _ = WanDiT(dataclasses.replace(c, dtype="bfloat16")).apply(
    {"params": params}, latents, time, cond
  )
  seen = torch.tensor(
    rearrange(np.concatenate([latents, mask, known], -1), "r f h w c -> r c f h w")
  )

  def run(net, dtype):
    with torch.no_grad():
      out = net(
        hidden_states=seen.to(dtype),
        timestep=torch.tensor([936]),
        encoder_hidden_states=torch.tensor(text[0]).to(dtype),
        return_dict=False,
      )[0]
    return rearrange(out.float().numpy(), "r c f h w -> 1 r f h w c")

  exact = run(model, torch.float32)
  net, halved = half(model, stack)
  with torch.autocast("cpu", torch.bfloat16, enabled=stack == "official"):
    theirs = run(net, torch.bfloat16 if halved else torch.float32)
  assert relative(theirs, exact) > 1e-4
  assert relative(ours, exact) <= 1.2 * relative(theirs, exact)


@pytest.mark.slow
def test_the_stacks_differ_in_bfloat16_alone():
  c = config("t2v", 2)
  latents = np.random.default_rng(1).standard_normal((1, 2, 4, 6, 6), np.float32)
  cond = Conditioning(text=np.ones((1, 1, 7, TEXT), np.float32))
  time = sinusoid(np.array([936.0, 0.0]), c.freq_dim)
  params = converted(reference(c), c)

  def velocity(stack, dtype):
    module = WanDiT(dataclasses.replace(c, numerics=stack, dtype=dtype))
    return module.apply({"params": params}, latents, time, cond)[0]

  stacks = ("official", "diffusers", "diffsynth")
  full, halved = ({s: velocity(s, d) for s in stacks} for d in ("float32", "bfloat16"))
  for stack in stacks[1:]:
    assert relative(full[stack], full["official"]) <= 1e-6
    assert relative(halved[stack], halved["official"]) > 1e-4
  assert relative(halved["diffusers"], halved["diffsynth"]) > 1e-4
