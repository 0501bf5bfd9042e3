"""The golden files are what scripts/make_golden.py makes with the references installed here."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent.parent
KEYS = sorted((ROOT / "tests" / "golden").glob("*.keys.json"))
NAMES = [path.stem for path in (ROOT / "tests" / "golden").glob("*.npz")]


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("make_golden", ROOT / "scripts" / "make_golden.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_there_is_a_file_of_each(script):
  assert set(NAMES) == set(script.GOLDEN)


@pytest.mark.parametrize("name", NAMES)
def test_made_again_it_is_the_same(script, name):
  """Weights and inputs to the bit; what was computed to 1e-5, for another CPU rounds otherwise."""
  made = script.make(name)
  with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
    assert set(made) == set(file)
    for key in set(made) - {"about"}:
      if key.startswith("weights/"):
        np.testing.assert_array_equal(made[key], file[key])
      else:
        np.testing.assert_allclose(made[key], file[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", KEYS, ids=lambda file: file.name.partition(".")[0])
def test_the_keys_are_those_of_the_installed_classes(script, file):
  """Wan's own are not installed: `make_golden.py keys` makes them from its repositories."""
  kept = json.loads(file.read_text())["diffusers"]
  made = json.loads(json.dumps(script.reference(kept["class"], kept["config"])))
  assert made == kept
