"""Studies that users write: what is wrong with one is said in a sentence, and never scored."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jax_videoreason
import toy
from jax_videoreason import cli, stats
from jax_videoreason.cli import run
from jax_videoreason.experiments import (
  EXPERIMENTS,
  Chunks,
  Claim,
  Result,
  experiment,
  find,
  judge_again,
  perform,
  results,
)
from jax_videoreason.folders import remove
from jax_videoreason.records import write_json
from jax_videoreason.taps import TapSpec

BOTH = ("counterpart", "case")


def study_of(give, *, axes=("run",), **declared):
  """A study that returns `give(ctx)` as the value v, or as it is where that is no array."""

  def own(ctx):
    """A question."""
    made = give(ctx)
    return Result(values={"v": made}, axes={"v": axes}) if isinstance(made, np.ndarray) else made

  return experiment(**{"tasks": "sides", **declared})(own)


def carried_out(study, *, count=3, seeds=(0,), **more):
  return perform(study, toy.setting(seeds=seeds), toy.cases(count), **more)


def named(name, value, axes=()):
  """A study that returns this one value."""
  return study_of(lambda ctx: Result(values={name: value}, axes={name: axes}))


def test_the_runs_of_one_role_are_scored_as_the_study_returned_them():
  study = study_of(lambda ctx: np.arange(ctx.sizes.R)[ctx.runs("case")], runs=BOTH)
  found, _, _ = carried_out(study, seeds=(0, 1))
  assert found.values["v"].tolist() == [[6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize(
  ("study", "said"),
  [
    (
      study_of(lambda ctx: np.zeros(ctx.sizes.R), runs=BOTH),
      "axis run of 'v' has 12 places, wanted 6, one per case and seed: "
      r"take value\[ctx.runs\('case'\)\]",
    ),
    (
      study_of(lambda ctx: np.zeros(ctx.sizes.R), runs=("counterpart", "case"), axes=("case",)),
      "axis case of 'v' has 12 places, wanted 3, one per case: give those of 'case' alone",
    ),
    (study_of(lambda ctx: np.zeros(1)), "axis run of 'v' has 1 places, wanted 6"),
    (study_of(lambda ctx: {"v": 1}), r"own returned dict, wanted Result\(values="),
    (study_of(lambda ctx: None), "own returned NoneType, wanted Result"),
    (
      study_of(lambda ctx: Result(values={}, axes={"u": ("run",)})),
      "axes= names 'u', wanted a value that it returns: none",
    ),
    (
      study_of(lambda ctx: np.zeros(6), zero=("w",)),
      "zero= names 'w', wanted a value that it returns: v",
    ),
    (
      study_of(lambda ctx: Result(values={"v": np.zeros(6)}, axes={"v": ("run",)}, signed=("w",))),
      "signed= names 'w', wanted a value that it returns: v",
    ),
    (
      study_of(lambda ctx: np.zeros((6, 6)), axes=("run", "run")),
      r"own: value 'v' has the axes \('run', 'run'\), wanted each once",
    ),
    (
      study_of(lambda ctx: np.zeros((6, 3)), axes=("run", "case")),
      "'run' becomes 'case' and 'seed'",
    ),
    (
      study_of(lambda ctx: np.zeros((6, 2)), axes=("run", "seed")),
      "'run' becomes 'case' and 'seed'",
    ),
    (
      study_of(lambda ctx: np.full(6, "left")),
      "own: value 'v' has dtype <U4, wanted bool or real numbers; texts can be labels in points=",
    ),
    (
      study_of(lambda ctx: np.full(6, None)),
      "own: value 'v' has dtype object, wanted bool or real",
    ),
    (study_of(lambda ctx: np.zeros(6, complex)), "value 'v' has dtype complex128, wanted bool or"),
    (named("v", None), "value 'v' has dtype object, wanted bool or real numbers"),
    (
      study_of(lambda ctx: np.full(6, None), finish=lambda result: result),
      "value 'v' has dtype object, wanted bool, numbers or texts",
    ),
    (
      study_of(lambda ctx: np.full(6, "left"), finish=lambda result: result),
      "value 'v' has dtype <U4, wanted bool or real numbers",
    ),
    (study_of(lambda ctx: np.zeros(6), finish=lambda result: 3), "own returned int, wanted Result"),
    (
      named("../x", 1.0),
      "own: a value can't be named '../x': choose another name of letters, digits, _ and -",
    ),
    (named("a b", 1.0), "a value can't be named 'a b'"),
    (named("", 1.0), "a value can't be named ''"),
    (named(3, 1.0), "a value can't be named 3"),
    (named("file", 1.0), "a value can't be named 'file'"),
  ],
)
def test_what_a_study_may_not_return_is_refused(study, said):
  with pytest.raises(ValueError, match=said):
    carried_out(study, seeds=(0, 1))


def test_a_value_that_cannot_be_kept_ends_the_first_batch():
  batches = []

  def give(ctx):
    batches.append(ctx.place)
    return np.full(ctx.sizes.R, "left")

  with pytest.raises(ValueError, match="has dtype <U4"):
    carried_out(study_of(give), batch=1)
  assert len(batches) == 1


def test_texts_may_be_what_finish_makes_numbers_of():
  def right(result):
    return Result(values={"right": result.values["v"] == "left"}, axes={"right": ("case", "seed")})

  found, _, _ = carried_out(study_of(lambda ctx: np.full(ctx.sizes.R, "left"), finish=right))
  assert found.values["right"].all()


@pytest.mark.parametrize("value", [np.float64(4), np.int32(4), np.bool_(True), 4, 4.5, True])
def test_a_number_is_kept_and_read_back(tmp_path, value):
  for place in ("fresh", "resumed"):
    chunks = Chunks(folder=tmp_path / "chunks")
    found, record, _ = carried_out(named("n", value), batch=1, chunks=chunks)
    (tmp_path / place).mkdir()
    results.save(tmp_path / place, found, record)
    opened, _ = jax_videoreason.open_study(tmp_path / place)
    assert (opened.axes["n"], opened.values["n"].shape) == ((), ())
    assert opened.values["n"] == value
    assert opened.values["n"].dtype == np.asarray(value).dtype


def test_a_claim_about_a_value_without_cases_ends_the_first_batch():
  batches = []

  def give(ctx):
    batches.append(ctx.place)
    return Result(values={"n": np.asarray(4.0)}, axes={"n": ()})

  claim = Claim(says="s", of="n", statistic="mean", above=0.1)
  with pytest.raises(ValueError, match="n has no axis 'case' to resample"):
    carried_out(study_of(give, claims=[claim]), batch=1)
  assert len(batches) == 1


def test_rows_in_bfloat16_are_the_same_fresh_and_resumed(tmp_path):
  """As taps of a bfloat16 model are."""
  seen = []

  def own(ctx):
    rows = [ctx.once(lambda: np.full(ctx.sizes.R, 1.5, jnp.bfloat16))]
    rows += list(ctx.map(lambda point: {"x": np.full(2, point, jnp.bfloat16)}, [1.5, 2.5])["x"])
    seen.append([(row.dtype, row.tolist()) for row in rows])
    if len(seen) == 1:
      raise KeyboardInterrupt
    return np.zeros(ctx.sizes.R)

  with pytest.raises(KeyboardInterrupt):
    carried_out(study_of(own), chunks=Chunks(folder=tmp_path))
  carried_out(study_of(own), chunks=Chunks(folder=tmp_path))
  assert seen[0] == seen[1]
  assert seen[0][1] == (np.float32, [1.5, 1.5])


def interrupted_once(study, folder):
  """What a study finds whose first call ends in an OSError and whose second goes on behind it."""
  with pytest.raises(OSError, match="the power fails"):
    carried_out(study, chunks=Chunks(folder=folder))
  return carried_out(study, chunks=Chunks(folder=folder))


def failing_once(*places):
  """A function that fails when it is given one of the places for the first time."""
  left = list(places)

  def at(place):
    if place in left:
      left.remove(place)
      raise OSError("the power fails")

  return at


def test_the_same_settings_asked_for_twice_are_two_pieces_of_work(tmp_path):
  fails = failing_once((0.0, 1))

  def own(ctx):
    rows, contexts = [], [ctx.vary(shift=3.0) for _ in range(2)]
    for gate, other in zip((0.5, 0.0), contexts, strict=True):
      rows.append(other.map(lambda point, gate=gate: (fails((gate, point)), gate)[1], [2, 1]))
    rows += [ctx.vary(shift=3.0).once(lambda k=k: [k, k]) for k in (7.0, 8.0)]
    return np.stack(rows)

  study = study_of(own, axes=("gate", "point"))
  found, _, _ = interrupted_once(study, tmp_path)
  assert found.values["v"].tolist() == [[0.5, 0.5], [0.0, 0.0], [7.0, 7.0], [8.0, 8.0]]


@pytest.mark.parametrize("inner", ["once", "map", "vary"])
def test_work_within_a_point_is_that_of_the_point_when_a_study_goes_on(tmp_path, inner):
  fails = failing_once(2)

  def own(ctx):
    varied = ctx.vary(shift=3.0)

    def at(point):
      if inner == "once":
        made = ctx.once(lambda: point)
      elif inner == "map":
        made = ctx.map(lambda part: 10 * point + part, [0, 1])[0] / 10
      else:
        made = varied.once(lambda: ctx.vary(shift=3.0).once(lambda: point))
      fails(point)
      return made

    return np.concatenate([ctx.map(at, [0, 1, 2, 3]), ctx.map(at, [4, 5])])

  found, _, _ = interrupted_once(study_of(own, axes=("point",)), tmp_path)
  assert found.values["v"].tolist() == [0, 1, 2, 3, 4, 5]


def test_what_work_within_a_point_has_cost_is_counted_once(tmp_path):
  fails = failing_once(1)

  def own(ctx):
    def at(point):
      final = ctx.once(lambda: ctx.denoise()[0].mean((1, 2, 3, 4)))
      fails(point)
      return final + ctx.denoise()[0].mean((1, 2, 3, 4))

    return ctx.map(at, [0, 1, 2])

  study = study_of(own, axes=("point", "run"))
  _, record, _ = interrupted_once(study, tmp_path)
  each = 3 * record["steps"]
  assert (record["reused"], record["evaluations"]) == (3 * each, 3 * each)
  _, record, _ = carried_out(study, chunks=Chunks(folder=tmp_path))
  assert (record["reused"], record["evaluations"]) == (6 * each, 0)


def spoken(chosen, cases):
  """As `toy.encode`; where guided, the negative branch holds the length of the negative prompt."""
  made = toy.encode(chosen, cases)
  negative = jnp.full_like(made.text, len(chosen.negative_prompt))
  text = jnp.concatenate([made.text, negative]) if chosen.guided else made.text
  return dataclasses.replace(made, text=text)


def varied_by(*changes, **settings):
  """The context of a study after these changes, one on top of the other."""
  seen = []

  def give(ctx):
    for change in changes:
      ctx = ctx.vary(**change)
    seen.append(ctx)
    return np.zeros(ctx.sizes.R)

  setting = toy.setting(**settings)
  setting = dataclasses.replace(setting, encode=spoken)
  perform(study_of(give), setting, toy.cases(3))
  return seen[0]


@pytest.mark.parametrize(
  ("changes", "negative"),
  [
    ([{"guidance": 6.0}], [0]),
    ([{"negative_prompt": "four"}], []),
    ([{"negative_prompt": "four"}, {"guidance": 6.0}], [4]),
    ([{"guidance": 6.0}, {"negative_prompt": "four"}], [4]),
    ([{"guidance": 6.0}, {"guidance": 1.0}, {"negative_prompt": "four"}, {"guidance": 2.0}], [4]),
    ([{"guidance": 6.0, "frames": 2}], [0]),
  ],
)
def test_what_is_told_to_the_encoders_is_encoded_anew_where_it_is_varied(changes, negative):
  ctx = varied_by(*changes)
  assert ctx.cond.text[1:, 0, 0, 0].tolist() == negative
  assert ctx.sizes.G == 1 + len(negative)


def test_what_is_told_to_no_encoder_keeps_the_conditioning():
  """So that "no guidance" is the program of the guided runs."""
  changes = {"guidance": 1.0, "shift": 3.0, "steps": 5, "solver": "unipc", "grid": "official"}
  guided = varied_by({"guidance": 6.0})
  ctx = varied_by({"guidance": 6.0}, changes)
  assert (guided.sizes.G, ctx.sizes.G, ctx.sizes.S) == (2, 2, 5)
  assert ctx.schedule.solver == "unipc"
  assert np.asarray(ctx.schedule.guidance).tolist() == [1.0] * 5


@pytest.mark.parametrize(
  ("value", "same"),
  [(2.0, 2.0), ((2.0,), 2.0), (np.float32(2), 2.0), (np.arange(1, 11), range(1, 11))],
)
def test_guidance_is_varied_as_a_configuration_says_it(value, same):
  found = np.asarray(varied_by({"guidance": value}).schedule.guidance)
  np.testing.assert_array_equal(found, np.broadcast_to(same, 10))


@pytest.mark.parametrize(
  ("change", "said"),
  [
    *(
      (
        {name: value},
        f"ctx.vary got '{name}', wanted some of steps, shift, .*: any other setting is that of a "
        "whole study, --config.KEY=VALUE",
      )
      for name, value in {
        "checkpoint": "mini_experts",
        "height": 64,
        "seeds": (0, 1),
        "tiles": "diffusers",
        "batch": 1,
        "nonsense": 1,
      }.items()
    ),
    ({"guidance": "x"}, "guidance='x', wanted a finite number"),
    ({"shift": np.nan}, "shift=nan, wanted a finite number"),
    ({"boundary": np.inf}, "boundary=inf, wanted a finite number"),
    ({"steps": 2.5}, "steps=2.5, wanted a whole number"),
  ],
)
@pytest.mark.parametrize("zero", [(), ("v",)])
def test_a_setting_that_cannot_be_varied_is_refused_by_the_control_too(change, said, zero):
  def give(ctx):
    ctx.vary(**change)
    raise AssertionError(f"it went on, control={ctx.control}")

  with pytest.raises(ValueError, match=said):
    carried_out(study_of(give, zero=zero))


def test_taps_over_the_budget_are_refused_before_they_are_taken():
  study = study_of(lambda ctx: ctx.denoise(taps=TapSpec(sites=("attn_out",)))[0][:, 0, 0, 0, 0])
  small = dataclasses.replace(toy.setting(seeds=(0,)).chosen.taps, budget_gb=1e-9)
  given = toy.setting(seeds=(0,))
  given = dataclasses.replace(given, chosen=dataclasses.replace(given.chosen, taps=small))
  with pytest.raises(ValueError, match=r"need .* GB, the budget is 1e-09: give a smaller --config"):
    perform(study, given, toy.cases(3))


def test_a_value_in_bfloat16_is_the_same_fresh_and_resumed(tmp_path):
  study = study_of(lambda ctx: np.full(ctx.sizes.R, 1.5, jnp.bfloat16))
  for _ in range(2):
    found, _, _ = carried_out(study, chunks=Chunks(folder=tmp_path))
    assert found.values["v"].tolist() == [[1.5]] * 3
    assert found.values["v"].dtype == np.float32


def test_an_option_that_is_no_json_is_refused_before_the_first_batch():
  @experiment(tasks="sides")
  def own(ctx, *, places=range(3)):
    """A question."""
    raise AssertionError("a batch began")

  said = r"own: option places=range\(0, 3\) can't be kept as JSON, wanted numbers, texts"
  with pytest.raises(ValueError, match=said):
    carried_out(own)
  with pytest.raises(ValueError, match=r"option places=\{1j\}"):
    carried_out(own, options={"places": {1j}})


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), OSError(2, "gone", "f")])
def test_what_the_code_of_a_study_raises_is_left_as_it_is_and_finished_work_stays(tmp_path, error):
  left, said = [error], []

  def give(ctx):
    if "batch 1" in ctx.place and left:
      raise left.pop()
    return ctx.denoise()[0].mean((1, 2, 3, 4))

  study, chunks = study_of(give), Chunks(folder=tmp_path)
  with pytest.raises(type(error)) as caught:
    carried_out(study, batch=1, chunks=chunks, say=said.append)
  assert caught.value is error
  assert said[-1].startswith(f"own: what is finished stays in {tmp_path}; the same command goes on")
  _, record, _ = carried_out(study, batch=1, chunks=chunks)
  assert record["reused"] * 2 == record["evaluations"] > 0


def test_nothing_is_said_to_stay_where_nothing_is_finished(tmp_path):
  said = []
  with pytest.raises(ZeroDivisionError):
    carried_out(
      study_of(lambda ctx: 1 / 0), chunks=Chunks(folder=tmp_path / "chunks"), say=said.append
    )
  assert not any("stays" in line for line in said)


@pytest.mark.parametrize("text", ["np.zeros(3) + np.zeros(2)", 'ctx.runs("wrong")'])
def test_a_sentence_out_of_a_study_names_its_line(write, text):
  study = find(write(FILE.format(name="own", value=text)))
  with pytest.raises(ValueError, match=r"^own_file.py, line 9: (operands|no run here is 'wrong')"):
    carried_out(study)


@pytest.mark.parametrize("runs", [("counterprat", "case"), ("case", "case"), (), "case"])
def test_roles_that_are_none_are_refused_where_they_are_declared(runs):
  with pytest.raises(ValueError, match=r"wanted some of \('case', 'counterpart'\), each once"):
    study_of(lambda ctx: None, runs=runs)


# A study in a file of its own

FILE = '''
import numpy as np
from jax_videoreason.experiments import Result, experiment
from jax_videoreason.interventions import identity

@experiment(tasks="pick")
def {name}(ctx, *, k=3):
  """A question."""
  return Result(values={{"v": np.full(ctx.sizes.R, {value})}}, axes={{"v": ("run",)}})
'''


@pytest.fixture
def write(write_module):
  """Writes the module `own_file` and says what a study in it is named."""

  def write(text):
    write_module("own_file", text)
    return "own_file:own"

  return write


def test_code_that_changed_is_new_work_and_a_result_of_other_code_is_named(write, tmp_path):
  sources = []
  for value in ("1.0", "22.0"):
    study = find(write(FILE.format(name="own", value=value)))
    sources.append(study.source())
  assert [source["module"] for source in sources] == ["own_file"] * 2
  assert sources[0]["sha256"] != sources[1]["sha256"]
  assert EXPERIMENTS["noise"].source() is None
  out = tmp_path / "out"
  out.mkdir()
  write_json(out / "result.json", {"key": "k", "source": sources[0]})
  with pytest.raises(ValueError, match="it was made by other code than own_file has now"):
    run.check_out(out, redo=False, source=sources[1])
  with pytest.raises(ValueError, match=r"\(it has result.json\)"):
    run.check_out(out, redo=False, source=sources[0])


def test_work_of_an_older_version_is_neither_gone_on_with_nor_taken(write, tmp_path, monkeypatch):
  asked, out = [], tmp_path / "out"

  def stop(study, *_, chunks, **__):
    asked.append(chunks.of)
    raise ValueError("it got as far as that")

  monkeypatch.setattr("jax_videoreason.experiments.perform", stop)
  study = find(write(FILE.format(name="own", value="1.0")))
  for version in (results.FORMAT, results.FORMAT - 1):
    monkeypatch.setattr(results, "FORMAT", version)
    assert cli.main(["run", "own_file:own", "--config.cases=1", f"--out={out}"]) == cli.BAD_INPUT
  assert asked[0] != asked[1]
  out.mkdir(exist_ok=True)
  before = {"axes": {}, "problem_of": [], "source": study.source(), "format": results.FORMAT - 1}
  write_json(out / "result.json", before)
  with pytest.raises(ValueError, match="it is a study of an older version"):
    run.check_out(out, redo=False, source=study.source())


def test_an_own_study_named_like_one_that_ships_is_not_taken_for_it(write, tmp_path, monkeypatch):
  asked = []

  def stop(study, *_, options, chunks, **__):
    asked.append((study.module, options, chunks.of))
    raise ValueError("it got as far as that")

  monkeypatch.setattr("jax_videoreason.experiments.perform", stop)
  for value in ("1.0", "22.0"):
    write(FILE.format(name="noise", value=value))
    words = ["run", "own_file:noise", "--config.cases=1", f"--out={tmp_path / 'out'}"]
    assert cli.main(words) == cli.BAD_INPUT
  (module, options, before), (_, _, after) = asked
  assert (module, options) == ("own_file", {"k": 3})
  assert before != after  # chunks of other code


def test_a_report_leaves_the_claims_of_an_own_study_alone(tmp_path):
  claim = Claim(says="s", of="v", statistic="mean", above=0.1)

  def noise(ctx):
    """A question."""
    return Result(values={"v": np.ones(ctx.sizes.R)}, axes={"v": ("run",)})

  found, record, _ = carried_out(experiment(tasks="sides", claims=[claim])(noise))
  results.save(tmp_path, found, record)
  judge_again(tmp_path)
  assert [row["says"] for row in results.load(tmp_path)[1]["claims"]] == ["s"]


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("def f(:", r"own_file: SyntaxError: .*own_file.py, line 1"),
    ("1 / 0", "own_file: ZeroDivisionError: division by zero; mend it there"),
    ("import nowhere", "No module named 'nowhere'; wanted module:function .*on PYTHONPATH"),
    ("import os; os.nothing", "own_file: AttributeError: module 'os' has no .*; mend it there"),
    ("", "has no attribute 'own'"),
    (FILE.format(name="own", value=1.0).replace("*, k=3", "k=3"), "'k' is no option, wanted key"),
    (FILE.format(name="own", value=1.0).replace("k=3", "k"), "option 'k' has no default: give"),
    (
      FILE.format(name="own", value=1.0).replace("ctx, *", "*"),
      r"own takes no ctx, wanted it as the first argument, as in \(ctx, \*, k=1\)",
    ),
    ("raise ValueError()", "own_file: ValueError; mend it there"),
    ("raise ImportError()", "own_file:own: ImportError; wanted module:function"),
    (
      "import sys; sys.exit()",
      "own_file calls sys.exit when it is imported: put that under `if __",
    ),
  ],
)
def test_a_file_that_is_no_study_is_told_in_a_sentence(write, text, said):
  with pytest.raises(ValueError, match=said):
    find(write(text))


@pytest.mark.parametrize("name", [":own", "own_file:", ":", ".own_file:own"])
def test_a_name_without_a_module_or_a_function_is_refused(name):
  with pytest.raises(ValueError, match=f"^'{name}' names no study, wanted module:function, as in"):
    find(name)


@pytest.mark.parametrize(
  ("word", "value"), [("4", 4), ("step", "step"), ("(1,2)", (1, 2)), ("None", None)]
)
def test_an_option_that_is_none_at_first_takes_any_value(write, word, value):
  write(FILE.format(name="own", value=1.0).replace("k=3", "k=None"))
  flags, _ = cli.parse(run, ["own_file:own", f"--config.experiment.k={word}"])
  assert cli.resolved(flags)["experiment"] == {"k": value}
  assert cli.resolved(cli.parse(run, ["own_file:own"])[0])["experiment"] == {"k": None}


@pytest.mark.parametrize(
  ("more", "of", "said"),
  [
    ({}, "w", "claim 's' can't be judged: no value 'w'; there are: v"),
    ({"zero": ("v",)}, "w[layer=9]", r"no value 'w\[layer=9\]'; there are: v"),
    ({"finish": lambda result: result}, "w", "no value 'w'; there are: v"),
  ],
)
def test_a_claim_about_what_a_study_does_not_return_is_named(more, of, said):
  claim = Claim(says="s", of=of, statistic="mean", above=0.1)
  study = study_of(lambda ctx: np.zeros(ctx.sizes.R), claims=[claim], **more)
  with pytest.warns(UserWarning, match=said):
    _, _, (finding,) = carried_out(study)
  assert finding.verdict == "not run here"


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("[]", "result.json is missing or damaged"),
    ('{"overall": 1.0}', "result.json has no 'axes', so it is damaged or not of a study"),
    (None, "arrays.zarr/v is missing or damaged"),
  ],
)
def test_a_result_that_is_damaged_is_named(tmp_path, text, said):
  results.save(tmp_path, Result(values={"v": np.ones(3)}, axes={"v": ("case",)}), {})
  if text is None:
    remove(tmp_path / "arrays.zarr")
  else:
    (tmp_path / "result.json").write_text(text)
  for read in (results.load, judge_again):
    with pytest.raises(ValueError, match=said):
      read(tmp_path)


def test_a_gain_gets_its_p_value_over_problems():
  rng = np.random.default_rng(0)
  gain = 0.1 + rng.random((8, 2))
  twice = np.concatenate([gain, gain[:1]])  # the last case is of the first's problem
  problems = [*"abcdefgh", "a"]
  result = Result(values={"gain": twice}, axes={"gain": ("case", "seed")}, problem_of=problems)
  found = stats.sign_flip(result.per_problem("gain")[0], seed=0)
  assert found.cases == 8
  assert found.p == 2 / 2**8  # all are above 0: of all flips none and every one are as far off


def test_calls_past_the_context_are_counted_by_the_study_alone():
  def give(ctx, count):
    latents, _, _ = jax_videoreason.denoise(ctx.bundle, ctx.noise, ctx.cond, ctx.schedule)
    ctx.tally.evaluations += count * ctx.sizes.S * ctx.sizes.R * ctx.sizes.G
    return np.asarray(latents).mean((1, 2, 3, 4))

  evaluations = []
  for count in (0, 1):
    _, record, _ = carried_out(study_of(lambda ctx, count=count: give(ctx, count)))
    evaluations.append(record["evaluations"])
  assert evaluations == [0, record["planned"]]


def test_a_study_is_opened_in_python_and_open_run_names_what_it_is(tmp_path):
  with pytest.raises(ValueError, match=r"has no result.json, so it is no finished study"):
    jax_videoreason.open_study(tmp_path)
  results.save(tmp_path, Result(values={"v": np.ones(3)}, axes={"v": ("case",)}), {"steps": 8})
  found, record = jax_videoreason.open_study(tmp_path)
  assert (found.values["v"].tolist(), record["steps"]) == ([1, 1, 1], 8)
  with pytest.raises(ValueError, match="is a study, no run: open it by open_study"):
    jax_videoreason.open_run(tmp_path)
  with pytest.raises(ValueError, match="is a study, no sweep: open it by open_study"):
    jax_videoreason.open_sweep(tmp_path)
  write_json(tmp_path / "sweep.json", {})
  with pytest.raises(ValueError, match="is a sweep, no study: open it by open_sweep"):
    jax_videoreason.open_study(tmp_path)
