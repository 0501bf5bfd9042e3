"""The floors: an import points to an earlier line of its own floor or to a lower floor."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The tree, floor by floor and line by line; modules of one line don't import each other.
FLOORS = (
  (
    "version axes",
    "pytrees derivatives",
    "sharding",
    "rope",
    "attention",
    "solvers",
    "schedules",
    "reductions",
    "stats",
  ),
  (
    "structs",
    "tiling",
    "taps",
    "places",
    "edits",
    "composing",
    "interventions",
    "settings",
    "folders",
    "records",
    "arrays media tables own",
    "framing",
    "tasks.draw",
    "tasks.base",
    "tasks.maze tasks.tree_reach tasks.tictactoe tasks.occlusion tasks.sort_bars tasks.rotate "
    "tasks.select_largest tasks.bounce tasks.pick tasks.contract",
    "tasks",
    "vbvr vbvr.suite vbvr.layout",
    "vbvr.published vbvr.samples",
  ),
  (
    "models.common",
    "models.wan",
    "models.vae_blocks",
    "models.preview",
    "models.wan21_vae",
    "models.wan22_vae",
    "models.umt5 models.clip",
    "models.variants",
    "models",
  ),
  (
    "distributed",
    "bundles",
    "checkpoint",
    "leaves",
    "tokenizer",
    "guidance",
    "conditioning",
    "prepare",
    "sampler",
    "decode",
    "store",
    "runs",
    "lanes",
    "sweep",
    "training encoded",
    "fitting",
    "plan",
    "costs",
  ),
  (
    "answers",
    "metrics",
    "baselines",
    "scoring",
    "probes",
    "evaluation",
    "evaluate",
    "comparing",
    "factors",
    "product",
    "branching",
  ),
  (
    "experiments.results",
    "experiments.context",
    "experiments.study",
    "experiments.base experiments.readings experiments.setting",
    "experiments.chain_of_steps experiments.noise experiments.frames experiments.behaviours "
    "experiments.layer_maps experiments.layer_swap experiments.ensemble experiments.probes "
    "experiments.early",
    "experiments.controls",
    "vbvr.jobs",
    "experiments.claims",
    "experiments",
    "vbvr.videos vbvr.evalkit vbvr.tokens",
    "vbvr.baselines",
    "vbvr.generate vbvr.scores vbvr.audit",
    "vbvr.table",
  ),
  ("console plots", "report", "scorecard pages vbvr.page vbvr.maps gallery"),
  (
    "cli",
    "cli.decoding",
    "cli.sample cli.run cli.sweep cli.evaluate cli.vbvr cli.convert cli.tasks cli.report",
    "cli.demo cli.plan",  # the demo is `sample` on cases of the tasks
    "__init__",
    "__main__",
  ),
)
PLACE = {
  module: (floor, line)
  for floor, lines in enumerate(FLOORS)
  for line, names in enumerate(lines)
  for module in names.split()
}
CONVERT_FLOOR = 3
HOMES = {
  "flax": ("models.",),
  "torch": ("convert.reader",),
  "safetensors": ("convert.reader",),
  "huggingface_hub": ("convert.hub",),
  "orbax": ("checkpoint", "fitting"),
  "tensorstore": ("arrays", "leaves"),
  "pyarrow": ("tables",),
  "tokenizers": ("tokenizer",),
  "ftfy": ("tokenizer",),
  "av": ("media",),
  "PIL": ("media",),
  "matplotlib": ("plots",),
  "jinja2": ("report",),
  "rich": ("console",),
  "tqdm": ("console",),
  "optax": ("training", "probes"),
  "scipy": ("stats",),
  "absl": ("cli.", "configs."),
  "ml_collections": ("cli.", "configs."),
  "diffusers": (),
  "transformers": (),
  "accelerate": (),
  "pandas": (),
}


def sources() -> dict[str, Path]:
  """Module name within the package -> file; a package is named by its folder, the root __init__."""
  found = {}
  for top, prefix in (
    ("jax_videoreason", ()),
    ("convert", ("convert",)),
    ("configs", ("configs",)),
  ):
    for path in sorted((ROOT / top).rglob("*.py")):
      parts = (*prefix, *path.relative_to(ROOT / top).with_suffix("").parts)
      found[".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)] = path
  return found


SOURCES = sources()
TREES = {module: ast.parse(path.read_text()) for module, path in SOURCES.items()}


def imports(module: str, tree: ast.AST) -> set[tuple[str, str]]:
  """(kind, name): kind "own" with a module of the package, or "other" with a distribution."""
  is_package = SOURCES[module].name == "__init__.py" if module in SOURCES else False
  here = [] if module == "__init__" else module.split(".")
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      wanted = [(alias.name.split("."), None) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = (node.module or "").split(".") if node.module else []
      if node.level:
        up = here if is_package else here[:-1]
        base = ["jax_videoreason", *up[: len(up) - node.level + 1], *base]
      wanted = [(base, alias.name) for alias in node.names]
    else:
      continue
    for base, name in wanted:
      if base[0] != "jax_videoreason":
        found.add(("other", base[0]))
        continue
      inner = ".".join(base[1:])
      deeper = f"{inner}.{name}".lstrip(".") if name else inner
      found.add(("own", deeper if deeper in SOURCES else inner or "__init__"))
  return found


def faults(module: str, tree: ast.AST) -> list[str]:
  """What the imports of a module do against the rules, a sentence each."""
  said = []
  top = module.split(".")[0]
  if top not in ("convert", "configs") and module not in PLACE:
    return [f"{module} stands on no floor: give it a line in the tree"]
  for kind, name in sorted(imports(module, tree)):
    if kind == "other":
      homes = HOMES.get(name)
      dotted = module + "." if SOURCES.get(module, Path()).name == "__init__.py" else module
      at_home = homes is None or any(
        dotted.startswith(home) if home.endswith(".") else dotted == home for home in homes
      )
      if not at_home:
        said.append(
          f"{module} imports {name}, whose home is {' and '.join(homes or ()) or 'tests'}"
        )
      if top == "configs" and name not in {"ml_collections", *sys.stdlib_module_names}:
        said.append(f"{module} imports {name}: a config sees ml_collections and other configs")
      continue
    target = name.split(".")[0]
    if target == "convert":
      if top != "convert":
        said.append(f"{module} imports {name}: only cli.convert may, by importlib")
    elif target == "configs":
      if top != "configs":
        said.append(f"{module} imports {name}: configs are found by cli, by name")
    elif top == "configs":
      said.append(f"{module} imports {name}: a config sees ml_collections and other configs")
    elif name not in PLACE:
      said.append(f"{module} imports {name}, which stands on no floor")
    elif top == "convert":
      if PLACE[name][0] > CONVERT_FLOOR:
        said.append(f"{module} imports {name}: convert sees floors 0 to {CONVERT_FLOOR}")
    elif PLACE[name] >= PLACE[module]:
      said.append(
        f"{module} (floor {PLACE[module][0]}) imports {name} (floor {PLACE[name][0]}), "
        "which is no earlier line"
      )
  return said


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down(module):
  assert faults(module, TREES[module]) == []


@pytest.mark.parametrize(
  ("module", "line", "said"),
  [
    ("rope", "from jax_videoreason.solvers import SOLVERS", "no earlier line"),
    ("rope", "def f():\n  from jax_videoreason import sampler", "no earlier line"),
    ("sampler", "from jax_videoreason import denoise", "no earlier line"),
    ("tasks.maze", "from . import pick", "no earlier line"),
    ("sampler", "import flax.linen as nn", "whose home is models."),
    ("report", "import matplotlib.pyplot", "whose home is plots"),
    ("cli.convert", "from jax_videoreason.convert import engine", "by importlib"),
    ("configs.mini", "import jax", "a config sees"),
    ("configs.mini", "from jax_videoreason import settings", "a config sees"),
    ("convert.wan", "from jax_videoreason import answers", "convert sees floors"),
    ("odds_and_ends", "import math", "stands on no floor"),
  ],
)
def test_a_wrong_import_is_named(module, line, said):
  found = faults(module, ast.parse(line))
  assert len(found) == 1
  assert said in found[0]


@pytest.mark.parametrize(
  ("module", "line"),
  [
    ("sampler", "from jax_videoreason import guidance\nfrom jax_videoreason.axes import Array"),
    ("models.wan", "from flax import linen as nn\nfrom jax_videoreason.models.common import site"),
    ("configs.mini", "from ml_collections import ConfigDict\nfrom . import common"),
    ("convert.wan", "from . import engine\nfrom jax_videoreason.models import wan"),
  ],
)
def test_a_right_import_is_let_pass(module, line):
  assert faults(module, ast.parse(line)) == []


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_config_dicts_stay_in_cli_and_configs(module):
  names = {n.id for n in ast.walk(TREES[module]) if isinstance(n, ast.Name)}
  names |= {n.attr for n in ast.walk(TREES[module]) if isinstance(n, ast.Attribute)}
  assert "ConfigDict" not in names or module.split(".")[0] in ("cli", "configs")


def test_no_room_for_leftovers():
  assert [m for m in SOURCES if m.split(".")[-1] in ("utils", "util", "helpers", "misc")] == []


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_every_module_says_what_it_is_for(module):
  if SOURCES[module].read_text().strip():
    assert ast.get_docstring(TREES[module])


def run_python(code: str) -> str:
  return subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
  ).stdout


def test_the_package_is_light_to_import():
  loaded = set(run_python("import sys, jax_videoreason; print(*sys.modules)").split())
  assert loaded.isdisjoint({"jax", "numpy", *HOMES})


def test_a_plan_needs_nothing_that_reads_weights():
  code = "import sys\nfrom jax_videoreason import bundles, costs, plan\nprint(*sys.modules)"
  assert "orbax" not in run_python(code).split()


def test_public_names_touch_no_device():
  code = """
import sys
import jax_videoreason as v
import jax_videoreason.decode
for name in v.PUBLIC:
  assert callable(getattr(v, name)), name
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
print(*sys.modules)
"""
  loaded = set(run_python(code).split())
  assert loaded.isdisjoint({"torch", "matplotlib"})


def test_a_wrong_public_name_is_answered_with_the_right_ones():
  import jax_videoreason

  with pytest.raises(AttributeError, match="no 'denoize'; it has: load, denoise"):
    _ = jax_videoreason.denoize
