"""How large each experiment is under `--preset quick`, `--preset full` and `--preset paper`.

Each is a list of cases (per task), seeds, steps and grids; the network evaluations that follow are
printed before anything runs. With `mini` on 2 cores, `run all` is meant to take about 5 minutes
(quick, most of it compilation) and 60 (full, about 279,000 evaluations). Answers are read from the
VAE: `chain_of_steps` prints how often mini's preview agrees with it, which is less than .98.
`paper` is the ensemble as it is described: three seeds, one step of 50, the middle layers.
They take the place of what the file of a config says, not of `NAME:key=value` or `--config.key=`.
"""

from typing import Any

EVERY: dict[str, dict[str, Any]] = {
  "quick": {"cases": 3, "seeds": 1, "steps": 8, "batch": 9, "decoder": "vae"},
  "full": {"cases": 10, "seeds": 2, "steps": 20, "batch": 10, "decoder": "vae"},
  "paper": {"cases": 10, "seeds": 3, "steps": 50, "batch": 10},
}
OWN: dict[str, dict[str, dict[str, Any]]] = {
  "chain_of_steps": {
    "quick": {"cases": 2, "batch": 14},
    "full": {"cases": 12, "batch": 12, "decoder": "auto"},
  },
  "noise": {
    "quick": {"experiment": {"modes": ("replace", "renoise"), "stride": 1}},
    "full": {"seeds": 1, "cases": 8, "batch": 12, "experiment": {"stride": 2}},
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
    "full": {"seeds": 1, "cases": 8, "batch": 8, "experiment": {"stride": 2}},
  },
  "ensemble": {
    "quick": {
      "tasks": ("maze", "pick"),
      "cases": 4,
      "seeds": 3,
      "batch": 8,
      "experiment": {"kinds": ("update", "out"), "steps": (1,)},
    },
    "full": {
      "seeds": 3,
      "cases": 16,
      "batch": 8,
      "experiment": {"kinds": ("update", "attn", "resid", "out", "latents"), "steps": (1,)},
    },
    "paper": {"experiment": {"kinds": ("update", "resid"), "steps": (1,)}},
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
    "full": {"seeds": 4, "cases": 8, "batch": 8},
  },
  "behaviours": {
    "quick": {"cases": 8, "batch": 16, "experiment": {"stride": 4}},
    "full": {"cases": 32, "seeds": 1, "batch": 16},
  },
  "controls": {
    "quick": {"experiment": {"settings": ("as is", "shift 1"), "places": 5}},
    "full": {"cases": 6, "seeds": 1, "batch": 9, "experiment": {}},
  },
}
# What `run all --config mini` also runs on a model beside it, into a folder "<study>_<config>".
BESIDE: dict[str, dict[str, Any]] = {
  "controls": {
    "config": "mini_experts",
    "quick": {"settings": ("as is", "switch earlier", "switch later")},
    "full": {
      "settings": (
        "as is",
        "switch earlier",
        "switch later",
        "high noise expert only",
        "low noise expert only",
      )
    },
  },
}


def get(preset: str, experiment: str) -> dict[str, Any]:
  """The values of a preset for an experiment; KeyError for a preset that it does not have."""
  own = OWN.get(experiment, {})
  if preset not in own and preset not in ("quick", "full"):
    raise KeyError(preset)
  return {**EVERY[preset], **own.get(preset, {})}
