"""How near a GPU comes to its own matrix rate on the published shapes; one JSON line per question.

  python scripts/bench_gpu.py                   Wan2.2 I2V A14B, 480 x 832, 81 frames, then TI2V-5B
  python scripts/bench_gpu.py stack --layers 8
  JAX_PLATFORMS=cpu python scripts/bench_gpu.py --config mini --layers 2 --square 256 --repeats 3

Weights are random. `share` is the rate over that of a square matmul in the dtype of the model,
measured first, in this process. `matmuls`: those of one block, one after the other. `attention`:
the self-attention of one block. `stack`: a forward pass of `--layers` blocks with what stands
around them; its FLOPs are those that `videoreason plan` counts. `step`: seconds of a denoising step
with guidance, by two lengths of schedule, so that what a sample does once drops out; each expert
has `--layers` blocks. `diffusers`: seconds of its forward pass of as many blocks, by the attention
that is its fastest here, over ours (above 1, ours is the faster one); needs PyTorch for the device.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory too

import jax
import jax.numpy as jnp
import numpy as np
from bench_denoise import BARE, ask, pairs, say, seconds

from jax_videoreason import cli, plan, runs, sampler, settings
from jax_videoreason.attention import attend
from jax_videoreason.models.wan import WanDiT
from jax_videoreason.structs import Conditioning, ModelBundle

ATTENTIONS = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3")  # of diffusers
STEPS = (2, 6)  # of the two schedules
SCALE = 0.02  # of random numbers

Found = tuple[plan.Problem, float]  # and FLOPs of one evaluation of all branches


@functools.cache
def shape_of(config: str, layers: int, steps: int = STEPS[0]) -> Found:
  """One run of a config, its DiT cut to so many layers."""
  chosen = settings.from_config(cli.load_config(config).to_dict())
  chosen = dataclasses.replace(chosen, steps=steps, piece=steps, seeds=(0,))
  whole = plan.model(chosen.checkpoint)
  given: Any = whole.parts.dit.config
  dit = WanDiT(dataclasses.replace(given, layers=layers))
  experts = [
    {
      path: jax.ShapeDtypeStruct((layers, *leaf.shape[1:]), leaf.dtype)
      if path.startswith("blocks/")
      else leaf
      for path, leaf in leaves.items()
    }
    for leaves in whole.experts
  ]
  cut = dataclasses.replace(whole, parts=dataclasses.replace(whole.parts, dit=dit), experts=experts)
  problem = plan.Problem(model=cut, chosen=chosen, runs=1)
  return problem, problem.sizes.G * problem.flops()


def drawn(shapes: Any) -> Any:
  """Random arrays of these shapes, on the device."""
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  fill = jax.jit(
    lambda key, leaf: (SCALE * jax.random.normal(key, leaf.shape)).astype(leaf.dtype),
    static_argnums=1,
  )
  return tree.unflatten([fill(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


def given_to(problem: plan.Problem) -> tuple[ModelBundle, Conditioning]:
  """The bundle and the conditioning of a problem, at random."""
  bundle, _, cond = plan.arguments(problem, None)
  made = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (bundle, cond))
  return drawn(made)


def rate(call: Callable[..., Any], given: Any, flops: float, repeats: int) -> tuple[float, float]:
  """(FLOPs a second, median seconds) of a jitted call, after one that compiles."""
  seconds(lambda: call(*given))
  took = float(np.median([seconds(lambda: call(*given)) for _ in range(repeats)]))
  return flops / took, took


@functools.cache
def matrix_rate(dtype: str, square: int, repeats: int) -> float:
  """FLOPs a second of square matmuls, eight in a row."""

  @jax.jit
  def call(a: jax.Array, b: jax.Array) -> jax.Array:
    for _ in range(8):
      a = a @ b
    return a

  a, b = drawn([jax.ShapeDtypeStruct((square, square), jnp.dtype(dtype))] * 2)
  found, _ = rate(call, (a, b), 8 * 2.0 * square**3, repeats)
  say("matrix rate", dtype=dtype, square=square, tflops=round(found / 1e12, 3))
  return found


def tell(
  question: str, wanted: str, options: argparse.Namespace, call: Any, given: Any, flops: float
) -> None:
  problem, _ = shape_of(options.config, options.layers)
  dtype = problem.model.parts.dit.config.dtype
  best = matrix_rate(dtype, options.square, options.repeats)
  found, took = rate(call, given, flops, options.repeats)
  say(
    question,
    wanted=wanted,
    share=round(found / best, 4),
    tflops=round(found / 1e12, 3),
    ms=round(1e3 * took, 2),
    tokens=problem.sizes.T,
    layers=options.layers,
    dtype=dtype,
    config=options.config,
  )


def measure_matmuls(options: argparse.Namespace) -> None:
  problem, _ = shape_of(options.config, options.layers)
  config, s = problem.model.parts.dit.config, problem.sizes
  dtype, rows = jnp.dtype(config.dtype), s.G * s.T
  square, up, down = (
    jax.ShapeDtypeStruct(shape, dtype)
    for shape in ((s.D, s.D), (s.D, config.ffn_width), (config.ffn_width, s.D))
  )
  x, *weights = drawn([jax.ShapeDtypeStruct((rows, s.D), dtype), *[square] * 6, up, down])

  @jax.jit
  def call(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
    for weight in weights:  # q k v o, q o of the text, up, down
      x = x @ weight
    return x

  flops = 2.0 * rows * (6 * s.D**2 + 2 * s.D * config.ffn_width)
  tell("matmuls of a block", "at least 0.75", options, call, (x, weights), flops)


def measure_attention(options: argparse.Namespace) -> None:
  problem, _ = shape_of(options.config, options.layers)
  config, s = problem.model.parts.dit.config, problem.sizes
  heads = (s.G, 1, s.T, config.heads, s.D // config.heads)
  given = drawn([jax.ShapeDtypeStruct(heads, jnp.dtype(config.dtype))] * 3)
  flops = 4.0 * s.G * s.D * s.T**2
  tell("attention of a block", "at least 0.55", options, jax.jit(attend), given, flops)


def forward(problem: plan.Problem) -> tuple[Any, tuple[Any, ...]]:
  """A jitted forward pass of the first expert, and what it takes."""
  bundle, cond = given_to(problem)
  s = problem.sizes
  x = drawn(jax.ShapeDtypeStruct((1, s.F, s.H, s.W, s.C), jnp.float32))
  time = jnp.asarray(problem.schedule().time[0])
  dit = problem.model.parts.dit
  call = jax.jit(lambda params, x, time, cond: dit.apply({"params": params}, x, time, cond)[0])
  return call, (bundle.params[0], x, time, cond)


def measure_stack(options: argparse.Namespace) -> None:
  problem, flops = shape_of(options.config, options.layers)
  call, given = forward(problem)
  tell("a stack of blocks", "at least 0.6", options, call, given, flops)


def measure_step(options: argparse.Namespace) -> None:
  took = []
  for steps in STEPS:
    problem, flops = shape_of(options.config, options.layers, steps)
    bundle, cond = given_to(problem)
    noise = runs.make_noise([0], problem.grid)
    schedule = problem.schedule()
    call = functools.partial(sampler.denoise, bundle, noise, cond, schedule, taps=BARE)
    _, one = rate(lambda call=call: call(), (), 0.0, options.repeats)
    took.append(one)
    del bundle, cond, call
  each = (took[1] - took[0]) / (STEPS[1] - STEPS[0])
  say(
    "a step with guidance",
    ms=round(1e3 * each, 2),
    tflops=round(flops / each / 1e12, 3),
    experts=len(problem.experts),
    tokens=problem.sizes.T,
    layers=options.layers,
    config=options.config,
  )


def measure_diffusers(options: argparse.Namespace) -> None:
  import torch
  from diffusers import WanTransformer3DModel

  problem, _ = shape_of(options.config, options.layers)
  config, s = problem.model.parts.dit.config, problem.sizes
  device = "cpu" if jax.default_backend() == "cpu" else "cuda"
  dtype = getattr(torch, config.dtype)
  theirs = WanTransformer3DModel(
    num_attention_heads=config.heads,
    attention_head_dim=config.width // config.heads,
    in_channels=config.in_channels,
    out_channels=config.out_channels,
    text_dim=config.text_width,
    ffn_dim=config.ffn_width,
    num_layers=config.layers,
  )
  theirs = theirs.to(device, dtype).eval()
  x = torch.randn(s.G, config.in_channels, s.F, s.H, s.W, device=device, dtype=dtype)
  words = (s.G, problem.model.card.text_length, config.text_width)
  text = torch.randn(*words, device=device, dtype=dtype)
  time = torch.full((s.G,), 500.0, device=device)

  def reference() -> None:
    with torch.no_grad():
      theirs(x, time, text, return_dict=False)
    if device == "cuda":
      torch.cuda.synchronize()

  took, refused = {}, {}
  for name in ATTENTIONS:
    try:
      theirs.set_attention_backend(name)
      seconds(reference)
      took[name] = min(seconds(reference) for _ in range(options.repeats))
    except (RuntimeError, ValueError, ImportError) as error:  # this machine has not all of them
      refused[name] = str(error).splitlines()[0]
  if not took:
    raise SystemExit(f"diffusers runs by none of its attentions here: {refused}.")
  fastest = min(took, key=lambda name: took[name])
  theirs.set_attention_backend(fastest)
  call, given = forward(problem)
  say(
    "speed of a stack of blocks over diffusers",
    attention=fastest,
    refused=refused,
    tokens=s.T,
    layers=options.layers,
    dtype=config.dtype,
    config=options.config,
    **pairs(reference, lambda: call(*given), options.repeats),
  )


QUESTIONS = {
  "matmuls": measure_matmuls,
  "attention": measure_attention,
  "stack": measure_stack,
  "step": measure_step,
  "diffusers": measure_diffusers,
}


def of_every_config(
  measure: Callable[[argparse.Namespace], None],
) -> Callable[[argparse.Namespace], None]:
  def call(options: argparse.Namespace) -> None:
    for config in options.config:
      measure(argparse.Namespace(**{**vars(options), "config": config}))

  return call


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", nargs="+", default=["wan22_i2v_a14b:480p", "wan22_ti2v_5b"])
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--square", type=int, default=8192, help="side of the matmuls of the rate")
  parser.add_argument("--repeats", type=int, default=10)
  ask(parser, {name: of_every_config(measure) for name, measure in QUESTIONS.items()})


if __name__ == "__main__":
  main()
