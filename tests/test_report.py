"""The page shows what the folder holds, stands alone, escapes every text, and stays small."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

import run_folder
from jax_videoreason import media, report, store
from jax_videoreason.arrays import StoredArray
from jax_videoreason.taps import TapSpec

MARKUP = "<script>alert(1)</script> & \"'</style>"


class Page(HTMLParser):
  """Tags and addresses of a page, and whether its tags close in order."""

  VOID = ("meta", "img", "input", "br", "polyline", "link")

  def __init__(self, text):
    super().__init__()
    self.tags, self.addresses, self.open = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    self.addresses += [value for name, value in attrs if name in ("src", "href")]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def all(self, tag, **wanted):
    return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = run_folder.make(tmp_path_factory.mktemp("runs") / "demo", steps=8)
  report.render(out)
  return out


@pytest.fixture(scope="module")
def text(folder):
  return (folder / "report.html").read_text(encoding="utf-8")


def data_of(text):
  found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
  assert found
  return json.loads(found.group(1))


def test_the_page_stands_alone(text):
  page = Page(text)
  assert not page.open
  assert page.addresses
  assert all(a.startswith(("data:", "#")) for a in page.addresses)
  assert all(a.startswith("data:") for a in re.findall(r"url\(([^)]{5})", text))
  assert "http://" not in text and "https://" not in text


def test_every_run_has_a_slider_over_all_steps_a_video_and_its_frames(text):
  page = Page(text)
  sliders = page.all("input", type="range")
  assert len(sliders) == 4
  assert all(s["max"] == "7" and s["aria-label"] for s in sliders)
  assert len(page.all("video")) == 4
  assert all(i["alt"] for i in page.all("img"))
  cells = [a for t, a in page.tags if t == "div" and "--column" in (a.get("style") or "")]
  assert len(cells) == 4 * 17


def test_sheets_hold_the_frames_of_every_step(folder, text, tmp_path):
  uri = re.search(r"\.sheet-2 { background-image: url\(data:image/png;base64,([^)]*)\)", text)
  assert uri
  (tmp_path / "sheet.png").write_bytes(base64.b64decode(uri.group(1)))
  sheet = media.read_image(tmp_path / "sheet.png")
  frames = store.open_run(folder).frames
  assert sheet.shape == (8 * 32, 17 * 32, 3)
  np.testing.assert_array_equal(sheet[5 * 32 : 6 * 32, 3 * 32 : 4 * 32], frames[5, 2, 3])


def test_the_answer_of_every_step_is_on_the_page(folder, text):
  read = store.open_run(folder).answers
  words = data_of(text)["words"]
  for r in range(4):
    for s in range(8):
      answer = read.answer[s, r]
      if answer is None:
        assert words[r][s] == "unreadable"
      else:
        assert words[r][s] == f"{answer}, {'right' if read.right[s, r] else 'wrong'}"
  right = int(read.right[-1].sum())
  assert f"{right} of 4 runs end" in text
  settled = read.commitment[0]
  assert f"settled at step {settled} (sigma {read.sigma[settled]:.2f})" in text


@pytest.mark.parametrize(
  ("readable", "said"),
  [
    ([1, 1, 0, 0], "first right at step 0, unreadable from step 2 on"),
    ([0, 0, 0, 0], "readable at no step"),
    ([0, 1, 1, 1], "first right at step 1, never changed"),
  ],
)
def test_an_answer_that_is_lost_is_not_one_that_never_changed(tmp_path, readable, said):
  cases = (("maze", 0),)
  out = run_folder.make(tmp_path / "lost", cases=cases, seeds=1, steps=4, readable=readable)
  text = " ".join(report.render(out).read_text(encoding="utf-8").split())
  assert said in text
  lost = "1 of the final answers cannot be read, 1 of them after one that could."
  assert (lost in text) == (readable == [1, 1, 0, 0])


def test_film_strips_and_figures_are_drawn(folder):
  run = store.open_run(folder)
  assert all(run.strip(r) for r in range(4))
  assert {p.name for p in (folder / "figures").iterdir()} == {"change.png", "answers.png"}
  run.verify()


def test_a_run_of_one_step_has_no_change_to_draw(tmp_path):
  out = run_folder.make(tmp_path / "one", seeds=1, steps=1)
  assert report.render(out).exists()
  assert {p.name for p in (out / "figures").iterdir()} == {"answers.png"}


def test_drawing_again_gives_the_same_page(folder, text):
  (folder / "report.html").unlink()
  assert report.render(folder).read_text(encoding="utf-8") == text


def test_markup_in_a_prompt_is_text(tmp_path):
  out = run_folder.make(tmp_path / MARKUP.replace("/", ""), seeds=1, steps=3, prompt=MARKUP)
  text = report.render(out).read_text(encoding="utf-8")
  page = Page(text)
  assert len(page.all("script")) == 2
  assert "alert(1)</script>" not in text
  assert "&lt;script&gt;alert(1)" in text


def test_runs_of_no_task_have_pictures_but_no_answers(tmp_path):
  out = run_folder.make(tmp_path / "own", seeds=1, steps=3, known=False, prompt="")
  text = report.render(out).read_text(encoding="utf-8")
  page = Page(text)
  assert "right answer" not in text and "empty prompt" in text
  assert len(page.all("input", type="range")) == 2


def test_a_run_that_is_not_finite_is_named_at_the_top(tmp_path):
  out = run_folder.make(tmp_path / "nan", seeds=2, steps=4, broken=(2, 1))
  text = report.render(out).read_text(encoding="utf-8")
  alert = text.index("Not a number.")
  assert "finite at step 2" in text[alert : alert + 300] and "seed 1" in text[alert : alert + 300]
  assert alert < text.index("<article")
  assert text.count("Not a number.") == 1


def test_a_trace_without_pictures_or_x0_still_makes_a_page(tmp_path):
  whole = run_folder.piece(np.random.default_rng(0), run_folder.sigmas(3), 1)
  with store.run_folder(tmp_path / "bare") as stage:
    with store.create_trace(stage, steps=3, runs=1) as writer:
      writer.write(store.Trace(sigma=whole.sigma, finite=whole.finite, taps={}))
    store.write_runs(stage, [{"seed": 0, "prompt": "a ball rolls"}])
    store.write_manifest(stage, config={}, command=["videoreason"], device="cpu")
    text = report.render(stage).read_text(encoding="utf-8")
  assert not Page(text).open
  assert "a ball rolls" in text and 'folder <b class="word">bare</b>' in text


def test_steps_that_were_not_decoded_show_the_one_before():
  assert report.rows_at([0, 3, 6], 8).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
  assert report.rows_at([2, 4], 5).tolist() == [0, 0, 0, 0, 1]


def test_a_page_says_which_steps_have_pictures(folder, text, tmp_path):
  """A picture is not taken for that of a step between."""
  assert data_of(text)["shown"] == list(range(8)) and "Pictures are there of" not in text
  copy = shutil.copytree(folder, tmp_path / "some")
  frames = store.open_run(folder).frames[:][[2, 5, 7]]
  shutil.rmtree(copy / "trace.zarr" / "frames")
  writer = store.TraceWriter(path=copy / "trace.zarr", steps=8, runs=4, taps=TapSpec())
  for row, one in enumerate(frames):
    writer.write_frames(one, at_row=row, steps=[2, 5, 7])
  np.testing.assert_array_equal(store.open_run(copy).frames[:], frames)
  text = report.render(copy).read_text(encoding="utf-8")
  assert data_of(text)["shown"] == [2, 5, 7]
  assert data_of(text)["row"] == [0, 0, 0, 0, 0, 1, 1, 2]
  assert "Pictures are there of the steps 2, 5, 7;" in " ".join(text.split())
  assert "The guesses were turned into pixels by the VAE." in " ".join(text.split())


def test_a_large_video_is_drawn_one_step_in_memory(folder, monkeypatch):
  """Eight steps of 81 frames of 480 x 832 pixels would be 0.8 GB."""
  inner, read = StoredArray.__getitem__, []

  def watched(stored, where):
    found = inner(stored, where)
    if stored.path.name == "frames":
      read.append(found.shape)
    return found

  monkeypatch.setattr(StoredArray, "__getitem__", watched)
  report.render(folder)
  assert set(read) == {(17, 32, 32, 3)}


def test_frames_are_left_out_before_the_page_grows_too_large(folder, monkeypatch):
  run = store.open_run(folder)
  whole, columns = report.sprite_sheets(run, range(4))
  assert columns == list(range(17))
  size = sum(len(uri) for uri in whole.values())
  monkeypatch.setattr(report, "SHEET_BYTES", size * 3 // 8)
  fewer, columns = report.sprite_sheets(run, range(4))
  assert columns in (list(range(0, 17, 2)), [0, 4, 8, 12, 16]) and len(fewer) == 4


@pytest.mark.slow
def test_only_the_first_runs_are_shown_in_full(folder, monkeypatch):
  monkeypatch.setattr(report, "MOST_RUNS", 3)
  text = report.render(folder).read_text(encoding="utf-8")
  assert len(Page(text).all("input", type="range")) == 3
  assert "The first 3 runs are shown in full" in text
  monkeypatch.undo()
  report.render(folder)


def test_curves_of_all_runs_are_drawn_on_one_scale_which_is_said(folder, text):
  """Next to no doubt is drawn as next to none."""
  run = store.open_run(folder)
  assert run.answers is not None
  change = report.changes(run.x0)
  tops = report.boxes(run, change)
  assert tops["bits"] == max(1.0, np.nanmax(run.answers.entropy))
  assert change.max() <= tops["change"] == report.upward(float(change.max()))
  words = " ".join(text.split())
  for r in range(4):
    said = f"largest {change[:, r].max():.2g} of the size of the last guess, at step "
    said += f"{change[:, r].argmax() + 1}; box 0 to {tops['change']:g}"
    assert f"change of the guess since the step before ({said})" in words
    bits = run.answers.entropy[:, r]
    assert (
      f"(entropy over answers, at most {bits.max():.2f} bits, at step {bits.argmax()}; box 0"
      in words
    )
  for values in ([0.1, 0.02], [0.2, 0.04]):
    found = report.curve(np.array([np.nan, *values]), 3, 0.2)
    assert found is not None
    (line,) = found["lines"]
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert heights == [97 - 92 * value / 0.2 for value in values]
  assert report.curve(np.full(3, np.nan), 3, 1.0) is None
  assert [report.upward(value) for value in (0.0, 0.19, 0.2, 1.3)] == [1.0, 0.2, 0.2, 2.0]
  for power in range(-6, 4):
    digits = [float(f"{digit}e{power}") for digit in range(1, 11)]
    assert [report.upward(value) for value in digits] == digits
    assert [report.upward(0.97 * value) for value in digits[1:]] == digits[1:]
