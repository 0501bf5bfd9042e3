"""What the answers along the steps say of each run, as numbers."""

import itertools
from collections import Counter

import numpy as np

from jax_videoreason.answers import readable
from jax_videoreason.structs import AnswerTrace


def per_run(said: AnswerTrace) -> dict[str, np.ndarray]:
  """What an AnswerTrace says of each run, as numbers; NaN where there is nothing to say.

  second: the largest share of a second candidate. several: NaN where no candidate was ever drawn.
  corrected, spoiled: NaN where fewer than two steps before the last can be read. first_readable:
  the first step with an answer that can be read. decided: as `decision` has it.
  """
  steps = len(said.sigma)
  legible = readable(said.answer)
  first = np.where(legible.any(0), legible.argmax(0), -1)
  told = legible[:-1].sum(0) >= 2

  def known(index: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.where(index < 0, np.nan, value)

  return {
    "right": said.right.astype(float),
    "readable": legible.astype(float),
    "candidates": said.candidates,
    "entropy": said.entropy,
    "mass": said.mass,
    "score": said.score,
    "second": said.second.max(0),
    "several": np.where((said.candidates >= 1).any(0), (said.candidates >= 2).any(0), np.nan),
    "most_candidates": said.candidates.max(0),
    "corrected": np.where(told, said.to_right > 0, np.nan),
    "spoiled": np.where(told, said.to_wrong > 0, np.nan),
    "flips": said.flips.astype(float),
    "first_readable": known(first, first / steps),
    "decided": decision(said.answer) / steps,
    "commitment": known(said.commitment, said.commitment / steps),
    "commitment_sigma": said.commitment_sigma,
    "first_hit": known(said.first_hit, said.first_hit / steps),
  }


def decision(answer: np.ndarray) -> np.ndarray:
  """R: the step of the last change to the final answer; 0 where step 0 says it and no other does.

  answer: S R, None = unreadable, which is no change. NaN where the final one can't be read, and
  where the first readable step is a later one and no other answer was read: that tells when the
  picture became legible, not when the answer was made.
  """
  found = np.full(answer.shape[1], np.nan)
  for run, said in enumerate(answer.T):
    other = [s for s, word in enumerate(said) if word is not None and word != said[-1]]
    same = [s for s, word in enumerate(said) if word is not None and word == said[-1]]
    if same and (other or same[0] == 0):
      found[run] = min(s for s in same if not other or s > other[-1])
  return found


def grown(parts: np.ndarray) -> dict[str, np.ndarray]:
  """R: whether an answer that is begun gains parts at a step and loses none at any; at how many
  steps it gains some.

  parts: S R, frozensets of what is drawn of an answer; None = unreadable, and is passed over: a
  picture that becomes legible is no growth. NaN where fewer than two steps can be read, as in tasks
  whose answers have no parts.
  """
  found = np.full((2, parts.shape[1]), np.nan)
  for run, shown in enumerate(parts.T):
    steps = list(itertools.pairwise(drawn for drawn in shown if drawn is not None))
    if steps:
      gains = sum(bool(before) and before < after for before, after in steps)
      kept = all(before <= after for before, after in steps)
      found[:, run] = gains > 0 and kept, gains
  return {"enhanced": found[0], "growth_steps": found[1]}


def majority(answers: np.ndarray) -> np.ndarray:
  """N: the first seed that gives the commonest readable answer (seed 0 where none is readable)."""
  chosen = []
  for said in answers.T:
    known = [answer for answer in said if answer is not None]
    common = Counter(known).most_common(1)[0][0] if known else said[0]
    chosen.append(list(said).index(common))
  return np.array(chosen)
