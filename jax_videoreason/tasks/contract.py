"""What the author of a task promises, held against some of its cases."""

import dataclasses
import json
from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from jax_videoreason.tasks.base import ENDING, SHORTEST, Answer, Case, Score, Task, Unseen
from jax_videoreason.tasks.draw import VISIBLE, blended

STILL = 0.1  # most that a clip may score in which nothing moves
WRONG = 0.6  # most that one may score that gives a wrong answer
SOME = 4  # wrong answers of a case that are looked at
BLENDS = ((0.1, False), (0.5, True))  # shares of an answer, and whether it is visible
METHODS = {"preservation": "kept", "final": "final", "process": "process"}


def check(task: Task, cases: int = 8) -> None:
  """Holds a task to what an evaluation rests on, over the first cases of every split.

  A case is the same each time it is drawn, also from its JSON, and asks the same in a clip of any
  length; no question is in two splits.
  Every right answer scores 1, strictly; every answer is read as the one that the clip gives, from
  its last ENDING frames alone too, unless these raise `Unseen`; a wrong one scores at most `WRONG`,
  and standing still at most `STILL`, with no answer. `candidates` shows what is drawn.

  ValueError: the first promise that is broken, where, and which method to mend.
  """
  asked: dict[tuple[bytes, str], str] = {}
  for split in task.splits():
    for index in range(cases):
      case = task.generate(split, index)
      _check_json(task, case)
      _check_options(task, case)
      _check_drawn_again(task, case)
      wrong = task.wrong_answers(case.metadata)
      some = np.random.default_rng(index).permutation(len(wrong))[:SOME]
      answers = [*case.metadata["answers"], *(wrong[number] for number in some)]
      clips = {answer: task.render(case.metadata, answer) for answer in answers}
      for answer, clip in clips.items():
        _check_first_frame(case, answer, clip)
      for answer, clip in clips.items():
        _check_read(task, case, answer, clip)
        _check_score(task, case, answer, clip)
      _check_still(task, case)
      _check_candidates(task, case)
      for text in task.templates(case.metadata["problem"]):
        before = asked.setdefault((case.first_frame.tobytes(), text), split)
        if before != split:
          _broken(
            case,
            f"the split {before} has its picture and prompt too, wanted no question in two splits",
            "canonical, which must be equal for problems that look alike",
          )


def _broken(case: Case, said: str, mend: str) -> NoReturn:
  raise ValueError(f"{case.task}, case {case.index} of {case.split}: {said}: mend {mend}.")


def _check_json(task: Task, case: Case) -> None:
  try:
    stored = json.loads(json.dumps(case.metadata))
  except TypeError as error:
    _broken(
      case,
      f"it can't be kept as JSON ({error}), wanted numbers and texts of Python",
      "draw_problem or right_answers, as by int(x) for a number of numpy",
    )
  for key, value in case.metadata.items():
    if stored[key] != value:
      _broken(
        case,
        f"its {key} {value!r} is {stored[key]!r} when read from JSON, wanted the same",
        "draw_problem: lists in place of tuples, texts as keys",
      )


def _check_options(task: Task, case: Case) -> None:
  options = task.options(case.metadata["problem"])
  for option in options:
    if type(option) not in (str, int):
      _broken(
        case, f"the option {option!r} is a {type(option).__name__}, wanted str or int", "options"
      )
    if options.count(option) > 1:
      _broken(case, f"the option {option!r} is there twice, wanted each once", "options")


def _check_drawn_again(task: Task, case: Case) -> None:
  again = dataclasses.replace(task).generate(case.split, case.index)
  if again.metadata != case.metadata:
    _broken(
      case,
      "drawn again it is another one, wanted all chance from the rng that is given",
      "draw_problem, right_answers and templates",
    )
  short = dataclasses.replace(task, frames=SHORTEST).generate(case.split, case.index)
  if short.prompt != case.prompt or (short.first_frame != case.first_frame).any():
    _broken(
      case,
      f"it has another prompt or another first frame in a clip of {SHORTEST} frames, wanted the "
      "same in all lengths",
      "draw_problem or draw_answer",
    )
  metadata = json.loads(json.dumps(case.metadata))
  if (task.case(metadata).frames != case.frames).any():
    _broken(case, "its clip is another one when drawn again, wanted no chance", "draw_answer")
  if task.problem_hash(metadata["problem"]) != metadata["hash"]:
    _broken(case, "its hash is another one when taken again, wanted no chance", "canonical")


def _check_first_frame(case: Case, answer: Answer, clip: np.ndarray) -> None:
  if clip.shape != case.frames.shape or (clip[0] != case.first_frame).any():
    _broken(
      case,
      f"the clip of {answer!r} begins with another picture than that of "
      f"{case.metadata['answer']!r}, wanted the problem alone on the first frame",
      "draw_answer",
    )


def _check_read(task: Task, case: Case, answer: Answer, clip: np.ndarray) -> None:
  read = task.parse(clip, case.metadata)
  if read != answer:
    _broken(case, f"the clip of {answer!r} is read as {read!r}, wanted {answer!r}", "read")
  try:
    read = task.parse(clip[-ENDING:], case.metadata)
  except Unseen:
    return
  if read != answer:
    _broken(
      case,
      f"the last {ENDING} frames of the clip of {answer!r} alone are read as {read!r}, wanted "
      f"{answer!r}, or tasks.Unseen raised",
      "read",
    )


def _check_score(task: Task, case: Case, answer: Answer, clip: np.ndarray) -> None:
  score = task.score(clip, case.metadata)
  if answer not in case.metadata["answers"]:
    if score.value > WRONG or score.strict:
      _broken(
        case,
        f"the clip of the wrong answer {answer!r} scores {_told(score)}, wanted at most {WRONG} "
        "and not strict",
        "final or process",
      )
  elif score.value != 1 or not score.strict:
    methods = [method for part, method in METHODS.items() if getattr(score, part) < 1]
    _broken(
      case,
      f"the clip of the right answer {answer!r} scores {_told(score)}, wanted 1",
      f"{' and '.join(methods)}, or draw_answer",
    )


def _check_still(task: Task, case: Case) -> None:
  clip = np.repeat(case.first_frame[None], task.frames, axis=0)
  score, read = task.judge(clip, case.metadata)
  if score.value > STILL:
    _broken(
      case,
      f"the first frame standing still scores {_told(score)}, wanted at most {STILL}",
      "final or process",
    )
  if read is not None:
    _broken(case, f"the first frame standing still is read as {read!r}, wanted None", "read")
  shown = _visible(task.candidates(clip, case.metadata))
  if shown:
    _broken(
      case,
      f"the first frame standing still shows the candidate {shown[0]!r}, wanted each below the "
      f"occupancy of a blend of {VISIBLE}",
      "soft",
    )


def _check_candidates(task: Task, case: Case) -> None:
  seen = task.candidates(case.frames, case.metadata)
  options = task.options(case.metadata["problem"])
  if list(seen) != options:
    _broken(case, f"candidates are {list(seen)}, wanted the options {options} in order", "soft")
  wrong = [v for v in seen.values() if not 0 <= v <= 1]
  if wrong:
    _broken(case, f"a candidate is seen by {wrong[0]!r}, wanted 0 to 1", "soft")
  shown, answer = _visible(seen), case.metadata["answer"]
  if shown != [answer]:
    _broken(
      case,
      f"the clip of {answer!r} shows the candidates {shown}, wanted [{answer!r}] alone to "
      f"have the occupancy of a blend of {VISIBLE} or more",
      "soft",
    )
  still = case.first_frame.astype(float)
  for share, wanted in BLENDS:
    blend = np.round(still + share * (case.frames - still)).astype(np.uint8)
    shown = case.metadata["answer"] in _visible(task.candidates(blend, case.metadata))
    if shown != wanted:
      _broken(
        case,
        f"a blend of {share} of the answer with the first frame "
        f"{'shows' if shown else 'does not show'} it, wanted {'it' if wanted else 'none'} on the "
        "scale of draw.occupancy",
        "soft",
      )


def _visible(seen: Mapping[Answer, float]) -> list[Answer]:
  return [answer for answer, value in seen.items() if blended(np.array(value)) >= VISIBLE]


def _told(score: Score) -> str:
  parts = ", ".join(f"{part} {getattr(score, part):.2f}" for part in METHODS)
  return f"{score.value:.2f} ({parts})"
