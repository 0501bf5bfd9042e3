"""`sample --fit` makes a first frame of a picture of any size."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_videoreason import (
  checkpoint,
  cli,
  conditioning,
  framing,
  media,
  open_run,
  prepare,
  settings,
)
from jax_videoreason.cli import sample
from jax_videoreason.convert import wan
from published import CLIP, CONFIG, DIT, clip_original, parts, shards, tensors, write_original

CHOSEN = settings.from_config({"checkpoint": "mini", "frames": 17, "height": 32, "width": 32})
each_stack = pytest.mark.parametrize(
  "stack",
  [pytest.param(s, marks=[] if s == "official" else pytest.mark.slow) for s in framing.STACKS],
)


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
  """40 x 70 pixels, its path and itself."""
  path = tmp_path_factory.mktemp("picture") / "wide.png"
  image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
  media.write_png(path, image)
  return str(path), image


def test_a_picture_of_the_size_is_taken_as_it_is(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  media.write_png(tmp_path / "right.png", image)
  for fit in sample.FITS:
    frame, shown, chosen = sample.fitted(str(tmp_path / "right.png"), CHOSEN, fit)
    np.testing.assert_array_equal(frame, image)
    np.testing.assert_array_equal(shown, image)
    assert chosen == CHOSEN


def test_another_size_is_refused_with_the_ways_out(picture):
  with pytest.raises(
    ValueError, match="70 x 40 pixels, the config says 32 x 32: give --fit stretch"
  ):
    sample.fitted(picture[0], CHOSEN, "exact")


@pytest.fixture(scope="session")
def i2v(tmp_path_factory):
  """Wan2.1 image to video as a bundle, converted by the stack whose arithmetic it follows."""
  root = tmp_path_factory.mktemp("i2v")
  wide = dataclasses.replace(DIT, clip_width=CLIP.width)
  source = write_original(root / "source", parts())
  for name in ("high_noise_model", "low_noise_model"):
    shutil.rmtree(source / name)
  shards(source, tensors("dit", wide, wan.table("original"), 4), 2)
  (source / "config.json").write_text(json.dumps(CONFIG))
  save_file(clip_original(), source / "models_clip_open-clip.safetensors")

  @functools.cache
  def converted(stack):
    words = ["convert", str(source), f"--out={root / stack}", f"--numerics={stack}"]
    assert cli.main(words) == 0
    return root / stack

  return converted


@each_stack
def test_a_picture_is_stretched_as_the_stack_of_the_model_does(i2v, picture, stack):
  """And the image tower is shown what it is shown there: DiffSynth alone stretches it before."""
  path, image = picture
  here = dataclasses.replace(CHOSEN, checkpoint=str(i2v(stack)))
  frame, shown, chosen = sample.fitted(path, here, "stretch")
  wanted = framing.stretched(image, 32, 32, stack)
  np.testing.assert_array_equal(frame, wanted)
  assert frame.dtype == (np.float32 if stack == "official" else np.uint8)
  np.testing.assert_array_equal(shown, wanted if stack == "diffsynth" else image)
  assert chosen == here


@pytest.mark.slow
@each_stack
def test_the_image_tokens_of_a_sample_are_those_of_the_picture(
  i2v, picture, monkeypatch, tmp_path, stack
):
  """From the command to the conditioning, for both seeds."""
  path, image = picture
  made = []

  def stop(*args, **more):
    made.append(prepare_encode(*args, **more))
    raise ValueError("enough")

  prepare_encode = prepare.encode
  monkeypatch.setattr(prepare, "encode", stop)
  words = ["sample", f"--checkpoint={i2v(stack)}", f"--image={path}", "--fit=stretch"]
  words += ["--prompt=sort the bars", "--seeds=0,1", f"--out={tmp_path / 'runs'}"]
  words += ["--config.height=32", "--config.width=32", "--config.frames=5"]
  assert cli.main(words) == cli.BAD_INPUT
  _, (cond,) = made[0]
  tower = checkpoint.load(i2v(stack), parts=("clip",))
  stretched = framing.stretched(image, 32, 32, stack)
  tokens, other = (
    np.asarray(conditioning.image_tokens(tower, [given, given])) for given in (image, stretched)
  )
  wanted, wrong = (other, tokens) if stack == "diffsynth" else (tokens, other)
  np.testing.assert_allclose(cond.clip, wanted, atol=1e-5)
  assert np.abs(np.asarray(cond.clip) - wrong).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["official", "diffusers"])
def test_a_branch_is_conditioned_as_its_run_was(i2v, picture, tmp_path, stack):
  """On the frame as it was, not rounded, and on the picture that the image tower was shown."""
  words = ["sample", f"--checkpoint={i2v(stack)}", f"--image={picture[0]}", "--fit=stretch"]
  words += ["--prompt=sort the bars", "--seeds=0", "--config.steps=2", "--config.solver=euler"]
  words += ["--config.height=32", "--config.width=32", "--config.frames=5"]
  assert cli.main([*words, f"--out={tmp_path / 'run'}"]) == 0
  run = open_run(tmp_path / "run")
  frame, shown = run.given(0)
  np.testing.assert_array_equal(frame, framing.stretched(picture[1], 32, 32, stack))
  np.testing.assert_array_equal(shown, picture[1])
  assert run.manifest["files"].keys() >= {"shown_0.png"}
  assert ("first_0.npy" in run.manifest["files"]) == (stack == "official")
  words = ["sample", f"--from={tmp_path / 'run'}", "--step=0", f"--out={tmp_path / 'branch'}"]
  assert cli.main(words) == 0
  branch = open_run(tmp_path / "branch")
  np.testing.assert_allclose(branch.final_latents, run.final_latents, atol=1e-6)
  for name in {"first_0.npy", "shown_0.png"} & run.manifest["files"].keys():
    assert branch.manifest["files"][name] == run.manifest["files"][name]
  (tmp_path / "run" / "shown_0.png").unlink()
  assert cli.main([*words, "--redo"]) == cli.BAD_INPUT


def test_the_first_frame_of_a_run_is_a_picture(i2v, picture, tmp_path):
  """The floats of the official stack are rounded only where they are shown."""
  floats = framing.stretched(picture[1], 32, 32, "official")
  question = sample.Question(prompt="", first_frame=floats)
  (shown,) = sample.first_pictures([question])
  assert shown.dtype == np.uint8
  assert np.abs(shown / 127.5 - 1 - np.clip(floats, -1, 1)).max() <= 0.5 / 127.5 + 1e-6


def test_cover(picture):
  path, image = picture
  frame, _, _ = sample.fitted(path, CHOSEN, "cover")
  np.testing.assert_array_equal(frame, framing.covered(image, 32, 32))


def test_area_takes_the_aspect_of_the_picture(picture):
  frame, _, chosen = sample.fitted(picture[0], CHOSEN, "area")
  assert frame.shape == (chosen.height, chosen.width, 3)
  assert chosen.height < 32 < chosen.width
  assert chosen.height * chosen.width <= 32 * 32
