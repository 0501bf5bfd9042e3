"""Experiments on models whose truth is known: they find it, and find nothing where it is absent."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from einops import repeat

import helpers
import toy
from jax_videoreason import (
  arrays,
  checkpoint,
  cli,
  conditioning,
  evaluate,
  folders,
  pages,
  records,
  runs,
  settings,
  sharding,
)
from jax_videoreason.cli import run
from jax_videoreason.cli import vbvr as cli_vbvr
from jax_videoreason.experiments import (
  EXPERIMENTS,
  Claim,
  Result,
  claims,
  experiment,
  judge_again,
  perform,
  results,
)
from jax_videoreason.experiments import setting as setting_module
from jax_videoreason.experiments.chain_of_steps import chain_of_steps
from jax_videoreason.experiments.context import Chunks, Context, Tally, assemble
from jax_videoreason.experiments.controls import highest, moved, places_of
from jax_videoreason.experiments.ensemble import closeness
from jax_videoreason.experiments.noise import cos_index, matched_steps, noise, peak, with_index
from jax_videoreason.interventions import identity, noise_at, where
from jax_videoreason.records import checksum, read_json, write_json
from jax_videoreason.structs import Sizes
from jax_videoreason.tasks import draw

STEPS = 10
MANIFEST = {
  "config": {"steps": 10},
  "command": ["videoreason", "run", "all"],
  "device": "cpu",
  "written": "2026-01-02T03:04:05+00:00",
  "versions": {"jax_videoreason": "1.0"},
}


def by_name(findings):
  return {finding.claim.says: finding for finding in findings}


def test_first_frames_are_encoded_in_the_tiles_of_the_settings(monkeypatch):
  asked = {}
  monkeypatch.setattr(setting_module.checkpoint, "load", lambda *_, **__: None)
  monkeypatch.setattr(setting_module.conditioning, "encode", lambda *_, **said: asked.update(said))
  chosen = dataclasses.replace(toy.setting(toy.both_then_one).chosen, tiles="diffsynth")
  setting_module.encode(chosen, toy.cases(2))
  assert asked["tiles"] == "diffsynth"


def mini(**changes):
  config = cli.load_config("mini").to_dict() | {"seeds": [0, 1], "steps": 2}
  return settings.from_config(config | changes)


def test_what_was_encoded_before_is_to_the_bit_what_the_encoders_make(monkeypatch):
  chosen = mini()
  shorter = dataclasses.replace(chosen, frames=13)
  cases = setting_module.pick_cases(chosen, ("pick", "maze"), 2)
  runs = [case for case in [*cases[2:], *cases[:2]] for _ in chosen.seeds]
  short = [evaluate.load_task(c.task, shorter).case(c.metadata | {"frames": 13}) for c in runs]
  asked = [(chosen, runs), (chosen, runs[:2]), (shorter, short)]
  wanted = [setting_module.encode(*each) for each in asked]
  made = setting_module.load(chosen, groups=[runs, runs[:2]])

  def loaded(*args, **more):
    raise FileNotFoundError("the encoders are loaded again")

  monkeypatch.setattr(checkpoint, "load", loaded)
  for each, cond in zip(asked, wanted, strict=True):
    jax.tree.map(np.testing.assert_array_equal, made.encode(*each), cond)
  others = [(chosen, runs[:4]), (dataclasses.replace(shorter, negative_prompt="no"), short)]
  for each in others:
    with pytest.raises(FileNotFoundError, match="loaded again"):
      made.encode(*each)


def test_a_study_encodes_its_batches_before_the_model_is_loaded_and_no_finished_one(
  tmp_path, monkeypatch
):
  words = ["run", "chain_of_steps", "--config.tasks=('pick',)", "--config.cases=3"]
  words += ["--config.batch=1", "--config.seeds=1", "--config.steps=2", "--config.decoder=auto"]
  assert cli.main([*words, f"--out={tmp_path / 'whole'}"]) == 0
  words += [f"--out={tmp_path / 'parts'}"]
  parts, groups = [], []
  load, encode, put = checkpoint.load, conditioning.encode, Chunks.put

  def loads(*args, **more):
    parts.append(more["parts"])
    return load(*args, **more)

  def encodes(bundle, prompts, *args, **more):
    groups.append(len(prompts))
    return encode(bundle, prompts, *args, **more)

  def stops(self, key, value):
    if key.endswith("batch") and "batch 2" in key:
      raise ValueError("the power fails")
    put(self, key, value)

  monkeypatch.setattr(checkpoint, "load", loads)
  monkeypatch.setattr(conditioning, "encode", encodes)
  with monkeypatch.context() as patch:
    patch.setattr(Chunks, "put", stops)
    assert cli.main(words) == cli.BAD_INPUT
  assert groups == [3, 1, 1, 1]  # what the reader is chosen by, then every batch
  assert cli.main(words) == 0
  assert groups[4:] == [3, 1, 1]  # the first and the last batch
  assert parts == 2 * [("text", "clip", "vae"), ("vae", "preview"), ("dit",)]
  assert cli.main(words) == 0
  assert len(parts) == 6  # nothing is loaded for what is there
  assert results.load(tmp_path / "parts")[1]["format"] == results.FORMAT
  whole, again = (results.load(tmp_path / place)[0].values for place in ("whole", "parts"))
  for name, value in whole.items():
    np.testing.assert_array_equal(again[name], value)


# chain of steps


def test_chain_of_steps_finds_two_candidates_and_the_step_that_decides():
  found, _, findings = perform(chain_of_steps, toy.setting(toy.both_then_one), toy.cases(12))
  assert (found.values["several"] == 1).all()
  # of an occupancy of .4 and 1: .55 of a blend and all of it
  np.testing.assert_allclose(found.values["second"], draw.blended(np.array(0.4)), atol=0.01)
  assert found.points["share"] == ["10% of a blend", "20% of a blend", "30% of a blend"]
  assert (found.values["several_from"] == 1).all()
  assert (found.values["corrected"] == 1).all()
  # sigma .5 is step 5 of 10, the first at or below .55
  np.testing.assert_allclose(found.values["commitment"], 0.5)
  assert {f.claim.number: f.verdict for f in findings if f.claim.number} == {
    7: "holds",
    11: "holds",
  }


def test_chain_of_steps_finds_neither_where_the_answer_stands_from_the_start():
  found, _, findings = perform(chain_of_steps, toy.setting(toy.truth), toy.cases(12))
  assert (found.values["several"] == 0).all()
  assert (found.values["several_from"] == 0).all()
  assert (found.values["commitment"] == 0).all()
  verdicts = {f.claim.number: f.verdict for f in findings if f.claim.number}
  assert verdicts[7] == "does not hold"


def large(passes):
  """The toy with pictures of 120 pixels; passes: gets the shape of all that it decodes."""
  plain = toy.setting(toy.both_then_one)

  def decode(x0):
    passes.append(x0.shape)
    return helpers.passing(repeat(v, "f h w c -> f (h 30) (w 30) c") for v in plain.decode(x0))

  return dataclasses.replace(plain, decode=decode)


def test_a_strip_is_kept_as_large_as_the_page_shows_it_and_no_video_longer_than_it_is_read():
  small, _, _ = perform(chain_of_steps, toy.setting(toy.both_then_one), toy.cases(4))
  found, _, _ = perform(chain_of_steps, large([]), toy.cases(4))
  assert found.values["strip"].shape == (2, 10, 3, 60, 60, 3)
  np.testing.assert_array_equal(found.values["strip"][..., ::15, ::15, :], small.values["strip"])
  none, _, _ = perform(chain_of_steps, large([]), toy.cases(4), options={"strips": 0})
  assert none.values.keys() == found.values.keys() - {"strip"}


def test_behaviours_looks_at_each_video_once_and_lets_it_go():
  passes = []
  perform(EXPERIMENTS["behaviours"], large(passes), toy.cases(16), options={"stride": 9})
  assert [shape[:2] for shape in passes] == [(10, 16)]


# noise


def test_noise_finds_the_step_from_which_the_answer_lives_in_the_latents():
  options = {"modes": ("replace", "renoise")}
  found, record, _ = perform(
    noise, toy.setting(toy.read_late, seeds=(0, 1)), toy.cases(16), options=options
  )
  drop = found.values["step_drop"].mean((2, 3))
  assert (drop[0, 5:] > 0.25).all()
  assert (drop[0, :3] < 0.1).all()
  assert (np.abs(drop[1]) < 0.1).all()  # the guess is kept, so is the answer
  assert record["control"] == dict.fromkeys(record["control"], 0.0)
  assert record["evaluations"] == record["planned"]
  assert record["saved"] > 0
  assert any(
    n.startswith("CoS index under replace: all 1.00") for n in found.notes
  )  # no frame matters
  assert record["programs"] <= 1


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_noise_of_gain_0_moves_nothing_at_any_step(solver):
  options = {"modes": ("add", "add_sigma"), "gain": 0.0, "stride": 3}
  setting = toy.setting(toy.read_late, solver=solver)
  found, record, _ = perform(noise, setting, toy.cases(2), options=options)
  for name in ("step_drop", "frame_drop", "matched_drop", "cka_x0", "cka_latents", "cka_hidden"):
    assert np.nanmax(np.abs(found.values[name])) == 0, name
  assert record["control"] == dict.fromkeys(record["control"], 0.0)


@pytest.mark.slow
def test_noise_finds_no_drop_where_the_answer_is_read_from_the_picture():
  options = {"modes": ("replace",), "stride": 3}
  found, _, findings = perform(noise, toy.setting(toy.truth), toy.cases(10), options=options)
  assert np.abs(found.values["step_drop"]).max() == 0
  assert np.nanmax(found.values["cka_x0"][..., 1:, :, :]) >= 0
  verdicts = by_name(findings)
  assert verdicts["noise at one step destroys the answer"].verdict != "holds"
  left_out = verdicts["sensitivity to noise peaks in the middle of the trajectory"]
  assert left_out.verdict == "not run here"
  assert left_out.note == "this model or these options have no sensitivity[mode=renoise]"


def test_both_arms_of_noise_are_put_on_the_same_steps():
  for count, frames in ((10, 4), (20, 4), (10, 6)):
    steps = list(range(0, 2 * count, 2))
    runs = matched_steps(steps, frames, 5)
    assert [len(set(run)) for run in runs] == [5] * frames  # as many cells as a step has frames
    np.testing.assert_array_equal(np.bincount(np.concatenate(runs))[::2], frames * 5 / count)
  assert matched_steps([0, 3], 3, 5) == [[0, 3]] * 3
  uneven = np.bincount(np.concatenate(matched_steps(list(range(8)), 4, 5)))
  assert (uneven.min(), uneven.max()) == (2, 3)


def test_the_cos_index_has_no_number_where_neither_arm_drops():
  arms = {"step_arm": [0.6, -0.2], "frame_arm_matched": [0.2, 0.0]}
  np.testing.assert_allclose(cos_index(np.array([[[0.6, 0.2]], [[0.2, 0.0]]])), [0.75, 1])
  assert np.isnan(cos_index(np.array([[-0.2, 0.0]])))
  values = {arm: np.repeat(np.array(drops)[:, None], 8, 1) for arm, drops in arms.items()}
  found = Result(
    values=values,
    axes=dict.fromkeys(values, ("mode", "case")),
    points={"mode": ["replace", "renoise"], "case": ["maze id 0"] * 8},
  )
  notes = with_index(found).notes
  assert notes[0].startswith("CoS index under replace: all 0.75")
  assert notes[1].startswith("CoS index under renoise: all has none: neither arm drops")
  four = with_index(dataclasses.replace(found, problem_of=[f"{i // 2}" for i in range(8)]))
  assert "4 cases: an interval needs at least 8" in four.notes[0]  # of problems, which it resamples


# the machinery


def make_study(**declared):
  def shift_of_score(ctx, *, steps=(1, 3)):
    """Does noise move the score?

    Noise replaces x at a step.

    Limits: a test.
    """
    base = identity(ctx.sizes, edits=("noise",))
    _, clean = ctx.denoise(base)

    def at(step):
      _, trace = ctx.denoise(noise_at(base, where(ctx.sizes, steps=step), mode="replace"))
      # Before the last step: after it a toy holds its guess, and of the noise a rounding at most.
      return np.abs(trace.latents[-1] - clean.latents[-1]).max(axis=(1, 2, 3, 4))

    moved = ctx.map(at, steps)
    return Result(
      values={"moved": moved}, axes={"moved": ("point", "run")}, points={"point": list(steps)}
    )

  return experiment(
    tasks="sides", zero=("moved",), cost=lambda sizes, steps: 1 + len(steps), **declared
  )(shift_of_score)


def test_a_study_is_told_by_its_docstring_and_signature():
  study = make_study()
  assert (study.name, study.question) == ("shift_of_score", "Does noise move the score?")
  assert (study.method, study.limits) == ("Noise replaces x at a step.", "A test.")
  assert study.options == {"steps": (1, 3)}


def test_the_control_looks_at_a_middle_point_too():
  @experiment(
    tasks="sides",
    zero=("moved",),
    claims=[Claim(says="it moves", of="moved[step=5]", statistic="mean", above=0.0)],
  )
  def from_its_middle(ctx):
    """Does a run go on as it was?"""
    base = identity(ctx.sizes, edits=("noise",))
    _, trace = ctx.resume(None, 0, base)
    forgotten = dataclasses.replace(trace, solver={})

    def at(step):
      edit = noise_at(base, where(ctx.sizes, steps=step), mode="replace")
      _, again = ctx.resume(forgotten, step, edit)
      return np.abs(again.latents[-1] - trace.latents[-1]).max(axis=(1, 2, 3, 4))

    steps = list(range(ctx.sizes.S))
    return Result(
      values={"moved": ctx.map(at, steps)}, axes={"moved": ("step", "run")}, points={"step": steps}
    )

  for solver, verdict in (("euler", "holds"), ("unipc", "can't tell")):
    _, record, findings = perform(
      from_its_middle, toy.setting(toy.read_late, solver=solver), toy.cases(8)
    )
    assert (record["control"]["moved"] == 0) == (solver == "euler")
    assert findings[0].verdict == verdict


def context_of(setting, count: int) -> Context:
  """A batch of so many cases, with the seeds of the setting, in one role."""
  cases = [case for case in toy.cases(count) for _ in setting.chosen.seeds]
  roles = {"case": np.arange(len(cases))}
  return assemble(setting, cases, roles, tally=Tally(), chunks=Chunks())


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_run_in_pieces_costs_one_trajectory_and_is_that_run(solver):
  ctx = context_of(toy.setting(toy.read_late, solver=solver), 3)
  whole, wanted = ctx.resume(None, 0, None)
  one = STEPS * 3
  assert (ctx.tally.evaluations, ctx.tally.saved) == (one, 0)
  trace, final = None, None
  for first, stop in itertools.pairwise((0, 3, 4, STEPS)):
    final, trace = ctx.resume(trace, first, None, stop=stop)
    np.testing.assert_array_equal(final, wanted.latents[stop] if stop < STEPS else whole)
    np.testing.assert_array_equal(trace.latents[first:stop], wanted.latents[first:stop])
    np.testing.assert_array_equal(trace.x0[first:stop], wanted.x0[first:stop])
  assert ctx.tally.evaluations == 2 * one
  assert ctx.tally.saved == (3 + 4) * 3


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_runs_are_chosen_anew_between_pieces(solver):
  ctx = context_of(toy.setting(toy.bent, seeds=(0, 1, 2, 3), solver=solver), 2)
  _, trace = ctx.resume(None, 0, None, stop=4)
  who = np.repeat(ctx.by_seed()[1], 4)  # the second seed of every case in the place of all
  chosen = runs.take(trace, who)
  final, _ = ctx.resume(chosen, 4, None)
  wanted, _ = ctx.resume(trace, 4, None)
  np.testing.assert_array_equal(final, wanted[who])
  # a memory that is left out, or is that of the runs before, is seen in this toy
  for memory in ({}, trace.solver) if solver == "unipc" else ():
    other, _ = ctx.resume(dataclasses.replace(chosen, solver=memory), 4, None)
    assert np.abs(other - final).max() > 1e-3


def test_a_piece_that_ends_before_it_begins_is_refused():
  ctx = context_of(toy.setting(toy.read_late), 2)
  _, trace = ctx.resume(None, 0, None)
  for step, stop in ((4, 3), (4, STEPS + 1)):
    with pytest.raises(ValueError, match=rf"only\({step}, {stop}\) of {STEPS} steps: wanted 0 <="):
      ctx.resume(trace, step, None, stop=stop)
  assert ctx.tally.evaluations == STEPS * 2


def test_batches_are_joined_filled_up_and_cut_and_seeds_stay_with_their_case():
  setting = toy.setting(toy.read_late, seeds=(0, 1, 2))
  whole, _, _ = perform(make_study(), setting, toy.cases(5))
  parts, record, _ = perform(make_study(), setting, toy.cases(5), batch=2)
  assert whole.axes["moved"] == ("point", "case", "seed")
  assert whole.values["moved"].shape == (2, 5, 3)
  np.testing.assert_array_equal(whole.values["moved"], parts.values["moved"])
  assert record["evaluations"] == record["planned"] == 3 * (STEPS * 6) * 3
  assert record["control"] == {"moved": 0.0}
  assert whole.points["case"] == [f"sides id {i}" for i in range(5)]


def test_what_is_finished_is_not_computed_again(tmp_path, monkeypatch):
  chunks = Chunks(folder=tmp_path, of="this study")
  setting = toy.setting(toy.read_late)
  one = STEPS * 2
  whole, _, _ = perform(make_study(), setting, toy.cases(4), batch=2)
  put, kept = Chunks.put, []

  def stops(self, key, value):
    kept.append(key)
    if (
      len(kept) == 7
    ):  # control of two points, two points, first batch, a point; the power fails at the next
      raise KeyboardInterrupt
    put(self, key, value)

  with monkeypatch.context() as patch:
    patch.setattr(Chunks, "put", stops)
    with pytest.raises(KeyboardInterrupt):
      perform(make_study(), setting, toy.cases(4), batch=2, chunks=chunks)
  again, record, _ = perform(make_study(), setting, toy.cases(4), batch=2, chunks=chunks)
  np.testing.assert_array_equal(whole.values["moved"], again.values["moved"])
  assert again.axes == whole.axes
  assert record["reused"] == 3 * one + one  # the first batch, and one point of the second
  assert record["evaluations"] == 2 * one
  other = dataclasses.replace(chunks, of="another study")
  assert perform(make_study(), setting, toy.cases(4), batch=2, chunks=other)[1]["reused"] == 0


def not_finite(latents, sigma, memory):
  broken = np.zeros((latents.shape[0], 1, 1, 1, 1), np.float32)
  broken[1] = np.nan
  return memory + broken[None]


def test_a_run_that_is_not_finite_is_named_and_left_out():
  study = make_study(
    claims=[Claim(says="it moves", of="moved[point=1]", statistic="mean", above=-1.0)]
  )
  with pytest.warns(UserWarning, match="sides id 1, seed 0 is not finite from step 0 on"):
    found, record, findings = perform(study, toy.setting(not_finite), toy.cases(10))
  assert np.isnan(found.values["moved"][:, 1]).all()
  assert np.isfinite(np.delete(found.values["moved"], 1, axis=1)).all()
  assert record["broken"] == ["sides id 1, seed 0 is not finite from step 0 on"]
  assert (findings[0].cases, findings[0].note) == (9, "1 of 10 cases have no number")


def test_a_run_that_is_not_finite_keeps_its_name_when_a_study_goes_on(tmp_path, monkeypatch):
  chunks = Chunks(folder=tmp_path, of="this study")
  put, kept = Chunks.put, []

  def stops(self, key, value):
    put(self, key, value)
    kept.append(key)
    if len(kept) == 2:  # both points, not yet the batch
      raise KeyboardInterrupt

  study = once_broken()
  with monkeypatch.context() as patch, pytest.warns(UserWarning, match="is not finite"):
    patch.setattr(Chunks, "put", stops)
    with pytest.raises(KeyboardInterrupt):
      perform(study, toy.setting(), toy.cases(4), chunks=chunks)
  found, record, _ = perform(study, toy.setting(), toy.cases(4), chunks=chunks)
  assert record["broken"] == ["sides id 2, seed 0 is not finite from step 3 on"]
  assert np.isnan(found.values["moved"][:, 2]).all()


def once_broken():
  """A study whose second point breaks the third run."""

  def breaks(ctx):
    """Does it break?"""
    base = identity(ctx.sizes, edits=("noise",))

    def at(step):
      final, _ = ctx.denoise(noise_at(base, where(ctx.sizes, steps=step), mode="add"))
      if step == 3 and not ctx.control:
        finite = np.ones((ctx.sizes.S, ctx.sizes.R), bool)
        finite[3:, 2] = False
        ctx._note_broken(finite)
      return final.mean(axis=(1, 2, 3, 4))

    return Result(values={"moved": ctx.map(at, [1, 3])}, axes={"moved": ("point", "run")})

  return experiment(tasks="sides")(breaks)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"options": {"step": 1}}, "has no option 'step'; its options: steps"),
    ({"cases": []}, "got no cases"),
  ],
)
def test_wrong_calls_are_told_what_is_wanted(change, said):
  call = {"cases": toy.cases(2), **change}
  with pytest.raises(ValueError, match=said):
    perform(make_study(), toy.setting(), **call)


@pytest.mark.parametrize(
  ("name", "options", "said"),
  [
    ("noise", {"stride": 0}, "noise: stride=0, wanted 1 or more"),
    ("frames", {"fewer": ()}, r"frames: fewer=\(\), wanted 1 or more, not empty"),
    ("controls", {"places": 0}, "controls: places=0, wanted 1 or more"),
    ("layer_swap", {"edited": (0,)}, r"layer_swap: edited=\(0,\), wanted 1 or more"),
  ],
)
def test_options_that_ask_for_nothing_are_refused_before_anything_is_loaded(name, options, said):
  study = EXPERIMENTS[name]
  with pytest.raises(ValueError, match=said):
    study.check({**study.options, **options})
  for preset in ("quick", "full"):
    flags, _ = cli.parse(run, [name, "--preset", preset])
    study.check(flags.config.experiment.to_dict())


def test_an_edit_outside_the_model_is_refused():
  with pytest.raises(ValueError, match="steps=40 does not exist"):
    perform(make_study(), toy.setting(), toy.cases(2), options={"steps": (40,)})


# verdicts


def finding(values, **declared):
  result = Result(values={"gain": np.asarray(values, float)}, axes={"gain": ("case",)})
  claim = Claim(**{"says": "s", "of": "gain", "statistic": "mean", "above": 0.1, **declared})
  return results.judge(claim, result)


def test_verdicts_follow_the_interval_and_the_smallest_effect_of_interest():
  rng = np.random.default_rng(0)
  spread = rng.normal(0, 0.05, 40)
  assert finding(0.3 + spread).verdict == "holds"
  assert finding(-0.3 + spread).verdict == "does not hold"
  assert finding(0.3 + spread, below=0.2).verdict == "does not hold"
  mostly = finding(np.r_[np.zeros(7), 1.0, 1.0], above=0.3)  # the side that crosses counts
  assert mostly.needed is not None
  assert mostly.needed > 9
  unsure = finding(0.12 + 4 * spread)
  assert unsure.verdict == "can't tell"
  assert unsure.needed is not None
  assert unsure.needed > 40
  assert finding(np.full(12, 0.3)).verdict == "can't tell"
  assert finding(np.full(12, 0.3), exact=True).verdict == "holds"
  by_largest = {"by": lambda rows: rows.mean(-1), "above": 0.5}
  never = finding(np.zeros(8), share=True, **by_largest)  # 0 of 8 does not exclude a third
  assert never.verdict == "does not hold"
  assert 0.3 < never.high < 0.4
  assert finding(np.zeros(8), **by_largest).note == (
    "all 8 cases are equal: resampling shows no spread"
  )
  few = finding([0.5, 0.6, 0.7])
  assert few.verdict == "can't tell"
  assert few.note is not None
  assert "needs at least" in few.note


def test_a_few_cases_that_move_decide_nothing():
  one = finding(np.r_[np.zeros(15), -0.5], above=0.02)
  assert one.high < 0.02  # a gain of one case in ten is missing in 16 cases once in five times
  assert (one.verdict, one.note) == ("can't tell", "only 1 of 16 cases differ from 0")
  assert one.needed is not None
  assert one.needed >= 96
  both = Result(
    values={"gain": np.r_[np.zeros(15), -0.5], "vote": np.r_[0.5, 0.5, 0.5, np.zeros(13)]},
    axes={"gain": ("case",), "vote": ("case",)},
  )
  beats = Claim(
    says="s", of=("gain", "vote"), statistic="m", above=0.02,
    by=lambda rows: (rows[..., 0] - rows[..., 1]).mean(-1),
  )  # fmt: skip
  found = results.judge(beats, both)
  assert (found.verdict, found.note) == ("can't tell", "only 4 of 16 cases differ from (0, 0)")
  assert finding(np.r_[np.zeros(15), -0.5], above=0.02, exact=True).verdict == "does not hold"
  assert finding(np.r_[np.zeros(69), 1.0], above=0.06, share=True).verdict == "can't tell"
  assert finding(np.r_[np.zeros(69), 1.0], above=0.08, share=True).verdict == "does not hold"
  assert finding(np.r_[np.zeros(10), np.full(6, -0.5)], above=0.02).verdict == "does not hold"


def of_problems(*, twice):
  """8 problems of one case each, or of two whose mean is that of the one."""
  value = np.random.default_rng(0).normal(0.12, 0.2, 8)
  if not twice:
    return Result(values={"gain": value}, axes={"gain": ("case",)}, problem_of=tuple("abcdefgh"))
  apart = np.r_[value + 0.5, value[::-1] - 0.5]
  return Result(
    values={"gain": apart}, axes={"gain": ("case",)}, problem_of=tuple("abcdefghhgfedcba")
  )


def test_cases_of_one_problem_are_averaged_before_they_are_resampled():
  claim = Claim(says="s", of="gain", statistic="mean", above=0.1)
  once, twice = (results.judge(claim, of_problems(twice=twice)) for twice in (False, True))
  assert (once.cases, once.problems, once.note) == (8, 8, None)
  assert (twice.cases, twice.problems, twice.note) == (16, 8, "16 cases are of 8 problems")
  for field in ("estimate", "low", "high", "needed"):
    assert getattr(twice, field) == pytest.approx(getattr(once, field), abs=1e-9), field
  found, axes = results.interval(of_problems(twice=True), "gain")
  assert (found.cases, axes, found.low) == (8, (), pytest.approx(once.low))
  both = Result(
    values={"gain": np.r_[np.zeros(14), -0.5, -0.5]},
    axes={"gain": ("case",)},
    problem_of=[f"{i // 2}" for i in range(16)],
  )
  few = results.judge(claim, both)
  assert few.note == "only 1 of 8 problems differ from 0; 16 cases are of 8 problems"
  assert claims.settling(results.describe(few)) == f"about {few.needed} problems would settle it"
  assert claims.settling({"cases": 8, "needed": 40}) == "about 40 cases would settle it"
  lost = np.r_[np.nan, np.random.default_rng(1).normal(size=15)]
  half = results.judge(claim, dataclasses.replace(both, values={"gain": lost}))
  assert (half.cases, half.problems) == (15, 8)  # the other case of its problem stands for both
  with pytest.raises(ValueError, match="has 16 cases and problem_of 8, wanted one for each case"):
    dataclasses.replace(both, problem_of=tuple("abcdefgh"))


def test_pages_count_problems_where_cases_share_some(tmp_path):
  once, twice = of_problems(twice=False), of_problems(twice=True)
  for found in (once, twice):
    task = {"case": ["pick id 0"] * len(found.problem_of)}
    (row,) = pages.numbers(dataclasses.replace(found, points=task))
    assert row["tasks"] == [row["all"]] == [pages.in_words(once.values["gain"])]
  rng = np.random.default_rng(2)
  cells = dataclasses.replace(twice, values={"gain": rng.normal(size=(16, 3))}, axes={
    "gain": ("case", "layer")
  })  # fmt: skip
  rows = pages.averaged(cells, "gain", ["layer"])
  assert rows.shape == (8, 3)
  np.testing.assert_allclose(rows[0], cells.values["gain"][[0, 15]].mean(0))


def with_shared_problems(count):
  """Cases of which each two are of one problem."""
  return [
    dataclasses.replace(case, metadata={**case.metadata, "hash": f"{case.index // 2}"})
    for case in toy.cases(count)
  ]


def test_a_number_over_some_problems_says_over_how_many():
  column = np.full(128, np.nan)
  column[:9] = np.random.default_rng(0).random(9)
  assert re.fullmatch(r"0\.\d\d \[0\.\d\d, 0\.\d\d\] \(n=9\)", pages.in_words(column))
  assert "n=" not in pages.in_words(column[:9])
  assert pages.in_words(np.r_[np.nan, np.ones(9)]) == "1.00 (n=9)"
  assert pages.in_words(np.ones(3)) == "1.00 (n=3)"


def test_a_study_keeps_the_problem_of_each_case_and_says_both_counts(tmp_path):
  moves = Claim(says="noise moves x", of="moved[point=1]", statistic="mean", above=0.0)
  anew = {  # a Result made anew loses no problem
    "finish": lambda r, **_: Result(values=r.values, axes=r.axes, points=r.points)
  }
  for more in ({}, anew):
    study = make_study(claims=[moves], **more)
    found, record, findings = perform(
      study, toy.setting(toy.read_late), with_shared_problems(16), batch=3
    )
    assert found.problem_of == [f"{i // 2}" for i in range(16)]
    assert (record["cases"], record["problems"]) == (16, 8)
    assert (findings[0].cases, findings[0].problems) == (16, 8)
  bare = make_study(finish=lambda r, **_: Result(values=r.values, axes=r.axes))
  without, _, _ = perform(bare, toy.setting(toy.read_late), with_shared_problems(16), batch=3)
  assert without.problem_of == found.problem_of
  results.save(tmp_path, found, record)
  assert results.load(tmp_path)[0].problem_of == found.problem_of
  write_json(tmp_path / "manifest.json", MANIFEST)
  page = pages.render(tmp_path).read_text()
  assert "<b>16</b> cases of <b>8</b> problems" in page
  assert "16 cases are of 8 problems" in page
  assert '<td class="n" data-name="n">8 x 1</td>' in page
  assert "bootstrap over problems" in page
  assert "claims about shares exact (Clopper and Pearson), or the bootstrap's where it is" in page
  earlier = {k: v for k, v in read_json(tmp_path / "result.json").items() if k != "problem_of"}
  write_json(tmp_path / "result.json", earlier)  # as it was written before problems were kept
  assert "bootstrap over cases" in pages.render(tmp_path).read_text()


def test_the_mean_of_equal_cases_is_what_they_are():
  value = np.array([[0.1, np.nan], [0.1, np.nan], [0.1, 0.7], [0.3, np.nan], [0.1, np.nan]])
  found = results.mean_by(value, [*"aaabb"])
  np.testing.assert_array_equal(found, [[0.1, 0.7], [0.2, np.nan]])


def test_a_study_of_before_problems_were_kept_opens_and_is_not_taken_for_one_of_now(
  tmp_path, monkeypatch, capsys
):
  values = {"several": np.ones(9), "corrected": np.linspace(0, 1, 9)}
  found = Result(values=values, axes=dict.fromkeys(values, ("case",)))
  rows = [results.describe(results.judge(claim, found)) for claim in chain_of_steps.claims]
  rows = [{key: value for key, value in row.items() if key != "problems"} for row in rows]
  told = {"experiment": "chain_of_steps", "control": None, "claims": rows, "key": "a"}
  out = tmp_path / "old"
  out.mkdir()
  results.save(out, found, told)
  write_json(out / "manifest.json", {**MANIFEST, "files": {}})
  record = read_json(out / "result.json")
  write_json(out / "result.json", {k: v for k, v in record.items() if k != "problem_of"})
  judge_again(out)
  back, record = results.open_study(out)
  assert back.problem_of == () and "judged_again" not in record
  assert back.per_problem("several")[0].shape == (9,)
  assert stopped(monkeypatch, out) == cli.BAD_INPUT
  assert "it is a study of an older version, whose intervals are over cases" in (
    capsys.readouterr().err
  )


def test_the_axes_of_a_value_are_those_of_the_result(tmp_path):
  axes = {"gain": ("case", "step"), "one": ()}
  found = Result(values={"gain": np.ones((2, 2)), "one": np.ones(())}, axes=axes)
  results.save(tmp_path, found, {"key": "a"})
  assert results.load(tmp_path)[0].axes == axes
  path = tmp_path / "arrays.zarr" / "gain" / "zarr.json"
  described = read_json(path)
  del described["attributes"][arrays.SUM]  # as earlier versions wrote it
  path.write_text(json.dumps(described).replace('"case"', '"cbse"'))
  with pytest.raises(ValueError, match=r"arrays\.zarr/gain is missing or damaged"):
    results.load(tmp_path)


def test_a_study_that_meant_something_else_is_not_taken_for_one_of_now(
  tmp_path, monkeypatch, capsys
):
  found = Result(values={"gain": np.ones(2)}, axes={"gain": ("case",)}, problem_of=("a", "b"))
  for age, named in ((1, True), (0, False)):
    out = tmp_path / f"{age}"
    out.mkdir()
    results.save(out, found, {"key": "a", "format": results.FORMAT - age})
    write_json(out / "manifest.json", {**MANIFEST, "files": {}})
    assert stopped(monkeypatch, out) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "holds something else" in said and "give --redo" in said
    assert ("; it is a study of an older version)" in said) == named


def curves(curve, places):
  """2 draws of 10 equal cases: curve and place side by side."""
  return np.tile(np.stack([curve, places], -1).astype(float), (2, 10, 1, 1))


def test_a_peak_is_the_share_of_the_steps_at_its_place():
  places = np.arange(0, 20, 2) / 20
  curve = np.array([9.0, 1, 2, 5, 2, 1, 0, 0, 0, 0])
  np.testing.assert_allclose(peak(curves(curve, places)), 6 / 20)  # the first is another seed
  assert np.isnan(peak(curves(-np.arange(10), places))).all()  # highest at an edge: no peak
  assert np.isnan(peak(curves(np.arange(10), places))).all()
  at = np.array(places_of(20, 9)) / 20
  both = curves(np.eye(9)[4], at)
  np.testing.assert_allclose(highest(both), 10 / 20)
  two_later = np.concatenate([both[..., :1], curves(np.eye(9)[6], at)], -1)
  np.testing.assert_allclose(moved(two_later), 4 / 20)
  assert np.isnan(moved(two_later[..., :7, :])).all()  # too coarse to tell a move


def test_a_place_that_is_repeated_counts_once():
  assert places_of(4, 11) == [1, 2, 3]
  assert places_of(10, 11) == list(range(1, 10))
  assert places_of(20, 9) == list(range(2, 20, 2))
  steps = np.array([1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3])  # 11 places of 4 steps
  last = curves(np.eye(11)[8], steps / 4)
  assert np.isnan(highest(last)).all()  # three places, the peak at the last of them
  two = np.concatenate([last[..., :1], last], -1)
  assert np.isnan(moved(two)).all()
  steps = np.array([1, 2, 3, 4, 5, 6, 6, 6])
  np.testing.assert_allclose(highest(curves(np.eye(8)[3], steps / 7)), 4 / 7)
  assert np.isnan(highest(curves(np.eye(8)[5], steps / 7))).all()


def test_a_peak_is_not_told_from_a_coarse_grid():
  rows = curves(np.array([9.0, 1, 5, 2, 1]), np.arange(5) / 5)
  assert np.isnan(peak(rows)).all()
  values = {"s": rows[0, ..., 0], "at": rows[0, ..., 1]}
  coarse = Result(values=values, axes=dict.fromkeys(values, ("case", "injected")))
  claim = Claim(says="s", of=("s", "at"), by=peak, statistic="place", above=0.4, below=0.6)
  assert results.judge(claim, coarse).verdict == "can't tell"


def test_a_claim_names_a_place_of_a_value():
  value = np.stack([np.zeros((12, 2)), np.ones((12, 2))])
  result = Result(
    values={"drop": value},
    axes={"drop": ("mode", "case", "seed")},
    points={"mode": ["add", "replace"]},
  )
  assert result.per_case("drop[mode=replace]")[0].tolist() == [1.0] * 12
  with pytest.raises(ValueError, match=r"axis 'mode' has no place 'noise'; it has: \['add'"):
    result.per_case("drop[mode=noise]")
  with pytest.raises(ValueError, match="no value 'gain'; there are: drop"):
    result.per_case("gain")


def test_a_result_survives_the_disk(tmp_path):
  result = Result(
    values={"b": np.arange(6.0).reshape(2, 3), "a": np.ones(3)},
    axes={"b": ("mode", "case"), "a": ("case",)},
    points={"mode": ["x", "y"], "case": ["p", "q", "r"]},
    titles={"b": "B"},
    notes=["n"],
  )
  results.save(tmp_path, result, {"experiment": "e"})
  back, record = results.load(tmp_path)
  assert record["experiment"] == "e"
  assert list(back.values) == ["b", "a"]
  np.testing.assert_array_equal(back.values["b"], result.values["b"])
  assert (back.axes, dict(back.points)) == (dict(result.axes), dict(result.points))


def test_verdicts_are_taken_again_from_the_arrays(tmp_path):
  values = {"several": np.ones(9), "corrected": np.zeros(9), "decided": np.linspace(0, 0.1, 9)}
  found = Result(values=values, axes=dict.fromkeys(values, ("case",)))
  record = {"experiment": "chain_of_steps", "control": None, "claims": []}
  results.save(tmp_path, found, record)
  write_json(tmp_path / "manifest.json", {**MANIFEST, "files": {}})
  judge_again(tmp_path)
  claims_now = results.load(tmp_path)[1]["claims"]
  assert [claim["verdict"] for claim in claims_now] == [
    "holds", "can't tell", "does not hold", "holds"
  ]  # fmt: skip
  manifest = read_json(tmp_path / "manifest.json")
  assert manifest["files"] == {"result.json": checksum(tmp_path / "result.json")}
  assert {claim["today"] for claim in claims_now} == {"declared after this run"}
  cut_short = records.rewriting(tmp_path, "result.json")
  with contextlib.suppress(KeyboardInterrupt), cut_short:
    raise KeyboardInterrupt
  assert not records.sums(tmp_path)
  whole = read_json(tmp_path / "result.json")
  judge_again(tmp_path)
  assert read_json(tmp_path / "result.json") == whole
  assert read_json(tmp_path / "manifest.json") == manifest
  write_json(tmp_path / "result.json", {**read_json(tmp_path / "result.json"), "cases": 1})
  for read in (results.load, results.open_study, judge_again):
    with pytest.raises(ValueError, match=r"result\.json is missing or damaged"):
      read(tmp_path)
  write_json(tmp_path / "manifest.json", {**MANIFEST, "files": {}})
  results.save(tmp_path, found, {**record, "experiment": "mine"})
  judge_again(tmp_path)  # its claims are not known here
  assert results.load(tmp_path)[1]["claims"] == []


def test_a_verdict_taken_again_keeps_what_the_run_declared(tmp_path):
  values = {"several": np.ones(9), "corrected": np.zeros(9), "commitment": np.linspace(0, 0.1, 9)}
  found = Result(values=values, axes=dict.fromkeys(values, ("case",)))
  rows = [results.describe(results.judge(claim, found)) for claim in chain_of_steps.claims]
  rows[0] = {**rows[0], "above": 0.9}  # was declared stricter
  rows[1] = {**rows[1], "says": "said then", "verdict": "holds"}
  record = {"experiment": "chain_of_steps", "control": None, "claims": rows}
  results.save(tmp_path, found, record)
  write_json(tmp_path / "manifest.json", {**MANIFEST, "files": {}})
  judge_again(tmp_path)
  again = results.load(tmp_path)[1]
  strict, gone, *same, late = again["claims"]
  assert (strict["above"], strict["verdict"]) == (0.9, "can't tell")
  assert strict["today"] == f"declared today with above {chain_of_steps.claims[0].above}"
  assert (gone["verdict"], gone["today"]) == ("holds", "no longer among the claims")
  assert [row["today"] for row in same] == [None] * len(same)
  assert (late["says"], late["today"]) == (chain_of_steps.claims[1].says, "declared after this run")
  assert again["judged_again"].keys() == {"written", "revision"}
  judge_again(tmp_path)
  assert results.load(tmp_path)[1]["claims"] == again["claims"]


# docs/new_experiment.md


def test_the_documented_experiment_runs_as_it_stands():
  block = helpers.documented("new_experiment.md")
  body = block[block.index("def early_attention") :].splitlines()
  assert len([line for line in body if line.strip()]) <= 30
  space = {}
  exec(compile(block, "new_experiment.md", "exec"), space)
  study = space["early_attention"]
  setting = toy.setting(toy.truth, carrier=0)
  found, record, findings = perform(study, setting, toy.cases(8), options={"edited_steps": 10})
  np.testing.assert_allclose(found.values["pull"].mean((1, 2)), [1, 0, 0, 0], atol=1e-5)
  assert record["control"] == {"pull": 0.0}
  assert record["evaluations"] == record["planned"]
  assert study.limits.startswith("One term of one layer")
  assert findings[0].estimate == pytest.approx(1)


# the command


def test_run_takes_presets_options_and_names_what_it_does_not_know():
  flags, words = cli.parse(
    run, ["noise", "--preset=full", "--config.experiment.stride=5", "--config.cases=2", "--out=x"]
  )
  assert words == ["noise"]
  assert (flags.config.experiment.stride, flags.config.cases) == (5, 2)
  for words, said in (
    (["nois"], "did you mean 'noise'"),
    (["noise", "--preset", "huge"], "wanted quick or full"),
    (["noise", "--config.experiment.strid=1"], "did you mean 'experiment.stride'"),
    (["nowhere:study"], "No module named 'nowhere'"),
    (["--out=x"], "no experiment named"),
  ):
    with pytest.raises(ValueError, match=said):
      cli.parse(run, words)


def asked_of(*words):
  return cli.parse(run, [*words, "--out=x"])[0].config


@pytest.mark.parametrize("typed", ["--config=mini:steps=3,seeds=5", "--config.steps=3"])
def test_a_preset_does_not_change_what_is_typed(typed):
  config = asked_of("noise", typed, "--preset=full")
  assert (config.steps, config.seeds) == (3, 5 if "seeds" in typed else 1)
  assert (config.batch, config.cases) == (12, 8)  # as the preset has them


def test_a_preset_comes_before_a_config_file_and_that_before_the_study(tmp_path):
  own = tmp_path / "own.py"
  own.write_text(
    "from jax_videoreason.configs import common, mini\n"
    "def get_config(argument=None):\n"
    "  config = mini.get_config()\n"
    "  config.steps = 30\n"
    "  with config.unlocked():\n"
    "    config.update({'cases': 20, 'split': 'ood', 'tasks': ('maze',)})\n"
    "    config.experiment = {'gain': 2.0, 'stride': 4}\n"
    "  return common.parse(config, argument)\n"
  )
  config = asked_of("noise", f"--config={own}")
  assert (config.steps, config.cases, config.experiment.stride) == (8, 3, 1)  # of the preset
  assert (config.split, config.tasks, config.experiment.gain) == ("ood", ("maze",), 2.0)
  config = asked_of("noise", f"--config={own}:cases=9,tasks=(pick,maze),experiment.stride=2")
  assert (config.steps, config.cases, config.experiment.stride) == (8, 9, 2)
  assert config.tasks == ("pick", "maze")


def test_words_with_commas_are_several_tasks():
  for tasks in ("maze,pick", "(maze, pick)", "('maze','pick')"):
    assert asked_of("noise", f"--config.tasks={tasks}").tasks == ("maze", "pick")


def test_run_all_on_mini_also_moves_the_switch_of_mini_experts():
  def studies(*words):
    return run.every_study(cli.parse(run, ["all", *words])[0])

  places = [place for place, _, _ in studies("--preset", "full")]
  assert places == [*EXPERIMENTS, "controls_mini_experts"]
  (_, study, more) = studies()[-1]
  flags, _ = cli.parse(run, [study.name, *more, "--out=x"])
  assert flags.config.checkpoint == "mini_experts"
  assert flags.config.experiment.settings == ("as is", "switch earlier", "switch later")
  for words in (["--checkpoint", "mini"], ["--config=mini:shift=3.0"]):
    (_, study, more) = studies(*words)[-1]
    flags, _ = cli.parse(run, [study.name, *words, *more, "--out=x"])
    assert cli.resolved(flags)["checkpoint"] == "mini_experts"
    assert flags.config.shift == (3.0 if "config" in words[0] else 5.0)
  for words in (["--config", "mini:steps=3"], ["--config=mini", "--config.steps=3"]):
    for _, study, more in studies(*words):
      assert asked_of(study.name, *words, *more).steps == 3
  for words in (["--checkpoint=mine"], ["--config=vbvr_wan22"]):
    assert [place for place, _, _ in studies(*words)] == [*EXPERIMENTS]


def test_a_study_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
  done = []

  def one(study, config, out, *, mesh, redo):
    if study.name == "noise":
      raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    done.append(out.name)

  monkeypatch.setattr(run, "one", one)
  with pytest.raises(ValueError, match="1 studies failed: noise; the rest is in"):
    run.every([], tmp_path)
  assert done == [name for name in (*EXPERIMENTS, "controls_mini_experts") if name != "noise"]
  assert "RESOURCE_EXHAUSTED: out of memory" in (tmp_path / "claims.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noise", "ensemble"])
def test_a_study_on_a_mesh_finds_what_it_finds_on_one_device(name, tmp_path):
  words = ["run", name, "--config.cases=2", "--config.seeds=2", "--config.steps=4"]
  words += ["--config.tasks=('pick',)", "--config.decoder=preview"]
  words += ["--config.experiment.stride=2"] if name == "noise" else []
  assert cli.main([*words, f"--out={tmp_path / 'one'}"]) == 0
  assert cli.main([*words, "--mesh=seed=2,context=2", f"--out={tmp_path / 'four'}"]) == 0
  (one, record), (four, again) = (results.load(tmp_path / place) for place in ("one", "four"))
  assert again["control"] == record["control"]
  assert again["evaluations"] == record["evaluations"]
  for key, value in one.values.items():
    if np.issubdtype(value.dtype, np.number):
      np.testing.assert_allclose(four.values[key], value, atol=1e-3, err_msg=key)
    else:
      np.testing.assert_array_equal(four.values[key], value)
  assert read_json(tmp_path / "four" / "manifest.json")["mesh"] == {
    "seed": 2,
    "fsdp": 1,
    "context": 2,
  }


def test_the_reader_is_chosen_on_a_mesh_that_the_runs_looked_at_do_not_fill():
  plain = toy.setting(toy.truth)
  parts = dataclasses.replace(plain.bundle.parts, preview=object())
  quick = dataclasses.replace(plain.bundle, parts=parts)
  wide = dataclasses.replace(plain, bundle=quick, mesh=sharding.make_mesh(seed=4))
  seen = []

  def show(bundle, x0):
    seen.append(x0.shape[1])
    return plain.decode(x0)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setting_module, "preview_each", show)
    chosen, agreement = setting_module.with_reader(wide, toy.cases(3))
  assert agreement == 1.0 and chosen is not wide
  assert seen == [4]


def test_the_reader_is_chosen_by_cases_of_all_tasks_with_every_seed(monkeypatch):
  plain = toy.setting(toy.truth, seeds=(0, 1))
  parts = dataclasses.replace(plain.bundle.parts, preview=object())
  both = dataclasses.replace(plain, bundle=dataclasses.replace(plain.bundle, parts=parts))
  asked = []

  def assembled(setting, cases, *rest, **more):
    ctx = assemble(setting, cases, *rest, **more)
    asked.extend((c.index, s) for c, s in zip(cases, [0, 1] * (len(cases) // 2), strict=True))
    assert len(np.unique(np.asarray(jax.random.key_data(ctx.noise.keys)), axis=0)) == len(cases)
    return ctx

  monkeypatch.setattr(setting_module, "assemble", assembled)

  def dark(videos):
    return map(np.zeros_like, videos)

  for shown, agreement in ((plain.decode, 1.0), (lambda x0: dark(plain.decode(x0)), 0.0)):
    monkeypatch.setattr(setting_module, "preview_each", lambda bundle, x0, shown=shown: shown(x0))
    chosen, found = setting_module.with_reader(both, toy.cases(84))
    assert found == agreement and (chosen is both) == (agreement == 0.0)
  numbers = [0, 12, 24, 36, 47, 59, 71, 83]
  assert asked == 2 * [(number, seed) for number in numbers for seed in (0, 1)]
  blind = dataclasses.replace(both, decode=lambda x0: dark(plain.decode(x0)))
  assert setting_module.with_reader(blind, toy.cases(2)) == (blind, None)  # nothing can be read


def test_weights_by_closeness_of_a_case_that_broke_are_equal():
  x0 = np.random.default_rng(0).normal(size=(2, 6, 1, 2, 2, 1)).astype(np.float32)
  by_seed = np.array([[0, 3], [1, 4], [2, 5]])
  whole = closeness(x0, by_seed)
  x0[1, 4] = np.nan
  found = closeness(x0, by_seed)
  np.testing.assert_allclose(found[1, 1], 1 / 3)
  np.testing.assert_array_equal(
    np.delete(found.reshape(4, 3), 3, 0), np.delete(whole.reshape(4, 3), 3, 0)
  )


def test_a_study_says_which_runs_a_mesh_does_not_share_out():
  setting = dataclasses.replace(toy.setting(toy.truth), mesh=sharding.make_mesh(seed=4))
  with pytest.raises(ValueError, match="3 runs on a mesh with seed=4, wanted a multiple of it"):
    perform(chain_of_steps, setting, toy.cases(3))


def test_every_preset_fits_its_experiment():
  flags, _ = cli.parse(run, ["ensemble", "--preset=paper", "--out=x"])
  assert (flags.config.steps, flags.config.seeds) == (50, 3)
  with pytest.raises(ValueError, match=r"wanted quick or full \(and paper for ensemble\)"):
    cli.parse(run, ["noise", "--preset=paper", "--out=x"])
  for name, study in EXPERIMENTS.items():
    for preset in run.PRESETS:
      flags, _ = cli.parse(run, [name, f"--preset={preset}", "--out=x"])
      own = flags.config.experiment.to_dict()
      assert own.keys() == study.options.keys()
      sizes = Sizes(S=20, R=8, G=2, L=12, F=5, H=8, W=8, C=16, T=80, D=128)
      assert study.trajectories(sizes, own) >= 1


def test_the_table_of_claims_keeps_small_numbers_away_from_published_ones(tmp_path):
  for name in ("noise", "early"):
    found, record, _ = perform(
      make_study(
        claims=[Claim(says=name, of="moved[point=1]", statistic="m", above=0.0, number=3)]
      ),
      toy.setting(toy.read_late),
      toy.cases(8),
    )
    (tmp_path / name).mkdir()
    results.save(tmp_path / name, found, record)
    write_json(tmp_path / name / "manifest.json", MANIFEST)
    pages.render(tmp_path / name)
  rows = claims.write(tmp_path, {"probes": "no cases"})
  assert [row["number"] for row in rows] == [1, 3, 3, 10, None]
  assert [row["verdict"] for row in rows if row["number"] in (1, 10)] == ["not run here"] * 2
  assert all(row["estimate"] is None for row in rows if row["number"] in (1, 10))
  for row, more, hours in ((rows[0], "", "270.1 h"), (rows[3], " --ensemble paper", "280.9 h")):
    command = "videoreason vbvr generate --data VBVR-Bench --config vbvr_wan22 --out videos"
    assert f"{command}{more}, then" in row["note"]
    assert f" {hours} on gpu:141GB" in row["note"]  # what plan prints
    cli.parse(cli_vbvr, command.split()[2:] + more.split())
  assert rows[-1]["note"] == "no cases"
  page = pages.render_claims(tmp_path).read_text()
  assert "not run here" in page
  assert "http" not in page.replace("http://www.w3.org", "")
  text = (tmp_path / "claims.md").read_text()
  assert "| 3 | noise |" in text
  assert text.count(" | 8 x 1 | ") == 2
  assert (
    text.count(f"\n8 cases x 1 seed, {read_json(tmp_path / 'noise' / 'result.json')['steps']} ")
    == 2
  )
  assert page.count('data-name="n">8 x 1</td>') == 2 and "8 cases x 1 seed, " in page
  for words in (" ".join(text.split()), page):
    assert "of shares the exact binomial one (Clopper and Pearson)" in words
  assert "Made by `videoreason run all` on 2026-01-02 (cpu, jax_videoreason 1.0)" in text
  shown = set(re.findall(r"\]\(figures/(.+?)\)", text))
  assert shown == {path.name for path in (tmp_path / "figures").iterdir()}
  assert shown == {"noise-moved.png", "early-moved.png"}
  assert cli.main(["report", str(tmp_path)]) == 0  # what failed is still told
  assert read_json(tmp_path / "claims.json")["failed"] == {"probes": "no cases"}


def test_the_table_shows_a_claim_once_that_only_one_study_could_ask(tmp_path):
  for name, of in (("one", "moved[point=1]"), ("two", "moved[point=9]")):
    claim = Claim(says="noise moves x", of=of, statistic="m", above=0.0, number=14)
    found, record, _ = perform(make_study(claims=[claim]), toy.setting(toy.read_late), toy.cases(8))
    (tmp_path / name).mkdir()
    results.save(tmp_path / name, found, record)
  rows = [row for row in claims.write(tmp_path) if row["number"] == 14]
  assert [(row["experiment"], row["verdict"]) for row in rows] == [("one", "holds")]


def test_a_damaged_result_gets_no_rows_in_the_table_of_claims(tmp_path):
  claim = Claim(says="s", of="moved[point=1]", statistic="m", above=0.0)
  found, record, _ = perform(make_study(claims=[claim]), toy.setting(toy.read_late), toy.cases(8))
  path = tmp_path / "own" / "result.json"
  path.parent.mkdir()
  results.save(path.parent, found, record)
  write_json(path.parent / "manifest.json", {**MANIFEST, "files": {path.name: checksum(path)}})
  claims.write(tmp_path)
  write_json(path, {**read_json(path), "claims": []})
  for read in (claims.write, pages.render_claims):
    with pytest.raises(ValueError, match=r"own/result\.json is missing or damaged"):
      read(tmp_path)


def test_the_table_leaves_out_what_another_call_left_behind(tmp_path):
  claim = Claim(says="s", of="moved[point=1]", statistic="m", above=0.0)
  found, record, _ = perform(make_study(claims=[claim]), toy.setting(toy.read_late), toy.cases(8))
  for name in ("now", "failed", "before"):
    (tmp_path / name).mkdir()
    results.save(tmp_path / name, found, record)
    write_json(tmp_path / name / "manifest.json", MANIFEST)
    pages.render(tmp_path / name)
  claims.write(tmp_path, {"failed": "out of memory"}, ["now", "failed"])
  pages.render_claims(tmp_path)
  assert cli.main(["report", str(tmp_path)]) == 0  # keeps the choice
  rows = [r for r in read_json(tmp_path / "claims.json")["claims"] if r["number"] is None]
  assert [(r["says"], r["verdict"]) for r in rows] == [
    ("s", "holds"),
    ("the claims of failed", "not run here"),
    ("the claims of before", "not run here"),
  ]
  assert [path.name for path in (tmp_path / "figures").iterdir()] == ["now-moved.png"]


def test_the_table_of_claims_calls_a_figure_as_the_page_of_its_study_does(tmp_path, monkeypatch):
  monkeypatch.setattr(pages, "MOST_ROWS", 4)
  found, record, _ = perform(chain_of_steps, toy.setting(toy.both_then_one), toy.cases(4))
  own = tmp_path / "chain_of_steps"
  own.mkdir()
  results.save(own, found, record)
  write_json(own / "manifest.json", MANIFEST)
  case = toy.cases(1)[0]
  said = f"The video that x0 shows along the steps, {case.task} {case.split} {case.index}, seed 0"
  said += f", 4 of {record['steps']} steps"
  assert said in pages.render(own).read_text()
  claims.write(tmp_path)
  assert said in pages.render_claims(tmp_path).read_text()
  assert f"![{said}](figures/chain_of_steps-strip-0.png)" in (tmp_path / "claims.md").read_text()
  (own / "figures" / pages.TITLES).unlink()  # as an earlier version left it
  assert "![The video that x0 shows along the steps](" in pages.document(
    read_json(tmp_path / "claims.json"),
    [pages.study_of(own / "result.json", tmp_path / "figures")],
  )


def test_a_curve_is_drawn_where_it_was_measured_and_no_place_twice(tmp_path, monkeypatch):
  drawn = {}
  monkeypatch.setattr(
    pages.plots, "bands", lambda path, lines, **_: drawn.update({path.stem: lines})
  )
  places = np.array([[0.125, 0.375, 0.75, 0.875], [0.25, 0.5, 0.5, 0.5]])
  at = np.repeat(places[..., None], 8, axis=2)
  values = {"sensitivity": np.random.default_rng(0).random(at.shape), "place_at": at}
  axes = dict.fromkeys(values, ("setting", "place", "case"))
  values["one_network"], axes["one_network"] = values["sensitivity"][1], ("place", "case")
  found = Result(
    values=values, axes=axes, points={"setting": ["as is", "half"], "place": [0.25, 0.5, 0.5, 0.5]}
  )
  assert [len(pages.draw(tmp_path, found, name)) for name in values] == [1, 0, 1]
  lines = drawn["sensitivity"]
  assert [line[0].tolist() for line in lines.values()] == [places[0].tolist(), [0.25, 0.5]]
  np.testing.assert_allclose(lines["half"][1], values["sensitivity"][1, :2].mean(1))
  assert drawn["one_network"][""][0].tolist() == [0.25, 0.5]


def test_only_maps_that_are_signed_get_dots(tmp_path, monkeypatch):
  drawn = {}
  monkeypatch.setattr(pages.plots, "heat_maps", lambda path, *a, **k: drawn.update({path.stem: k}))
  rng = np.random.default_rng(0)
  effect = rng.normal(0, 1, (3, 4, 24))
  effect[1, 2] += 3
  effect[..., 20:] = np.nan  # cases of another task
  values = {"drop": effect, "distance": np.abs(effect)}
  axes = dict.fromkeys(values, ("step", "layer", "case"))
  found = Result(values=values, axes=axes, signed=("drop",))
  for name in values:
    pages.draw(tmp_path, found, name)
  assert np.argwhere(drawn["drop"]["marked"][""]).tolist() == [[1, 2]]
  assert drawn["distance"]["marked"] is None
  results.save(tmp_path, found, {"experiment": "e"})
  assert list(results.load(tmp_path)[0].signed) == ["drop"]


def test_the_page_of_a_study_shows_verdicts_figures_and_limits(tmp_path):
  study = make_study(
    claims=[Claim(says="noise moves x", of="moved[point=1]", statistic="mean", above=0.0)]
  )
  found, record, _ = perform(study, toy.setting(toy.read_late), toy.cases(8))
  results.save(tmp_path, found, record)
  write_json(tmp_path / "manifest.json", MANIFEST)
  page = pages.render(tmp_path).read_text()
  for said in ("Does noise move the score?", "noise moves x", "holds", "A test.", "0 in 1 of 1"):
    assert said in page
  assert (tmp_path / "figures" / "moved.png").exists()


# The command and its folder


def stopped(monkeypatch, out, *words):
  """`run noise`, which ends where it would begin to compute."""

  def perform(*_, **__):
    raise ValueError("it got as far as that")

  monkeypatch.setattr("jax_videoreason.experiments.perform", perform)
  return cli.main(["run", "noise", "--config.cases=1", f"--out={out}", *words])


def test_redo_does_not_take_what_an_interrupted_call_left(tmp_path, monkeypatch, capsys):
  chunk = tmp_path / "noise" / "chunks" / "a"
  chunk.mkdir(parents=True)
  assert stopped(monkeypatch, tmp_path / "noise") == cli.BAD_INPUT
  assert "it got as far as that" in capsys.readouterr().err
  assert chunk.exists()
  assert stopped(monkeypatch, tmp_path / "noise", "--redo") == cli.BAD_INPUT
  assert not chunk.exists()


def test_what_a_killed_call_left_is_no_obstacle_and_a_damaged_result_is_named(
  tmp_path, monkeypatch, capsys
):
  out = tmp_path / "noise"
  (out / folders.STAGE).mkdir(parents=True)
  assert stopped(monkeypatch, out) == cli.BAD_INPUT
  assert "it got as far as that" in capsys.readouterr().err
  (out / "result.json").write_text("{")
  assert stopped(monkeypatch, out) == cli.BAD_INPUT
  assert "holds something else (it has result.json)" in capsys.readouterr().err
  assert stopped(monkeypatch, out, "--redo") == cli.BAD_INPUT
  assert "it got as far as that" in capsys.readouterr().err


def test_the_same_command_does_a_study_again_whose_result_is_damaged(tmp_path, capsys):
  out = tmp_path / "study"
  words = ["run", "chain_of_steps", "--config.tasks=('pick',)", "--config.cases=1", f"--out={out}"]
  words += ["--config.seeds=1", "--config.steps=2", "--config.decoder=preview"]
  assert cli.main(words) == 0
  whole = read_json(out / "result.json")
  for text in (json.dumps({**whole, "evaluations": 1}), "{"):
    (out / "result.json").write_text(text)
    assert cli.main([*words, "--config.steps=3"]) == cli.BAD_INPUT
    assert "holds something else (it has arrays.zarr" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert "result.json is missing or damaged; done again" in " ".join(
      capsys.readouterr().out.split()
    )
    again = {name: whole[name] for name in ("seconds", "programs")}  # compiled in this process
    assert {**read_json(out / "result.json"), **again} == whole
  (out / "arrays.zarr" / ".DS_Store").write_text("not ours")
  assert cli.main(words) == 0
  assert "has it already" in capsys.readouterr().out
  chunk = max(p for p in (out / "arrays.zarr").glob("*/c/**/*") if p.is_file())
  raw = chunk.read_bytes()

  def on_the_way(*names):
    (out / folders.STAGE).mkdir()
    for name in names:
      shutil.move(out / name, out / folders.STAGE)

  for damage in (
    lambda: chunk.write_bytes(raw[:-1]),
    lambda: shutil.rmtree(out / "arrays.zarr"),
    lambda: on_the_way("result.json", "report.html", "manifest.json"),
    lambda: on_the_way("manifest.json"),
  ):
    damage()
    assert cli.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is missing or damaged; done again" in said
    assert chunk.read_bytes() == raw and not (out / folders.STAGE).exists()
  manifest = out / "manifest.json"
  manifest.write_text(manifest.read_text().replace('"device": "', '"device": "x'))
  assert cli.main(words) == 0
  assert "manifest.json is missing or damaged; done again" in " ".join(
    capsys.readouterr().out.split()
  )
  assert cli.main(words) == 0
  assert "has it already" in capsys.readouterr().out


def test_a_second_study_in_a_folder_is_refused_meanwhile(tmp_path, monkeypatch, capsys):
  with folders.held(tmp_path / "noise"):
    assert stopped(monkeypatch, tmp_path / "noise", "--redo") == cli.BAD_INPUT
  assert "another command works in" in capsys.readouterr().err
  with folders.held(tmp_path / "all"):
    assert cli.main(["run", "all", f"--out={tmp_path / 'all'}"]) == cli.BAD_INPUT
  assert "another command works in" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("word", "said"),
  [
    ("--config.batch=-1", "batch=-1, wanted at least 1"),
    ("--config.batch=0", "batch=0, wanted at least 1"),
    ("--config.cases=0", "cases=0, wanted at least 1"),
    ("--config.tasks=('pick','pick')", "tasks=('pick', 'pick'), wanted at least one, and none"),
    ("--config.tasks=()", "tasks=(), wanted at least one"),
  ],
)
@pytest.mark.parametrize("command", [("run", "noise", "--out=x"), ("plan", "run", "noise")])
def test_cases_that_are_none_are_refused_also_by_a_plan(
  capsys, tmp_path, monkeypatch, command, word, said
):
  monkeypatch.chdir(tmp_path)
  assert cli.main([*command, word]) == cli.BAD_INPUT
  assert said in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_no_case_of_a_study_has_picture_and_prompt_of_another():
  chosen = settings.from_config({**cli.load_config("mini").to_dict(), "seeds": [0]})
  cases = setting_module.pick_cases(chosen, ("pick", "maze"), 32)
  assert len({(case.first_frame.tobytes(), case.prompt) for case in cases}) == 64
  assert [case.metadata["k"] > 1 for case in cases] == 32 * [False, True]


@pytest.mark.parametrize("kind", ["scores", "evaluate"])
def test_report_refuses_a_folder_of_other_results(tmp_path, capsys, kind):
  (tmp_path / kind).mkdir()
  write_json(tmp_path / kind / "result.json", {"overall": 1.0})
  assert cli.main(["report", str(tmp_path)]) == cli.BAD_INPUT
  assert f"for {kind} in it is no study: give the folder of one" in capsys.readouterr().err
