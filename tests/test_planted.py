"""Each experiment beside a toy that has the effect, and one that has not."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import toy
from helpers import relative, tiny_bundle, tiny_inputs, tiny_schedule
from jax_videoreason import probes as linear
from jax_videoreason import sampler, tasks
from jax_videoreason.experiments import EXPERIMENTS, Result, perform
from jax_videoreason.experiments.behaviours import parts_shown, with_memory
from jax_videoreason.experiments.context import Chunks, Tally, assemble
from jax_videoreason.experiments.ensemble import ensemble, medoid, parsed
from jax_videoreason.experiments.layer_maps import (
  agrees,
  beside_ground,
  lens_x0,
  object_share,
  rise,
  rise_before_last,
  tapped,
)
from jax_videoreason.experiments.layer_swap import flipped
from jax_videoreason.experiments.probes import fit, targets_of
from jax_videoreason.experiments.readings import decision, grown, majority
from jax_videoreason.interventions import identity, steer, where
from jax_videoreason.taps import TapSpec
from jax_videoreason.tasks import draw


def run(name, setting, count=10, **options):
  return perform(EXPERIMENTS[name], setting, toy.cases(count), options=options)


def verdicts(findings):
  return {finding.claim.says: finding.verdict for finding in findings}


def is_zero(record):
  return record["control"] == dict.fromkeys(record["control"], 0.0)


def context(setting, cases):
  """The batch of these runs."""
  return assemble(
    setting, cases, {"case": np.arange(len(cases))}, tally=Tally(), chunks=Chunks(), place="test"
  )


def test_tokens_are_the_grid_that_a_hidden_state_lies_in():
  setting = toy.setting(toy.truth)
  card = setting.bundle.card
  card = dataclasses.replace(card, latents=dataclasses.replace(card.latents, patch=(1, 2, 4)))
  bundle = dataclasses.replace(setting.bundle, card=card)
  ctx = context(dataclasses.replace(setting, bundle=bundle), toy.cases(2))
  sizes = ctx.sizes
  assert ctx.tokens == (sizes.F, sizes.H // 2, sizes.W // 4)
  assert math.prod(ctx.tokens) == sizes.T


# layer_swap


def test_layer_swap_finds_the_one_layer_that_carries_the_answer():
  options = {"variants": ("stream", "update", "attention"), "edited": (1, 10)}
  found, record, _ = run("layer_swap", toy.setting(toy.truth, carrier=2), **options)
  flip = found.values["flip"].mean((3, 4))  # variant edited layer
  assert flip[1, 1].tolist() == [0, 0, 1, 0]
  assert flip[2, 1].tolist() == [0, 0, 1, 0]
  assert flip[0, 1].tolist() == [0, 0, 1, 1]  # the stream holds what an earlier layer wrote
  first = found.values["pull_first"].mean((3, 4))
  np.testing.assert_allclose(first[1, 0], [0, 0, 1, 0], atol=1e-5)
  assert flip[1, 0].tolist() == [0, 0, 0, 0]  # one step is undone by the nine that follow
  assert is_zero(record)
  assert record["evaluations"] == record["planned"]


def test_layer_swap_finds_no_layer_where_the_head_reads_the_picture_itself():
  options = {"variants": ("update",), "edited": (10,)}
  found, _, findings = run("layer_swap", toy.setting(toy.truth, carrier=None), **options)
  assert np.abs(found.values["flip"]).max() == 0
  assert np.abs(found.values["pull"]).max() == 0
  left_out = verdicts(findings)[
    "swapping one middle layer at the first step turns the answer round"
  ]
  assert left_out == "not run here"


@pytest.mark.slow
def test_layer_swap_asks_for_no_flip_where_a_counterpart_cannot_be_read():
  options = {"variants": ("stream", "update"), "edited": (10,)}
  found, record, findings = run("layer_swap", toy.setting(toy.right_is_dark), **options)
  assert np.isnan(found.values["flip"]).all()
  said = verdicts(findings)["swapping one middle layer at the first step turns the answer round"]
  assert said == "not run here"
  assert is_zero(record)
  answers = np.array([None, "a", "a", "b", "b", None], object)
  own = np.array(["a", "a", "a", "a", "a", None], object)
  other = np.array(["b", "b", "a", "b", None, None], object)
  nan = np.nan
  np.testing.assert_array_equal(flipped(answers, own, other), [0, 0, nan, 1, nan, nan])


@pytest.mark.slow
def test_layer_swap_cannot_tell_a_layer_where_the_whole_stream_turns_nothing_round():
  says = "swapping one middle layer at the first step turns the answer round"
  options = {"variants": ("stream", "update"), "edited": (1,)}
  for setting, verdict, flips in (
    (toy.setting(toy.truth, carrier=2), "can't tell", 0),  # undone by the steps that follow
    (toy.setting(toy.truth, carrier=2, steps=1), "holds", 1),
  ):
    found, _, findings = run("layer_swap", setting, **options)
    assert found.values["flip"][0].max() == flips
    assert np.isfinite(found.values["reversal"]).any() == flips
    assert verdicts(findings)[says] == verdict


def test_layer_swap_refuses_what_it_does_not_know():
  with pytest.raises(ValueError, match="no variant 'half'; there are: stream, update"):
    run("layer_swap", toy.setting(), variants=("half",))
  with pytest.raises(ValueError, match="branches='negative', wanted 'both' or 'positive'"):
    run("layer_swap", toy.setting(), branches="negative")


# layer_maps


def test_layer_maps_finds_the_layer_from_which_the_lens_gives_the_answer():
  found, _, findings = run("layer_maps", toy.setting(toy.truth, carrier=2))
  share = found.values["lens_agrees"].mean((1, 2))
  assert share.tolist() == [0, 0, 1, 1]
  [lens] = [f for f in findings if f.claim.says.endswith("read from them is the final one")]
  assert (lens.estimate, lens.verdict) == (1.0, "can't tell")  # ten equal cases show no spread
  assert (found.values["cka_last"][2:] > found.values["cka_last"][:2] + 0.1).all()
  assert found.values["norm_map"].shape == (4, toy.F, toy.H, toy.W)


def test_the_last_layer_is_no_evidence_that_layers_grow_like_it():
  rows = np.full((3, 12), 0.5)
  rows[:, -1] = 1.0  # with itself
  assert rise(rows[None]) == pytest.approx(0.125)
  assert rise_before_last(rows[None]) == 0


def test_a_lens_that_shows_nothing_does_not_agree_with_a_video_that_shows_nothing():
  final = np.array(["left", "left", None], object)
  shown = np.array([["left", "right", None], [None, "left", "left"]], object)
  found = agrees(shown, final)
  np.testing.assert_array_equal(found, [[1, 0, np.nan], [0, 1, np.nan]])


def test_an_object_smaller_than_a_token_gives_the_contrast_that_was_planted():
  pictures = np.full((2, 64, 64, 3), draw.RGB[draw.WHITE])
  pictures[:, :, :32] = draw.RGB[draw.BLACK]  # ground and walls alone
  pictures[0, 20:23, 43:46] = draw.RGB[draw.RED]
  share = object_share(pictures, (2, 8, 8))
  assert np.flatnonzero(share[0]).tolist() == [2 * 8 + 5, 64 + 2 * 8 + 5]
  np.testing.assert_allclose(share[0].max(), 9 / 64)
  value = np.zeros((3, 2, 128))  # layers, runs, tokens
  value[1, :, share[0] > 0] = 4.0
  found = beside_ground(value, share[None])
  np.testing.assert_allclose(found[:, 0], [0, 4, 0], atol=0.1)
  assert np.isnan(found[:, 1]).all()


@pytest.mark.parametrize("name", ["maze", "pick", "select_largest"])
def test_objects_are_neither_ground_nor_walls(name):
  task = tasks.load(name, size=32)
  for index in range(8):
    picture = task.generate("id", index).first_frame
    share = object_share(picture[None], (1, 4, 4))
    shown = draw.label(picture[None])
    assert share.sum() * 64 == (~np.isin(shown, [draw.BLACK, draw.WHITE, draw.GREY])).sum()
    assert 0 < share.mean() < 0.5


def test_cases_without_objects_are_left_out_of_the_contrast_and_counted():
  _, _, findings = run("layer_maps", toy.setting(toy.truth), 2)
  [found] = [f for f in findings if f.claim.of == "contrast"]
  assert (found.verdict, found.cases) == ("can't tell", 0)
  assert found.note == "2 of 2 cases have no number"


@pytest.mark.parametrize("image_input", ["none", "concat", "overwrite"])
def test_the_lens_of_the_last_layer_is_what_the_sampler_guesses(image_input):
  own = toy.setting()
  chosen = dataclasses.replace(own.chosen, frames=9, height=16, width=16, steps=3, guidance=(3.0,))
  setting = dataclasses.replace(
    own,
    bundle=tiny_bundle(image_input),
    chosen=chosen,
    encode=lambda chosen, cases: tiny_inputs(len(cases), image_input)[1],
  )
  ctx = context(setting, toy.cases(2))
  taps = tapped(ctx.sizes, site="resid_post")
  _, trace = ctx.denoise(taps=taps)
  guesses = lens_x0(ctx, trace, np.asarray(trace.taps["resid_post/lens"]))
  # the head runs once more, outside the model's own program: rounding alone lies between
  assert relative(guesses[:, -1], trace.x0) < 1e-5
  assert relative(guesses[:, 0], trace.x0) > 0.01


@pytest.mark.slow
def test_layer_maps_finds_no_layer_where_all_of_them_give_the_answer():
  found, _, findings = run("layer_maps", toy.setting(toy.truth, carrier=None))
  assert (found.values["lens_agrees"] == 1).all()
  said = verdicts(findings)
  assert said["later layers consolidate: the answer read from them is the final one"] != "holds"


# frames


def test_frames_finds_that_a_shorter_video_loses_the_answer():
  fewer = {"fewer": (2,)}
  found, record, findings = run("frames", toy.setting(toy.needs_frames), **fewer)
  assert found.axes["drop"] == ("frames", "case", "seed")
  assert (found.values["clean"] == 1).all()
  assert (found.values["drop"] == 1).all()
  assert verdicts(findings)["fewer frames change little"] != "holds"
  assert is_zero(record)
  same, _, _ = run("frames", toy.setting(toy.truth), **fewer)
  assert np.abs(same.values["drop"]).max() == 0


# ensemble


def test_ensemble_finds_that_a_vote_of_seeds_helps_where_seeds_err_alone():
  seeds = tuple(range(7))
  options = {"kinds": ("out", "out close"), "steps": (10,), "more_steps": 1}
  found, record, _ = run("ensemble", toy.setting(toy.leaning, seeds=seeds), 32, **options)
  assert found.axes["gain"] == ("kind", "steps", "case")
  assert found.values["gain"].shape == (2, 1, 32)
  assert (found.values["gain"].mean((1, 2)) > 0.05).all()
  assert (found.values["moved"][0] != found.values["moved"][1]).any()  # other weights
  assert found.notes[0].startswith("Cost in network evaluations, one seed = 1: the ensemble 7.00")
  assert found.values["oracle_gain"].mean() >= found.values["vote_gain"].mean() > 0.05
  assert is_zero(record)
  assert record["evaluations"] == record["planned"]


@pytest.mark.slow
def test_ensemble_finds_no_gain_where_seeds_do_not_matter():
  options = {"kinds": ("update", "latents"), "steps": (1,), "more_steps": 3}
  found, record, _ = run("ensemble", toy.setting(toy.truth, seeds=(0, 1, 2)), **options)
  for name in ("gain", "vote_gain", "oracle_gain", "steps_gain"):
    assert np.abs(found.values[name]).max() == 0, name
  assert is_zero(record)


def test_an_ensemble_of_one_seed_is_refused():
  with pytest.raises(ValueError, match="an ensemble of 1 seed, wanted two or more"):
    perform(ensemble, toy.setting(), toy.cases(2))


def test_the_kinds_of_an_ensemble_are_read_word_by_word():
  assert parsed("update") == ("update", "middle", False)
  assert parsed("update late close") == ("update", "late", True)
  assert parsed("latents close") == ("latents", "middle", True)
  for kind in ("updat", "out early", "update far", "update early late"):
    with pytest.raises(ValueError, match=f"no kind '{kind}': wanted one of resid, update, attn"):
      parsed(kind)


def test_majority_and_medoid():
  said = np.array([["a", None], ["b", "x"], ["b", None]], object)
  assert majority(said).tolist() == [1, 1]
  latents = np.zeros((3, 1, 1, 1, 1))
  latents[:, 0, 0, 0, 0] = [0.0, 1.0, 5.0]
  assert medoid(latents, np.array([[0], [1], [2]])).tolist() == [1]


# early


@pytest.mark.parametrize(
  ("said", "step"),
  [
    ("AAAA", 0),
    ("A..A", 0),  # a gap is no change of mind
    ("BBAA", 2),
    ("B.AA", 2),
    ("BA.A", 1),
    ("ABA.A", 2),
    (".ABA", 3),
    ("..AA", None),  # it became legible
    ("BBB.", None),
  ],
)
def test_the_decision_is_the_last_change_of_what_can_be_read(said, step):
  answer = np.array([[None if letter == "." else letter] for letter in said], object)
  np.testing.assert_array_equal(decision(answer), [np.nan if step is None else step])


def test_growth_is_of_answers_that_are_begun_and_not_complete():
  shown = [
    ["", "a", "ab", "ab"],  # grows
    ["a", "ab", "a", "ab"],  # loses
    ["", "abc", "abc", "abc"],  # is there at once
    ["abc", "abc", "abc", "abc"],
    [None, "a", None, "abc"],  # grows while it can't be read
    ["ab", "cde", "cdef", "cdef"],  # becomes another
    [None, None, None, "abc"],
    [None, None, None, None],
  ]
  parts = np.full((4, len(shown)), None, object)
  for run, words in enumerate(shown):
    for step, word in enumerate(words):
      parts[step, run] = None if word is None else frozenset(word)
  found = grown(parts)
  nan = np.nan
  np.testing.assert_array_equal(found["enhanced"], [1, 0, 0, 0, 1, 0, nan, nan])
  np.testing.assert_array_equal(found["growth_steps"], [1, 2, 0, 0, 1, 1, nan, nan])


def part_by_part(case):
  """Pictures that show more and more parts of the answer: a trail that lengthens, bar after bar."""
  if case.task == "maze":
    return case.frames[2:]
  ends = case.frames[[0, -1]]
  bars = [draw.colour(bar["colour"]) for bar in case.metadata["problem"]["bars"]]
  moved = [np.isin(draw.label(ends), bars[:count]).any(0) for count in range(len(bars) + 1)]
  return np.stack([np.where(place[..., None], ends[1], ends[0]) for place in moved])


@pytest.mark.parametrize("name", ["maze", "sort_bars"])
def test_an_answer_grows_by_its_parts_and_not_by_its_contrast(name):
  task = tasks.load(name, size=32)
  cases = [task.generate("id", index) for index in range(6)]
  for case in cases:
    still = case.frames[0].astype(float)
    fade = [still + share * (case.frames[-1] - still) for share in np.linspace(0, 1, 15)]
    for pictures, enhanced in ((np.round(fade).astype(np.uint8), 0), (part_by_part(case), 1)):
      clips = np.repeat(pictures[:, None], 2, axis=1)
      shown = [[parts_shown(task, clip, case.metadata)] for clip in clips]
      found = grown(np.array(shown, object))
      assert found["enhanced"].tolist() == [enhanced]
      assert (found["growth_steps"] > 1) == enhanced


def test_no_growth_is_asked_of_a_task_whose_answer_has_no_parts():
  task = tasks.load("pick", size=32)
  case = task.generate("id", 0)
  shown = [[parts_shown(task, case.frames, case.metadata)]] * 3
  assert np.isnan(grown(np.array(shown, object))["enhanced"]).all()


def test_early_finds_that_an_early_vote_suffices_where_seeds_commit_at_once():
  found, record, _ = run("early", toy.setting(toy.leaning, seeds=tuple(range(7))), 32)
  assert is_zero(record)
  assert record["evaluations"] == record["planned"]
  assert found.values["early_gain"].mean() > 0.05
  assert found.values["late_minus_early"].shape == (32,)
  np.testing.assert_array_equal(found.values["late_minus_early"], 0)
  cost = found.values["cost"]
  assert cost[0] == pytest.approx((7 + 9) / 10)
  assert cost[-1] == pytest.approx(7)


@pytest.mark.slow
def test_early_finds_nothing_to_read_before_the_answer_is_made():
  found, _, _ = run("early", toy.setting(toy.both_then_one, seeds=(0, 1, 2)))
  assert found.values["early_readout"][:5].max() == 0
  assert found.values["early_readout"][5:].min() == 1
  assert np.abs(found.values["early_gain"]).max() == 0


# behaviours


@pytest.mark.slow
def test_behaviours_finds_correction_and_its_absence():
  found, _, _ = run("behaviours", toy.setting(toy.both_then_one))
  assert (found.values["net_correction"] == 1).all()
  np.testing.assert_allclose(found.values["acted"], 0.5)
  still, _, _ = run("behaviours", toy.setting(toy.truth))
  assert (still.values["net_correction"] == 0).all()
  assert (still.values["action_after"] == 0).all()


def test_behaviours_finds_what_is_hidden_from_the_layer_that_remembers_it():
  found, _, _ = run("behaviours", toy.setting(toy.truth, carrier=2), 16, stride=9)
  first = found.values["memory_accuracy"][0].mean((1, 2))  # by layer
  assert (first[2:] == 1).all()
  assert (first[:2] < 0.8).all()
  assert found.values["memory"].mean() > 0.2
  says = "working memory: a hidden object can be read from the hidden states while it is hidden"
  lost, _, findings = run("behaviours", toy.setting(toy.of_the_noise, carrier=None), 16, stride=9)
  assert lost.values["memory"].mean() < 0.2
  assert verdicts(findings)[says] != "holds"


def test_too_few_hidden_objects_are_said_instead_of_probed():
  four = Result(
    values={"features": np.zeros((4, 1, 1, 2, 3, 5)), "colours": np.full((4, 1, 1), "red")},
    axes={
      "features": ("case", "seed", "object", "probed", "layer", "column"),
      "colours": ("case", "seed", "object"),
    },
  )
  found = with_memory(four)
  assert found.notes == ["Too few hidden objects for a probe of memory."]
  assert not found.values and not found.signed


# controls


@pytest.mark.slow
def test_controls_finds_where_new_noise_changes_the_video():
  options = {"settings": ("as is", "shift 3", "half the steps"), "places": 4}
  found, record, _ = run("controls", toy.setting(toy.of_the_noise), **options)
  assert found.axes["sensitivity"] == ("setting", "place", "case", "seed")
  assert is_zero(record)
  assert record["evaluations"] == record["planned"]
  np.testing.assert_array_equal(found.values["one_network"], found.values["sensitivity"][0])
  calm, _, findings = run("controls", toy.setting(toy.truth), settings=("as is",), places=4)
  assert np.abs(calm.values["sensitivity"]).max() < 1e-5
  moves = verdicts(findings)["the peak of sensitivity does not move with the expert switch"]
  assert moves == "not run here"


def test_controls_looks_at_a_step_once_where_there_are_few():
  options = {"settings": ("as is", "half the steps"), "places": 11}
  found, record, findings = run("controls", toy.setting(toy.of_the_noise, steps=4), **options)
  assert record["evaluations"] == record["planned"]
  assert found.values["place_at"][..., 0, 0].tolist() == [[0.25, 0.5, 0.75], [0.5] * 3]
  assert found.points["place"] == [0.25, 0.5, 0.75]
  np.testing.assert_array_equal(
    found.values["sensitivity"][1, 1:], found.values["sensitivity"][1, :1].repeat(2, 0)
  )
  said = verdicts(findings)["the peak of sensitivity is there without an expert switch"]
  assert said == "can't tell"


def test_controls_refuses_an_expert_that_is_not_there():
  with pytest.raises(ValueError, match="no setting 'switch later' for this model"):
    run("controls", toy.setting(), settings=("switch later",))


# probes


def test_probes_find_the_layer_from_which_the_picture_can_be_read():
  found, _, findings = run("probes", toy.setting(toy.truth, carrier=2), 24)
  seen = found.values["accuracy"][0].mean((2, 3))  # step layer
  assert (seen[:, 2:] == 1).all()
  assert (seen[:2, :2] < 0.8).all()  # later on the latents themselves show it
  said = verdicts(findings)
  assert said["the final answer can be read from the hidden states of the first step"] == "holds"
  assert set(found.values) == {
    "accuracy",
    "shuffled",
    "selectivity",
    "perception",
    "reasoning",
    "perception_selectivity",
    "first_answer",
    "perception_lead",
  }


PROBED = {
  "features": ("step", "layer", "case", "seed", "feature"),
  "labels": ("target", "case", "seed"),
  "problem": ("case", "seed"),
}


def test_what_the_problem_alone_says_is_no_answer():
  rng = np.random.default_rng(0)
  rank, said = np.arange(40) % 2, rng.integers(2, size=40)
  features = rng.normal(size=(1, 1, 40, 1, 3)) / 10
  features[0, 0, :, 0, 0] = rank

  def fitted(task):
    targets = targets_of([task])
    labels = [rank if name.endswith("rank") else said for name in targets]
    return fit(
      Result(
        values={
          "features": features,
          "labels": np.stack(labels)[..., None].astype(str),
          "problem": np.arange(40)[:, None].astype(str),
        },
        axes=PROBED,
        points={"target": targets, "case": [f"{task} id {i}" for i in range(40)]},
      )
    )

  found = fitted("select_largest")
  of = dict(zip(found.points["target"], found.values["selectivity"][:, 0, 0], strict=True))
  assert of["select_largest: rank"].mean() > 0.3  # it is there to be read
  assert abs(of["select_largest: answer"].mean()) < 0.3
  np.testing.assert_array_equal(found.values["first_answer"], of["select_largest: answer"])
  assert np.isnan(fitted("sort_bars").values["first_answer"]).all()


def test_a_probe_is_not_judged_by_another_picture_of_a_problem_it_saw():
  """20 problems with a colour each, drawn twice: it can be remembered, and not be worked out."""
  rng = np.random.default_rng(0)
  colour = np.repeat(np.arange(20) % 2, 2)
  features = np.repeat(rng.normal(size=(1, 1, 20, 1, 64)), 2, axis=2)

  def read(problem):
    labels = [
      colour if name.endswith("colour") else np.full(40, "") for name in targets_of(["pick"])
    ]
    return (
      fit(
        Result(
          values={
            "features": features,
            "labels": np.stack([of.astype(str) for of in labels])[..., None],
            "problem": problem[:, None].astype(str),
          },
          axes=PROBED,
          points={"target": targets_of(["pick"]), "case": [f"pick id {i}" for i in range(40)]},
        )
      )
      .values["accuracy"][0]
      .mean()
    )

  assert read(np.arange(40)) > 0.9
  assert read(np.arange(40) // 2) < 0.75


def test_too_few_cases_for_a_probe_are_refused():
  cases, targets = [f"sides id {i}" for i in range(4)], ["sides: side", "sides: answer"]
  four = Result(
    values={
      "features": np.zeros((1, 1, 4, 1, 3)),
      "labels": np.full((2, 4, 1), "left"),
      "problem": np.array([["a"], ["b"], ["c"], ["d"]]),
    },
    axes=PROBED,
    points={"target": targets, "case": cases},
  )
  with pytest.raises(ValueError, match="4 cases of sides are too few for any probe"):
    fit(four)
  elsewhere = dataclasses.replace(four, points={**four.points, "case": ["rotate id 0"] * 4})
  with pytest.raises(ValueError, match="nothing is known to be probed in cases of rotate, wanted"):
    fit(elsewhere)


@pytest.mark.parametrize("name", ["layer_maps", "probes"])
def test_a_site_outside_the_model_is_refused(name):
  with pytest.raises(ValueError, match="no site 'resid_mid'"):
    run(name, toy.setting(), 2, site="resid_mid")


def test_probes_find_nothing_in_noise_and_nothing_for_shuffled_labels():
  rng = np.random.default_rng(0)
  labels = np.repeat(["a", "b"], 40)
  features = rng.normal(size=(8, 80, 12))
  groups = np.arange(80)
  noise = linear.crossed(features, labels, groups).mean(1)
  assert np.all(np.abs(noise - 0.5) < 0.2)
  features[3:, :, 0] += np.where(labels == "a", 4.0, -4.0)[None]
  planted = linear.crossed(features, labels, groups).mean(1)
  assert planted[3:].min() > 0.95
  assert planted[:3].max() < 0.7


@pytest.mark.parametrize(("period", "seeds"), [(2, 1), (4, 1), (2, 4)])
def test_labels_in_an_order_are_judged_as_shuffled_ones_are(period, seeds):
  groups = np.arange(64) // seeds
  labels = np.where(groups % period < period // 2, "a", "b")
  features = np.random.default_rng(0).normal(size=(32, 64, 12))
  found = linear.beside_shuffled(features, labels, groups)
  assert np.all(np.abs(found.mean((1, 2)) - 0.5) < 0.08)


def test_folds_rest_on_the_order_of_groups_and_not_on_their_numbers():
  rng = np.random.default_rng(0)
  features, labels, groups = rng.normal(size=(8, 24, 6)), np.arange(24) % 3, np.arange(24) // 2
  found = linear.crossed(features, labels, groups)
  np.testing.assert_array_equal(found, linear.crossed(features, labels, 7 * groups - 30))


def test_probes_are_the_same_on_four_devices_and_on_one(monkeypatch):
  rng = np.random.default_rng(1)
  features, labels = rng.normal(size=(8, 24, 6)), np.arange(24) % 3
  features[:, :, 0] += labels
  spread = linear.crossed(features, labels, np.arange(24))
  monkeypatch.setattr(linear, "_spread", jax.numpy.asarray)
  np.testing.assert_array_equal(spread, linear.crossed(features, labels, np.arange(24)))


def test_fitted_probes_are_those_that_are_judged():
  rng = np.random.default_rng(2)
  groups, labels = np.arange(40) % 4, rng.choice(["a", "b", "c"], size=40)
  features = rng.normal(size=(8, 40, 6))
  features[:4, :, :2] += 4 * (labels[:, None] == ["a", "b"])
  features = 3 + features * 10.0 ** np.arange(-2, 4)  # columns in units of their own
  right = linear.crossed(features, labels, groups)
  for group in range(4):  # as many groups as folds
    seen = groups != group
    found = linear.fit(features[:, seen], labels[seen])
    scores = features[:, ~seen] @ found.kernel + found.bias[:, None]
    said = found.classes[scores.argmax(2)]
    np.testing.assert_array_equal(said == labels[~seen], right[:, ~seen])
  assert right[:4].mean() > 0.8
  with pytest.raises(ValueError, match="label 'd' is no class, wanted one of"):
    found.direction("d")


def test_steering_along_a_probe_moves_its_score():
  bundle, (noise, cond), schedule = tiny_bundle(), tiny_inputs(8), tiny_schedule()
  sizes = sampler.sizes_of(bundle, noise, cond, schedule)
  taps = TapSpec(
    sites=("resid_post",), reduce=("region_mean",), steps=(0,), regions=np.ones((8, 1, sizes.T))
  )

  def means(edit=None):
    """L R D."""
    trace = sampler.denoise(bundle, noise, cond, schedule, edit, taps)[1]
    return np.asarray(trace.taps["resid_post/region_mean"])[0, :, 0, :, 0]

  before = means()
  found = linear.fit(before, np.array(["a", "b", "c", "c"] * 2))
  towards = found.direction("b")
  room = identity(sizes, edits=("steer",), sites=("resid_post",))
  at = where(sizes, steps=0, layers=1)
  after = means(steer(room, at, towards, gain=2.0))
  rise = (after - before) @ found.kernel  # L R C
  wanted = 2 * np.square(towards[1]).sum()
  np.testing.assert_allclose(rise[1, :, 1] - rise[1].mean(1), wanted, rtol=1e-3)
  assert np.abs(rise[0]).max() == 0
  said = (after[1] @ found.kernel[1] + found.bias[1]).argmax(1)
  assert (found.classes[said] == "b").all()


@pytest.mark.parametrize(
  ("labels", "groups", "said"),
  [
    (np.zeros(8), np.arange(8), "all 8 labels are equal"),
    (np.arange(8) % 2, np.zeros(8, int), "1 groups for 4 folds"),
  ],
)
def test_probes_say_what_they_need(labels, groups, said):
  with pytest.raises(ValueError, match=said):
    linear.crossed(np.zeros((2, 8, 3)), labels, groups)


def test_a_probe_of_one_class_is_not_fitted():
  with pytest.raises(ValueError, match="all 8 labels are equal"):
    linear.fit(np.zeros((2, 8, 3)), np.zeros(8))
