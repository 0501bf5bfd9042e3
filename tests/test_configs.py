"""The shipped configurations are the published ones."""

import dataclasses
import re
from pathlib import Path

import pytest

from jax_videoreason import schedules, settings
from jax_videoreason.cli import load_config
from jax_videoreason.configs import common
from jax_videoreason.models import FAMILIES

NAMES = sorted(FAMILIES["wan21"].variants)


def chosen(name: str) -> settings.SampleSettings:
  return settings.from_config(load_config(name).to_dict())


@pytest.mark.parametrize("name", NAMES)
def test_every_published_model_has_a_config_that_fits_it(name):
  run, variant = chosen(name), FAMILIES["wan21"].variants[name]
  family = FAMILIES["wan21"]
  grid = family.latents(family.build(variant.configs)).grid(run.frames, run.height, run.width)
  assert all(grid)
  assert run.checkpoint.startswith(f"ckpt/{name}")
  assert len(run.guidance) <= variant.experts


@pytest.mark.parametrize(
  ("name", "steps", "shift", "guidance", "solver", "size"),
  [
    ("wan21_t2v_1_3b", 50, 5.0, (5.0,), "unipc", (81, 480, 832)),
    ("wan21_t2v_14b", 50, 5.0, (5.0,), "unipc", (81, 720, 1280)),
    ("wan21_i2v_14b:480p", 40, 3.0, (5.0,), "unipc", (81, 480, 832)),
    ("wan21_i2v_14b:720p", 40, 5.0, (5.0,), "unipc", (81, 720, 1280)),
    ("wan22_t2v_a14b", 40, 12.0, (4.0, 3.0), "unipc", (81, 720, 1280)),
    ("wan22_i2v_a14b:480p", 40, 5.0, (3.5, 3.5), "unipc", (81, 480, 832)),
    ("wan22_ti2v_5b", 50, 5.0, (5.0,), "unipc", (121, 704, 1280)),
    ("vbvr_wan21", 50, 5.0, (5.0,), "euler", (81, 480, 832)),
    ("vbvr_wan22", 50, 5.0, (5.0,), "euler", (81, 480, 832)),
  ],
)
def test_the_published_settings(name, steps, shift, guidance, solver, size):
  run = chosen(name)
  assert (run.steps, run.shift, run.guidance, run.solver) == (steps, shift, guidance, solver)
  assert (run.frames, run.height, run.width) == size
  assert run.grid == ("diffsynth" if solver == "euler" else "official")


@pytest.mark.parametrize("name", NAMES)
def test_the_conversion_it_names_halves_the_weights(name):
  """Published transformers are float32, which is not what the sizes beside them say."""
  said = (Path(common.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
  (line,) = re.findall(r"videoreason convert (?:.|\n)*?--out", said)
  assert "--dtype bf16" in line


@pytest.mark.parametrize("name", NAMES)
def test_the_stock_negative_prompt(name):
  """Wan2.1's image model puts a shaking camera before them."""
  stock = chosen("vbvr_wan22").negative_prompt
  assert stock.startswith("色调艳丽，过曝，静态，") and stock.endswith("背景人很多，倒着走")
  before = "镜头晃动，" if name == "wan21_i2v_14b" else ""
  assert chosen(name).negative_prompt == before + stock


@pytest.mark.parametrize(("boundary", "high"), [(0.875, 21), (0.9, 18)])
def test_both_boundaries_of_the_paper_are_reached(boundary, high):
  run = chosen(f"vbvr_wan22:boundary={boundary}")
  schedule = schedules.build(
    steps=run.steps, shift=run.shift, boundary=run.boundary, grid=run.grid, numerics="diffsynth"
  )
  assert int((schedule.which == 0).sum()) == high


def test_a_size_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match="'360p' is no choice; there are: 480p, 720p"):
    load_config("wan21_i2v_14b:360p")


def test_they_differ_only_in_what_they_say():
  """Everything else is the default of a run, so that a config is read in one glance."""
  plain = dataclasses.asdict(chosen("wan21_t2v_1_3b"))
  other = dataclasses.asdict(chosen("vbvr_wan21"))
  differing = {key for key in plain if plain[key] != other[key]}
  assert differing == {"checkpoint", "solver", "grid", "tiles"}
