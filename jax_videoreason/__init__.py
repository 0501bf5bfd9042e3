"""Video diffusion models that reason along the denoising steps: run them, watch them, change them.

The public names below are found when they are first used, so that importing the package is light.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_videoreason.version import __version__ as __version__

if TYPE_CHECKING:
  from jax_videoreason.checkpoint import load as load
  from jax_videoreason.decode import decode as decode
  from jax_videoreason.evaluation import open_evaluation as open_evaluation
  from jax_videoreason.experiments.results import open_study as open_study
  from jax_videoreason.interventions import Intervention as Intervention
  from jax_videoreason.interventions import identity as identity
  from jax_videoreason.interventions import patch_runs as patch_runs
  from jax_videoreason.interventions import where as where
  from jax_videoreason.sampler import denoise as denoise
  from jax_videoreason.store import open_run as open_run
  from jax_videoreason.structs import Conditioning as Conditioning
  from jax_videoreason.structs import Noise as Noise
  from jax_videoreason.structs import Trace as Trace
  from jax_videoreason.sweep import open_sweep as open_sweep
  from jax_videoreason.taps import TapSpec as TapSpec

PUBLIC = {
  "load": "checkpoint",
  "denoise": "sampler",
  "decode": "decode",
  "Noise": "structs",
  "Conditioning": "structs",
  "Intervention": "interventions",
  "identity": "interventions",
  "where": "interventions",
  "patch_runs": "interventions",
  "TapSpec": "taps",
  "Trace": "structs",
  "open_run": "store",
  "open_sweep": "sweep",
  "open_study": "experiments.results",
  "open_evaluation": "evaluation",
}

_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file():  # a checkout: convert/ and configs/ lie beside the package
  __path__.append(str(_root))


class _Package(types.ModuleType):
  def __setattr__(self, name: str, value: Any) -> None:
    # `decode` is a function and a module; the name of the package is the function.
    if not (name in PUBLIC and isinstance(value, types.ModuleType)):
      super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
  if name not in PUBLIC:
    raise AttributeError(
      f"jax_videoreason has no {name!r}; it has: {', '.join(PUBLIC)}, and its modules."
    )
  value = getattr(importlib.import_module(f"jax_videoreason.{PUBLIC[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *PUBLIC})
