"""The wheel holds everything and runs elsewhere; metadata lies in setup.cfg and nowhere twice."""

import ast
import configparser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jax_videoreason

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"jax_videoreason": "jax_videoreason", "configs": "configs", "convert": "convert"}


def setup() -> configparser.ConfigParser:
  read = configparser.ConfigParser()
  read.read(ROOT / "setup.cfg")
  return read


def lines(text: str) -> list[str]:
  return [line for line in text.splitlines() if line]


def package_files() -> set[str]:
  """Every file that must be in the wheel, as its place there."""
  found = set()
  for top, prefix in (
    ("jax_videoreason", ""),
    ("configs", "jax_videoreason/"),
    ("convert", "jax_videoreason/"),
  ):
    for path in (ROOT / top).rglob("*"):
      if path.is_file() and "__pycache__" not in path.parts:
        found.add(prefix + path.relative_to(ROOT).as_posix())
  return found


def test_every_package_is_listed():
  listed = set(lines(setup()["options"]["packages"]))
  found = {
    name.removesuffix("/__init__.py").replace("/", ".")
    for name in package_files()
    if name.endswith("/__init__.py")
  }
  assert listed == found


def test_every_file_belongs_to_a_package_or_is_data():
  listed = {name.replace(".", "/") for name in lines(setup()["options"]["packages"])}
  for name in package_files():
    folder = name.rpartition("/")[0]
    data = name.startswith(("jax_videoreason/templates/", "jax_videoreason/assets/"))
    assert folder in listed or data, name


def test_configs_and_convert_are_found_in_a_checkout():
  from jax_videoreason import configs, convert

  for module, folder in ((configs, "configs"), (convert, "convert")):
    assert Path(module.__path__[0]).resolve().name == folder


def imported() -> set[str]:
  """The distributions that the package imports from."""
  found = set()
  for path in (path for top in FOLDERS.values() for path in (ROOT / top).rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        found |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        found.add(node.module.split(".")[0])
  offered = importlib.metadata.packages_distributions()
  return {name.lower().replace("_", "-") for top in found for name in offered.get(top, ())}


def test_what_every_user_installs_is_imported_by_the_package():
  required = {name.split(">")[0] for name in lines(setup()["options"]["install_requires"])}
  assert required - imported() == set()


def test_optax_is_one_that_has_the_norm_that_training_takes():
  required = lines(setup()["options"]["install_requires"])
  assert [name for name in required if name.startswith("optax")] == ["optax>=0.2.5"]  # optax.tree


def test_pins_are_exact_and_cover_what_is_required():
  pins = dict(
    line.lower().replace("_", "-").split("==")
    for line in lines((ROOT / ".ci" / "constraints.txt").read_text())
    if not line.startswith("#")
  )
  extras = setup()["options.extras_require"]
  needed = lines(setup()["options"]["install_requires"]) + lines(extras["test"])
  names = {name.split(">")[0].split("=")[0].lower() for name in needed}
  assert names <= pins.keys()
  assert pins["torch"] == "2.13.0"
  assert "+" not in "".join(pins.values())


def test_the_pinned_libtpu_is_the_one_that_the_pinned_jax_asks_for():
  pins = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
  if f"jax=={importlib.metadata.version('jax')}" not in pins:
    pytest.skip("another jax than the pinned one is installed")
  asked = [line for line in importlib.metadata.requires("jax") or [] if line.startswith("libtpu")]
  wanted = asked[0].partition(";")[0].strip().removesuffix("*")
  assert any(pin.startswith(wanted) for pin in pins), asked


def test_the_version_is_written_once():
  assert setup()["metadata"]["version"] == "attr: jax_videoreason.version.__version__"
  assert jax_videoreason.__version__ in (ROOT / "jax_videoreason" / "version.py").read_text()


def run(*words: object, cwd: Path) -> str:
  environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
  done = subprocess.run(
    [str(w) for w in words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
  """The wheel, built from a copy so that the checkout stays clean."""
  place = tmp_path_factory.mktemp("wheel")
  ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
  for name in FOLDERS:
    shutil.copytree(ROOT / name, place / "source" / name, ignore=ignore)
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, place / "source")
  words = ("-m", "pip", "wheel", "-q", "--no-deps", "-w", place, place / "source")
  run(sys.executable, *words, cwd=place)
  return next(place.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_code_templates_and_assets(wheel):
  with zipfile.ZipFile(wheel) as archive:
    inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    meta = "".join(n for n in archive.namelist() if n.endswith("LICENSE"))
  assert inside == package_files()
  assert meta


@pytest.mark.slow
def test_the_wheel_runs_where_there_is_no_checkout(wheel, tmp_path):
  """In a virtual environment that sees this one's dependencies, but not its checkout."""
  venv = tmp_path / "venv"
  run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
  python = venv / "bin" / "python"
  run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
  site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
  here = run(sys.executable, "-c", "import jax; print(jax.__path__[0])", cwd=tmp_path).strip()
  (Path(site) / "dependencies.pth").write_text(str(Path(here).parent) + "\n")
  assert "usage: videoreason" in run(venv / "bin" / "videoreason", "--help", cwd=tmp_path)
  assert "maze" in run(venv / "bin" / "videoreason", "tasks", "list", cwd=tmp_path)
  where = "import jax_videoreason.configs as c, jax_videoreason.convert; print(c.__path__[0])"
  assert run(python, "-c", where, cwd=tmp_path).strip() == f"{site}/jax_videoreason/configs"
  out = tmp_path / "demo"
  words = ("demo", "--config=mini:steps=2,seeds=1", "--cases=1", "--out", out)
  if "mini" in lines(run(python, "-c", MODELS, cwd=tmp_path)):
    assert "report:" in run(venv / "bin" / "videoreason", *words, cwd=tmp_path)
    assert (out / "report.html").is_file()


MODELS = "from jax_videoreason import bundles; print('\\n'.join(bundles.shipped()))"
