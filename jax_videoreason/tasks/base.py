"""What a task is: cases drawn from (task, split, index), and their scores.

A task subclasses `Task` and writes the methods NEEDED; also `final` where a part of an answer is
worth something, `parts` where it is drawn part by part, and `canonical` where two problem dicts can
mean one problem. `read` is given whole clips or their last ENDING frames alone, and raises `Unseen`
where these do not say the answer. `Task` itself makes the cases, keeps the splits apart and puts
the score together. A problem is a dict that JSON can hold; an answer is a str or an int, so that it
is hashable and survives metadata.json unchanged. `tasks.check` holds a task to all that.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jax_videoreason.records import canonical_json, digest
from jax_videoreason.tasks import draw

SPLITS = {"train": 0, "id": 1, "ood": 2, "heldout": 3}
BUCKETS = 8  # a problem's hash, modulo 8, says which split may have it
RESERVED = {"id": 0, "ood": 1}  # `train` has the other six
SCORING = 3  # raised where a clip gets another score, answer or candidates than before
NEEDED = (  # what a task writes, at least
  "draw_problem",
  "right_answers",
  "options",
  "templates",
  "draw_answer",
  "kept",
  "read",
  "process",
  "soft",
)
MOST_ANSWERS = 4
TRIES = 20_000
SHORTEST = 13  # frames that a clip has at least
ENDING = 2  # frames that show the answer
FIRST_MARK = 4  # frame on which a mark begins to grow: looking comes before acting
WHOLE, ABSENT = 0.85, 0.15  # drawn shares from which a mark is there, and up to which it isn't
GREW = 0.02  # least share by which a mark grows on a frame; less in clips of more than 25 frames
CLEAR = 0.65  # least of a mark on its way that is either drawn or as before

Answer = str | int
Problem = dict[str, Any]
Metadata = dict[str, Any]


class Unseen(ValueError):
  """The ending of a clip does not say its answer; all frames do."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
  """A problem with the video that solves it.

  first_frame: uint8 (height width 3). frames: uint8 (T height width 3), frames[0] == first_frame.
  metadata: JSON; task, split, index, size, frames, prompt, problem, answers (all right ones), k,
  answer (the one the frames show), hash.
  """

  task: str
  split: str
  index: int
  first_frame: np.ndarray
  prompt: str
  frames: np.ndarray
  metadata: Metadata


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """value = preservation * (final + process) / 2; all in 0..1.

  strict: preservation > .9, final = 1 and process > .9.

  In tictactoe, select_largest and pick `process` asks how the mark is drawn and not whether the
  answer is right: a flawless wrong move earns .5. In the other tasks the way is compared with that
  of a right answer, of which a wrong one may share a part, and in rotate all: a turn too far.
  """

  value: float
  preservation: float
  final: float
  process: float
  strict: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
  """A group of regions that must stay as they are in the problem.

  allowed: bool (N, 10): the colours each region may show; the last column is "undecided". A
  region where an answer may be drawn allows its own colour, the mark, and the mixture on the way.
  other: None = a region shows the colour that most of it has; a number = it is kept while pixels
  that are not allowed cover no more than this share of it.
  """

  regions: draw.Regions
  allowed: np.ndarray
  other: float | None = None

  def good(self, labels: np.ndarray) -> np.ndarray:
    """Which regions are kept: labels int8 (T height width) -> bool (T, N)."""
    if self.other is not None:
      return draw.shares(labels, self.regions, ~self.allowed) <= self.other
    seen = draw.majority(labels, self.regions)
    return self.allowed[np.arange(len(self.regions))[None], seen]


@dataclasses.dataclass(frozen=True, eq=False)
class NoObject:
  """Kept while no object (draw.has_object) stands where its colour does not belong. Pixels here and
  there, and thin edges, may have any colour.

  wrong: bool (10, height, width): where each colour does not belong; "undecided" does everywhere.
  pixels: the area of the smallest object that counts.
  """

  wrong: np.ndarray
  pixels: float

  def good(self, labels: np.ndarray) -> np.ndarray:
    """Which frames are kept: labels int8 (T height width) -> bool (T, 1)."""
    place = np.arange(labels[0].size).reshape(labels[0].shape)
    # UNDECIDED is -1: its places are counted from the end, where the last map lies.
    strange = self.wrong.reshape(-1)[labels.astype(int) * place.size + place]
    good = np.ones((len(labels), 1), bool)
    for t in np.flatnonzero(strange.sum(axis=(1, 2)) >= draw.SHARE * self.pixels):
      each = (strange[t] & (labels[t] == colour) for colour in range(len(draw.NAMES)))
      good[t] = not any(draw.has_object(hits, self.pixels) for hits in each)
    return good


def kept(
  regions: draw.Regions, allowed: Sequence[Sequence[int]], other: float | None = None
) -> Kept:
  """Kept from one list of colour indices per region; draw.UNDECIDED allows a mixture."""
  table = np.zeros((len(regions), len(draw.NAMES) + 1), bool)
  for row, colours in zip(table, allowed, strict=True):
    row[list(colours)] = True  # UNDECIDED is -1, the last column
  return Kept(regions, table, other)


def never(regions: draw.Regions, wrong: Sequence[int]) -> Kept:
  """Kept from the one colour that each region must not have; a blurred edge may show any other."""
  table = np.ones((len(regions), len(draw.NAMES) + 1), bool)
  table[np.arange(len(regions)), list(wrong)] = False
  return Kept(regions, table)


def no_object(
  where: np.ndarray, colours: Mapping[int, np.ndarray | bool], pixels: float
) -> NoObject:
  """NoObject in the mask `where`. colours: the masks in which some belong, True = everywhere."""
  wrong = np.repeat(where[None], len(draw.NAMES) + 1, axis=0)
  for colour, home in {**colours, draw.UNDECIDED: True}.items():
    wrong[colour] &= ~np.asarray(home)
  return NoObject(wrong, pixels)


def preservation(labels: np.ndarray, groups: Sequence[Kept | NoObject]) -> float:
  """Mean over frames of clip((p - .8) / .2), p = share of regions kept, in the worst group."""
  worst = np.ones(len(labels))
  for group in groups:
    worst = np.minimum(worst, group.good(labels).mean(-1))
  return float(np.clip((worst - 0.8) / 0.2, 0, 1).mean().round(12))


def growth(amount: np.ndarray, steps: int, counts: np.ndarray | None = None) -> float:
  """Share of `steps` gradual increases in a curve (T,) of 0..1, the share of a mark that is drawn.

  What counts are frames on which the mark is partly drawn and larger than ever before, so that a
  jump (a cut, a cross-fade) or a shrinking mark is worth 0; so is one that is there before frame
  FIRST_MARK. counts: bool (T,), the frames that may count; None = all.
  """
  if amount[:FIRST_MARK].max() > 0.1:
    return 0.0
  best = np.maximum.accumulate(amount)
  grew = amount[1:] > best[:-1] + min(GREW, 0.5 / len(amount))
  partly = (amount > 0.08) & (amount < 0.92) & (True if counts is None else counts)
  return float(min(1.0, (grew & partly[1:]).sum() / steps))


def unmixed(drawn: np.ndarray, left: np.ndarray) -> np.ndarray:
  """Where one part of a mark is drawn beside another that is left as before, from their shares. One
  that fades in never is: it is a mixture, which noise and blur may make uneven."""
  return (np.minimum(drawn, left) > 0.08) & (drawn + left >= CLEAR)


def lone_growth(
  amounts: np.ndarray, clear: np.ndarray, steps: int, most: np.ndarray | None = None
) -> float:
  """`growth` of the mark that ends largest, times the share of frames that show no other one; 0 for
  a mark that is never `unmixed`.

  amounts: (T, N), the drawn share of each of N possible marks; clear: (T, N), where unmixed. most:
  (T, N), of a mark in several parts the share of its most drawn one, by which it is seen where it
  must not be; None = `amounts`.
  """
  target = int(amounts[-1].argmax())
  others = np.delete(amounts if most is None else most, target, axis=1)
  alone = (others <= ABSENT).all(axis=1).mean()
  return growth(amounts[:, target], steps) * float(alone) * bool(clear[:, target].any())


def only_mark(amounts: np.ndarray) -> int | None:
  """The one mark that is whole on both last frames while all others are absent; else None.

  amounts: (T, N), the drawn share of each of N possible marks.
  """
  whole, absent = at_the_end(amounts)
  if whole.sum() != 1 or not (whole | absent).all():
    return None
  return int(whole.argmax())


def at_the_end(amounts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Which marks (T, N) are whole on both last frames, and which are absent: bool (N,) each."""
  return amounts[-2:].min(axis=0) >= WHOLE, amounts[-2:].max(axis=0) <= ABSENT


@dataclasses.dataclass(frozen=True)
class Task:
  """One kind of problem at one size.

  size: height and width in pixels. frames: T, 1 + 4k; frame 0 is the problem, the last two show
  the answer.
  """

  size: int = 64
  frames: int = 17

  name: ClassVar[str] = ""
  number: ClassVar[int] = 0  # task_id of the random numbers: never change it
  held_out: ClassVar[bool] = False
  ambiguous: ClassVar[bool] = True  # whether a variant with several right answers exists
  smallest: ClassVar[int] = 32

  def __post_init__(self):
    if self.frames < SHORTEST or self.frames % 4 != 1:
      raise ValueError(f"frames={self.frames}, wanted 1 + 4k and at least {SHORTEST}: 17 is usual.")
    if not self.smallest <= self.size <= 512:
      raise ValueError(
        f"size={self.size} pixels for {self.name}, wanted {self.smallest} to 512: 32 and "
        "64 are usual."
      )

  # --- what a task writes ---

  def draw_problem(self, rng: np.random.Generator, split: str, ambiguous: bool) -> Problem | None:
    """One problem in symbols; None when the draw is of no use and another must be made.

    `ood` draws from ranges (sizes, colours, their pairings) that the other splits lack.
    """
    raise NotImplementedError

  def right_answers(self, problem: Problem) -> list[Answer]:
    """All right answers, in a fixed order."""
    raise NotImplementedError

  def options(self, problem: Problem) -> list[Answer]:
    """Every answer a clip could give, right or wrong, in a fixed order."""
    raise NotImplementedError

  def templates(self, problem: Problem) -> Sequence[str]:
    """The prompt in several wordings; all information that the first frame does not show."""
    raise NotImplementedError

  def draw_answer(self, problem: Problem, answer: Answer) -> np.ndarray:
    """The clip that gives `answer`, as palette maps int8 (T height width)."""
    raise NotImplementedError

  def kept(self, problem: Problem) -> Sequence[Kept | NoObject]:
    """What must not change, in groups; the worst group counts."""
    raise NotImplementedError

  def read(self, labels: np.ndarray, problem: Problem) -> Answer | None:
    """The answer the clip gives at its end: labels int8 (T height width). None = unreadable.

    Must do with the last ENDING frames alone, or raise `Unseen`.
    """
    raise NotImplementedError

  def final(self, labels: np.ndarray, metadata: Metadata) -> float:
    """Correctness of the final state, 0..1: by default, 1 for a right answer."""
    return float(self.read(labels, metadata["problem"]) in metadata["answers"])

  def parts(self, labels: np.ndarray, problem: Problem) -> frozenset[Any] | None:
    """The parts of an answer, right or wrong, that the clip ends with, such as the cells of a
    trail. None = unreadable, as where one is half there; or, by default, an answer has no parts.
    """
    return None

  def process(self, labels: np.ndarray, metadata: Metadata) -> float:
    """Validity of the way there, 0..1: legal steps / required steps."""
    raise NotImplementedError

  def soft(self, frames: np.ndarray, problem: Problem) -> dict[Answer, float]:
    """Occupancy of every option at the end of the clip: frames uint8 (T height width 3)."""
    raise NotImplementedError

  def canonical(self, problem: Problem) -> Any:
    """JSON that is equal for problems that are the same to a solver."""
    return problem

  # --- what every task has ---

  def generate(self, split: str, index: int, ambiguous: bool | None = None) -> Case:
    """Case `index` of a split, the same on every machine.

    ambiguous: several right answers; None = every odd index, where the task has such a variant.
    """
    self.check_split(split, index)
    if ambiguous is None:
      ambiguous = self.ambiguous and index % 2 == 1
    if ambiguous and not self.ambiguous:
      raise ValueError(f"{self.name} has no ambiguous variant: use ambiguous=False or None.")
    rng = np.random.default_rng([self.number, SPLITS[split], index])
    problem, answers, key = self.accept(rng, split, ambiguous)
    answer = answers[int(rng.integers(len(answers)))]
    texts = self.templates(problem)
    prompt = texts[int(rng.integers(len(texts)))]
    metadata = {
      "task": self.name,
      "split": split,
      "index": index,
      "size": self.size,
      "frames": self.frames,
      "prompt": prompt,
      "problem": problem,
      "answers": answers,
      "k": len(answers),
      "answer": answer,
      "hash": key,
    }
    return self.case(metadata)

  def case(self, metadata: Metadata) -> Case:
    """The case that `metadata` describes, drawn again."""
    frames = self.render(metadata, metadata["answer"])
    return Case(
      task=self.name,
      split=metadata["split"],
      index=metadata["index"],
      first_frame=frames[0],
      prompt=metadata["prompt"],
      frames=frames,
      metadata=metadata,
    )

  def render(self, metadata: Metadata, answer: Answer) -> np.ndarray:
    """The clip that gives `answer`, right or wrong: uint8 (T height width 3)."""
    self.check_metadata(metadata)
    if answer not in self.options(metadata["problem"]):
      raise ValueError(
        f"{answer!r} is no answer to this {self.name} case: take one of "
        "options(metadata['problem'])."
      )
    return draw.paint(self.draw_answer(metadata["problem"], answer))

  def wrong_answers(self, metadata: Metadata) -> list[Answer]:
    """The options that are not right."""
    right = set(metadata["answers"])
    return [a for a in self.options(metadata["problem"]) if a not in right]

  def parse(self, frames: np.ndarray, metadata: Metadata) -> Answer | None:
    """The answer a clip gives, right or wrong; None = unreadable. Equals metadata["answer"] on
    the truth.

    frames: uint8 (T height width 3), or of a clip its last ENDING frames alone.

    Raises:
      Unseen: only the ending is given and the answer lies on the way there.
      ValueError: other frames.
    """
    ends = np.shape(frames)[:1] == (ENDING,)
    self.check_frames(frames, metadata, ENDING if ends else None)
    return self.read(draw.label(frames), metadata["problem"])

  def judge(self, frames: np.ndarray, metadata: Metadata) -> tuple[Score, Answer | None]:
    """`score` and `parse` of a whole clip, in less time than the two take."""
    self.check_frames(frames, metadata)
    labels = draw.label(frames)
    return self.earned(labels, metadata), self.read(labels, metadata["problem"])

  def candidates(self, frames: np.ndarray, metadata: Metadata) -> dict[Answer, float]:
    """The soft reading: occupancy in 0..1 of every option on the scale of `draw.occupancy`, from
    which `draw.blended` takes back its share of a blend."""
    self.check_frames(frames, metadata)
    return self.soft(frames, metadata["problem"])

  def score(self, frames: np.ndarray, metadata: Metadata) -> Score:
    """Preservation * (final + process) / 2, against the symbols in `metadata` alone."""
    self.check_frames(frames, metadata)
    return self.earned(draw.label(frames), metadata)

  def earned(self, labels: np.ndarray, metadata: Metadata) -> Score:
    """The score of labels int8 (T height width)."""
    gate = preservation(labels, _kept(self, canonical_json(metadata["problem"])))
    final = float(self.final(labels, metadata))
    process = float(self.process(labels, metadata))
    return Score(
      value=gate * (0.5 * final + 0.5 * process),
      preservation=gate,
      final=final,
      process=process,
      strict=gate > 0.9 and final == 1 and process > 0.9,
    )

  def problem_hash(self, problem: Problem) -> str:
    """Equal for equal problems; decides between `train`, `id` and `ood`."""
    try:
      return digest([self.name, self.canonical(problem)])
    except TypeError as error:
      raise ValueError(
        f"a problem of {self.name} can't be kept as JSON ({error}): write numbers, texts, lists "
        "and dicts, as int(x) for a number of numpy."
      ) from error

  def accept(
    self, rng: np.random.Generator, split: str, ambiguous: bool
  ) -> tuple[Problem, list[Answer], str]:
    """Draws until a problem has the wanted number of right answers and belongs to the split."""
    for _ in range(TRIES):
      problem = self.draw_problem(rng, split, ambiguous)
      if problem is None:
        continue
      answers = self.right_answers(problem)
      if not (2 <= len(answers) <= MOST_ANSWERS if ambiguous else len(answers) == 1):
        continue
      key = self.problem_hash(problem)
      bucket = int(key, 16) % BUCKETS
      if split == "train" and bucket in RESERVED.values():
        continue
      if split in RESERVED and bucket != RESERVED[split]:
        continue
      return problem, answers, key
    raise ValueError(
      f"no {'ambiguous ' if ambiguous else ''}{self.name} problem of split {split!r} at "
      f"size={self.size} in {TRIES} draws: the rules of draw_problem are too strict"
      f"{', or the class lacks ambiguous = False' if ambiguous else ''}."
    )

  @classmethod
  def splits(cls) -> tuple[str, ...]:
    """The splits it has."""
    return ("heldout",) if cls.held_out else ("train", "id", "ood")

  @classmethod
  def check_split(cls, split: str, index: int) -> None:
    own = cls.splits()
    if split not in own:
      raise ValueError(f"{cls.name} has no split {split!r}; it has: {', '.join(own)}.")
    if index < 0:
      raise ValueError(f"index={index}, wanted 0 or more.")

  def check_metadata(self, metadata: Metadata) -> None:
    came = (metadata["task"], metadata["size"], metadata["frames"])
    if came != (self.name, self.size, self.frames):
      raise ValueError(
        f"the case is {came[0]} at size={came[1]}, frames={came[2]}, the task is "
        f"{self.name} at size={self.size}, frames={self.frames}: load the task as the case "
        "was made."
      )

  def check_frames(self, frames: np.ndarray, metadata: Metadata, count: int | None = None) -> None:
    """ValueError for other frames than `count` of the task's size, None = a whole clip."""
    self.check_metadata(metadata)
    wanted = (count or self.frames, self.size, self.size, 3)
    if np.shape(frames) != wanted or frames.dtype != np.uint8:
      raise ValueError(
        f"frames are {getattr(frames, 'dtype', type(frames).__name__)} {np.shape(frames)}, "
        f"wanted uint8 {wanted} (frames height width 3): decode, cut or resize the clip "
        "first."
      )


@functools.lru_cache(draw.ASKED)
def _kept(task: Task, problem: str) -> tuple[Kept | NoObject, ...]:
  """`Task.kept` of a problem in JSON; every step and seed of a case asks for the same."""
  return tuple(task.kept(json.loads(problem)))
