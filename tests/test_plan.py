"""`videoreason plan`: what it says of memory and work, held against arithmetic and the compiler."""

import dataclasses
import functools
import importlib.util
import inspect
import os
import re

import jax
import pytest

from jax_videoreason import checkpoint, cli, costs, factors, plan, settings, sharding
from jax_videoreason.experiments import EXPERIMENTS, find
from jax_videoreason.runs import make_noise
from jax_videoreason.solvers import SOLVERS
from jax_videoreason.taps import TapSpec, tap_bytes


@functools.cache
def model(name: str) -> plan.Model:
  return plan.model(name)


def problem(config: str, runs: int = 1, **more) -> plan.Problem:
  chosen = settings.from_config(cli.load_config(config).to_dict())
  return plan.Problem(model=model(chosen.checkpoint), chosen=chosen, runs=runs, **more)


def alone(axes: str = "seed=1") -> dict[str, int]:
  return sharding.axes_of(axes)


def test_devices_are_known_by_their_names():
  slices = {"v5e:4x8": 32, "v5p:2x2x4": 16, "v5p:4x4x4": 64, "v6e:4x8": 32, "tpu7x:2x2x4": 32}
  for name, count in slices.items():
    assert (plan.target(name).device.platform, plan.target(name).count) == ("tpu", count)
  assert plan.target("gpu:80GBx8").count == 8
  h100, h200 = (plan.target(name).device.memory / 2**20 for name in ("gpu:80GB", "gpu:141GB"))
  assert h100 == pytest.approx(81_559, rel=1e-3)  # MiB, as nvidia-smi has them
  assert h200 == pytest.approx(143_771, rel=1e-3)
  assert plan.target("cpu").count == len(jax.devices())
  for wrong in ("v4:2x2", "gpu", "gpu:80", "gpu:x8", "gpu:v100-32GB", "v5p", "tpu"):
    with pytest.raises(ValueError, match=r"wanted cpu, gpu:80GB, .*v5e, v5p, v6e, tpu7x"):
      plan.target(wrong)


@pytest.mark.parametrize(
  ("name", "gigabytes", "cards", "teraflops", "like"),
  [
    ("gpu:80GB", 80, 1, 989, "H100"),
    ("gpu:40GBx4", 40, 4, 312, "A100"),
    ("gpu:96GB", 96, 1, 989, "H100"),
    ("gpu:a100-80GBx8", 80, 8, 312, "A100"),
    ("gpu:A100", 40, 1, 312, "A100"),
    ("gpu:h100-94GB", 94, 1, 989, "H100"),
    ("gpu:l40sx2", 48, 2, 362, "L40S"),
    ("gpu:rtx4090", 24, 1, 165, "RTX4090"),
    ("gpu:h200", 141, 1, 989, "H200"),
    ("gpu:b200", 180, 1, 2250, "B200"),
  ],
)
def test_a_card_is_known_by_its_memory_or_by_its_name(name, gigabytes, cards, teraflops, like):
  found = plan.target(name)
  assert (found.count, found.device.like) == (cards, like)
  assert found.device.memory == gigabytes * plan.CARD_GB
  assert found.device.peak == teraflops * 1e12


def test_seconds_name_the_peak_that_they_are_of():
  work = costs.Work(name="all", problem=problem("mini"), evaluations=1e15, videos=1)
  hours = []
  for card, peak in (("80GB", "989 TFLOP/s, H100"), ("a100-80GB", "312 TFLOP/s, A100")):
    said = costs.totals([work], plan.target(f"gpu:{card}"))
    (found,) = re.findall(rf"([\d.]+) h on gpu:{card} at 46% of {peak} ", said)
    hours.append(float(found))
  assert hours[1] == pytest.approx(hours[0] * 989 / 312, rel=1e-3)
  eight = costs.totals([work], plan.target("gpu:80GBx8"))
  assert "on gpu:80GBx8 at 46% of 989 TFLOP/s a device, H100 (" in eight


def test_forced_devices_share_the_machine():
  found, pages = plan.target("cpu"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  assert found.count == 4
  assert found.count * found.device.memory == pages
  assert found.count * found.device.peak * plan.SHARE == plan.CORE * (os.cpu_count() or 1)


def test_mesh_axes_are_read():
  assert sharding.axes_of("seed=2,context=4") == {"seed": 2, "fsdp": 1, "context": 4}
  for wrong in ("seeds=2", "seed=0", "seed", "seed=2;fsdp=2"):
    with pytest.raises(ValueError, match="wanted axes of seed, fsdp, context"):
      sharding.axes_of(wrong)


def test_a_published_model_needs_no_bundle():
  found = plan.model("ckpt/wan22_i2v_a14b")
  assert len(found.experts) == 2
  own = plan.size_of(found.experts[0])
  assert own == pytest.approx(28.6e9, rel=0.01)  # bfloat16, norms in float32
  assert plan.size_of(found.text) == pytest.approx(11.4e9, rel=0.01)
  assert len(plan.model("ckpt/wan21_i2v_14b_480p").experts) == 1
  with pytest.raises(FileNotFoundError, match="no bundle"):
    plan.model("ckpt/unheard_of")


@pytest.mark.parametrize(
  ("config", "tokens", "gigabytes"),
  [("wan22_i2v_a14b:480p", 32_760, 6), ("wan22_i2v_a14b:720p", 75_600, 14)],
)
def test_activations_of_a_run_of_14b(config, tokens, gigabytes):
  found = problem(config)
  assert found.sizes.T == tokens
  assert found.activations() == pytest.approx(gigabytes * 1e9, rel=0.06)
  one_by_one = problem(config, guidance="sequential")
  assert one_by_one.activations() == found.activations() / 2
  assert one_by_one.flops() == found.flops()


@pytest.mark.parametrize(
  ("config", "on", "most", "sequential", "one_expert"),
  [
    ("wan22_i2v_a14b:480p,steps=50", "gpu:80GB", 3, 5, 7),
    ("wan22_i2v_a14b:480p,steps=50", "gpu:141GB", 12, 21, 16),
    ("wan22_i2v_a14b:720p,steps=50", "gpu:80GB", 1, 2, 3),
    ("wan22_i2v_a14b:720p,steps=50", "gpu:141GB", 5, 9, 7),
  ],
)
def test_so_many_runs_of_14b_fit_a_card(config, on, most, sequential, one_expert):
  """With both experts and both branches, one branch at a time, one expert at a time."""
  where = plan.target(on)

  def said(**more) -> int:
    return plan.most_runs(problem(config, **more), where, alone())

  assert said() == most
  assert said(guidance="sequential") == sequential
  assert said(resident=1) == one_expert
  for runs, fits in ((most, True), (most + 1, False)):
    assert plan.make(problem(config, runs), where, alone()).fits is fits


def test_one_expert_at_a_time_frees_the_other():
  both, one = (
    plan.arithmetic(problem("wan22_i2v_a14b:480p", resident=n), plan.target("gpu:80GB"), alone())
    for n in (None, 1)
  )
  assert both.parameters - one.parameters == pytest.approx(28.6e9, rel=0.01)
  assert plan.arguments(one.problem, None)[0].params[1] is None


def test_a_bundle_without_a_text_encoder_is_planned(tmp_path, capsys):
  whole = checkpoint.load("mini")
  parts = dataclasses.replace(whole.parts, text=None)
  checkpoint.save(dataclasses.replace(whole, text=None, parts=parts), tmp_path / "bare")
  assert cli.main(["plan", f"--checkpoint={tmp_path / 'bare'}", "--on=gpu:80GB"]) == 0
  assert "it fits" in capsys.readouterr().out


def test_flops_are_those_that_the_compiler_counts():
  found = problem("mini")
  made = plan.model("mini")
  config = made.parts.dit.config
  bundle, _, cond = plan.arguments(found, None)
  s = found.sizes
  one_layer = config.__class__(
    **{**{f: getattr(config, f) for f in config.__dataclass_fields__}, "layers": 1}
  )

  def forward(params, latents, time, cond):
    return made.parts.dit.__class__(one_layer).apply({"params": params}, latents, time, cond)[0]

  params = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), bundle.params[0]["blocks"]
  )
  params = {**bundle.params[0], "blocks": params}
  latents = jax.ShapeDtypeStruct((1, s.F, s.H, s.W, s.C), "float32")
  time = jax.ShapeDtypeStruct((2, config.freq_dim), "float32")
  counted = jax.jit(forward).lower(params, latents, time, cond).cost_analysis()["flops"]
  ours = s.G * found.flops() / config.layers
  assert ours < counted < 1.5 * ours  # the rest: embeddings, norms, the head


def test_on_this_cpu_the_compiler_says_what_is_needed():
  one = problem("mini:steps=3", runs=4)
  found = plan.make(one, plan.target("cpu"), {"seed": 4, "fsdp": 1, "context": 1})
  assert found.compiled
  assert found.fits
  assert found.collectives == {}  # no mix: no device talks to another
  assert found.evaluations == 3 * 4 * 2
  assert found.parameters == sum(map(plan.size_of, one.model.experts))
  assert found.parameters < found.arguments < found.parameters + 4e6
  assert found.latents <= found.outputs
  assert found.temporaries > 0


def test_a_ring_holds_two_blocks_of_keys_and_values():
  axes, where = sharding.axes_of("context=16"), plan.target("v5p:2x2x4")

  def held(runs: int, route: str | None) -> float:
    asked = problem("wan22_i2v_a14b:480p", runs, route=route)
    return plan.arithmetic(asked, where, axes).temporaries

  whole = 2 * 2 * 32_760 * 5120 * 2  # two branches, keys and values, 5,120 wide in bfloat16
  assert held(1, "gather") - held(1, "ring") == pytest.approx(whole * (1 - 2 / 16))
  for runs, route in ((1, "gather"), (3, "gather"), (4, "ring")):  # up to 4 GiB they are gathered
    assert held(runs, None) == held(runs, route)
  gpus = plan.target("gpu:80GBx8")
  with pytest.raises(ValueError, match="--route=ring in bfloat16 on a GPU"):
    asked = problem("wan22_i2v_a14b:480p", route="ring")
    plan.arithmetic(asked, gpus, sharding.axes_of("context=8"))


@pytest.mark.parametrize(
  ("route", "kind"), [("ring", "collective-permute"), ("gather", "all-gather")]
)
def test_the_compiler_moves_keys_and_values_by_the_route_asked_for(route, kind):
  made = plan.make(
    problem("mini:steps=3", route=route), plan.target("cpu"), sharding.axes_of("context=4")
  )
  others = {"ring": "all-gather", "gather": "collective-permute"}[route]
  assert made.collectives[kind] > made.collectives[others]


def test_a_mesh_is_proposed():
  def axes(config: str, on: str, runs: int = 1) -> dict:
    return plan.propose(problem(config, runs), plan.target(on))

  assert axes("mini", "gpu:80GBx8", runs=16) == {"seed": 8, "fsdp": 1, "context": 1}
  # a chip of v5p holds both experts, of v6e a quarter, of v5e an eighth: the rest goes to tokens
  wide = {"v5p:2x2x4": 1, "v6e:4x8": 4, "v5e:4x8": 8}
  for on, fsdp in wide.items():
    count = plan.target(on).count
    found = axes("wan22_i2v_a14b:480p", on)
    assert found == {"seed": 1, "fsdp": fsdp, "context": count // fsdp}
  assert axes("wan22_i2v_a14b:480p", "gpu:80GBx8") == {"seed": 1, "fsdp": 1, "context": 8}
  assert axes("wan22_i2v_a14b:480p", "gpu:80GBx8", 8) == {"seed": 8, "fsdp": 1, "context": 1}
  assert axes("wan22_i2v_a14b:480p", "v5p:2x2x4", runs=2)["seed"] == 2
  for runs in (1, 2, 3, 16):
    found = axes("wan22_i2v_a14b:720p", "v5p:4x4x4", runs)
    assert found["seed"] * found["fsdp"] * found["context"] == 64
    assert runs % found["seed"] == 0


def test_a_plan_has_the_keys_of_a_run_under_any_default_generator():
  one = problem("mini")
  with jax.default_prng_impl("rbg"):
    noise = plan.arguments(one, None)[1]
  assert noise.keys.dtype == make_noise([0], one.grid).keys.dtype


@pytest.mark.parametrize("fsdp", [1, 2, 3, 4])
def test_a_plan_counts_the_shares_that_the_loader_makes(fsdp):
  """No axis of most leaves of mini divides by 3: they lie whole on every device."""
  mesh = sharding.make_mesh(fsdp=fsdp)
  dit = checkpoint.load("mini", parts=("dit",), mesh=mesh).params
  first = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(dit))
  where = plan.target(f"gpu:80GBx{fsdp}")
  assert plan.arithmetic(problem("mini"), where, dict(mesh.shape)).parameters == first


def test_sevenths_of_a_model_that_has_no_seventh_are_not_counted():
  large = problem("wan22_i2v_a14b")
  seven, eight = (plan.target(f"gpu:24GBx{count}") for count in (7, 8))
  one = plan.arithmetic(large, plan.target("gpu:24GB"), alone())
  whole = plan.arithmetic(large, seven, alone("fsdp=7"))
  assert (whole.parameters, whole.text) == (one.parameters, one.text)
  shares = plan.arithmetic(large, eight, alone("fsdp=8"))
  assert shares.parameters == pytest.approx(one.parameters / 8, rel=0.01)
  assert shares.text == pytest.approx(one.text / 8, rel=0.01)
  assert not plan.make(large, seven).fits
  assert plan.most_runs(large, seven, alone("fsdp=7")) == 0
  assert plan.make(large, eight).fits


def test_decoding_takes_its_part_of_the_memory():
  """A card that holds a step of TI2V-5B and not the decode of whole frames after it."""
  card = plan.target("gpu:20GB")
  whole = plan.make(problem("wan22_ti2v_5b"), card)
  assert whole.total < whole.room < whole.decoding
  assert whole.decoding == pytest.approx((2.63 + 0.30 + 15.86) * plan.GIB, rel=0.02)
  assert not whole.fits
  assert plan.most_runs(whole.problem, card, whole.axes) == 0
  said = "\n".join(
    costs.lines(whole, [costs.Work(name="all", problem=whole.problem, evaluations=1, videos=1)])
  )
  assert re.search(r"decoding alone takes 16.3 GiB, in tiles 2.\d+ GiB: .*tiles=diffusers", said)
  tiled = plan.make(problem("wan22_ti2v_5b:tiles=diffusers"), card)
  assert tiled.fits
  assert plan.most_runs(tiled.problem, card, tiled.axes) == 1
  assert plan.make(problem("wan22_ti2v_5b"), plan.target("gpu:24GB")).fits


def test_what_stays_while_latents_are_decoded():
  card = plan.target("gpu:80GB")

  def decoding(**more) -> float:
    return plan.make(problem("wan22_i2v_a14b", **more), card).decoding

  alone_ = plan.make(problem("wan22_i2v_a14b"), card)
  assert decoding() == alone_.vae + alone_.decode
  assert decoding(decodes="between") == decoding() + alone_.parameters
  assert decoding(decodes="between", resident=1) == decoding()
  assert decoding(decodes="beside") == alone_.total + alone_.decode
  assert decoding(ending=2) > decoding()


def test_a_mesh_that_does_not_fit_the_devices_or_the_runs_is_refused():
  where = plan.target("v5p:2x2x4")
  with pytest.raises(ValueError, match=r"takes 8 devices, v5p:2x2x4 has 16"):
    plan.make(problem("mini"), where, sharding.axes_of("fsdp=4,context=2"))
  with pytest.raises(
    ValueError, match=r"3 runs on seed=2, wanted .*: give other seeds.* or seed=1 in --mesh on as"
  ):
    plan.make(problem("mini", runs=3), where, sharding.axes_of("seed=2,fsdp=4,context=2"))


@pytest.mark.parametrize(
  ("config", "remedies"),
  [
    ("seeds_mini:cases=3", ["--config.unit=24", "--mesh=seed=2"]),
    ("seeds_mini:cases=3,unit=7", ["--config.unit=24", "--mesh=seed=2"]),
    ("seeds_mini:cases=3,seeds=6,unit=2", ["--config.unit=3", "--mesh=seed=2"]),
    ("seeds_mini", ["--mesh=seed=2"]),
  ],
)
def test_what_makes_units_divide_by_the_seeds_of_a_mesh_is_named(config, remedies, capsys):
  words = ["plan", f"--config={config}"]
  assert cli.main([*words, "--on=gpu:80GBx3", "--mesh=seed=3"]) == 2
  said = capsys.readouterr().err
  given = re.findall(r"--config\.unit=\d+", said)
  given += [f"--mesh={axes}" for axes in re.findall(r"seed=\d+(?=\.$)", said.strip())]
  assert given == remedies
  for remedy in given:
    mesh = [] if "mesh" in remedy else ["--mesh=seed=3"]
    count = remedy[-1] if "mesh" in remedy else 3
    assert cli.main([*words, f"--on=gpu:80GBx{count}", *mesh, remedy]) == 0


@pytest.mark.parametrize(
  ("words", "together", "made"),
  [
    (["--config.seeds=5", "--config.batch=4"], 6, 12),
    (["--config.seeds=4"], 6, 6),
    (["--config.seeds=4", "--config.batch=9"], 6, 6),
    (["--runs=5"], 6, 6),
  ],
)
def test_a_plan_of_a_sample_fills_batches_up_as_sample_does(words, together, made, capsys):
  mesh = ["--on=gpu:80GBx3", "--mesh=seed=3"]
  assert cli.main(["plan", "--config=mini:steps=2", *words, *mesh]) == 0
  said = capsys.readouterr().out
  assert f"{together} runs together" in said
  assert whole_of(said) == made * 2 * 2  # steps, branches


def test_runs_that_fill_a_sample_up_count_for_no_budget_of_taps():
  """`sample` holds the taps of the runs that it keeps to the budget."""
  asked = problem("mini:taps.sites=(attn_out,)", runs=6)
  four = tap_bytes(asked.spec, dataclasses.replace(asked.sizes, R=4), "float32") / 1e9
  taps = dataclasses.replace(asked.chosen.taps, budget_gb=1.01 * four)
  own = dataclasses.replace(asked, chosen=dataclasses.replace(asked.chosen, taps=taps))
  for videos in (4, 5):
    said = costs.over_budget(costs.Work(name="all", problem=own, evaluations=1, videos=videos))
    assert (said is None) == (videos == 4)


def test_a_study_that_a_mesh_does_not_share_out_is_told_how_it_would(capsys):
  words = ["plan", "run", "noise", "--config=mini:cases=2,seeds=1,tasks=(pick,)"]
  assert cli.main([*words, "--on=gpu:80GBx3", "--mesh=seed=3"]) == 2
  said = capsys.readouterr().err
  assert (
    "2 runs on seed=3, wanted a multiple: give other seeds, cases or --config.batch, or" in said
  )
  assert "or seed=2 in --mesh on as many devices." in said
  for remedy in ("--config.seeds=3", "--config.cases=3"):
    assert cli.main([*words, "--on=gpu:80GBx3", "--mesh=seed=3", remedy]) == 0
  assert cli.main([*words, "--on=gpu:80GBx2", "--mesh=seed=2"]) == 0


def test_the_command_prints_it(capsys):
  assert cli.main(["plan", "--config=seeds_mini", "--on=gpu:80GB"]) == 0
  said = capsys.readouterr().out
  assert re.search(r"gpu:80GB: 1 device as seed=1,fsdp=1,context=1, by arithmetic", said)
  assert "it fits" in said
  assert "8 runs together: 160 network evaluations" in said
  assert "the whole command: 20,480 network evaluations (1,024 videos)" in said
  assert cli.main(["plan", "sweep", "--config=seeds_mini", "--on=gpu:80GB"]) == 0
  assert capsys.readouterr().out == said
  assert cli.main(["plan", "sweep", "--config=seeds_mini", "--on=gpu:80GBx8"]) == 0
  said = "the sweep lies so with --config.mesh=seed=8,fsdp=1,context=1"
  assert said in capsys.readouterr().out


def test_runs_together_are_runs_of_the_command(capsys):
  words = ["plan", "--config=mini:steps=5", "--on=gpu:80GB"]
  for more, together, videos in (
    (["--config.seeds=1", "--runs=2"], "2 runs", "2 videos"),
    (["--config.seeds=6", "--runs=2"], "2 runs", "6 videos"),
    (["--config.seeds=6"], "6 runs", "6 videos"),
  ):
    assert cli.main([*words, *more]) == 0
    said = capsys.readouterr().out
    count = {"2": 20, "6": 60}
    assert f"{together} together: {count[together[0]]} network evaluations of" in said
    assert f"the whole command: {count[videos[0]]} network evaluations ({videos})" in said


def test_runs_that_fill_the_last_batch_up_are_counted(capsys):
  words = ["plan", "--config=mini:steps=5", "--config.seeds=5", "--on=gpu:80GB"]
  for together in ("--config.batch=4", "--runs=4"):
    assert cli.main([*words, together]) == 0
    said = capsys.readouterr().out
    assert "4 runs together: 40 network evaluations of" in said
    assert "the whole command: 80 network evaluations (5 videos)" in said


def test_taps_above_their_budget_are_told(capsys):
  words = ["plan", "--on=gpu:141GB", "--config=wan22_ti2v_5b", "--config.taps.sites=('attn_out',)"]
  over = "the budget is 8.0 GB. Use reduce="
  assert cli.main(words) == 0
  assert over not in capsys.readouterr().out
  assert cli.main([*words, "--config.taps.reduce=('full',)"]) == 0
  assert over in capsys.readouterr().out
  assert cli.main([*words, "--config.taps.reduce=('full',)", "--config.taps.budget_gb=1e4"]) == 0
  assert over not in capsys.readouterr().out


def test_taps_of_a_study_are_held_to_the_budget_that_run_holds_them_to(capsys):
  words = ["plan", "run", "layer_maps", "--on=gpu:141GB", "--config=wan22_i2v_a14b"]
  words += ["--config.height=480", "--config.width=480"]
  assert cli.main([*words, "--config.batch=8"]) == 0
  said = capsys.readouterr().out
  assert "the budget is 8: give a smaller --config.batch, or --config.taps.budget_gb=" in said
  assert cli.main([*words, "--config.taps.budget_gb=1e4"]) == 0
  assert "the budget is" not in capsys.readouterr().out


def test_what_the_planned_command_would_not_take_is_refused(capsys, tmp_path):
  assert cli.main(["plan", "--config=seeds_mini", "--runs=3"]) == 2
  assert "plan takes no --runs" in capsys.readouterr().err
  words = ["plan", "vbvr", "generate", "--data=.", "--config.seeds=3"]
  assert cli.main(words) == 2
  assert "seeds of the config is not used here: give --seeds" in capsys.readouterr().err
  words = ["plan", "sweep", "--config=seeds_mini", "--config.mesh=seed=4", "--on=gpu:80GBx8"]
  assert cli.main(words) == 2
  assert "or --on for the devices that it lies on" in capsys.readouterr().err


def test_a_study_over_its_budget_fits_nowhere_and_is_named(capsys):
  words = ["plan", "run", "all", "--on=gpu:141GBx8", "--config=wan22_i2v_a14b:height=480,width=480"]
  assert cli.main(words) == 0
  said = capsys.readouterr().out
  assert re.search(r"layer_maps: the taps of a batch of \d+ runs need", said)
  row = next(line for line in said.splitlines() if "layer_maps" in line)
  assert " no " in row


def test_a_sweep_is_planned_on_its_own_mesh(capsys):
  words = ["plan", "sweep", "--config=seeds_mini", "--on=gpu:80GBx4"]
  assert cli.main([*words, "--config.mesh=seed=2,fsdp=2"]) == 0
  said = capsys.readouterr().out
  assert "gpu:80GBx4: 4 devices as seed=2,fsdp=2,context=1" in said
  assert "the sweep lies so" not in said
  assert cli.main([*words, "--config.mesh=seed=2,fsdp=2", "--mesh=seed=4"]) == 0
  assert "4 devices as seed=4,fsdp=1,context=1" in capsys.readouterr().out


SMALL = (
  "vbvr_ensemble:checkpoint=mini_experts,height=32,width=32,frames=17,steps=3,negative_prompt='',"
  "unit=8,edits.block_update.steps=(0,2),edits.guess.steps=(0,2),edits.latents.steps=(0,2),"
  "edits.block_update.layers=(6,9)"
)


def units_of(config: str, **more) -> dict[str, plan.Problem]:
  given = {**cli.load_config(config).to_dict(), **more}
  own = {key: given.pop(key) for key in factors.KEYS}
  return factors.problems(settings.from_config(given), factors.varied(own))


def test_an_edit_of_a_sweep_is_compiled_and_counted():
  """Every device of four reads what all runs hold at a site, once as it is, once in float32."""
  units, where, axes = units_of(SMALL), plan.target("cpu"), alone("seed=4")
  bare, mixed = (plan.make(units[name], where, axes) for name in ("none", "block_update"))
  assert (bare.collectives, mixed.collectives) == ({}, {"all-gather": 6})  # of two experts
  told = plan.arithmetic(mixed.problem, where, axes)
  more = mixed.problem.exchanged()
  assert mixed.temporaries - bare.temporaries == pytest.approx(more, rel=0.05)
  assert told.temporaries - plan.arithmetic(bare.problem, where, axes).temporaries == more
  own = told.arguments - told.parameters
  assert mixed.arguments - bare.arguments == pytest.approx(own, rel=0.01)


def test_an_edit_counts_for_as_many_runs_as_there_are():
  mixed = units_of(SMALL)["block_update"]
  more = dataclasses.replace(mixed, runs=12)
  assert mixed.edited is not None
  assert more.edited is not None
  assert mixed.edited.mix.shape == (3, 12, 8, 8)
  assert more.edited.mix.shape == (3, 12, 12, 12)


def test_some_keys_of_a_sweep_are_completed_by_plan_sweep_alone(tmp_path, capsys):
  path = tmp_path / "own.py"
  path.write_text(
    "from jax_videoreason.configs import mini\n\n\ndef get_config(argument=None):\n"
    "  config = mini.get_config()\n  with config.unlocked():\n    config.cases = 2\n"
    "  return config\n"
  )
  assert cli.main(["plan", f"--config={path}", "--on=cpu"]) == 2
  said = capsys.readouterr().err
  assert "the config has cases and no tasks, split" in said and "say `plan sweep`" in said
  assert cli.main(["plan", "sweep", f"--config={path}", "--on=cpu"]) == 0


def test_what_a_sweep_does_not_keep_is_not_counted():
  unit, where, axes = units_of(SMALL)["none"], plan.target("cpu"), alone("seed=4")
  whole = dataclasses.replace(unit, drops=())
  s = unit.sizes
  latents = 4 * s.S * s.R / 4 * s.F * s.H * s.W * s.C
  for make in (plan.make, plan.arithmetic):
    more = make(whole, where, axes).outputs - make(unit, where, axes).outputs
    assert more == pytest.approx(latents, rel=1e-3)  # an array more has a pointer more


@pytest.mark.parametrize("on", ["cpu", "gpu:80GBx4"])
def test_the_heaviest_edit_of_a_sweep_is_named(on, capsys):
  assert cli.main(["plan", "sweep", f"--config={SMALL}", f"--on={on}", "--mesh=seed=4"]) == 0
  said = capsys.readouterr().out
  assert re.search(r"as seed=4,.*; R=8 G=2 T=\d+, edit block_update, on each device", said)
  assert ("6 all-gather" in said) is (on == "cpu")
  rows = {cells[0]: cells for cells in table(said)}
  assert rows.keys() == {"part", "none", "block_update", "guess", "latents"}
  assert whole_of(said) == sum(int(rows[name][5].replace(",", "")) for name in list(rows)[1:])
  assert whole_of(said) == 4 * 4 * 8 * 4 * 3 * 2  # edits, tasks, cases, seeds, steps, branches


def test_of_edits_alike_in_weight_the_compiler_tells(monkeypatch):
  """Which of two sites takes more is not to be seen in the structure."""
  gates = {site: {"edit": "ablate", "sites": (site,)} for site in ("attn_out", "mlp_out")}
  first, other = units_of("seeds_mini:steps=2", edits=gates).values()
  asked, where = [], plan.target("cpu")

  def make(problem, where, axes):
    asked.append(problem.edit.sites)
    told = plan.arithmetic(problem, where, axes)
    return dataclasses.replace(told, temporaries=2.0 if problem is other else 1.0)

  monkeypatch.setattr(costs, "make", make)
  works = [
    costs.Work(name=name, problem=problem, evaluations=1, videos=1)
    for name, problem in (("a", first), ("b", other), ("again", first))
  ]
  assert costs.heaviest(works, where, alone("seed=4")).problem is other
  assert asked == [("attn_out",), ("mlp_out",)]


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--config=vbvr_ensemble", "--config.width=832"], "832 x 480 pixels, tasks are square"),
    (["--config=seeds_mini", "--config.tasks=('walk',)"], "no task 'walk'"),
    (["--config=vbvr_ensemble", "--config.seeds=1"], "an ensemble of 1 seed, wanted two or more"),
    (["--config=vbvr_ensemble:reader=preview"], "vbvr_wan22 has no preview"),
    (["--config=seeds_mini", "--runs=2"], "plan sweep takes no --runs"),
    (["--config=seeds_mini", "--config.mesh=fsdp=3"], "takes 3 devices, gpu:80GB has 1"),
  ],
)
def test_a_plan_refuses_what_the_sweep_would(words, said, capsys):
  assert cli.main(["plan", "sweep", "--on=gpu:80GB", *words]) == 2
  assert said in capsys.readouterr().err


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--on=v6e:32x32"], "--on=v6e:32x32 has 1024 chips, wanted 1 to 256 of v6e"),
    (["--on=v9"], "--on=v9, wanted cpu, gpu:80GB, gpu:80GBx8"),
    (["--on=gpu:80GBx8", "--mesh=fsdp=3"], "takes 3 devices, gpu:80GBx8 has 8: give other sizes"),
    (["--on=gpu:80GB", "--config=mini:frames=16"], "frames=16, wanted 1 + 4k: use 13 or 17"),
    (["--on=v5e:2x4"], "needs libtpu, which is not installed: pip install 'jax-videoreason[pods]'"),
    (["--config=wan22_i2v_a14b:checkpoint=ckpt/none", "--on=gpu:80GB"], "no bundle"),
    (["walk"], "say plan (for a sample), plan sweep, plan run NAME"),
    (["sample", "--seeds=0,1"], "plan sample: say plan (for a sample)"),
    (["--on=gpu:80GBx0"], "--on=gpu:80GBx0, wanted cpu, gpu:80GB"),
    (["run"], "no experiment named"),
    (["run", "nois", "--on=gpu:80GB"], "did you mean 'noise'"),
    (["run", "noise", "--preset=huge"], "wanted quick or full"),
    (["run", "noise", "--config=wan22_i2v_a14b", "--on=gpu:80GB"], "tasks are square"),
    (["run", "noise", "--data=cases"], "plan run noise takes no --data"),
    (["--experts=2", "--on=gpu:80GB"], "--experts=2 of a model of 1 expert: leave it out"),
    (["--config=wan22_i2v_a14b", "--experts=3", "--on=gpu:80GB"], "of a model of 2 experts"),
    (["sweep", "--experts=1"], "plan sweep takes no --experts"),
    (["run", "noise", "--sequential"], "plan run noise takes no --sequential"),
    (["sweep", "--preset=full"], "plan sweep takes no --preset"),
    (["vbvr", "generate", "--on=gpu:80GB"], "--data must be given"),
    (["vbvr", "generate", "--data=nowhere", "--on=gpu:80GB"], "nowhere"),
  ],
)
def test_bad_input_is_one_sentence(words, said, capsys, monkeypatch):
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else found(name, *a)
  )
  assert cli.main(["plan", *words]) == 2
  error = capsys.readouterr().err
  assert said in error
  assert len(error.splitlines()) == 1


def test_a_study_is_planned_whole(capsys):
  words = ["plan", "run", "noise", "--preset=quick", "--config=mini", "--on=gpu:80GB"]
  assert cli.main(words) == 0
  said = capsys.readouterr().out
  assert "  taps  " in said
  evaluations = whole_of(said)
  assert evaluations > 1000
  assert cli.main([*words, "--config.cases=30"]) == 0
  assert whole_of(capsys.readouterr().out) > 5 * evaluations
  counts = []
  for less in (["--config=mini:steps=3"], ["--config.steps=3"]):
    assert cli.main([*words, *less]) == 0
    counts.append(whole_of(capsys.readouterr().out))
  assert counts[0] == counts[1] < evaluations


def whole_of(said: str) -> int:
  (found,) = re.findall(r"the whole command: ([\d,]+) network evaluations", said)
  return int(found.replace(",", ""))


def test_all_studies_are_planned_on_14b(capsys):
  """The bytes of each one's taps, its network evaluations and its hours."""
  words = ["--config=wan22_i2v_a14b:height=480,width=480", "--preset=full", "--on=gpu:141GB"]
  assert cli.main(["plan", "run", "all", *words]) == 0
  said = capsys.readouterr().out
  rows = {cells[0]: cells for cells in table(said)}
  assert list(rows) == ["part", *EXPERIMENTS]
  counts = {name: int(rows[name][5].replace(",", "")) for name in EXPERIMENTS}
  assert whole_of(said) == sum(counts.values())
  for name, of in (("noise", "MiB|GiB"), ("layer_maps", "GiB"), ("probes", "MiB|GiB")):
    assert re.fullmatch(rf"[\d.,]+ ({of})", rows[name][2])
  assert cli.main(["plan", "run", "noise", *words]) == 0
  alone = capsys.readouterr().out
  assert whole_of(alone) == counts["noise"]
  assert re.search(rf"taps +{rows['noise'][2]}\n", alone)


def table(said: str) -> list[list[str]]:
  lines = [line for line in said.splitlines() if line.startswith(("│", "┃"))]
  return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]


def test_a_study_taps_what_its_plan_says():
  study, sizes = find("layer_maps"), problem("mini", runs=2).sizes
  taps = study.tapped(sizes, study.options)
  told = plan.arithmetic(problem("mini", 2, taps=taps), plan.target("gpu:80GB"), alone())
  assert told.taps == tap_bytes(taps, sizes)
  assert told.outputs == told.taps + told.latents
  assert find("early").tapped(sizes, {}) == TapSpec()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_study_that_keeps_the_memory_of_its_solver_plans_for_it(solver):
  bare, kept = (problem("mini:steps=4", 2, taps=TapSpec(solver=said)) for said in (False, True))
  bare, kept = (
    dataclasses.replace(p, chosen=dataclasses.replace(p.chosen, solver=solver))
    for p in (bare, kept)
  )
  s = kept.sizes
  memory = SOLVERS[solver].init(jax.numpy.zeros((1, s.F, s.H, s.W, s.C)))
  assert kept.latents() - bare.latents() == 4 * sum(x.nbytes for x in memory.values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_study_that_taps_says_so(name):
  study = EXPERIMENTS[name]
  taps = "TapSpec(" in inspect.getsource(inspect.getmodule(study.run))
  told = study.tapped(problem("mini").sizes, study.options)
  assert bool(told.sites or told.solver) == taps
