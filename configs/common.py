"""What configurations share: the fields of a run, and `parse` for their argument."""

import ast
import re
from typing import Any

from ml_collections import ConfigDict, config_dict


def sample() -> ConfigDict:
  """The fields of a run with Wan's own values; model and size of the video come from a config."""
  return ConfigDict(
    {
      "checkpoint": config_dict.required_placeholder(str),
      "frames": 81,
      "height": 480,
      "width": 832,
      "steps": 50,
      "shift": 5.0,
      # one scale, or high noise and low noise expert
      "guidance": (5.0,),
      # sigma at which the low noise expert takes over; None = the bundle's own
      "boundary": config_dict.placeholder(float),
      "solver": "euler",
      "grid": "diffsynth",
      # how many: the seeds 0, 1, 2, ...
      "seeds": 1,
      "negative_prompt": "",
      # runs denoised together; None = all
      "batch": config_dict.placeholder(int),
      # steps between two writes to disk
      "piece": 10,
      "taps": {
        "sites": (),
        "reduce": ("norm",),
        "layers": config_dict.placeholder(tuple),
        "steps": config_dict.placeholder(tuple),
        "branches": (0,),
        "budget_gb": 8.0,
      },
    }
  )


def parse(config: ConfigDict, argument: str | None) -> ConfigDict:
  """`config` with "key=value,taps.sites=('attn_out',)" set; a value is a Python literal or a text.

  Raises:
    KeyError: the key, where the config has none of that name.
    ValueError: a word without a value, or a value of another kind.
  """
  # a comma inside brackets belongs to the value
  for part in filter(None, re.split(r",(?![^()]*\))", argument or "")):
    key, equals, value = part.partition("=")
    if not equals:
      raise ValueError(f"argument {part!r}, wanted key=value,other=value.")
    *path, last = key.strip().split(".")
    place: Any = config
    for name in path:
      place = place[name]
    if last not in place:
      raise KeyError(key.strip())
    try:
      place[last] = _literal(value.strip())
    except TypeError as error:
      kind = place.get_type(last).__name__
      raise ValueError(f"{part}: wanted a value of type {kind}.") from error
  return config


def _literal(value: str) -> Any:
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return value
