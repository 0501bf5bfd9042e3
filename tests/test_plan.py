"""`videoreason plan`: what it says of memory and work, held against arithmetic and the compiler."""

import re

import jax
import pytest

from jax_videoreason import checkpoint, cli, plan, settings, sharding


def problem(config: str, runs: int = 1, **changes) -> plan.Problem:
  chosen = settings.from_config({**cli.load_config(config).to_dict(), **changes})
  return plan.Problem(model=plan.model(chosen.checkpoint), chosen=chosen, runs=runs)


def test_devices_are_known_by_their_names():
  slices = {"v5e:4x8": 32, "v5p:2x2x4": 16, "v5p:4x4x4": 64, "v6e:4x8": 32, "tpu7x:2x2x4": 32}
  for name, count in slices.items():
    assert (plan.target(name).device.platform, plan.target(name).count) == ("tpu", count)
  assert plan.target("gpu:80GBx8").count == 8
  assert plan.target("gpu:80GB").device.memory == 80e9
  assert plan.target("cpu").count == len(jax.devices())
  for wrong in ("v4:2x2", "gpu", "gpu:80", "v5p", "tpu"):
    with pytest.raises(ValueError, match=r"wanted cpu, gpu:80GB, .*v5e, v5p, v6e, tpu7x"):
      plan.target(wrong)


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
  one = problem("mini", runs=4, steps=3)
  found = plan.make(one, plan.target("cpu"), {"seed": 4, "fsdp": 1, "context": 1})
  assert found.compiled
  assert found.fits
  assert found.collectives == {}  # no mix: no device talks to another
  assert found.evaluations == 3 * 4 * 2
  mesh = sharding.make_mesh(4)
  assert found.parameters == sum(plan.size_of(leaves, mesh) for leaves in one.model.experts)
  assert found.parameters < found.arguments < found.parameters + 4e6
  assert found.latents <= found.outputs
  assert found.temporaries > 0


def test_a_card_is_told_by_arithmetic():
  found = plan.make(problem("wan22_i2v_a14b:480p", runs=3), plan.target("gpu:80GB"))
  assert not found.compiled
  assert found.parameters == pytest.approx(57.2e9, rel=0.01)
  crowded = plan.make(problem("wan22_i2v_a14b:480p", runs=8), plan.target("gpu:80GB"))
  assert not crowded.fits


def test_a_mesh_is_proposed():
  def axes(config: str, on: str, runs: int = 1) -> dict:
    return plan.propose(problem(config, runs), plan.target(on))

  assert axes("mini", "gpu:80GBx8", runs=16) == {"seed": 8, "fsdp": 1, "context": 1}
  small = axes("wan22_i2v_a14b:480p", "v5e:4x8")
  assert small["seed"] == 1
  assert small["fsdp"] >= 8
  assert axes("wan22_i2v_a14b:480p", "v5p:2x2x4", runs=2)["seed"] == 2
  for runs in (1, 2, 3, 16):
    found = axes("wan22_i2v_a14b:720p", "v5p:4x4x4", runs)
    assert found["seed"] * found["fsdp"] * found["context"] == 64
    assert runs % found["seed"] == 0


def test_a_mesh_that_does_not_fit_the_devices_or_the_runs_is_refused():
  where = plan.target("v5p:2x2x4")
  with pytest.raises(ValueError, match=r"takes 8 devices, v5p:2x2x4 has 16"):
    plan.make(problem("mini"), where, sharding.axes_of("fsdp=4,context=2"))
  with pytest.raises(ValueError, match=r"3 runs on seed=2, wanted a multiple: give --runs"):
    plan.make(problem("mini", runs=3), where, sharding.axes_of("seed=2,fsdp=4,context=2"))


def test_the_command_prints_it(capsys):
  assert cli.main(["plan", "--config=seeds_mini", "--on=gpu:80GB"]) == 0
  said = capsys.readouterr().out
  assert re.search(r"gpu:80GB: 1 devices as seed=1,fsdp=1,context=1, by arithmetic", said)
  assert "it fits" in said
  assert "32 runs together: 640 network evaluations" in said
  assert "the whole command: 20480 evaluations, 1024 videos" in said
  assert cli.main(["plan", "--config=mini", "--on=v9"]) == 2
  assert checkpoint.shipped()


def test_a_study_is_planned_whole(capsys):
  words = ["plan", "run", "noise", "--preset=quick", "--config=mini", "--on=gpu:80GB"]
  assert cli.main(words) == 0
  said = capsys.readouterr().out
  evaluations = int(re.search(r"the whole command: (\d+) evaluations", said)[1])
  assert evaluations > 1000
  assert cli.main([*words, "--config.cases=30"]) == 0
  more = int(re.search(r"the whole command: (\d+) evaluations", capsys.readouterr().out)[1])
  assert more > 5 * evaluations
  assert cli.main(["plan", "walk"]) == 2
  assert "say plan run NAME, or plan alone" in capsys.readouterr().err
