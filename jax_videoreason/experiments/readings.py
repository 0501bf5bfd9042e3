"""What the answers along the steps say of each run, as numbers."""

from collections import Counter

import numpy as np

from jax_videoreason.structs import AnswerTrace

GROWN = 0.02  # rise of the score that counts as growth


def per_run(said: AnswerTrace) -> dict[str, np.ndarray]:
  """What an AnswerTrace says of each run, as numbers; NaN where there is nothing to say.

  enhanced: the score of an answer that is begun and not complete rises at some step, and never
  falls by as much.
  """
  steps = len(said.sigma)
  rise = np.diff(said.score, axis=0)
  grows = (said.score[:-1] > GROWN) & (rise > GROWN)

  def known(index: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.where(index < 0, np.nan, value)

  return {
    "right": said.right.astype(float),
    "readable": np.vectorize(lambda a: float(a is not None))(said.answer),
    "candidates": said.candidates,
    "entropy": said.entropy,
    "mass": said.mass,
    "score": said.score,
    "several": (said.candidates >= 2).any(0).astype(float),
    "most_candidates": said.candidates.max(0),
    "corrected": (said.to_right > 0).astype(float),
    "spoiled": (said.to_wrong > 0).astype(float),
    "enhanced": (grows.any(0) & ~(rise < -GROWN).any(0)).astype(float),
    "growth_steps": grows.sum(0).astype(float),
    "flips": said.flips.astype(float),
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
