"""A run folder is whole or not there, and reads back as it was written."""

import builtins
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
import zarr

import run_folder
from jax_videoreason import (
  arrays,
  checkpoint,
  folders,
  leaves,
  media,
  records,
  store,
  sweep,
  tables,
)
from jax_videoreason.branching import Branch
from jax_videoreason.experiments import results
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Trace
from jax_videoreason.taps import TapSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return run_folder.make(tmp_path_factory.mktemp("runs") / "one")


def trace(steps=5, runs=3, sites=1, dtype=np.float32):
  rng = np.random.default_rng(1)
  whole = run_folder.piece(rng, run_folder.sigmas(steps), runs)
  taps = {name: value.astype(dtype) for name, value in list(whole.taps.items())[:sites]}
  return dataclasses.replace(whole, taps=taps)


def cut(whole, steps, runs):
  return Trace(
    sigma=whole.sigma[steps],
    finite=whole.finite[steps, runs],
    latents=whole.latents[steps, runs],
    x0=whole.x0[steps, runs],
    taps={name: value[steps, :, :, runs] for name, value in whole.taps.items()},
  )


def write_pieces(folder, whole, pieces, taps=None):
  steps, runs = whole.finite.shape
  with store.create_trace(folder, steps=steps, runs=runs, taps=taps) as writer:
    for at_steps, at_runs in pieces:
      writer.write(cut(whole, at_steps, at_runs), at_step=at_steps.start, at_run=at_runs.start)


def test_everything_reads_back(folder):
  run = store.open_run(folder)
  assert run.sigma.shape == (6,)
  assert run.finite.all()
  assert run.latents.shape == run.x0.shape == (6, 4, 2, 4, 4, 4)
  assert run.frames.shape == (6, 4, 17, 32, 32, 3) and run.frames[0].dtype == np.uint8
  assert set(run.taps) == set(run_folder.SITES)
  assert run.final_latents.shape == (4, 2, 4, 4, 4)
  np.testing.assert_array_equal(run.x0[-1], run.final_latents)
  np.testing.assert_array_equal(run.x0[2, 1], run.x0[2][1])
  assert [said["seed"] for said in run.runs] == [0, 1, 0, 1]
  assert run.answers.answer.shape == (6, 4)
  assert all(path.is_file() for r in range(4) for path in (run.first(r), run.video(r)))
  assert run.video(4) is None
  assert run.manifest["config"]["shift"] == 5.0 and run.manifest["model"] == "mini"
  run.verify()


def test_zarr_reads_it_with_named_dimensions(folder):
  group = zarr.open_group(folder / "trace.zarr", mode="r")
  latents = group["latents"]
  assert latents.metadata.dimension_names == store.LATENT_AXES
  np.testing.assert_array_equal(latents[:], store.open_run(folder).latents[:])
  norms = group["taps/attn_out/norm"]
  assert norms.metadata.dimension_names == ("step", "layer", "branch", "run", "norm_0")
  assert norms.attrs["layers"] == [0, 1, 2]
  assert group["frames"].attrs["steps"] == [0, 1, 2, 3, 4, 5]


def test_pieces_in_any_order_equal_the_whole(tmp_path):
  whole = trace()
  a, b = tmp_path / "a", tmp_path / "b"
  for path in (a, b):
    path.mkdir()
  write_pieces(a, whole, [(slice(0, 5), slice(0, 3))])
  write_pieces(
    b, whole, [(slice(i, j), slice(k, k + 1)) for i, j in ((3, 5), (0, 3)) for k in (2, 0, 1)]
  )
  one, other = (zarr.open_group(path / "trace.zarr", mode="r") for path in (a, b))
  for name in ("sigma", "finite", "latents", "x0", "taps/attn_out/norm"):
    np.testing.assert_array_equal(one[name][:], other[name][:])
  np.testing.assert_array_equal(one["latents"][:], whole.latents)


def test_taps_of_chosen_steps_land_on_their_rows(tmp_path):
  whole = trace()
  first, last = cut(whole, slice(0, 3), slice(0, 3)), cut(whole, slice(3, 5), slice(0, 3))
  (name,) = whole.taps
  kept = TapSpec(sites=("attn_out",), steps=(1, 4), layers=(0, 2, 5))
  with store.create_trace(tmp_path, steps=5, runs=3, taps=kept) as writer:
    writer.write(dataclasses.replace(last, taps={name: whole.taps[name][4:5]}), at_step=3)
    writer.write(dataclasses.replace(first, taps={name: whole.taps[name][1:2]}))
    with pytest.raises(ValueError, match=r"brings 3 rows for steps 0\.\.2, of which 1 are kept"):
      writer.write(first)
  array = zarr.open_group(tmp_path / "trace.zarr", mode="r")[f"taps/{name}"]
  np.testing.assert_array_equal(array[:], whole.taps[name][[1, 4]])
  assert array.attrs["steps"] == [1, 4] and array.attrs["layers"] == [0, 2, 5]


def test_bfloat16_is_widened_exactly(tmp_path):
  whole = trace(dtype=ml_dtypes.bfloat16)
  write_pieces(tmp_path, whole, [(slice(0, 5), slice(0, 3))])
  array = zarr.open_group(tmp_path / "trace.zarr", mode="r")["taps/attn_out/norm"]
  assert array.dtype == np.float32 and array.attrs["written_from"] == "bfloat16"
  np.testing.assert_array_equal(array[:], whole.taps["attn_out/norm"].astype(np.float32))


def test_taps_in_bfloat16_go_on_in_the_trace_of_a_branch(tmp_path):
  whole = trace(dtype=ml_dtypes.bfloat16)
  (tmp_path / "of").mkdir()
  write_pieces(tmp_path / "of", whole, [(slice(0, 5), slice(0, 3))])
  found = arrays.open_group(tmp_path / "of" / "trace.zarr")
  run = SimpleNamespace(
    sigma=whole.sigma,
    finite=whole.finite,
    latents=whole.latents,
    x0=whole.x0,
    taps={"attn_out/norm": found["taps/attn_out/norm"]},
  )
  branch = Branch(
    run=cast(Any, run),
    chosen=SampleSettings(
      checkpoint="mini",
      frames=17,
      height=32,
      width=32,
      steps=5,
      shift=5.0,
      guidance=(1.0,),
      seeds=(0,),
    ),
    step=2,
    said={},
    edit=None,
  )
  spec = TapSpec(sites=("attn_out",), reduce=("norm",))
  with store.create_trace(tmp_path, steps=5, runs=3, taps=spec) as writer:
    writer.write(branch.prefix(spec, 2), at_step=0)
    writer.write(cut(whole, slice(2, 5), slice(0, 3)), at_step=2)
  again = arrays.open_group(tmp_path / "trace.zarr")["taps/attn_out/norm"]
  np.testing.assert_array_equal(again[:], whole.taps["attn_out/norm"].astype(np.float32))


INDICES = (
  np.s_[-2:], np.s_[:-1], np.s_[2::-1], np.s_[1::-1], np.s_[::-2], np.s_[:100], np.s_[2:100],
  np.s_[5:], np.s_[3:1], np.s_[-1], np.s_[np.int64(-2)], np.s_[:, -1], np.s_[..., -3:],
  np.s_[..., 0, ::2], np.s_[-1, ..., [0, -1]], [-1], [-1, 0, 2, 0], [], np.s_[[0, 3], :, [1, 2]],
  np.s_[[[0], [3]], [1, 2]], np.s_[:, None, 1], np.array([True, False, True, False]),
  np.s_[1, np.arange(3) > 0], (), ..., np.s_[::10**30], np.s_[::-10**30],
  np.s_[:2, [1, -1], ..., -2], np.s_[:3, -2, ..., [[0, -1], [2, 1]]],
  np.s_[0, ..., 0, 0], np.s_[0, 0, 0], np.array(2), True, False, np.True_,
  np.s_[:2, True, [1, 0]], np.s_[True, :, [0, 1]],
)  # fmt: skip


@pytest.mark.parametrize("where", INDICES, ids=str)
def test_a_stored_array_is_indexed_as_one_in_memory(tmp_path, where):
  value = np.arange(4 * 3 * 5, dtype=np.float32).reshape(4, 3, 5)
  arrays.put(tmp_path / "of", "x", ("step", "run", "value"), value, chunk=(1, 2, 5))
  found = arrays.open_group(tmp_path / "of")["x"][where]
  assert type(found) is type(value[where])
  np.testing.assert_array_equal(found, value[where], strict=True)


def drawn_index(rng: random.Random, shape: tuple[int, ...]) -> tuple[Any, ...]:
  """An index of every kind that numpy knows, now and then one that it refuses."""

  def some(size: int, dtype: type, count: tuple[int, ...]) -> np.ndarray:
    beyond = rng.random() < 0.05
    low = max(-size - beyond, np.iinfo(dtype).min)
    high = min(size - 1 + beyond, np.iinfo(dtype).max)
    drawn = [rng.randint(low, high) for _ in range(int(np.prod(count)))]
    return np.array(drawn, dtype).reshape(count)

  def mask(sizes: tuple[int, ...]) -> np.ndarray:
    made = np.zeros(sizes, bool)
    made.flat[rng.sample(range(made.size), rng.choice((0, 1, 2, 2)))] = True
    return made

  def item(size: int) -> Any:
    dtype = rng.choice((np.int8, np.uint8, np.int32, np.int64, np.uint64))
    ends = (None, *(rng.randint(-size - 2, size + 2) for _ in range(3)))
    step = rng.choice((None, 1, 2, 3, 50, -1, -2, -7))
    kind = rng.choice(("slice", "slice", "integer", "number", "list", "array", "array", "mask"))
    return {
      "slice": slice(rng.choice(ends), rng.choice(ends), step),
      "integer": int(some(size, np.int64, ())),
      "number": some(size, dtype, ())[()],
      "list": some(size, np.int64, (2,)).tolist(),
      "array": some(size, dtype, rng.choice(((1,), (2,), (2, 1), (2, 2)))),
      "mask": mask((size,)),
    }[kind]

  def items(sizes: tuple[int, ...]) -> list[Any]:
    if len(sizes) > 1 and rng.random() < 0.1:
      return [mask(sizes[:2]), *items(sizes[2:])]
    return [item(sizes[0]), *items(sizes[1:])] if sizes else []

  first, last = sorted(rng.randint(0, len(shape)) for _ in range(2))
  made = items(shape[:first])
  if rng.random() < 0.6:
    made += [..., *items(shape[last:])]
  for more, odds in ((None, 0.3), (True, 0.1), (0, 0.05)):
    if rng.random() < odds:
      made.insert(rng.randint(0, len(made)), more)
  return tuple(made)


def test_any_index_finds_what_numpy_finds_or_is_refused_as_by_numpy(tmp_path):
  value = np.arange(300 * 4 * 3, dtype=np.int16).reshape(300, 4, 3)
  arrays.put(tmp_path / "of", "x", ("step", "run", "value"), value, chunk=(70, 3, 3))
  stored, rng, refused = arrays.open_group(tmp_path / "of")["x"], random.Random(0), 0
  for _ in range(600):
    where = drawn_index(rng, value.shape)
    try:
      wanted = value[where]
    except IndexError:
      refused += 1
      with pytest.raises(IndexError, match=r"x is \(300, 4, 3\): "):
        stored[where]
    else:
      found = stored[where]
      assert type(found) is type(wanted), where
      np.testing.assert_array_equal(found, wanted, strict=True, err_msg=f"{where}")
  assert 20 < refused < 200


NUMBERS = (
  np.uint8(3), np.int8(-1), np.uint64(3), np.array([3, 255], np.uint8),
  np.array([-1, 127], np.int8), np.array([-300, 299], np.int16), np.array([0, 299], np.uint64),
)  # fmt: skip


@pytest.mark.parametrize("where", NUMBERS, ids=repr)
def test_an_index_may_be_of_any_integer_dtype(tmp_path, where):
  value = np.arange(300)
  arrays.put(tmp_path / "of", "x", ("step",), value, chunk=(100,))
  np.testing.assert_array_equal(arrays.open_group(tmp_path / "of")["x"][where], value[where])


@pytest.mark.parametrize("where", [4, -5, np.s_[:, 0:2, 5], [0, 9], np.s_[0, 0, 0, 0]], ids=str)
def test_an_index_beyond_a_stored_array_is_no_damage(tmp_path, where):
  arrays.put(tmp_path / "of", "x", ("step", "run", "value"), np.zeros((4, 3, 5), np.float32))
  with pytest.raises(IndexError, match=r"x is \(4, 3, 5\): .*(out of bounds|too many indices)"):
    arrays.open_group(tmp_path / "of")["x"][where]


def test_a_run_opened_by_a_relative_path_stays_itself_in_another_folder(
  folder, tmp_path, monkeypatch
):
  for project in ("one", "two"):
    shutil.copytree(folder, tmp_path / project / "run")
  wanted = store.open_run(folder)
  damaged = tmp_path / "one/run/trace.zarr/x0"
  monkeypatch.chdir(tmp_path / "one")
  run = store.open_run("run")
  assert run.latents is not None and run.x0 is not None
  monkeypatch.chdir(tmp_path / "two")
  shutil.rmtree("run")
  np.testing.assert_array_equal(run.latents[2], wanted.latents[2])
  np.testing.assert_array_equal(run.final_latents, wanted.final_latents)
  run.verify()
  shutil.rmtree(damaged / "c")
  with pytest.raises(ValueError, match=rf"{damaged} can't be read at 2, a chunk is missing"):
    run.x0[2]


def test_only_what_is_asked_for_is_read(tmp_path):
  value = np.arange(12, dtype=np.float32).reshape(4, 3)
  arrays.put(tmp_path / "of", "x", ("step", "run"), value, chunk=(1, 3))
  (tmp_path / "of" / "x" / "c" / "1" / "0").unlink()
  stored = arrays.open_group(tmp_path / "of")["x"]
  np.testing.assert_array_equal(stored[[-1, 0]], value[[3, 0]])
  with pytest.raises(ValueError, match="a chunk is missing or damaged"):
    stored[:2]


@pytest.mark.parametrize("where", [np.s_[::2], np.s_[::-2], np.s_[2::-2], np.s_[-1:0:-2]], ids=str)
def test_a_step_reads_nothing_between(tmp_path, where):
  value = np.arange(21, dtype=np.float32).reshape(7, 3)
  arrays.put(tmp_path / "of", "x", ("step", "run"), value, chunk=(1, 3))
  for row in (1, 3, 5):
    (tmp_path / "of" / "x" / "c" / str(row) / "0").unlink()
  np.testing.assert_array_equal(arrays.open_group(tmp_path / "of")["x"][where], value[where])


@pytest.mark.parametrize(
  ("where", "copies"), [(np.arange(200), 0), (np.arange(200) > 99, 0), (np.arange(200)[::-1], 1)]
)
def test_an_index_array_is_read_without_copies_of_what_it_finds(tmp_path, where, copies):
  """What TensorStore itself reads into is not traced."""
  value = np.ones((200, 5000), np.float32)
  arrays.put(tmp_path / "of", "x", ("step", "value"), value, chunk=(50, 5000))
  stored = arrays.open_group(tmp_path / "of")["x"]
  tracemalloc.start()
  try:
    found = stored[where]
    assert tracemalloc.get_traced_memory()[1] < (copies + 0.3) * found.nbytes
  finally:
    tracemalloc.stop()


def test_a_chunk_holds_one_step_of_as_many_runs_as_fit():
  small = store._chunk(store.LATENT_AXES, (50, 1024, 5, 8, 8, 16), 4)
  assert small == [1, 51, 5, 8, 8, 16]
  assert store._chunk(store.LATENT_AXES, (50, 8, 21, 60, 104, 16), 4) == [1, 1, 21, 60, 104, 16]


def test_a_piece_beyond_the_trace_is_refused(tmp_path):
  with pytest.raises(ValueError, match="ends at step 6 and run 3, the trace has 5 steps"):
    with store.create_trace(tmp_path, steps=5, runs=3) as writer:
      writer.write(trace(steps=2), at_step=4)
  assert not list(tmp_path.iterdir())


# --- the folder as a whole ---


def test_a_full_folder_is_refused_and_redo_replaces_only_what_a_run_wrote(folder, tmp_path):
  out = run_folder.make(tmp_path / "run", seeds=3)
  (out / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"is not empty .*--redo"):
    run_folder.make(out)
  run_folder.make(out, seeds=1, redo=True)
  assert (out / "notes.txt").read_text() == "mine"
  assert len(store.open_run(out).runs) == 2
  assert not (out / "video_5.mp4").exists()


@pytest.mark.parametrize("name", ["figures/fig1.pdf", "report.html", "manifest.json"])
def test_redo_removes_nothing_that_no_run_wrote(tmp_path, name):
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("{}")
  with pytest.raises(ValueError, match="holds nothing that --redo may replace"):
    run_folder.make(tmp_path, seeds=1, redo=True)
  assert path.read_text() == "{}"


@pytest.mark.parametrize("redo", [False, True])
@pytest.mark.parametrize(("names", "kind"), [found[:2] for found in folders.KINDS])
def test_one_kind_of_folder_is_never_made_into_another(tmp_path, names, kind, redo):
  for name in (*names, "manifest.json"):
    (tmp_path / name).write_text("{}")
  said = f"holds an? {kind}, which no {{}} replaces: choose another --out"
  with pytest.raises(ValueError, match=said.format("sweep" if kind == "run" else "run")):
    if kind == "run":
      sweep.begin(tmp_path, {"units": 1, "width": 1}, redo=redo)
    else:
      run_folder.make(tmp_path, seeds=1, redo=redo)
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "manifest.json"])


@pytest.mark.parametrize(
  ("names", "kind", "reading"), [found for found in folders.KINDS if found[1] != "run"]
)
def test_a_folder_of_another_kind_is_named_where_a_run_is_opened(tmp_path, names, kind, reading):
  for name in names:
    (tmp_path / name).write_text("{}")
  with pytest.raises(ValueError, match=f"is an? {kind}, no run: {reading}"):
    store.open_run(tmp_path)


@pytest.mark.parametrize("address", ["gs://bucket/x", Path("s3://bucket/x"), Path("hf://a/b")])
@pytest.mark.parametrize(
  "opens",
  [
    *(store.open_run, sweep.open_sweep, sweep.status, results.open_study, checkpoint.load),
    *(media.read_image, media.read_mp4),
    lambda place: run_folder.make(place, seeds=1),
    lambda place: sweep.begin(place, {"units": 1, "width": 1}),
    lambda place: records.write_json(place, {}),
    lambda place: checkpoint.save(checkpoint.load("mini", parts=()), place),
    lambda place: leaves.LeafWriter(place, {}, plan=""),
  ],
)
def test_an_address_is_no_folder(tmp_path, monkeypatch, opens, address):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"(gs|s3|hf)://.* is an address, wanted the path"):
    opens(address)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["runs/a:b", "a14b:480p", "C:/x", "./gs:", "/mnt/gs://x", "~/x"])
def test_a_path_stays_what_it_is(path):
  assert folders.local(path) == Path(path)


def test_redo_takes_what_a_kill_left_while_files_were_moved(tmp_path):
  (tmp_path / folders.STAGE).mkdir()
  (tmp_path / "runs.json").write_text("[]")
  store.open_run(run_folder.make(tmp_path, seeds=1, redo=True)).verify()


def test_redo_goes_on_where_an_interrupt_came_while_files_were_moved(tmp_path, monkeypatch):
  replace, moved = Path.replace, []

  def interrupted(self, target):
    if self.parent.name == folders.STAGE and not self.name.startswith(folders.PART):
      moved.append(target)
    if len(moved) == 3:
      raise KeyboardInterrupt
    return replace(self, target)

  monkeypatch.setattr(Path, "replace", interrupted)
  with pytest.raises(KeyboardInterrupt):
    run_folder.make(tmp_path / "run", seeds=1)
  monkeypatch.undo()
  shutil.rmtree(tmp_path / "run" / "trace.zarr", ignore_errors=True)
  store.open_run(run_folder.make(tmp_path / "run", seeds=1, redo=True)).verify()


def test_redo_takes_the_trace_of_a_run_that_lost_its_other_files(tmp_path):
  (run_folder.make(tmp_path, seeds=1) / "manifest.json").unlink()
  store.open_run(run_folder.make(tmp_path, seeds=1, redo=True)).verify()


def test_what_tells_whose_a_folder_is_goes_last(tmp_path):
  """A kill between two removals leaves a folder that --redo still knows."""
  there = ["asked.json", "tasks", "zeros", "mine"]
  given = {"what": "evaluation", "folder": tmp_path}
  found = folders.replaceable(there, there[:3], marks=["asked.json"], **given)
  assert found == ["tasks", "zeros", "asked.json"]
  assert folders.replaceable(["mine"], there[:3], marks=["asked.json"], **given) == []


def test_redo_of_a_begun_folder_needs_what_was_asked(tmp_path):
  more = {"owned": ("asked.json", "tasks"), "what": "evaluation", "redo": True}
  todo = tmp_path / "tasks" / "todo.md"
  todo.parent.mkdir()
  todo.write_text("mine")
  with pytest.raises(ValueError, match=r"has tasks and no asked\.json, so it holds no evaluation"):
    records.begin(tmp_path, "asked.json", {}, **more)
  assert todo.read_text() == "mine"
  (tmp_path / "asked.json").write_text("damaged")
  records.begin(tmp_path, "asked.json", {}, **more)
  assert not todo.exists()


@pytest.mark.parametrize("existed", (True, False))
def test_a_run_that_fails_leaves_nothing(tmp_path, existed):
  out = tmp_path / "deep" / "run"
  if existed:
    out.mkdir(parents=True)
  with pytest.raises(KeyboardInterrupt):
    with store.run_folder(out) as stage:
      records.write_json(stage / "runs.json", [])
      raise KeyboardInterrupt
  assert list(tmp_path.rglob("*")) == ([tmp_path / "deep", out] if existed else [])


def test_faults_that_are_not_about_the_folder_stay_as_they_are(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"weights\.bin"):
    with store.run_folder(tmp_path / "run") as stage, store.create_trace(stage, steps=1, runs=1):
      (tmp_path / "weights.bin").read_bytes()
  assert not list(tmp_path.iterdir())


def test_a_failed_redo_keeps_the_old_run(tmp_path):
  out = run_folder.make(tmp_path / "run", seeds=1)
  with pytest.raises(RuntimeError):
    with store.run_folder(out, redo=True):
      raise RuntimeError
  store.open_run(out).verify()


def test_what_a_killed_run_left_is_no_obstacle(tmp_path):
  (tmp_path / folders.STAGE / "trace.zarr").mkdir(parents=True)
  run_folder.make(tmp_path, seeds=1)
  assert not (tmp_path / folders.STAGE).exists()


def test_a_second_command_leaves_the_first_one_its_files(tmp_path):
  out = tmp_path / "run"
  with store.run_folder(out) as folder:
    (folder / "video_000.mp4").write_bytes(b"first")
    for redo in (False, True):
      with pytest.raises(ValueError, match="another command works in"):
        with store.run_folder(out, redo=redo):
          pass
  assert [path.name for path in out.iterdir()] == ["video_000.mp4"]


def test_a_file_of_ones_own_that_is_called_lock_is_content_and_stays(tmp_path):
  mine = tmp_path / folders.LOCK
  mine.write_text("precious")
  assert folders.names_in(tmp_path) == {folders.LOCK}
  with pytest.raises(ValueError, match=r"is not empty \(it has lock\)"):
    records.begin(tmp_path, "asked.json", {}, owned=(), what="evaluation", redo=False)
  with folders.held(tmp_path):
    pass
  assert mine.read_text() == "precious"


def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", flock)
  with pytest.warns(UserWarning, match="start no second command in it"):
    with store.run_folder(tmp_path / "run") as folder:
      (folder / "video_000.mp4").write_bytes(b"first")
  assert (tmp_path / "run" / "video_000.mp4").exists()


def test_too_many_open_files_is_said_of_a_bucket_where_a_folder_is_renamed_alone(tmp_path, flat):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "file").write_text("")
  with pytest.raises(OSError, match="mounted bucket"), folders.disk(tmp_path):
    os.rename(tmp_path / "a", tmp_path / "b")
  with pytest.raises(OSError, match=r"Too many open files\): choose"), folders.disk(tmp_path):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(tmp_path / "a"))


def test_where_folders_are_not_renamed_a_run_is_the_same(tmp_path, folder, flat):
  out = run_folder.make(tmp_path / "run", seeds=1)
  made = run_folder.make(out, redo=True)
  assert records.sums(made) == records.sums(folder)
  store.open_run(made).verify()


@pytest.mark.parametrize("moved", range(4))
def test_a_folder_whose_files_go_one_by_one_is_whole_with_the_last(
  tmp_path, flat, monkeypatch, moved
):
  real, calls = os.replace, []

  def replace(source, target):
    real(source, target)
    calls.append(Path(target).name)
    if len(calls) == moved:
      raise KeyboardInterrupt

  monkeypatch.setattr(os, "replace", replace)
  with pytest.raises(KeyboardInterrupt) if moved else contextlib.nullcontext():
    with folders.beside(tmp_path / "made", last="a.json") as part:
      (part / "deep").mkdir(parents=True)
      for name in ("a.json", "b", "deep/c"):
        (part / name).write_text(name)
  there = sorted(path.name for path in (tmp_path / "made").rglob("*") if path.is_file())
  assert there == sorted(calls) and ("a.json" in there) == (moved in (0, 3))
  assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_that_is_gone_with_its_last_file_as_in_a_bucket_is_no_fault(tmp_path, monkeypatch):
  real = os.rmdir

  def rmdir(path, **more):
    real(path, **more)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

  monkeypatch.setattr(os, "rmdir", rmdir)
  run_folder.make(tmp_path / "run", seeds=1)
  run_folder.make(tmp_path / "run", seeds=2, redo=True)
  run = store.open_run(tmp_path / "run")
  run.verify()
  assert len(run.runs) == 4 and not (tmp_path / "run" / folders.STAGE).exists()


def test_out_that_cannot_be_a_folder(tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(ValueError, match="is a file, wanted a folder"):
    with store.run_folder(file):
      pass
  with pytest.raises(OSError, match=r"could not be written \(Not a directory\): choose another"):
    with store.run_folder(file / "run"):
      pass


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import run_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
out = Path(sys.argv[1])
try:
  if sys.argv[4] == "run":
    run_folder.make(out)
  else:
    from jax_videoreason import folders, store
    store.write_final_latents(out.parent, [0.0] * 1000)
except OSError as error:
  print(error)
"""


@pytest.mark.parametrize(("what", "room"), (("run", 30), ("run", 3000), ("latents", 3000)))
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(tmp_path, what, room):
  """A limit on the size of a file stands for the full disk: 30 bytes stop JSON, 3000 a chunk."""
  assert hasattr(resource, "RLIMIT_FSIZE")
  here = str(Path(__file__).parent)
  command = [sys.executable, "-c", FULL, str(tmp_path / "run"), here, str(room), what]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert "could not be written" in done.stdout, done.stderr
  assert "free some space or choose another --out." in done.stdout
  assert len(done.stdout.strip().splitlines()) == 1
  assert not list(tmp_path.iterdir())


# --- reading what is missing or damaged ---


def test_a_folder_that_is_no_run(tmp_path):
  with pytest.raises(ValueError, match=r"there is no folder .*gone"):
    store.open_run(tmp_path / "gone")
  with pytest.raises(ValueError, match=r"has no manifest\.json, so it is not a finished run"):
    store.open_run(tmp_path)


@pytest.fixture
def copy(folder, tmp_path):
  """A copy of the folder that may be damaged."""
  return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("manifest", ({"format": 2}, {}, []))
def test_a_folder_of_another_format(copy, manifest):
  (copy / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(
    ValueError, match=r"has format (2|None), this version .* of format 1: upgrade"
  ):
    store.open_run(copy)


def test_a_manifest_that_says_nothing_but_its_format_is_damaged(copy):
  (copy / "manifest.json").write_text('{"format": 1}')
  with pytest.raises(ValueError, match=r"manifest\.json is missing or damaged"):
    store.open_run(copy)


def test_no_bit_of_a_manifest_turns_over_unseen(copy):
  path = copy / "manifest.json"
  whole = path.read_bytes()
  manifest = store.open_run(copy).manifest
  for place in range(0, len(whole), 11):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with contextlib.suppress(ValueError):
      found = store.open_run(copy).manifest  # white space, or no checksum by its name
      assert found == manifest or found.keys() != manifest.keys()


@pytest.mark.parametrize("name", ["x0", "frames"])
def test_an_array_that_is_missing_is_not_taken_for_one_that_was_not_kept(copy, name):
  shutil.rmtree(copy / "trace.zarr" / name)
  with pytest.raises(ValueError, match=f"{name} is missing or damaged"):
    store.open_run(copy)


def test_a_first_frame_that_is_missing_is_not_taken_for_none(copy):
  run = store.open_run(copy)
  (copy / "first_0.png").unlink()
  with pytest.raises(ValueError, match=r"first_0\.png is missing or damaged"):
    run.given(0)


@pytest.mark.parametrize("name", ["finite", "x0"])
def test_an_array_of_fewer_steps_than_sigmas_is_damaged_in_a_run_of_before_too(copy, name):
  path = copy / "trace.zarr" / name / "zarr.json"
  described = records.read_json(path)
  del described["attributes"][arrays.SUM]
  records.write_json(path, described)
  store.open_run(copy)
  described["shape"][0] -= 1
  records.write_json(path, described)
  with pytest.raises(ValueError, match=f"trace.zarr/{name} is missing or damaged"):
    store.open_run(copy)


@pytest.mark.parametrize("content", ["null", "[]", "3", "{"])
def test_what_was_asked_may_be_damaged(tmp_path, content):
  (tmp_path / "asked.json").write_text(content)
  with pytest.raises(ValueError, match=r"asked\.json is missing or damaged"):
    records.begin(tmp_path, "asked.json", {}, owned=(), what="evaluation", redo=False)


@pytest.mark.parametrize("name", ("runs.json", "manifest.json", "answers.json"))
def test_truncated_json(copy, name):
  text = (copy / name).read_text()
  (copy / name).write_text(text[: len(text) // 2])
  with pytest.raises(ValueError, match=rf"{name} is missing or damaged: run it again"):
    store.open_run(copy)


def test_an_answer_file_without_a_column(copy):
  record = json.loads((copy / "answers.json").read_text())
  del record["flips"]
  (copy / "answers.json").write_text(json.dumps(record))
  with pytest.raises(ValueError, match=r"answers\.json is missing or damaged"):
    store.open_run(copy)


@pytest.mark.parametrize("name", ["runs.json", "answers.json"])
def test_a_number_that_is_not_what_was_written_is_never_read(copy, name):
  text = (copy / name).read_text()
  (copy / name).write_text(re.sub(r"\d", lambda found: str(9 - int(found[0])), text, count=1))
  with pytest.raises(ValueError, match=rf"{name} is missing or damaged"):
    store.open_run(copy)


@pytest.mark.parametrize("name", ["final_latents.npy", "first_0.png"])
def test_one_bit_of_what_a_run_holds_is_never_read_as_another_value(copy, name):
  whole = bytearray((copy / name).read_bytes())
  whole[len(whole) // 2] ^= 1
  (copy / name).write_bytes(whole)
  run = store.open_run(copy)
  with pytest.raises(ValueError, match=rf"{name} is missing or damaged"):
    _ = run.given(0) if name == "first_0.png" else run.final_latents


def test_stopped_while_a_file_is_written_anew_its_folder_is_still_read(copy, monkeypatch):
  runs, sums = records.read_json(copy / "runs.json"), records.sums(copy)
  real, calls = records.write_json, []

  def stopped(path, value):
    calls.append(path)
    if len(calls) == at:
      raise KeyboardInterrupt
    real(path, value)

  monkeypatch.setattr(records, "write_json", stopped)
  for at in (1, 2, 3, 4):
    calls.clear()
    with contextlib.suppress(KeyboardInterrupt):
      with records.rewriting(copy, "runs.json"):
        records.write_json(copy / "runs.json", [{**run, "prompt": f"{at}"} for run in runs])
    seen = store.open_run(copy).runs[0]["prompt"]
    assert seen == {1: runs[0]["prompt"], 2: runs[0]["prompt"], 3: "3", 4: "4"}[at]
  assert records.sums(copy).keys() == sums.keys()


@pytest.mark.parametrize("name", ("trace.zarr/x0/c/2", "final_latents.npy"))
def test_stopped_while_it_is_decoded_a_run_is_what_it_was(copy, name):
  manifest = records.read_mapping(copy / "manifest.json")
  frames = copy / "trace.zarr" / "frames"
  frames.rename(copy / "later")
  manifest["files"]["trace.zarr"] = records.checksum(copy / "trace.zarr")
  records.write_json(copy / "manifest.json", {**manifest, store.UNDECODED: [0, 1]})
  (copy / "later").rename(frames)
  run = store.open_run(copy)
  run.verify()
  chunk = copy / name
  file = chunk if chunk.is_file() else next(p for p in sorted(chunk.rglob("*")) if p.is_file())
  file.write_bytes(file.read_bytes()[::-1])
  with pytest.raises(ValueError, match=f"{name.split('/')[0]} differs from its checksum"):
    run.verify()


def test_a_damaged_manifest_is_not_sealed_anew(copy):
  path = copy / "manifest.json"
  path.write_text(path.read_text().replace('"shift": 5.0', '"shift": 4.0'))
  with pytest.raises(ValueError, match=r"manifest\.json is missing or damaged"):
    with records.rewriting(copy, "runs.json"):
      pass


def test_truncated_latents(copy):
  path = copy / "final_latents.npy"
  path.write_bytes(path.read_bytes()[:-100])
  run = store.open_run(copy)
  with pytest.raises(ValueError, match=r"final_latents\.npy is missing or damaged"):
    _ = run.final_latents
  with pytest.raises(ValueError, match=r"final_latents\.npy differs from its checksum"):
    run.verify()


@pytest.mark.parametrize("damage", ("truncate", "flip", "remove"))
def test_a_damaged_chunk_is_never_read_as_numbers(copy, damage):
  chunk = next(p for p in sorted((copy / "trace.zarr/x0/c/3").rglob("*")) if p.is_file())
  raw = bytearray(chunk.read_bytes())
  if damage == "remove":
    chunk.unlink()
  else:
    raw[len(raw) // 2] ^= 255
    chunk.write_bytes(bytes(raw if damage == "flip" else raw[: len(raw) // 2]))
  run = store.open_run(copy)
  run.x0[2]
  with pytest.raises(ValueError, match="a chunk is missing or damaged: run it again"):
    run.x0[3]
  with pytest.raises(ValueError, match=r"trace\.zarr differs from its checksum"):
    run.verify()


def test_the_steps_of_an_array_are_those_that_were_written(copy):
  path = copy / "trace.zarr/frames/zarr.json"
  wanted = store.open_run(copy).frames.steps
  path.write_text(path.read_text().replace(f'"steps":[{wanted[0]}', '"steps":[9'))
  with pytest.raises(ValueError, match=r"frames/zarr\.json is missing or damaged"):
    store.open_run(copy)


def test_a_trace_without_sigma(copy):
  shutil.rmtree(copy / "trace.zarr/sigma")
  with pytest.raises(ValueError, match="sigma is missing or damaged"):
    store.open_run(copy)


def test_a_step_that_is_not_there(folder):
  run = store.open_run(folder)
  with pytest.raises(
    IndexError, match=r"x0 is \(6, 4, 2, 4, 4, 4\): index 6 is out of bounds for axis 0 with size 6"
  ):
    run.x0[6]
  np.testing.assert_array_equal(run.x0[-1], run.x0[5])


# --- tables and JSON ---


def test_a_row_per_run_and_step(folder):
  run = store.open_run(folder)
  rows = run.table()
  assert len(rows) == 4 * 6
  last = rows[5]
  assert (last["run"], last["step"], last["task"], last["seed"]) == (0, 5, "maze", 0)
  assert last["answer"] == run.answers.answer[5, 0]
  assert last["right"] == bool(run.answers.right[5, 0])
  without = dataclasses.replace(run.answers, task=(None, *run.answers.task[1:]))
  rows = dataclasses.replace(run, answers=without).table()
  assert [rows[5][name] for name in ("answer", "right", "score")] == [None] * 3
  assert rows[11]["right"] is not None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_revision_of_a_checkout_says_whether_its_files_differ(tmp_path, monkeypatch):
  monkeypatch.setattr(store, "__file__", str(tmp_path / "package/store.py"))
  assert store.revision() is None

  def git(*words):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(tmp_path), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

  git("init")
  assert store.revision() is None  # nothing is committed
  (tmp_path / "a.py").write_text("1")
  git("add", "a.py")
  git("commit", "-m", "a")
  head = git("rev-parse", "HEAD")
  (tmp_path / "b.py").write_text("not tracked")
  assert store.revision() == head
  (tmp_path / "a.py").write_text("2")
  assert store.revision() == f"{head}+"


def test_pandas_is_asked_for_in_one_sentence(folder, monkeypatch):
  monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="to_pandas needs pandas, which is not installed"):
    store.open_run(folder).to_pandas()


def test_to_pandas_is_the_table(folder, monkeypatch):
  """pandas is no dependency, so a stand-in shows what reaches it."""

  class Pandas:
    DataFrame = builtins.list

  monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: object())
  monkeypatch.setattr(tables.importlib, "import_module", lambda name: Pandas)
  run = store.open_run(folder)
  assert run.to_pandas() == run.table()


def test_plain_refuses_what_json_cannot_say():
  assert records.plain({"a": (np.float32(0.5), float("nan")), 2: np.arange(2)}) == {
    "a": [0.5, None],
    "2": [0, 1],
  }
  with pytest.raises(ValueError, match="can't be written as JSON"):
    records.plain(object())


def test_a_run_without_a_prompt_is_refused(tmp_path):
  with pytest.raises(ValueError, match="run 1 has no prompt"):
    store.write_runs(tmp_path, [{"seed": 0, "prompt": ""}, {"seed": 1}])
