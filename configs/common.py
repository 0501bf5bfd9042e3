"""What configurations share: the fields of a run, and `parse` for their argument."""

import ast
import itertools
import re
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict, config_dict

# What Wan's own configurations advise against, for every model: garish, overexposed, still,
# blurred, subtitles, worst quality, JPEG artefacts, extra fingers, walking backwards, and so on.
NEGATIVE_PROMPT = (
  "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
  "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
  "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
# A shaking camera too: put before it for image to video of Wan2.1.
STEADY = "镜头晃动，"

# a quote opens where a value may begin, so not in don't
_QUOTED = re.compile(r"""(?<![^=(\[{,:\s])('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_BRACKETED = re.compile(r"[(\[][^()\[\]{}]*[)\]]")
_INNERMOST = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")


def sample() -> ConfigDict:
  """The fields of a run with Wan's own values; model and size of the video come from a config."""
  return ConfigDict(
    {
      "checkpoint": config_dict.placeholder(str),
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
      # how many: the seeds 0, 1, 2, ...; or the numbers themselves, as (3, 5)
      "seeds": config_dict.FieldReference(1, field_type=object),
      "negative_prompt": "",
      # whose tiles the VAE works in: diffusers or diffsynth; None = whole frames
      "tiles": config_dict.placeholder(str),
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


def sweep() -> ConfigDict:
  """The fields that a sweep adds to those of a run."""
  return ConfigDict(
    {
      "tasks": ("maze", "pick"),
      "split": "id",
      # of each task
      "cases": 8,
      # plain, ambiguous, or both in turn
      "ambiguous": "both",
      # name -> none, noise_at, ablate or ensemble_runs, with its arguments; given as a whole
      "edits": {"none": {"edit": "none"}},
      # runs of a work unit; None = 32; whole cases, or a share of the seeds of one
      "unit": config_dict.placeholder(int),
      # of the devices of a process, as seed=2,fsdp=2; None = as many runs side by side as divide
      "mesh": config_dict.placeholder(str),
      # what shows x0 at every step: vae, or preview, a small and quick decoder taught by it
      "reader": "vae",
    }
  )


def published(name: str) -> ConfigDict:
  """The run of a published Wan model as its authors sample it: UniPC, 81 frames, stock negative.

  The weights are a bundle in ckpt/NAME: `videoreason convert SRC --dtype bf16 --out ckpt/NAME`.
  """
  config = sample()
  config.checkpoint = f"ckpt/{name}"
  config.negative_prompt = NEGATIVE_PROMPT
  config.solver, config.grid = "unipc", "official"
  return config


def vbvr(name: str) -> ConfigDict:
  """The run of a VBVR model as the paper samples it: 50 Euler steps, shift 5, guidance 5, tiles."""
  config = published(name)
  config.solver, config.grid = "euler", "diffsynth"
  config.tiles = "diffsynth"
  return config


def choose(argument: str | None, *choices: str) -> tuple[str, str]:
  """The first word of an argument, one of `choices` (the first if none is given), and the rest.

  Raises:
    ValueError: a word that is neither a choice nor key=value.
  """
  word, _, rest = (argument or "").partition(",")
  if not word or "=" in word:
    return choices[0], argument or ""
  if word not in choices:
    raise ValueError(f"{word!r} is no choice; there are: {', '.join(choices)}.")
  return word, rest


def parse(config: ConfigDict, argument: str | None) -> ConfigDict:
  """`config` with "key=value,taps.sites=(attn_out,mlp_out)" set; a value is a literal or a text.

  Raises:
    KeyError: the key, where the config has none of that name.
    ValueError: a word without a value, or a value of another kind.
  """
  for part in _parts(argument or ""):
    key, equals, value = part.partition("=")
    if not equals:
      raise ValueError(
        f"argument {part!r}, wanted key=value,other=value, and several values of one key in "
        "brackets, as key=(one,two)."
      )
    if not key.strip():
      raise ValueError(f'argument {part!r} has no key before "=", wanted key=value.')
    place, last = place_of(config, key.strip())
    kind, value = place.get_type(last), value.strip()
    try:
      place[last] = several(value) if kind is tuple else _literal(value)
    except TypeError as error:
      raise ValueError(f"{part}: wanted a value of type {kind.__name__}.") from error
  return config


def named(argument: str) -> set[str]:
  """The keys that an argument sets."""
  return {part.partition("=")[0].strip() for part in _parts(argument)}


def split(argument: str, keys: Collection[str]) -> tuple[str, str]:
  """What an argument says of other keys, and what it says of these."""
  parts = _parts(argument)
  of_these = [part for part in parts if "=" in part and named(part) <= set(keys)]
  return ",".join(part for part in parts if part not in of_these), ",".join(of_these)


def place_of(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
  """Where "taps.sites" lies: the config below `config`, and the name there; KeyError: nowhere."""
  *path, last = key.split(".")
  place: Any = config
  for name in path:
    place = place.get(name) if isinstance(place, ConfigDict) else None
  if not isinstance(place, ConfigDict) or last not in place:
    raise KeyError(key)
  return place, last


def several(text: str) -> tuple[Any, ...] | list[Any] | None:
  """The values of a key that has several: a Python literal, or words, in brackets or without."""
  given = _literal(text)
  if given is text:  # no literal
    inside = _BRACKETED.fullmatch(_QUOTED.sub(_mask, text)) is not None
    words = _parts(text[1:-1] if inside else text)
    given = tuple(_literal(word.strip()) for word in words) or text
  return given if isinstance(given, tuple | list | None) else (given,)


def _parts(argument: str) -> list[str]:
  """Cut at its commas; those in quotes and in brackets belong to a value."""
  masked = _QUOTED.sub(_mask, argument)
  before = ""
  while masked != before:
    before, masked = masked, _INNERMOST.sub(_mask, masked)
  cuts = [-1, *(at for at, sign in enumerate(masked) if sign == ","), len(argument)]
  parts = [argument[low + 1 : high] for low, high in itertools.pairwise(cuts)]
  return [part for part in parts if part.strip()]


def _mask(found: re.Match[str]) -> str:
  return "_" * len(found[0])


def _literal(value: str) -> Any:
  """What a Python literal says; the text itself where it is none."""
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError, TypeError):
    return value
