"""Case folders: written in the official five files and read back."""

import json

import numpy as np
import pytest

from jax_videoreason import media, tasks
from jax_videoreason.vbvr import layout


@pytest.fixture
def case():
  return tasks.load("pick", size=64).generate("id", 3)


def test_a_case_is_five_files_that_other_tools_can_read(tmp_path, case):
  (folder,) = layout.write_cases(tmp_path, [case])
  assert folder == tmp_path / "pick" / "00003"
  assert sorted(p.name for p in folder.iterdir()) == sorted(layout.FILES)
  assert (media.read_image(folder / "first_frame.png") == case.first_frame).all()
  assert (media.read_image(folder / "final_frame.png") == case.frames[-1]).all()
  assert (folder / "prompt.txt").read_text() == case.prompt + "\n"
  frames, fps = media.read_mp4(folder / "ground_truth.mp4")
  assert fps == 16
  assert np.abs(frames.astype(int) - case.frames).mean() < 6
  task = tasks.load("pick", size=64)
  metadata = json.loads((folder / "metadata.json").read_text())
  assert task.score(frames, metadata).value >= 0.95


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_own_cases_are_read_back_exactly(tmp_path, name):
  task = tasks.load(name, size=32)
  split = "heldout" if task.held_out else "ood"
  written = [task.generate(split, index) for index in (0, 1)]
  layout.write_cases(tmp_path, written)
  read = list(layout.read(tmp_path))
  assert [c.index for c in read] == [0, 1]
  for one, two in zip(read, written, strict=True):
    assert (one.task, one.split, one.prompt) == (two.task, two.split, two.prompt)
    assert one.metadata == two.metadata
    assert (one.frames == two.frames).all()


def test_benchmark_folders_are_read_from_their_files(tmp_path, case):
  for number in ("00001", "00000"):
    folder = tmp_path / "In-Domain_50" / "G-1_any_data-generator" / number
    layout.write_case(folder, case)
    (folder / "metadata.json").unlink()
  first, second = layout.read(tmp_path)
  assert (first.index, second.index) == (0, 1)
  assert (first.split, first.task) == ("In-Domain_50", "G-1_any_data-generator")
  assert first.metadata == {}
  assert first.prompt == case.prompt
  assert first.frames.shape == case.frames.shape


def test_no_bit_of_the_metadata_of_a_case_turns_over_unseen(tmp_path, case):
  (folder,) = layout.write_cases(tmp_path, [case])
  path = folder / "metadata.json"
  whole = path.read_bytes()
  assert layout.read_metadata(path) == case.metadata
  for place in range(0, len(whole), 7):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    try:
      changed = layout.read_metadata(path)
    except ValueError:
      continue
    # a key is another: no case of ours, which `samples.load` refuses, or one without a checksum
    assert changed == case.metadata or changed.keys() != case.metadata.keys()


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"hash": "0" * 64}, "its hash is not that of its problem"),
    ({"answer": "9"}, "its answers are no answers to its problem"),
    ({"answers": ["9"], "answer": "9", "k": 1}, "its answers are no answers to its problem"),
    ({"k": 7}, "its k is 7, wanted 2, the number of its answers"),
    ({"prompt": "Pick another."}, "its prompt is not that of prompt.txt"),
  ],
)
def test_a_case_without_a_checksum_must_fit_its_problem(tmp_path, case, change, said):
  (folder,) = layout.write_cases(tmp_path, [case])
  path = folder / "metadata.json"
  path.write_text(json.dumps(case.metadata))
  assert layout.read_case(folder).metadata == case.metadata
  path.write_text(json.dumps({**case.metadata, **change}))
  with pytest.raises(ValueError) as refused:
    layout.read_case(folder)
  assert f"metadata.json in {folder} is damaged ({said}): export" in str(refused.value)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    *(("size", value) for value in ("x", None, [32])),
    *(("frames", value) for value in ("x", None)),
    *(("problem", value) for value in ({}, [], None, 3)),
    *(("answers", value) for value in (None, 3, [[1]])),
    *((key, ...) for key in ("size", "frames", "split", "index", "prompt", "answers", "k", "hash")),
  ],
)
def test_metadata_of_another_kind_are_one_sentence(tmp_path, case, key, value):
  (folder,) = layout.write_cases(tmp_path, [case])
  changed = {k: v for k, v in {**case.metadata, key: value}.items() if v is not ...}
  (folder / "metadata.json").write_text(json.dumps(changed))
  with pytest.raises(ValueError, match=f"metadata.json in {folder} is damaged"):
    layout.read_case(folder)


def test_a_folder_that_is_not_whole_is_refused(tmp_path, case):
  with pytest.raises(ValueError, match="holds no case"):
    list(layout.read(tmp_path))
  (folder,) = layout.write_cases(tmp_path, [case])
  video = (folder / "ground_truth.mp4").read_bytes()
  (folder / "ground_truth.mp4").unlink()
  with pytest.raises(ValueError, match=r"lacks ground_truth\.mp4"):
    list(layout.read(tmp_path))
  (folder / "ground_truth.mp4").write_bytes(video)
  media.write_png(folder / "first_frame.png", case.frames[-1])
  with pytest.raises(ValueError, match="not the one that its metadata"):
    list(layout.read(tmp_path))
  (folder / "metadata.json").write_text("[1]")
  with pytest.raises(ValueError, match="no JSON object"):
    list(layout.read(tmp_path))
