"""The README and the table of a page do what they say: Python runs, commands and names exist."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

from jax_videoreason import cli, interventions
from jax_videoreason.reductions import REDUCTIONS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
EDITS = "| name | what it is |"
KEPT = "| name | of each step and layer | needs | what it is |"


def blocks(language: str) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
  """Every `videoreason ...` of a shell block or of the table."""
  lines = [line for block in blocks("sh") for line in block.splitlines()]
  lines += re.findall(r"`(videoreason [a-z].*?)`", TEXT)
  words = [shlex.split(line) for line in lines]
  return [w for w in words if w[0] == "videoreason" and w[1] in cli.COMMANDS]


def test_the_first_two_shell_blocks_run_the_demo_and_the_tests():
  demo, tests = blocks("sh")[:2]
  assert [line for line in demo.splitlines() if not line.startswith(("git clone", "cd "))] == [
    "pip install -e .",
    "videoreason demo --out runs/demo",
  ]
  assert tests.splitlines() == [
    'pip install -e ".[test]"',
    'pytest -n 2 --dist loadfile -m "not slow"',
  ]


def test_there_is_something_to_check():
  assert len(blocks("python")) == 2
  assert {words[1] for words in commands()} == set(cli.COMMANDS)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_line_is_understood(words):
  module = importlib.import_module(f"jax_videoreason.cli.{words[1]}")
  cli.parse(module, words[2:])


def test_the_library_examples_run_one_after_the_other(capsys):
  names = {}
  for block in blocks("python"):
    assert len([line for line in block.splitlines() if line.strip()]) <= 14
    exec(compile(block, "README.md", "exec"), names)
  said = capsys.readouterr().out.splitlines()
  assert len([line for line in said if line.startswith("sigma ")]) == 20
  assert said[0].startswith("sigma 1.00 [")
  words = [line[5:] for line in said[20:]]
  assert "".join(words) == names["case"].prompt + "</s>"


def test_links_and_pictures_lead_to_files():
  for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
    assert (ROOT / target).exists(), target


def test_every_module_stands_in_the_table_of_floors():
  named = set(re.findall(r"`([a-z_]+)/?`", TEXT))
  for path in (ROOT / "jax_videoreason").iterdir():
    is_module = path.suffix == ".py" and not path.stem.startswith("__") and path.stem != "version"
    is_package = path.is_dir() and (path / "__init__.py").exists()
    if is_module or is_package:
      assert path.stem in named, path.stem


def table(page: str, heading: str) -> list[list[str]]:
  """The cells of the rows of the table under that first line."""
  _, _, rest = (ROOT / "docs" / page).read_text().partition(f"\n{heading}\n")
  rows = rest.partition("\n\n")[0].splitlines()[1:]
  return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_edit_stands_in_the_page_of_experiments_with_arguments_that_it_takes():
  cells = [code for row in table("new_experiment.md", EDITS) for code in row[0].split("`")[1::2]]
  named = {code.partition("(")[0]: code.partition("(")[2].rstrip(")") for code in cells}
  assert sorted(named) == sorted(interventions.__all__)
  for name, arguments in named.items():
    if arguments:
      told = [argument.rstrip("=") for argument in arguments.split(", ")]
      assert set(told) <= set(inspect.signature(getattr(interventions, name)).parameters), name


def test_every_reduction_stands_in_the_page_of_experiments_with_its_shape_and_its_array():
  told = {name.strip("`"): more for name, *more in table("new_experiment.md", KEPT)}
  assert list(told) == list(REDUCTIONS)
  for name, (shape, needs, _) in told.items():
    assert re.match(rf"{re.escape(shape)}( in 0\.\.1)?:", REDUCTIONS[name].apply.__doc__ or ""), (
      name
    )
    assert needs.strip("`") == REDUCTIONS[name].needs
