"""How large each experiment is under `--preset quick` and `--preset full`.

Each is a list of cases (per task), seeds, steps and grids; the network evaluations that follow are
printed before anything runs. On 2 cores with `mini`, `run all` is meant to take 5 minutes (quick)
and 60 (full).
"""

from typing import Any

EVERY: dict[str, dict[str, Any]] = {
  "quick": {"cases": 3, "seeds": 1, "steps": 8, "batch": 9},
  "full": {"cases": 10, "seeds": 2, "steps": 20, "batch": 10},
}
OWN: dict[str, dict[str, dict[str, Any]]] = {
  "chain_of_steps": {
    "quick": {"cases": 2, "batch": 10},
    "full": {},
  },
  "noise": {
    "quick": {"experiment": {"modes": ("replace", "renoise"), "stride": 1}},
    "full": {"seeds": 1, "experiment": {"stride": 2}},
  },
  "layer_maps": {
    "quick": {"experiment": {"lens_steps": 2}},
    "full": {"seeds": 1, "cases": 8, "batch": 8, "experiment": {"lens_steps": 3}},
  },
  "layer_swap": {
    "quick": {
      "cases": 8,
      "batch": 8,
      "experiment": {"variants": ("stream", "update"), "edited": (1, 4), "stride": 3},
    },
    "full": {"cases": 12, "seeds": 1, "batch": 12, "experiment": {}},
  },
  "ensemble": {
    "quick": {
      "tasks": ("maze", "pick"),
      "cases": 4,
      "seeds": 3,
      "batch": 8,
      "experiment": {"kinds": ("update", "out"), "steps": (1,)},
    },
    "full": {"seeds": 3, "experiment": {}},
  },
  "frames": {
    "quick": {},
    "full": {},
  },
  "probes": {
    "quick": {"tasks": ("pick",), "cases": 16, "batch": 16, "experiment": {"stride": 4}},
    "full": {"cases": 32, "seeds": 1, "batch": 16, "experiment": {"stride": 2}},
  },
  "early": {
    "quick": {"tasks": ("maze", "pick"), "cases": 4, "seeds": 3, "batch": 8},
    "full": {"seeds": 4},
  },
  "behaviours": {
    "quick": {"cases": 2, "batch": 8},
    "full": {},
  },
  "controls": {
    "quick": {"experiment": {"settings": ("as is", "shift 1"), "places": 5}},
    "full": {"cases": 6, "seeds": 1, "batch": 9, "experiment": {}},
  },
}


def get(preset: str, experiment: str) -> dict[str, Any]:
  """The values of a preset for an experiment; KeyError for a preset that does not exist."""
  return {**EVERY[preset], **OWN.get(experiment, {}).get(preset, {})}
