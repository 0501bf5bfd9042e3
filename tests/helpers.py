"""Tiny models made in memory, and the lists that several test files go through."""

import dataclasses
import re
import socket
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_videoreason import cli, runs, schedules
from jax_videoreason.models.wan import WanConfig, WanDiT
from jax_videoreason.schedules import Schedule
from jax_videoreason.structs import Card, Conditioning, LatentSpec, ModelBundle, Noise, Parts

SOLVERS = ("euler", "unipc")
SITES = (
  "resid_pre",
  "attn_out",
  "cross_out",
  "mlp_out",
  "resid_post",
  "attn_heads",
  "cross_heads",
)
GRID = (3, 4, 4, 4)  # F H W C
FREQ = 16


def tiny_config(image_input: str = "concat", **changes) -> WanConfig:
  """A WanDiT of 3 layers, 24 wide."""
  channels = GRID[-1]
  return WanConfig(
    **{
      "width": 24,
      "ffn_width": 48,
      "heads": 2,
      "layers": 3,
      "in_channels": 2 * channels + 4 if image_input == "concat" else channels,
      "out_channels": channels,
      "text_width": 12,
      "freq_dim": FREQ,
      "image_input": image_input,
      **changes,
    }
  )


def tiny_bundle(image_input: str = "concat", experts: int = 1, **changes) -> ModelBundle:
  """A bundle with random weights in every leaf (so that no gate or head is zero)."""
  config = tiny_config(image_input, **changes)
  dit = WanDiT(config)
  f, h, w, c = GRID
  _, cond = tiny_inputs(1, image_input)
  shapes = jax.eval_shape(
    dit.init, jax.random.key(0), jnp.zeros((1, f, h, w, c)), jnp.zeros((2, FREQ)), cond
  )["params"]
  rng = np.random.default_rng(0)

  def weights():
    return jax.tree.map(
      lambda s: jnp.asarray(rng.normal(0, 0.2, s.shape), jnp.float32), dict(shapes)
    )

  card = Card(
    name="tiny",
    family="wan21",
    latents=LatentSpec(channels=c, stride=(4, 4, 4)),
    text_length=5,
    boundary=0.9 if experts == 2 else None,
  )
  return ModelBundle(
    params=tuple(weights() for _ in range(experts)), parts=Parts(dit=dit), card=card
  )


def tiny_inputs(
  count: int, image_input: str = "concat", branches: int = 2, seed: int = 0
) -> tuple[Noise, Conditioning]:
  """Noise and conditioning of `count` runs."""
  rng = np.random.default_rng(seed)
  f, h, w, c = GRID
  text = jnp.asarray(rng.normal(size=(branches, count, 5, 12)), jnp.float32)
  known = mask = None
  if image_input != "none":
    known = jnp.asarray(rng.normal(size=(count, f, h, w, c)), jnp.float32)
    mask = jnp.zeros((count, f, h, w, 4)).at[:, 0].set(1.0)
  return (
    runs.make_noise(range(count), GRID),
    Conditioning(text=text, known=known, known_mask=mask),
  )


def tiny_schedule(steps: int = 4, **changes) -> Schedule:
  """A schedule for the tiny model."""
  return schedules.build(**{"steps": steps, "guidance": 3.0, "freq_dim": FREQ, **changes})


def relative(a, b) -> float:
  """Relative L2 distance of two arrays."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def replace(value, **changes):
  """dataclasses.replace, under a shorter name."""
  return dataclasses.replace(value, **changes)


def documented(name: str) -> str:
  """The Python of docs/NAME, which is one block."""
  text = (Path(__file__).parent.parent / "docs" / name).read_text()
  (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
  return block


def refusal(capsys, source, out: Path, *more: str) -> str:
  """The one line that a conversion which is refused says; nothing is left in the place of `out`."""
  before = out.exists()
  capsys.readouterr()
  assert cli.main(["convert", str(source), "--out", str(out), *more]) == cli.BAD_INPUT
  assert out.exists() == before
  said = capsys.readouterr().err
  return said[said.rindex("videoreason: ") :].rstrip("\n")


def export_cases(root: Path, names: str, count: int) -> Path:
  """The folder of some cases of tasks of ours, 32 pixels, as `tasks export` writes them."""
  words = ["tasks", "export", f"--tasks={names}", "--size=32", f"--cases={count}", f"--out={root}"]
  assert cli.main(words) == 0
  return root


def free_port() -> int:
  """A port of this machine that nobody listens on."""
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def passing(videos: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """The videos, none of which is made while two others are still held."""
  made: list[weakref.ref] = []
  for video in videos:
    assert sum(ref() is not None for ref in made) < 2
    made.append(weakref.ref(video))
    yield video
