"""The commands as a shell calls them; bad input is one sentence, status 2, nothing left behind."""

import contextlib
import dataclasses
import errno
import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason import (
  bundles,
  checkpoint,
  cli,
  console,
  factors,
  folders,
  media,
  open_run,
  plan,
  records,
  report,
  settings,
  store,
  tasks,
  tokenizer,
)
from jax_videoreason.cli import decoding, sample, vbvr
from jax_videoreason.cli import report as report_command
from jax_videoreason.configs import common
from jax_videoreason.experiments import EXPERIMENTS
from jax_videoreason.models import FAMILIES, Family
from jax_videoreason.structs import Card, LatentSpec, ModelBundle

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "mark the largest shape"
SMALL = ("--config.frames=5", "--config.height=16", "--config.width=16", "--config.steps=3")
LATENTS = (2, 4, 4, 4)  # F H W C of 5 x 16 x 16 pixels


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory) -> Path:
  """A bundle of random weights on disk: stride 4, 2 layers, 12 wide."""
  place = tmp_path_factory.mktemp("bundles")
  text = place / "words.json"
  text.write_text(tokenizer.train_word_tokenizer([PROMPT]))
  family = FAMILIES["wan21"]
  parts = family.build(
    {
      "dit": {
        "width": 24,
        "ffn_width": 32,
        "heads": 2,
        "layers": 2,
        "in_channels": 12,
        "out_channels": 4,
        "text_width": 16,
        "freq_dim": 16,
        "image_input": "concat",
        "dtype": "float32",
      },
      "vae": {
        "base_width": 4,
        "z_channels": 4,
        "stages": (1, 1, 2),
        "temporal": (True, True),
        "blocks": 1,
        "mean": (0.0,) * 4,
        "std": (1.0,) * 4,
      },
      "text": {
        "vocab": tokenizer.Tokenizer(text).vocab,
        "width": 16,
        "head_width": 8,
        "heads": 2,
        "ffn_width": 16,
        "layers": 1,
        "dtype": "float32",
      },
    }
  )
  rng = np.random.default_rng(0)
  params = {
    name: jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.1, s.shape), jnp.float32), tree)
    for name, tree in family.abstract(parts).items()
  }
  card = Card(
    name="tiny",
    family="wan21",
    latents=family.latents(parts),
    text_length=6,
    tokenizer=str(text),
  )
  made = ModelBundle(
    params=(params["dit"],), vae=params["vae"], text=params["text"], parts=parts, card=card
  )
  return checkpoint.save(made, place / "tiny")


@pytest.fixture(scope="session")
def two_experts(bundle_dir) -> Path:
  """The same with a second expert, other in every leaf, which takes over at sigma 0.9."""
  one = checkpoint.load(bundle_dir)
  (first,) = one.params
  rng = np.random.default_rng(1)
  second = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), first)
  made = dataclasses.replace(
    one, params=(first, second), card=dataclasses.replace(one.card, boundary=0.9)
  )
  return checkpoint.save(made, bundle_dir.parent / "two", shared_with=bundle_dir)


@pytest.fixture
def image(tmp_path) -> Path:
  path = tmp_path / "frame.png"
  media.write_png(path, np.full((16, 16, 3), 90, np.uint8))
  return path


@pytest.fixture
def call(capsys):
  """Calls a command: (status, standard output, standard error)."""

  def run(*words) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out, said.err

  return run


@pytest.fixture
def refuses(call):
  """Calls a command that must be refused with one sentence; returns it."""

  def run(*words) -> str:
    status, _, err = call(*words)
    lines = [line for line in err.splitlines() if line.startswith("videoreason: ")]
    assert status == 2
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]

  return run


@pytest.fixture
def sample_words(bundle_dir, image, tmp_path):
  """The words of a small `sample` that works."""
  return [
    "sample",
    f"--checkpoint={bundle_dir}",
    *SMALL,
    f"--image={image}",
    f"--prompt={PROMPT}",
    "--seeds=0,1",
    f"--out={tmp_path / 'run'}",
  ]


def python(*words: str, **more) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False, **more
  )


# Help


@pytest.mark.parametrize("command", ["sweep", "sample"])
def test_help_names_every_edit_with_what_it_takes(call, command):
  lines = call(command, "--help")[1].splitlines()
  for name, keys in factors.EDITS.items():
    (line,) = [line for line in lines if line.startswith(f"  {name} ")]
    assert all(re.search(rf"[ ,]{key}\b", line) for key in keys)


@pytest.mark.parametrize(
  "given", ["--config.edits.n.edit=noise_at", "--config=mini:edits.n.edit=ablate"]
)
def test_an_edit_of_another_name_is_told_the_form_that_works(given):
  module = importlib.import_module("jax_videoreason.cli.sweep")
  with pytest.raises(cli.UsageError, match=r"no key 'edits\.n\.edit'") as refused:
    cli.parse(module, [given])
  (form,) = re.findall(r'--config "(.*?)"', str(refused.value))
  flags, _ = cli.parse(module, ["--config", form])
  assert flags.config.edits.to_dict() == {"mine": {"edit": "noise_at", "mode": "add"}}


def test_the_help_of_run_lists_the_studies(call):
  said = " ".join(call("run", "--help")[1].split())
  for name, study in EXPERIMENTS.items():
    assert f"{name} {study.question}" in said


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_the_help_of_a_study_has_its_question_and_its_options(call, name):
  out, study = call("run", name, "--help")[1], EXPERIMENTS[name]
  assert f"{name}: {study.question}" in " ".join(out.split())
  for key, value in study.options.items():
    assert f"\n  {key}={value!r}\n" in out
  assert ("It has no options of its own." in out) == (not study.options)


def test_run_without_a_name_lists_the_studies(refuses):
  said = refuses("run", "--out=x")
  assert all(name in said for name in EXPERIMENTS)


@pytest.mark.parametrize("command", ["run", "sweep", "evaluate", "sample"])
def test_help_says_where_a_command_goes_on_in_its_folder(call, command):
  (line,) = re.findall(r"^  --out .*$", call(command, "--help")[1], re.MULTILINE)
  assert ("which goes on there" in line) == (command != "sample")


def options_of(out):
  return set(re.findall(r"^  --([\w-]+) ", out.partition("options:\n")[2], re.MULTILINE))


@pytest.mark.parametrize("word", list(vbvr.COMMANDS))
def test_the_help_of_a_word_of_vbvr_has_the_options_that_it_takes(call, word):
  every = call("vbvr", "--help")[1]
  out = call("vbvr", word, "--help")[1]
  assert options_of(out) == set(vbvr.COMMANDS[word][1])
  assert options_of(out) < options_of(every)
  assert ("--config.KEY" in out) == (word == "generate")
  for name in vbvr.KIT:
    assert re.search(rf"--{name} +score, audit: \w", every)


def test_the_help_of_evaluate_says_whose_interval_is_which(call):
  said = " ".join(call("evaluate", "--help")[1].split())
  assert "shares of a task are exact (Clopper and Pearson), or the bootstrap's where it is" in said
  assert "those of scores, of means over tasks and of differences a bootstrap." in said


def test_help_is_quick_and_imports_no_jax():
  began = time.monotonic()
  said = python("-X", "importtime", "-m", "jax_videoreason", "--help")
  assert time.monotonic() - began < 1.5
  assert said.returncode == 0
  loaded = {line.rsplit("|", 1)[-1].strip() for line in said.stderr.splitlines()}
  assert loaded.isdisjoint({"jax", "numpy", "absl", "ml_collections", "rich"})
  lines = [line.split(maxsplit=1) for line in said.stdout.splitlines()]
  for command, summary in cli.COMMANDS.items():
    assert [command, summary] in lines


def test_no_command_shows_help_and_fails(call):
  status, out, _ = call()
  assert status == 2
  assert "usage: videoreason COMMAND" in out


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_explains_itself(call, command):
  status, out, _ = call(command, "--help")
  assert status == 0
  assert f"videoreason {command}" in out
  _, _, options = out.partition("options:\n")
  assert all(re.match(r"  --[\w.=-]+  +\S", line) for line in options.splitlines() if line)


def test_version(call):
  from jax_videoreason.version import __version__

  assert call("--version") == (0, f"videoreason {__version__}\n", "")


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (("sampel",), "no command 'sampel'; did you mean 'sample'?"),
    (("sample", "--imagee=x"), "Unknown command line flag 'imagee'. Did you mean: image"),
    (("sample", "x.png"), "unexpected word 'x.png'"),
    (("sample",), "--prompt and --out must be given"),
    (("report",), "no folder given"),
    (("report", "nowhere"), "there is no folder nowhere"),
    (("tasks",), "say videoreason tasks export"),
    (("tasks", "export"), "--out must be given"),
    (("tasks", "export", "--out=x", "--tasks=mase"), "no task 'mase'"),
    (("tasks", "export", "--out=x", "--tasks=maze,,pick"), "--tasks=maze,,pick has an empty name"),
    (("tasks", "export", "--out=x", "--split=test"), "no split 'test'"),
    (("tasks", "export", "--out=x", "--cases=0"), "--cases=0"),
    (("tasks", "export", "--out=x", "--frames=16"), "frames=16, wanted 1 + 4k"),
    (("demo", "--tasks=mase"), "no task 'mase'"),
    (("demo", "--tasks=maze, mase"), "no task 'mase'"),
    (("demo", "--tasks=maze,,pick"), "--tasks=maze,,pick has an empty name"),
    (("evaluate", "--out=x", "--tasks=maze,,pick"), "--tasks=maze,,pick has an empty name"),
    (("evaluate", "--out=x", "--tasks="), "--tasks= has an empty name"),
    (("demo", "--out="), "--out is empty, wanted a path"),
    (("sweep", "--status="), "--status is empty, wanted a path"),
    (("report", ""), "DIR is empty, wanted a path"),
    (("vbvr", "table", ""), "RESULT is empty, wanted a path"),
    (("convert", "", "--out=x"), "SRC is empty, wanted a path"),
    (("convert", "x", "--out=x", "--lora="), "--lora is empty, wanted a path"),
    (("convert", "x", "--out=x", "--lora=high="), "--lora is empty, wanted a path"),
    (("tasks", "export", "--out", ""), "--out is empty, wanted a path"),
    (("demo", "--config=minni"), "did you mean 'mini'?"),
    (("demo", "--config.width=64"), "tasks are square"),
  ],
)
def test_a_wrong_word_is_refused(refuses, tmp_path, monkeypatch, words, said):
  monkeypatch.chdir(tmp_path)
  assert said in refuses(*words)
  assert list(tmp_path.iterdir()) == []


GS = "gs://bucket/x"
ADDRESSED = (
  *(("demo", "--out"), ("evaluate", "--out"), ("run", "noise", "--out")),
  *(("tasks", "export", "--out"), ("sweep", "--out"), ("sweep", "--status")),
  *(("report",), ("report", "x", "--checkpoint")),
  *(("sample", "--prompt=x", name) for name in ("--out", "--image", "--noise", "--from")),
  *(("sample", "--prompt=x", "--out=x", name) for name in ("--checkpoint", "--config.checkpoint")),
  *(("vbvr", "generate", "--out=x", name) for name in ("--data", "--out", "--checkpoint")),
  *(("vbvr", "score", "--data=x", name) for name in ("--videos", "--out", "--evalkit")),
  *(("vbvr", "table", "--out=x"), ("vbvr", "baselines", "--data"), ("vbvr", "audit", "--data")),
  *(("plan", "vbvr", "generate", "--data"), ("plan", "--checkpoint")),
  *((*words, "--out=x", "--config") for words in (("evaluate",), ("run", "noise"), ("sweep",))),
  *(("convert", "--out=x"), ("convert", "x", "--out"), ("convert", "x", "--out=x", "--lora")),
)


@pytest.mark.parametrize("words", ADDRESSED)
def test_an_address_in_the_place_of_a_path_is_refused(refuses, tmp_path, monkeypatch, words):
  monkeypatch.chdir(tmp_path)
  said = refuses(*words, GS)
  assert f"{GS} is an address, wanted the path" in said
  assert "mount a bucket as a folder (docs/pods.md)" in said
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "words",
  [
    ("sample", "--prompt=x", "--out=x", "--checkpoint=hf://owner/name"),
    ("convert", "x", "--out=hf://owner/name"),
    ("convert", "hf://owner/name", "--out=x", "--to=diffusers"),
  ],
)
def test_the_hub_is_for_published_weights_alone(refuses, tmp_path, monkeypatch, words):
  monkeypatch.chdir(tmp_path)
  assert "hf://owner/name is an address, wanted the path" in refuses(*words)
  assert list(tmp_path.iterdir()) == []


def test_debug_shows_where(call):
  status, _, err = call("report", "nowhere", "--debug")
  assert status == 2
  assert "Traceback" in err


def test_an_interrupt_is_130_and_no_traceback(call, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(cli, "_dispatch", interrupted)
  assert call("report", "x") == (130, "", "videoreason: interrupted.\n")


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
  def broken(*_):
    raise KeyError("bug")

  monkeypatch.setattr(cli, "_dispatch", broken)
  with pytest.raises(KeyError):
    cli.main(["report", "x"])


def test_a_leading_tilde_is_the_home_folder(call, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path)
  words = ("--tasks=pick", "--cases=1", "--size=32", "--frames=17")
  assert call("tasks", "export", *words, "--out=~/cases")[0] == 0
  assert [item.name for item in tmp_path.iterdir()] == ["home"]
  assert (tmp_path / "home" / "cases").is_dir()


@pytest.mark.parametrize(
  "words",
  [
    ("sweep", "--status=~/x"),
    ("report", "~/x"),
    ("vbvr", "table", "~/x"),
    ("convert", "~/x", "--out=out"),
    ("convert", "src", "--out=out", "--lora=~/x"),
    ("convert", "src", "--out=out", "--lora=high=~/x"),
    ("demo", "--config=mini:checkpoint=~/x"),
    ("demo", "--config.checkpoint=~/x"),
  ],
)
def test_every_path_takes_a_leading_tilde(refuses, tmp_path, monkeypatch, words):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path)
  assert f"{tmp_path / 'home' / 'x'}" in refuses(*words)


# Configs


class Command:
  define = staticmethod(lambda flags: cli.define_config(flags, "mini"))


def configured(*words: str) -> settings.SampleSettings:
  return settings.from_config(cli.resolved(cli.parse(Command, words)[0]))


TWO_SITES = settings.TapSettings(sites=("attn_out", "mlp_out"))


def test_every_shipped_config_is_read_and_documented():
  names = [p.stem for p in (ROOT / "configs").glob("*.py") if p.stem[:2] != "__"]
  names = [name for name in names if name not in ("common", "presets")]
  assert "mini" in names
  for name in names:
    assert configured(f"--config={name}").checkpoint
    assert f"--config {name}" in (ROOT / "configs" / f"{name}.py").read_text()


@pytest.mark.parametrize(
  ("words", "field", "value"),
  [
    ((), "steps", 20),
    (("--config=wan21_i2v_14b:480p",), "shift", 3.0),
    (("--config=wan21_i2v_14b:720p,seeds=2",), "width", 1280),
    (("--config=wan21_i2v_14b:720p,seeds=2",), "shift", 5.0),
    (("--config=wan21_i2v_14b:seeds=2",), "checkpoint", "ckpt/wan21_i2v_14b_480p"),
    (("--config=wan22_t2v_a14b",), "guidance", (4.0, 3.0)),
    (("--config=wan22_i2v_a14b",), "boundary", None),
    (("--config=wan22_ti2v_5b",), "frames", 121),
    (("--config=vbvr_wan22",), "boundary", 0.875),
    (("--config=vbvr_wan22:boundary=0.9",), "boundary", 0.9),
    (("--config", "mini:steps=50,seeds=8"), "seeds", tuple(range(8))),
    (("--config=mini:steps=50", "--config.steps=7"), "steps", 7),
    (("--config.steps", "7"), "steps", 7),
    (("--config=configs/mini.py:solver=unipc",), "solver", "unipc"),
    (("--config=mini:guidance=(4.0,3.0),steps=3",), "guidance", (4.0, 3.0)),
    (("--config.guidance=(4,3)",), "guidance", (4.0, 3.0)),
    (("--config.guidance=1",), "guidance", (1.0,)),
    (("--config.guidance=4,3",), "guidance", (4.0, 3.0)),
    (("--config.boundary=0.9",), "boundary", 0.9),
    (("--config=mini:seeds=(3,5),steps=3",), "seeds", (3, 5)),
    (("--config=mini:seeds=(3,5)", "--config.seeds=2"), "seeds", (0, 1)),
    (("--config.seeds", "2"), "seeds", (0, 1)),
    (("--config.seeds=3,5",), "seeds", (3, 5)),
    (("--config.negative_prompt=dull, grey",), "negative_prompt", "dull, grey"),
    (("--config.taps.sites=('attn_out',)",), "taps", settings.TapSettings(sites=("attn_out",))),
    (("--config=mini:taps.layers=(1,2)",), "taps", settings.TapSettings(layers=(1, 2))),
    (("--config=mini:taps.layers=[1,2],steps=3",), "taps", settings.TapSettings(layers=(1, 2))),
    (("--config=mini:guidance=1.0",), "guidance", (1.0,)),
    (("--config=mini:taps.sites=attn_out",), "taps", settings.TapSettings(sites=("attn_out",))),
    (("--config=mini:taps.layers=3,steps=3",), "taps", settings.TapSettings(layers=(3,))),
    (("--config=mini:taps.sites=(attn_out,mlp_out),steps=3",), "taps", TWO_SITES),
    (("--config=mini:taps.sites=['attn_out',mlp_out]",), "taps", TWO_SITES),
    (("--config.taps.sites=attn_out,mlp_out",), "taps", TWO_SITES),
    (("--config.taps.sites", "(attn_out, mlp_out)"), "taps", TWO_SITES),
    (("--config.taps.sites=attn_out", "--config.taps.sites=mlp_out"), "taps", TWO_SITES),
    (("--config=mini:taps.layers=None",), "taps", settings.TapSettings()),
    (("--config=mini:negative_prompt='a, b',steps=3",), "negative_prompt", "a, b"),
    (("--config=mini:negative_prompt='a, (b',steps=3",), "steps", 3),
    (("--config=mini:negative_prompt=don't (blur),steps=3",), "negative_prompt", "don't (blur)"),
    (("--config=mini:negative_prompt=(dull, grey)",), "negative_prompt", "(dull, grey)"),
    (("--checkpoint=some/folder",), "checkpoint", "some/folder"),
  ],
)
def test_a_config_takes_an_argument_and_overrides(monkeypatch, words, field, value):
  monkeypatch.chdir(ROOT)
  assert getattr(configured(*words), field) == value


def test_an_argument_takes_one_value_for_a_tuple_and_nested_brackets():
  assert cli.load_config("seeds_mini:tasks=maze").tasks == ("maze",)
  assert cli.load_config("seeds_mini:tasks=(maze, pick),cases=2").tasks == ("maze", "pick")
  edits = "edits={'a':{'edit':'noise_at','steps':(1,2),'frames':(0,1)},'none':{'edit':'none'}}"
  assert list(cli.load_config(f"seeds_mini:{edits},cases=2").edits) == ["a", "none"]


@pytest.mark.parametrize(
  ("command", "words", "wanted"),
  [
    ("run", ("noise", "--config=mini:steps=6,cases=5"), {"steps": 6, "cases": 5}),
    ("run", ("all", "--config", "mini:cases=5", "--config.steps=6"), {"steps": 6, "cases": 5}),
    ("run", ("noise", "--config=mini:experiment.stride=5"), {"experiment.stride": 5}),
    ("run", ("noise", "--config=wan21_i2v_14b:480p,cases=5"), {"shift": 3.0, "cases": 5}),
    ("sweep", ("--config=mini:tasks=maze,unit=4",), {"tasks": ("maze",), "unit": 4}),
    ("plan", ("sweep", "--config=mini:cases=5"), {"cases": 5}),
  ],
)
def test_the_argument_of_a_config_sets_keys_that_the_command_adds(command, words, wanted):
  module = importlib.import_module(f"jax_videoreason.cli.{command}")
  flags, _ = cli.parse(module, words)
  for key, value in wanted.items():
    place, last = common.place_of(flags.config, key)
    assert place[last] == value


@pytest.mark.parametrize(
  ("argument", "said"),
  [
    ("cases=many", "config mini:cases=many: cases=many: wanted a value of type int"),
    ("experiment.strid=3", "config mini has no key 'experiment.strid'; did you mean"),
    ("cases=3,stepz=3", "config mini has no key 'stepz'; did you mean 'steps'?"),
    ("case=8", "config mini has no key 'case'; did you mean 'cases'?"),
    ("steps=3,case=8", "config mini has no key 'case'; did you mean 'cases'?"),
    ("cases=3,task=(maze)", "config mini has no key 'task'; did you mean 'tasks'?"),
  ],
)
def test_a_wrong_key_that_a_command_might_add_is_refused(argument, said):
  module = importlib.import_module("jax_videoreason.cli.run")
  with pytest.raises(cli.UsageError, match=re.escape(said)):
    cli.parse(module, ["noise", f"--config=mini:{argument}"])


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (("--config.stepz=3",), "config mini has no key 'stepz'; did you mean 'steps'?"),
    (("--config=mini:stepz=3",), "config mini has no key 'stepz'; did you mean 'steps'?"),
    (("--config=mini:steps.foo=3",), "has no key 'steps.foo'; did you mean 'steps'?"),
    (("--config=mini:steps",), "argument 'steps', wanted key=value"),
    (("--config=mini:taps.sites=attn_out,mlp_out",), "in brackets, as key=(one,two)"),
    (("--config=mini:seeds=many",), "seeds='many', wanted a whole number"),
    (("--config=mini:checkpoint=",), "checkpoint of the config is empty, wanted a path"),
    (("--config.checkpoint=",), "checkpoint of the config is empty, wanted a path"),
    (("--config.steps",), "Missing value for flag --config.steps"),
    (("--config=mini:steps=many",), "wanted a value of type int"),
    (("--config=mini:=3",), """config mini:=3: argument '=3' has no key before "=\""""),
    (("--config.steps=many",), "--config.steps=many"),
    (("--config=",), "--config wants a path or a shipped name"),
    (("--config=setup.cfg",), "a config ends in .py"),
    (("--config.solver=eular",), "wanted one of euler, unipc"),
    (("--config.taps.sites=('resid_mid',)",), "wanted one of resid_pre"),
  ],
)
def test_a_wrong_config_is_refused_with_the_nearest_right_one(monkeypatch, words, said):
  monkeypatch.chdir(ROOT)
  with pytest.raises(ValueError) as caught:
    configured(*words)
  assert said in str(caught.value)


OWN = "from jax_videoreason.configs import mini\ndef get_config"
MINI = "  c = mini.get_config()\n"


@pytest.mark.parametrize(
  ("source", "said"),
  [
    ("def get_config(argument=None):\n  return 3\n", "returned int, wanted a ConfigDict"),
    ("x = (\n", "was never closed"),
    ("x = 3\n", "own.py has no get_config: define one"),
    ("import os\nx = os.environ['NOPE_X']\n", "own.py: KeyError: NOPE_X"),
    (f"{OWN}(argument=None):\n  return {{}}['x']\n", "own.py: KeyError: x"),
    (f"{OWN}(argument=None):\n  return stepz\n", "own.py: NameError: name 'stepz' is not defined"),
    ("raise ValueError()\n", "own.py: ValueError"),
    ("import sys\nsys.exit()\n", "own.py calls sys.exit: take that out"),
    (f"{OWN}():\n  raise SystemExit(0)\n", "own.py calls sys.exit: take that out"),
    (f"{OWN}():\n  return 1 / 0\n", "own.py: ZeroDivisionError: division by zero"),
    (f"{OWN}():\n{MINI}  c.stepz = 4\n", "own.py has no key 'stepz'; did you mean 'steps'?"),
    (f"{OWN}():\n{MINI}  c.taps.xyz = 4\n", "own.py has no key 'xyz'; it takes no new ones"),
  ],
)
def test_a_broken_config_file_is_refused(tmp_path, source, said):
  path = tmp_path / "own.py"
  path.write_text(source)
  with pytest.raises(cli.UsageError) as caught:
    configured(f"--config={path}")
  assert said in str(caught.value)
  assert len(str(caught.value)) < 200 + len(str(path))


def test_a_config_may_leave_the_checkpoint_to_the_command_line(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(
    "from jax_videoreason.configs import common\ndef get_config():\n  return common.sample()\n"
  )
  for words in ([f"--config={path}"], ["--config=mini:checkpoint=None"]):
    with pytest.raises(cli.UsageError, match="names no checkpoint: give --checkpoint, or set"):
      configured(*words)
    assert configured(*words, "--checkpoint=mini").checkpoint == "mini"


def test_get_config_needs_no_parameter(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(f"{OWN}():\n{MINI}  c.steps = 4\n  return c\n")
  assert configured(f"--config={path}").steps == 4
  with pytest.raises(cli.UsageError, match="takes no argument, 'steps=3' was given"):
    configured(f"--config={path}:steps=3")


def test_a_fault_of_a_config_file_is_not_laid_on_its_argument(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(f"{OWN}(argument=None):\n  return {{}}['NOPE']\n")
  with pytest.raises(cli.UsageError, match="KeyError: NOPE"):
    configured(f"--config={path}:steps=3")


# sample


@pytest.fixture(scope="session")
def sampled(bundle_dir, tmp_path_factory) -> Path:
  """A run folder made by `sample` with taps, in pieces and batches."""
  place = tmp_path_factory.mktemp("sampled")
  media.write_png(place / "frame.png", np.full((16, 16, 3), 90, np.uint8))
  status = cli.main(
    [
      "sample",
      f"--checkpoint={bundle_dir}",
      *SMALL,
      f"--image={place / 'frame.png'}",
      f"--prompt={PROMPT}",
      "--seeds=0,5,2",
      "--config.taps.sites=('attn_out', 'resid_post')",
      "--config.batch=2",
      "--config.piece=1",
      f"--out={place / 'run'}",
    ]
  )
  assert status == 0
  return place / "run"


def test_sample_leaves_a_whole_run_folder(sampled):
  names = {p.name for p in sampled.iterdir()}
  per_run = {
    f"{kind}_{r}.{end}" for r in range(3) for kind, end in (("video", "mp4"), ("x0", "png"))
  }
  assert (
    per_run
    | {
      "manifest.json",
      "runs.json",
      "final_latents.npy",
      "trace.zarr",
      "report.html",
    }
    <= names
  )
  run = open_run(sampled)
  run.verify()
  assert run.final_latents.shape == (3, *LATENTS)
  assert run.x0 is not None
  assert run.x0.shape == (3, 3, *LATENTS)
  assert np.array_equal(run.x0[-1], run.final_latents)
  assert [r["seed"] for r in run.runs] == [0, 5, 2]
  assert run.finite.all()
  assert run.taps["attn_out/norm"].shape[:4] == (3, 2, 1, 3)
  assert run.frames is not None
  assert run.frames.shape == (3, 3, 5, 16, 16, 3)
  assert run.answers is None


def test_a_video_has_the_frame_rate_of_its_model(call, sample_words, tmp_path, monkeypatch):
  asked = []

  def fps(_, latents):
    asked.append(latents)
    return 24

  monkeypatch.setattr(Family, "fps", fps)
  assert call(*sample_words)[0] == 0
  for number in (0, 1):
    assert media.read_mp4(tmp_path / "run" / f"video_{number}.mp4")[1] == 24
  assert asked == [LatentSpec(channels=4, stride=(4, 4, 4))]


def test_the_manifest_says_how_to_do_it_again(sampled, bundle_dir):
  manifest = json.loads((sampled / "manifest.json").read_text())
  chosen = settings.from_config(manifest["config"])
  assert chosen.seeds == (0, 5, 2)
  assert (chosen.steps, chosen.piece, chosen.batch) == (3, 1, 2)
  assert chosen.checkpoint == str(bundle_dir)
  assert manifest["command"][0] == "videoreason"
  assert manifest["model"] == "tiny"
  assert manifest["evaluations"] == 3 * 4 * 2  # the second batch is filled up
  assert manifest["device"]
  assert {"jax", "jax_videoreason", "python"} <= manifest["versions"].keys()


def test_report_draws_again(call, sampled):
  page = sampled / "report.html"
  before = page.read_bytes()
  page.unlink()
  status, out, _ = call("report", sampled)
  assert status == 0
  assert page.read_bytes() == before
  assert page.resolve().as_uri() in out


@pytest.mark.slow
def test_noise_fed_in_is_noise_drawn(call, sampled, sample_words, tmp_path):
  latents = open_run(sampled).latents
  assert latents is not None
  np.save(tmp_path / "noise.npy", latents[0][:2])
  status, _, _ = call(*sample_words, f"--noise={tmp_path / 'noise.npy'}", "--seeds=8,9")
  assert status == 0
  given = open_run(tmp_path / "run").final_latents
  np.testing.assert_allclose(given, open_run(sampled).final_latents[:2], atol=1e-5)


@pytest.mark.slow
def test_taps_of_some_steps_and_layers_are_those_of_all(call, sampled, sample_words, tmp_path):
  status, _, err = call(
    *sample_words,
    "--config.taps.sites=('attn_out',)",
    "--config.taps.steps=(0, 2)",
    "--config.taps.layers=(1,)",
    "--config.piece=1",
    "--seeds=0,5",
  )
  assert status == 0, err
  some, every = (open_run(d).taps["attn_out/norm"] for d in (tmp_path / "run", sampled))
  assert some.steps == [0, 2]
  wanted = np.stack([every[0][1:], every[2][1:]])[..., :2, :]
  np.testing.assert_allclose(some[:], wanted, rtol=1e-5)


@pytest.mark.slow
def test_one_expert_in_memory_leaves_the_run_of_both(
  call, sample_words, two_experts, tmp_path, monkeypatch
):
  load, asked, alive = checkpoint.load, [], []

  def watched(where, parts=None, *more, **options):
    experts = [part for part in parts or () if part.startswith("dit")]
    asked.extend(experts)
    # a cycle through a traceback, say, would keep the one before
    assert not experts or not any(leaf() is not None for leaf in alive)
    bundle = load(where, parts, *more, **options)
    alive.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(bundle.params))
    return bundle

  monkeypatch.setattr(checkpoint, "load", watched)
  words = [*sample_words, f"--checkpoint={two_experts}", "--config.taps.sites=('attn_out',)"]
  words += ["--config.steps=4", "--config.piece=2", "--config.batch=1"]
  assert call(*words, f"--out={tmp_path / 'both'}")[0] == 0
  assert asked == ["dit"]
  leaves = len(alive)
  one_by_one = [*words, "--experts=1", "--sequential", f"--out={tmp_path / 'one'}"]
  assert call(*one_by_one)[0] == 0
  assert asked == ["dit", "dit_0", "dit_1"]
  assert len(alive) == 2 * leaves
  both, one = open_run(tmp_path / "both"), open_run(tmp_path / "one")
  one.verify()
  assert sorted(p.name for p in one.path.iterdir()) == sorted(p.name for p in both.path.iterdir())
  assert both.finite.all()
  for name in ("final_latents", "sigma", "finite"):
    np.testing.assert_allclose(getattr(one, name), getattr(both, name), atol=1e-5)
  for name in ("latents", "x0"):
    np.testing.assert_allclose(getattr(one, name)[:], getattr(both, name)[:], atol=1e-5)
  stored, wanted = (run.taps["attn_out/norm"][:] for run in (one, both))
  np.testing.assert_allclose(stored, wanted, rtol=1e-4)


def test_more_experts_than_a_model_has_are_refused(call, sample_words, tmp_path):
  status, _, error = call(*sample_words, "--experts=2", f"--out={tmp_path / 'run'}")
  assert status == 2
  assert "--experts=2 of a model of 1 expert: leave it out" in error
  assert not (tmp_path / "run").exists()


def test_a_boundary_of_one_expert_is_refused_before_any_work(call, sample_words, tmp_path):
  for words in (sample_words, ("evaluate",), ("run", "noise"), ("sweep",)):
    given = ("--config=mini:boundary=0.5", f"--out={tmp_path / 'out'}")
    status, _, error = call(*words, *given)
    assert status == 2
    assert "which has one expert, wanted None: leave it out" in error
    assert not (tmp_path / "out").exists()


def test_a_sample_decodes_without_the_dit_and_on_the_devices_of_its_mesh(
  call, sample_words, tmp_path, monkeypatch
):
  load, inner, weights, seen = checkpoint.load, decoding.decode, [], []

  def watched(where, parts=None, **options):
    bundle = load(where, parts, **options)
    if parts == ("dit",):
      weights.extend(map(weakref.ref, jax.tree.leaves(bundle.params)))
    return bundle

  def decoded(*args, mesh, **options):
    seen.append((sum(leaf() is not None for leaf in weights), mesh.size))
    return inner(*args, mesh=mesh, **options)

  monkeypatch.setattr(checkpoint, "load", watched)
  monkeypatch.setattr(decoding, "decode", decoded)
  words = [*sample_words, "--config.steps=2", "--mesh=seed=2", f"--out={tmp_path / 'run'}"]
  assert call(*words)[0] == 0
  assert weights
  assert seen == 3 * [(0, 2)]  # x0 of both steps, and the video


@pytest.mark.parametrize(
  ("config", "runs", "shown"),
  [
    ("mini", 6, list(range(20))),
    ("mini:steps=5", 10**6, [0, 1, 2, 3, 4]),
    ("vbvr_wan22", 1, [0, 7, 14, 21, 28, 35, 42, 49]),
    ("wan22_ti2v_5b", 4, [0, 7, 14, 21, 28, 35, 42, 49]),
    ("wan21_i2v_14b:480p", 2, [0, 6, 11, 17, 22, 28, 33, 39]),
  ],
)
def test_x0_is_shown_at_eight_steps_at_least(config, runs, shown):
  assert sample.shown_steps(configured(f"--config={config}"), runs) == shown


def test_x0_is_decoded_at_the_steps_to_keep_and_the_last(call, refuses, sample_words, tmp_path):
  for steps, wanted in (("3", "steps below 3."), ("a", "numbers as 0,1,2."), ("1,1", "numbers in")):
    said = refuses(*sample_words, f"--keep-steps={steps}")
    assert f"--keep-steps={steps}, wanted {wanted}" in said
  assert not (tmp_path / "run").exists()
  assert call(*sample_words, "--keep-steps=1")[0] == 0
  run = open_run(tmp_path / "run")
  assert run.frames is not None and run.x0 is not None
  assert run.frames.steps == [1, 2] and run.frames.shape[:2] == (2, 2)
  assert run.x0.shape[0] == 3  # which are all kept
  words = ("--step=2", "--keep-steps=0")
  branch = branched(call, run.path, tmp_path / "branch", *words)
  assert branch.frames is not None and branch.frames.steps == [0, 2]


# A sample that can't be decoded


def faulty(monkeypatch, error, *, at):
  """Lets decoding fail at its call number `at`, once; returns the options of all calls."""
  inner, asked = decoding.decode, []

  def decoded(*args, **options):
    asked.append(options)
    if len(asked) == at:
      raise error
    return inner(*args, **options)

  monkeypatch.setattr(decoding, "decode", decoded)
  return asked


FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")


def denoised_alone(out: Path) -> dict[str, bytes]:
  """The files of a folder that is denoised and no more, after a look at what it holds."""
  run = open_run(out)
  run.verify()
  assert run.undecoded == [0, 1, 2]
  assert run.final_latents.shape == (2, *LATENTS)
  assert run.x0 is not None and np.array_equal(run.x0[-1], run.final_latents)
  assert run.frames is None and run.video(0) is None
  wanted = {"manifest.json", "runs.json", "final_latents.npy", "trace.zarr"}
  assert {p.name for p in out.iterdir()} == wanted | {"first_0.png", "first_1.png"}
  return {str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_what_was_denoised_outlives_a_device_that_is_too_small(
  call, refuses, sample_words, bundle_dir, tmp_path, monkeypatch
):
  out = tmp_path / "run"
  asked = faulty(monkeypatch, FULL, at=4)  # the video, when all steps are done
  said = refuses(*sample_words)
  assert f"out of memory while decoding, what was denoised stays in {out}" in said
  assert f"`videoreason report {out} --tiles=diffusers`" in said
  assert "--config.tiles=diffusers" in said
  before = denoised_alone(out)

  said = refuses(*sample_words)  # it is not lost by the same command
  assert f"is denoised and not decoded: `videoreason report {out}` makes its videos" in said
  assert {str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()} == before

  manifest = (out / "manifest.json").read_text()
  other = {**records.read_mapping(out / "manifest.json"), "weights": "0" * 64}
  records.write_json(out / "manifest.json", records.sealed(other))
  assert f"{bundle_dir} holds other weights than those that made {out}" in refuses("report", out)
  (out / "manifest.json").write_text(manifest)

  assert call("report", out, "--tiles=diffusers")[0] == 0
  assert [options["tiles"] for options in asked] == 4 * [None] + 4 * ["diffusers"]
  run = open_run(out)
  run.verify()
  assert run.undecoded is None and run.manifest["decoded_in"] == "diffusers"
  assert run.manifest["config"]["tiles"] is None  # those that the first frame was encoded in
  assert "--tiles is for a run that is not decoded" in refuses("report", out, "--tiles=diffusers")


def test_a_run_decoded_later_is_the_same_run(call, sample_words, tmp_path, monkeypatch):
  assert call(*sample_words)[0] == 0
  whole, late = open_run(tmp_path / "run"), tmp_path / "late"
  faulty(monkeypatch, KeyboardInterrupt(), at=2)
  status, _, err = call(*sample_words, f"--out={late}")
  assert (status, err.splitlines()[-1]) == (130, "videoreason: interrupted.")
  denoised_alone(late)
  assert call("report", late)[0] == 0
  found = open_run(late)
  found.verify()
  assert found.manifest["files"] == whole.manifest["files"]
  assert {p.name for p in late.iterdir()} == {p.name for p in whole.path.iterdir()}


@pytest.mark.slow
def test_a_run_that_is_not_decoded_can_be_branched_and_replaced(
  call, refuses, sample_words, tmp_path, monkeypatch
):
  out = tmp_path / "run"
  faulty(monkeypatch, FULL, at=1)
  refuses(*sample_words)
  whole = open_run(out)
  branch = branched(call, out, tmp_path / "branch", "--step=2")
  np.testing.assert_allclose(branch.final_latents, whole.final_latents, atol=1e-5)
  assert branch.undecoded is None and branch.frames is not None
  assert call(*sample_words, "--redo")[0] == 0
  assert open_run(out).undecoded is None


def test_a_full_disk_at_the_videos_leaves_what_was_denoised(
  call, refuses, sample_words, tmp_path, monkeypatch
):
  out, write = tmp_path / "run", media.write_mp4

  def full(path, *more, **options):
    if Path(path).name == "video_1.mp4":
      with folders.disk(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    write(path, *more, **options)

  monkeypatch.setattr(media, "write_mp4", full)
  said = refuses(*sample_words)
  assert f"{out} could not be written (No space left on device): free some space" in said
  assert f"when that is mended, `videoreason report {out}` goes on" in said
  denoised_alone(out)
  monkeypatch.undo()
  assert call("report", out)[0] == 0
  assert open_run(out).video(1)


def test_a_run_that_was_damaged_meanwhile_is_not_decoded(
  call, refuses, sample_words, bundle_dir, tmp_path, monkeypatch
):
  out = tmp_path / "run"
  faulty(monkeypatch, FULL, at=1)
  refuses(*sample_words)
  denoised_alone(out)
  kept = out / "trace.zarr" / "x0"
  chunk, other, *_ = (p for p in kept.rglob("*") if p.is_file() and p.suffix != ".json")
  before, runs = chunk.read_bytes(), (out / "runs.json").read_text()

  chunk.write_bytes(other.read_bytes())
  said = refuses("report", out)
  assert "trace.zarr" in said and f"what was denoised stays in {out}" in said
  assert open_run(out).undecoded == [0, 1, 2]
  chunk.write_bytes(before)

  asked = faulty(monkeypatch, FULL, at=99)
  changed = [{**run, "task": "odd_one:OddOne"} for run in json.loads(runs)]
  with records.rewriting(out, "runs.json"):
    records.write_json(out / "runs.json", changed)
  assert "No module named 'odd_one'" in refuses("report", out)
  assert not asked  # before anything is decoded
  with records.rewriting(out, "runs.json"):
    records.write_json(out / "runs.json", json.loads(runs))

  assert call("report", out, f"--checkpoint={bundle_dir}")[0] == 0
  manifest = open_run(out).manifest
  assert manifest["decoded_by_weights"] == manifest["weights"]


def test_a_run_is_decoded_when_its_manifest_says_so(
  call, refuses, sample_words, tmp_path, monkeypatch
):
  out = tmp_path / "run"

  def stopped(path, *_):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))

  record = sample.record

  def recorded(*args, **options):
    made = record(*args, **options)
    monkeypatch.setattr(store, "write_json", stopped)  # after all files are in their places
    return made

  monkeypatch.setattr(sample, "record", recorded)
  refuses(*sample_words)
  assert (out / "video_1.mp4").exists() and (out / "trace.zarr" / "frames").exists()
  assert open_run(out).undecoded == [0, 1, 2]
  monkeypatch.undo()
  assert call("report", out)[0] == 0
  open_run(out).verify()
  assert not (out / folders.STAGE).exists()


# sample --from


def branched(call, place, out, *words):
  status, _, err = call("sample", f"--from={place}", *words, f"--out={out}")
  assert status == 0, err
  return open_run(out)


def test_a_branch_without_an_edit_is_the_rest_of_the_run(call, sampled, tmp_path):
  whole = open_run(sampled)
  again = branched(call, sampled / "trace.zarr", tmp_path / "again", "--step=1")
  np.testing.assert_allclose(again.final_latents, whole.final_latents, atol=1e-5)
  assert again.latents is not None and whole.latents is not None
  np.testing.assert_allclose(again.latents[:], whole.latents[:], atol=1e-5)
  for name, taps in whole.taps.items():
    np.testing.assert_allclose(again.taps[name][:], taps[:], atol=1e-4)
  assert [run["seed"] for run in again.runs] == [0, 5, 2]
  assert again.manifest["branch"] == {
    "from": str(sampled), "step": 1, "intervene": {"edit": "none"}, "of": None
  }  # fmt: skip
  assert again.manifest["evaluations"] == whole.manifest["evaluations"] * 2 // 3


@pytest.mark.slow
def test_a_branch_changes_what_comes_after_its_step_alone(call, sampled, tmp_path):
  whole = open_run(sampled)
  words = ("--step=1", "--intervene=noise_at:mode=add_sigma,gain=0.5")
  other = branched(call, sampled, tmp_path / "other", *words)
  assert other.x0 is not None and whole.x0 is not None
  np.testing.assert_array_equal(other.x0[0], whole.x0[0])
  assert (np.abs(other.x0[1] - whole.x0[1]).max(axis=(1, 2, 3, 4)) > 0.05).all()
  said = {"edit": "noise_at", "mode": "add_sigma", "gain": 0.5, "steps": [1, 2]}
  assert other.manifest["branch"]["intervene"] == said
  assert branched(call, sampled, tmp_path / "third", *words).final_latents == pytest.approx(
    other.final_latents, abs=1e-6
  )


BAD_BRANCHES = {
  "no step": ([], "--step must be given"),
  "step outside": (["--step=3"], "--step=3 is not in"),
  "unknown edit": (["--step=1", "--intervene=noise:mode=add"], "no edit 'noise'; did you mean"),
  "unknown key": (["--step=1", "--intervene=noise_at:gian=1"], "takes no 'gian'; did you mean"),
  "steps before": (
    ["--step=1", "--intervene=noise_at:mode=replace,steps=0:2"],
    "steps begin at 0, before --step=1",
  ),
  "steps of no number": (
    ["--step=1", "--intervene=noise_at:steps=a"],
    "wanted an index or from:to",
  ),
  "frame outside": (["--step=1", "--intervene=noise_at:mode=replace,frames=9"], "frames=9:10"),
  "layer outside": (["--step=1", "--intervene=ablate:sites=attn_out,layers=5"], "layers=5:6"),
  "head outside": (["--step=1", "--intervene=ablate:sites=attn_heads,heads=9"], "heads=9:10"),
  "heads elsewhere": (
    ["--step=1", "--intervene=ablate:sites=mlp_out,heads=0"],
    "heads are named and there are none at mlp_out",
  ),
  "unknown site": (["--step=1", "--intervene=ablate:sites=attention"], "no site 'attention'"),
  "unknown mode": (["--step=1", "--intervene=noise_at:mode=more"], "no noise mode 'more'"),
  "unknown site later": (
    ["--step=1", "--intervene=ablate:sites=attn_out+mlp"],
    "--intervene=ablate:sites=attn_out+mlp: no site 'mlp'",
  ),
  "sites in brackets": (
    ["--step=1", "--intervene=ablate:sites=('attn_out','mlp_out')"],
    "several sites are joined by +, as sites=attn_out+mlp_out",
  ),
  "no mode": (["--step=1", "--intervene=noise_at"], "noise_at: noise_at needs mode, of replace"),
  "no sites": (["--step=1", "--intervene=ablate:gate=0"], "ablate needs sites, of resid_pre"),
  "gain that is not finite": (
    ["--step=1", "--intervene=noise_at:mode=add,gain=nan"],
    "gain='nan', wanted a finite number",
  ),
  "gate that is no number": (
    ["--step=1", "--intervene=ablate:sites=attn_out,gate={}"],
    "gate={}, wanted a finite number",
  ),
  "gate that is no literal": (
    ["--step=1", "--intervene=ablate:sites=attn_out,gate={{}}"],
    "gate='{{}}', wanted a finite number",
  ),
  "a key twice": (
    ["--step=1", "--intervene=noise_at:mode=add,mode=replace"],
    "mode is given twice, wanted once",
  ),
  "asked again": (["--step=1", "--prompt=x"], "--prompt has no meaning with --from"),
  "another config": (["--step=1", "--config=mini"], "--config has no meaning with --from"),
  "a config in two words": (["--step=1", "--config", "mini"], "--config has no meaning with"),
  "another key": (["--step=1", "--config.steps=3"], "--config.steps has no meaning with --from"),
  "a key below": (["--step=1", "--config.taps.sites=()"], "--config.taps.sites has no meaning"),
  "another fit": (["--step=1", "--fit=exact"], "--fit has no meaning with --from"),
}


@pytest.mark.parametrize("fault", list(BAD_BRANCHES))
def test_a_bad_branch_is_one_sentence_before_weights_are_loaded(
  refuses, sampled, tmp_path, monkeypatch, fault
):
  monkeypatch.delattr(checkpoint, "load")
  words, said = BAD_BRANCHES[fault]
  assert said in refuses("sample", f"--from={sampled}", *words, f"--out={tmp_path / 'run'}")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_branch_of_a_branch_does_not_lose_an_edit(call, refuses, sampled, tmp_path):
  edit = "--intervene=noise_at:mode=add,gain=0.5"
  edited = branched(call, sampled, tmp_path / "edited", "--step=1", edit)
  later = branched(call, edited.path, tmp_path / "later", "--step=2")
  np.testing.assert_allclose(later.final_latents, edited.final_latents, atol=1e-5)
  assert later.manifest["branch"]["of"] == edited.manifest["branch"]
  for place in (edited.path, later.path):
    for step in (0, 1):
      said = refuses("sample", f"--from={place}", f"--step={step}", f"--out={tmp_path / 'lost'}")
      assert f"{place} was edited at the steps 1..1, which a branch at --step={step}" in said
      assert f"or --from {sampled}." in said


def test_a_branch_notices_other_weights(call, refuses, sampled, bundle_dir, tmp_path):
  weights = json.loads((sampled / "manifest.json").read_text())["weights"]
  assert weights == bundles.fingerprint(bundle_dir)
  copy = tmp_path / "copy"
  shutil.copytree(sampled, copy)
  manifest = records.read_mapping(copy / "manifest.json")

  def branch_where(changed, *words):
    records.write_json(copy / "manifest.json", records.sealed(changed))
    return ("sample", f"--from={copy}", "--step=2", f"--out={tmp_path / 'run'}", *words)

  other = {**manifest, "weights": "0" * 64}
  said = refuses(*branch_where(other))
  assert f"{bundle_dir} holds other weights than those that made {copy}" in said
  assert f"--checkpoint={bundle_dir}" in said
  assert call(*branch_where(other, f"--checkpoint={bundle_dir}"))[0] == 0
  assert open_run(tmp_path / "run").manifest["weights"] == weights
  del manifest["weights"]
  said = refuses(*branch_where(manifest, f"--checkpoint={bundle_dir}", "--redo"))
  assert "did not keep all that a branch needs: sample it again" in said


def test_a_branch_of_damaged_data_is_refused(refuses, sampled, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(sampled, copy)
  media.write_png(copy / "first_0.png", np.zeros((16, 16, 3), np.uint8))
  said = refuses("sample", f"--from={copy}", "--step=1", f"--out={tmp_path / 'run'}")
  assert "first_0.png differs from its checksum" in said


@pytest.mark.parametrize(
  ("key", "value"), [("steps", 4), ("steps", 1), ("shift", 2.0), ("grid", "diffusers")]
)
def test_a_branch_goes_by_the_settings_that_made_the_stored_steps(
  refuses, sampled, tmp_path, key, value
):
  copy = tmp_path / "copy"
  shutil.copytree(sampled, copy)
  path = copy / "manifest.json"
  manifest = records.read_mapping(path)
  changed = {**manifest, "config": {**manifest["config"], key: value}}
  words = ["sample", f"--from={copy}", "--step=0", f"--out={tmp_path / 'run'}"]
  records.write_json(path, {**json.loads(path.read_text()), **changed})
  assert f"{path} is missing or damaged" in refuses(*words)
  records.write_json(path, changed)  # as an earlier version wrote it
  assert f"{path} is damaged: it asks for the sigmas" in refuses(*words)


@pytest.mark.parametrize("words", [[], ["--redo"]])
def test_a_branch_never_replaces_the_run_it_reads(refuses, sampled, tmp_path, words):
  copy = tmp_path / "copy"
  shutil.copytree(sampled, copy)
  for read in (copy, copy / "trace.zarr"):
    said = refuses("sample", f"--from={read}", "--step=1", f"--out={copy}", *words)
    assert "which is read: choose another --out" in said
  open_run(copy).verify()


def test_a_trace_without_latents_can_not_be_branched(refuses, sampled, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(sampled, copy)
  shutil.rmtree(copy / "trace.zarr" / "latents")
  manifest = records.read_mapping(copy / "manifest.json")
  manifest["arrays"].remove("latents")  # as of a run that kept none
  records.write_json(copy / "manifest.json", manifest)
  said = refuses("sample", f"--from={copy}", "--step=1", f"--out={tmp_path / 'run'}")
  assert "holds no latents, from which a branch starts" in said
  assert "is not a finished run" in refuses(
    "sample", f"--from={tmp_path}", "--step=1", f"--out={tmp_path / 'run'}"
  )
  assert "belong to --from" in refuses("sample", "--step=1", f"--out={tmp_path / 'run'}")


@pytest.mark.slow
def test_an_empty_prompt_is_a_prompt(call, sample_words, tmp_path):
  status, _, err = call(*sample_words, "--prompt=")
  assert status == 0
  assert "warning" not in err
  assert open_run(tmp_path / "run").runs[0]["prompt"] == ""


@pytest.mark.slow
def test_a_prompt_over_the_limit_is_cut_with_a_warning(call, sample_words, tmp_path):
  status, _, err = call(*sample_words, "--prompt=mark the largest shape mark the largest shape")
  said = [line for line in err.splitlines() if line.startswith("videoreason: warning: ")]
  assert status == 0
  assert len(said) == 1
  assert "reads 6 text tokens" in said[0]
  assert "lost 'the largest shape'" in said[0]


# Bad input of sample; nothing may be left where --out points


def write_bytes(path: Path, data: bytes) -> Path:
  path.write_bytes(data)
  return path


def clear_image(folder: Path) -> Path:
  from PIL import Image

  Image.fromarray(np.zeros((16, 16, 4), np.uint8)).save(folder / "clear.png")
  return folder / "clear.png"


def large_image(folder: Path) -> Path:
  media.write_png(folder / "large.png", np.zeros((20, 24, 3), np.uint8))
  return folder / "large.png"


def saved(folder: Path, array: np.ndarray) -> Path:
  np.save(folder / "noise.npy", array)
  return folder / "noise.npy"


def several(folder: Path) -> Path:
  np.savez(folder / "noise.npz", a=np.zeros((2, *LATENTS), np.float32))
  return folder / "noise.npz"


BAD = {
  "image missing": (lambda d: ["--image=nowhere.png"], "nowhere.png"),
  "image unreadable": (lambda d: [f"--image={write_bytes(d / 'x.png', b'no')}"], "x.png"),
  "image not RGB": (lambda d: [f"--image={clear_image(d)}"], "wanted opaque RGB"),
  "image of another size": (lambda d: [f"--image={large_image(d)}"], "24 x 20 pixels"),
  "size the model can't take": (
    lambda d: [f"--image={large_image(d)}", "--config.width=24", "--config.height=20"],
    "height=20 pixels, wanted a multiple of 8",
  ),
  "frames not 4k+1": (lambda d: ["--config.frames=6"], "frames=6, wanted 1 + 4k"),
  "noise of another shape": (
    lambda d: [f"--noise={saved(d, np.zeros((1, *LATENTS), np.float32))}"],
    "(1, 2, 4, 4, 4), wanted floats of (2, 2, 4, 4, 4)",
  ),
  "noise with NaN": (
    lambda d: [f"--noise={saved(d, np.full((2, *LATENTS), np.nan, np.float32))}"],
    "not finite",
  ),
  "noise of integers": (
    lambda d: [f"--noise={saved(d, np.zeros((2, *LATENTS), int))}"],
    "wanted floats",
  ),
  "noise unreadable": (
    lambda d: [f"--noise={write_bytes(d / 'x.npy', b'no')}"],
    "x.npy is no .npy array",
  ),
  "noise that is several arrays": (
    lambda d: [f"--noise={several(d)}"],
    "noise.npz holds several arrays",
  ),
  "noise missing": (lambda d: ["--noise=nowhere.npy"], "nowhere.npy"),
  "seeds": (lambda d: ["--seeds=a,b"], "--seeds=a,b, wanted whole numbers"),
  "unknown key": (lambda d: ["--config.stepz=3"], "did you mean 'steps'"),
  "unknown site": (lambda d: ["--config.taps.sites=('resid_mid',)"], "wanted one of resid_pre"),
  "unknown solver": (lambda d: ["--config.solver=heun"], "wanted one of euler"),
  "layer that is not there": (
    lambda d: ["--config.taps.sites=('attn_out',)", "--config.taps.layers=(7,)"],
    "7",
  ),
  "taps over the budget": (
    lambda d: [
      "--config.taps.sites=('attn_out',)",
      "--config.taps.reduce=('full',)",
      "--config.taps.budget_gb=0.000001",
    ],
    "the budget is",
  ),
  "no bundle": (lambda d: ["--checkpoint=nowhere"], "no bundle 'nowhere'"),
  "out below a file": (
    lambda d: [f"--out={write_bytes(d / 'file', b'') / 'run'}"],
    "could not be written",
  ),
  "out is a file": (lambda d: [f"--out={write_bytes(d / 'file', b'')}"], "is a file"),
}


@pytest.mark.parametrize("fault", list(BAD))
def test_bad_input_is_one_sentence_and_leaves_nothing(refuses, sample_words, tmp_path, fault):
  words, said = BAD[fault]
  changed = words(tmp_path)
  before = sorted(tmp_path.rglob("*"))
  assert said in refuses(*sample_words, *changed)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_folder_in_use_is_refused_unless_redo(call, refuses, sample_words, tmp_path):
  out = tmp_path / "run"
  out.mkdir()
  (out / "mine.txt").write_text("keep")
  assert "not empty" in refuses(*sample_words)
  assert [p.name for p in out.iterdir()] == ["mine.txt"]
  assert call(*sample_words, "--redo")[0] == 0
  first = open_run(out).final_latents
  assert call(*sample_words, "--redo", "--seeds=7")[0] == 0
  assert open_run(out).final_latents.shape[0] == 1
  assert first.shape[0] == 2
  assert not (out / "video_1.mp4").exists()
  assert (out / "mine.txt").read_text() == "keep"


def test_a_folder_that_may_not_be_written_is_refused(refuses, sample_words, tmp_path, monkeypatch):
  def denied(path, *given, **more):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))

  monkeypatch.setattr(Path, "mkdir", denied)  # a test may run as root, who is denied nothing
  before = sorted(tmp_path.rglob("*"))
  assert f"{tmp_path / 'run'} could not be written (Permission denied)" in refuses(*sample_words)
  assert sorted(tmp_path.rglob("*")) == before


@contextlib.contextmanager
def files_up_to(size: int):
  """A file that may not grow fails as a full disk does, in the middle of the writing.

  Programs compiled meanwhile are not kept for other tests: JAX warns of each that it cannot write.
  """
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


@pytest.mark.parametrize("limit", [300, 900])
def test_a_disk_that_fills_up_leaves_nothing(refuses, sample_words, tmp_path, limit):
  before = sorted(tmp_path.rglob("*"))
  with files_up_to(limit):
    said = refuses(*sample_words)
  assert f"{tmp_path / 'run'} could not be written (File too large): free some space" in said
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("limit", [5, 200, 1000])
def test_a_disk_that_fills_up_leaves_no_case(refuses, tmp_path, limit):
  out = tmp_path / "cases"
  with files_up_to(limit):
    said = refuses("tasks", "export", "--tasks=pick", "--size=32", "--cases=1", f"--out={out}")
  assert f"{out} could not be written (File too large): free some space" in said
  assert not list(tmp_path.iterdir())


def test_a_device_without_memory_is_one_sentence_and_a_bug_is_none(refuses, monkeypatch):
  def fails(text):
    def main(flags, words):
      raise jax.errors.JaxRuntimeError(text)

    return main

  monkeypatch.setattr(report_command, "main", fails("RESOURCE_EXHAUSTED: Out of memory allocating"))
  assert "out of memory: use fewer runs" in refuses("report", "somewhere")
  monkeypatch.setattr(report_command, "main", fails("INTERNAL: something else"))
  with pytest.raises(RuntimeError, match="INTERNAL"):
    refuses("report", "somewhere")


def test_damaged_weights_are_refused(refuses, sample_words, bundle_dir, tmp_path):
  copy = tmp_path / "damaged"
  shutil.copytree(bundle_dir, copy)
  described = records.read_mapping(copy / "bundle.json")
  leaf = next(iter(described["leaves"]["dit_0"].values()))
  leaf["sha256"] = "0" * 64
  (copy / "bundle.json").write_text(json.dumps(described))
  before = sorted(tmp_path.rglob("*"))
  assert "differs from its checksum" in refuses(*sample_words, f"--checkpoint={copy}")
  assert sorted(tmp_path.rglob("*")) == before


def test_a_report_that_fails_does_not_cost_the_run(refuses, sample_words, tmp_path, monkeypatch):
  def full(_):
    raise OSError("No space left on device")

  monkeypatch.setattr(report, "render", full)
  said = refuses(*sample_words)
  assert f"`videoreason report {tmp_path / 'run'}` draws it" in said
  open_run(tmp_path / "run").verify()


def test_a_run_that_is_not_finite_is_told():
  finite = np.ones((4, 3), bool)
  finite[2:, 1] = False
  with pytest.warns(UserWarning, match="run 1 is not finite from step 2 on"):
    sample.warn_broken(finite)


# tasks


def test_tasks_export_writes_the_five_files(call, tmp_path):
  out = tmp_path / "cases"
  status, said, _ = call(
    "tasks", "export", "--tasks=maze,pick", "--split=id", "--cases=2", "--size=32", f"--out={out}"
  )
  assert status == 0
  assert "4 cases" in said
  assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == {
    f"{task}/{index}/{name}"
    for task in ("maze", "pick")
    for index in ("00000", "00001")
    for name in (
      "first_frame.png",
      "final_frame.png",
      "ground_truth.mp4",
      "prompt.txt",
      "metadata.json",
    )
  }
  case = tasks.load("pick", size=32).generate("id", 1)
  folder = out / "pick" / "00001"
  assert np.array_equal(media.read_image(folder / "first_frame.png"), case.first_frame)
  assert (folder / "prompt.txt").read_text() == case.prompt + "\n"
  assert json.loads((folder / "metadata.json").read_text())["answers"] == case.metadata["answers"]


def test_tasks_export_again_needs_redo(call, refuses, tmp_path):
  words = ["tasks", "export", "--tasks=pick", "--size=32", f"--out={tmp_path / 'cases'}"]
  assert call(*words, "--cases=3")[0] == 0
  assert "not empty" in refuses(*words, "--cases=1")
  assert call(*words, "--cases=1", "--redo")[0] == 0
  assert [p.name for p in (tmp_path / "cases" / "pick").iterdir()] == ["00000"]


def test_an_export_is_replaced_as_a_whole_and_takes_a_name_once(call, tmp_path):
  out = tmp_path / "cases"
  words = ["tasks", "export", "--size=32", "--cases=1", f"--out={out}"]
  assert call(*words, "--tasks=maze, pick,maze")[0] == 0
  assert sorted(p.name for p in out.iterdir()) == ["maze", "pick"]
  assert call(*words, "--tasks=maze", "--redo")[0] == 0
  assert [p.name for p in out.iterdir()] == ["maze"]


def test_a_file_of_ones_own_that_is_called_lock_stays(call, refuses, tmp_path):
  mine = tmp_path / "lock"
  mine.write_text("precious")
  words = ["tasks", "export", "--size=32", "--cases=1", "--tasks=pick", f"--out={tmp_path}"]
  assert f"{tmp_path} is not empty (it has lock)" in refuses(*words)
  assert call(*words, "--redo")[0] == 0
  assert mine.read_text() == "precious"


@pytest.mark.parametrize("name", ["maze", "maze/todo.md", "maze/00000/todo.md"])
def test_redo_of_an_export_removes_cases_alone(refuses, tmp_path, name):
  mine = tmp_path / "cases" / name
  mine.parent.mkdir(parents=True)
  mine.write_text("mine")
  words = ["tasks", "export", "--size=32", "--cases=1", "--tasks=pick", "--redo"]
  said = refuses(*words, f"--out={tmp_path / 'cases'}")
  assert f"{mine} is no part of a case, and --redo replaces cases alone" in said
  assert mine.read_text() == "mine"


def test_redo_takes_a_study_that_was_stopped_while_its_files_were_moved(tmp_path):
  from jax_videoreason.cli import run
  from jax_videoreason.folders import STAGE

  for name in ("arrays.zarr", STAGE):
    (tmp_path / name).mkdir()
  run.check_out(tmp_path, redo=True)


def test_a_table_of_all_claims_is_not_put_into_a_sweep(refuses, tmp_path):
  (tmp_path / "sweep.json").touch()
  said = refuses("run", "all", f"--out={tmp_path}")
  assert "holds a sweep, which no set of studies replaces" in said
  assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_taps_of_a_study_over_the_budget_are_refused_before_the_model_is_loaded(
  refuses, tmp_path, monkeypatch
):
  from jax_videoreason.experiments import setting

  monkeypatch.setattr(setting, "load", None)
  words = ["run", "layer_maps", "--config.taps.budget_gb=1e-6", f"--out={tmp_path / 'out'}"]
  assert "the budget is 1e-06: give a smaller --config.batch" in refuses(*words)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["taps.steps", "batch", "boundary"])
def test_none_is_said_alike_in_both_spellings(key):
  from jax_videoreason.cli import sample

  for words in ([f"--config=mini:{key}=None"], [f"--config.{key}=None"]):
    flags, _ = cli.parse(sample, words)
    place = flags.config
    for name in key.split("."):
      place = place[name]
    assert place is None


def test_a_config_file_for_several_studies_gives_each_its_own_options(tmp_path):
  from jax_videoreason.cli import run

  (tmp_path / "mine.py").write_text(
    "from jax_videoreason.configs import mini\n"
    "def get_config(argument=None):\n"
    "  config = mini.get_config(argument)\n"
    "  with config.unlocked():\n"
    "    config.experiment = {'stride': 4}\n"
    "  return config\n"
  )
  words = ["--config", str(tmp_path / "mine.py")]
  asked, _ = cli.parse(run, ["probes", *words])
  assert asked.config.experiment.stride == 4
  asked, _ = cli.parse(run, ["chain_of_steps", *words])
  assert "stride" not in asked.config.experiment


@pytest.mark.parametrize("name", ["figures", "report.html", "manifest.json", "arrays.zarr"])
def test_redo_of_a_study_removes_nothing_that_no_study_wrote(tmp_path, name):
  from jax_videoreason.cli import run

  (tmp_path / name).mkdir()
  with pytest.raises(ValueError, match=f"has {name} and no result.json or chunks, so it holds no"):
    run.check_out(tmp_path, redo=True)
  for mark in ("result.json", "chunks"):
    (tmp_path / mark).mkdir()
    run.check_out(tmp_path, redo=True)
    (tmp_path / mark).rmdir()
  (tmp_path / "sweep.json").touch()
  for redo in (False, True):
    with pytest.raises(ValueError, match="holds a sweep, which no study replaces"):
      run.check_out(tmp_path, redo=redo)


def test_a_file_is_no_folder_for_a_study(tmp_path):
  from jax_videoreason.cli import run

  (tmp_path / "mine").write_text("mine")
  for redo in (False, True):
    with pytest.raises(ValueError, match="mine is a file, wanted a folder: choose another --out"):
      run.check_out(tmp_path / "mine", redo=redo)


@pytest.mark.parametrize(
  ("names", "said"),
  [("maze, mase", "no task 'mase'"), ("pick,bounce", "bounce has no split 'id'")],
)
def test_an_export_checks_all_names_before_a_bar_begins(call, tmp_path, names, said):
  status, _, err = call("tasks", "export", f"--tasks={names}", f"--out={tmp_path / 'x'}")
  assert status == 2
  assert err.startswith(f"videoreason: {said}") and len(err.splitlines()) == 1
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "words", [["--config=mini:steps=2,seeds=4"], ["--config.seeds=4"], ["--config.seeds", "4"]]
)
@pytest.mark.parametrize("command", ["evaluate", "vbvr generate --data=."])
def test_seeds_that_a_command_would_not_use_are_refused(refuses, tmp_path, command, words):
  said = refuses(*command.split(), *words, f"--out={tmp_path / 'out'}")
  assert "seeds of the config is not used here: give --seeds (see --help)" in said
  assert list(tmp_path.iterdir()) == []


def test_tasks_list_names_them_all(call):
  status, out, _ = call("tasks", "list")
  assert status == 0
  assert all(name in out for name in tasks.TASKS)


# demo


@pytest.mark.slow
def test_demo_asks_unseen_cases_of_the_tasks_with_every_seed(call, bundle_dir, tmp_path):
  status, out, _ = call(
    "demo",
    f"--checkpoint={bundle_dir}",
    "--config.steps=2",
    "--config.frames=13",
    "--config.seeds=2",
    "--tasks=pick,maze",
    "--cases=1",
    f"--out={tmp_path / 'demo'}",
  )
  assert status == 0
  run = open_run(tmp_path / "demo")
  assert [(r["task"], r["split"], r["seed"]) for r in run.runs] == [
    ("pick", "id", 0),
    ("pick", "id", 1),
    ("maze", "id", 0),
    ("maze", "id", 1),
  ]
  assert run.answers is not None
  assert run.answers.answer.shape == (2, 4)
  assert "pick 0" in out
  assert (tmp_path / "demo" / "report.html").resolve().as_uri() in out


@pytest.mark.slow
def test_the_demo_takes_less_than_three_minutes(tmp_path):
  began = time.monotonic()
  fresh = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
  said = python("-m", "jax_videoreason", "demo", f"--out={tmp_path / 'demo'}", env=fresh)
  assert said.returncode == 0, said.stderr
  assert time.monotonic() - began < 180
  run = open_run(tmp_path / "demo")
  assert len({r["task"] for r in run.runs}) == 3
  assert len({r["seed"] for r in run.runs}) >= 3


def test_a_table_shows_a_number_that_is_none_as_a_dash(capsys):
  console.table("t", ("name", "value"), [("a", float("nan")), ("b", 0.5)])
  said = capsys.readouterr().out
  assert "nan" not in said
  assert [line.split("│")[2].strip() for line in said.splitlines() if "│" in line] == ["-", "0.50"]


def test_a_table_in_a_file_breaks_no_word_and_one_with_a_width_keeps_it(capsys, monkeypatch):
  heads = [f"measure {i} there, here" for i in range(12)]
  row = [f"0.{i:02d} [0.00, 1.00]" for i in range(12)]
  monkeypatch.delenv("COLUMNS", raising=False)
  console.table("t", heads, [row])
  lines = capsys.readouterr().out.splitlines()
  assert all(any(text in line for line in lines) for text in (*heads, *row))
  monkeypatch.setenv("COLUMNS", "80")
  console.table("t", heads, [row])
  assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


# Memory of a GPU


OURS, OLD, FLAGS = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_FLAGS"


@pytest.mark.parametrize(
  ("said", "wanted"),
  [
    ({}, str(plan.FITS)),
    ({OURS: "0.5"}, "0.5"),
    ({OLD: "0.5"}, None),  # jax refuses both at once
    ({FLAGS: "--xla_gpu_memory_fraction_policy=0.5+"}, None),
  ],
)
def test_jax_may_take_of_a_gpu_what_fits_by_the_plan(call, monkeypatch, said, wanted):
  for name in (OURS, OLD, FLAGS):
    monkeypatch.delenv(name, raising=False)
  for name, value in said.items():
    monkeypatch.setenv(name, value)
  assert call("report", "nowhere")[0] == cli.BAD_INPUT
  assert os.environ.get(OURS) == wanted
