"""What the answers along the steps say of each run, as numbers."""

from collections import Counter

import numpy as np

from jax_videoreason.answers import readable
from jax_videoreason.structs import AnswerTrace

GROWN = 0.02  # rise of the score that counts as growth


def per_run(said: AnswerTrace) -> dict[str, np.ndarray]:
  """What an AnswerTrace says of each run, as numbers; NaN where there is nothing to say.

  enhanced: the score of an answer that is begun and not complete rises at some step, and never
  falls by as much. several: NaN where no candidate was ever drawn. corrected, spoiled: NaN where
  fewer than two steps before the last can be read. first_readable: the first step with an answer
  that can be read. decided: the commitment of runs that could be read before it, or from step 0
  on; for the others commitment says when the picture became legible, not when the answer was made.
  """
  steps = len(said.sigma)
  rise = np.diff(said.score, axis=0)
  legible = readable(said.answer)
  first = np.where(legible.any(0), legible.argmax(0), -1)
  told = legible[:-1].sum(0) >= 2
  grows = (said.score[:-1] > GROWN) & (rise > GROWN)

  def known(index: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.where(index < 0, np.nan, value)

  return {
    "right": said.right.astype(float),
    "readable": legible.astype(float),
    "candidates": said.candidates,
    "entropy": said.entropy,
    "mass": said.mass,
    "score": said.score,
    "several": np.where((said.candidates >= 1).any(0), (said.candidates >= 2).any(0), np.nan),
    "most_candidates": said.candidates.max(0),
    "corrected": np.where(told, said.to_right > 0, np.nan),
    "spoiled": np.where(told, said.to_wrong > 0, np.nan),
    "enhanced": (grows.any(0) & ~(rise < -GROWN).any(0)).astype(float),
    "growth_steps": grows.sum(0).astype(float),
    "flips": said.flips.astype(float),
    "first_readable": known(first, first / steps),
    "decided": np.where(
      (said.commitment == 0) | (said.commitment > first),
      known(said.commitment, said.commitment / steps),
      np.nan,
    ),
    "commitment": known(said.commitment, said.commitment / steps),
    "commitment_sigma": said.commitment_sigma,
    "first_hit": known(said.first_hit, said.first_hit / steps),
  }


def majority(answers: np.ndarray) -> np.ndarray:
  """N: the first seed that gives the commonest readable answer (seed 0 where none is readable)."""
  chosen = []
  for said in answers.T:
    known = [answer for answer in said if answer is not None]
    common = Counter(known).most_common(1)[0][0] if known else said[0]
    chosen.append(list(said).index(common))
  return np.array(chosen)
