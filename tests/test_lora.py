"""A LoRA merged on the way into the bundle: W' = W + alpha * scale * B A, or one sentence."""

import json

import chex
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_videoreason import checkpoint, cli
from jax_videoreason.convert import detect, engine, kinds, lora, reader, wan
from published import DIT, abstract

TARGETS = [f"blocks.{i}.self_attn.{p}" for i in range(2) for p in "qkvo"]
TARGETS += [f"blocks.{i}.cross_attn.{p}" for i in range(2) for p in "qkvo"]
TARGETS += [f"blocks.{i}.ffn.{n}" for i in range(2) for n in (0, 2)]
RANK = 4


def updates(base, seed, rank=RANK, targets=TARGETS, dtype=np.float32):
  """Module -> (A, B)."""
  rng = np.random.default_rng(seed)
  made = {}
  for name in targets:
    wide, narrow = base[f"{name}.weight"].shape
    a, b = rng.normal(size=(rank, narrow)), rng.normal(size=(wide, rank))
    made[name] = (a.astype(dtype), b.astype(dtype))
  return made


def diffsynth(given, file):
  """As DiffSynth saves it: the infix .default., no alpha, nothing before the name."""
  save_file(
    {
      key: value
      for name, (a, b) in given.items()
      for key, value in ((f"{name}.lora_A.default.weight", a), (f"{name}.lora_B.default.weight", b))
    },
    file,
  )
  return file


def merged(base, given, alpha=1.0, scale=1.0):
  """What ought to come out, summed in float64."""
  made = dict(base)
  for name, (a, b) in given.items():
    change = alpha * scale * (b.astype(np.float64) @ a.astype(np.float64))
    made[f"{name}.weight"] = (base[f"{name}.weight"] + change).astype(np.float32)
  return made


def expected(tensors):
  return engine.fill(tensors, wan.table("original"), abstract("dit", DIT))


def converted(source, out, *more):
  assert cli.main(["convert", str(source), "--out", str(out), *more]) == 0
  return checkpoint.load(out)


@pytest.fixture
def refused(single, capsys, tmp_path):
  """What a LoRA is answered; nothing may be left."""

  def run(*more, source=single):
    capsys.readouterr()
    assert cli.main(["convert", str(source), "--out", str(tmp_path / "out"), *more]) == 2
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    return said[said.rindex("videoreason: ") :].rstrip("\n")

  return run


@pytest.mark.slow
def test_both_experts_take_their_own(original, published, tmp_path):
  high, low = (updates(published[f"dit_{i}"], seed=i) for i in range(2))
  words = [
    f"--lora=high={diffsynth(high, tmp_path / 'high.safetensors')}",
    f"--lora=low={diffsynth(low, tmp_path / 'low.safetensors')}",
    "--lora-alpha=0.5",
    "--verify",
  ]
  bundle = converted(original, tmp_path / "out", *words)
  for expert, given in enumerate((high, low)):
    wanted = expected(merged(published[f"dit_{expert}"], given, alpha=0.5))
    chex.assert_trees_all_close(bundle.params[expert], wanted, rtol=1e-6, atol=1e-6)
  names = [name for name, _ in bundle.card.sources]
  assert "high.safetensors (LoRA merged into dit_0, alpha 0.5, fp32)" in names
  assert "low.safetensors (LoRA merged into dit_1, alpha 0.5, fp32)" in names


def test_one_expert_may_stay_as_it_is(original, published, tmp_path):
  given = updates(published["dit_1"], seed=3)
  file = diffsynth(given, tmp_path / "low.safetensors")
  bundle = converted(original, tmp_path / "out", f"--lora=low={file}", "--parts=dit")
  chex.assert_trees_all_equal(bundle.params[0], expected(published["dit_0"]))
  wanted = expected(merged(published["dit_1"], given))
  chex.assert_trees_all_close(bundle.params[1], wanted, rtol=1e-6, atol=1e-6)


def test_two_for_the_same_transformer_add_up(single, published, tmp_path):
  one, two = (updates(published["dit_0"], seed, targets=TARGETS[:3]) for seed in (5, 6))
  words = [
    f"--lora={diffsynth(g, tmp_path / f'{i}.safetensors')}" for i, g in enumerate((one, two))
  ]
  bundle = converted(single, tmp_path / "out", *words)
  wanted = expected(merged(merged(published["dit_0"], one), two))
  chex.assert_trees_all_close(bundle.params[0], wanted, rtol=1e-6, atol=1e-6)


DIFFUSERS = {
  "self_attn.q": "attn1.to_q",
  "cross_attn.o": "attn2.to_out.0",
  "ffn.0": "ffn.net.0.proj",
}


def pefts(given, before="", rename=lambda name: name):
  return {
    f"{before}{rename(name)}.lora_{side}.weight": value
    for name, pair in given.items()
    for side, value in zip("AB", pair, strict=True)
  }


def kohyas(given, rename=lambda name: name):
  """As musubi-tuner saves it: one word for the module, and an alpha beside every pair."""
  flat = {f"lora_unet_{rename(name).replace('.', '_')}": pair for name, pair in given.items()}
  return {
    key: value
    for name, (a, b) in flat.items()
    for key, value in (
      (f"{name}.lora_down.weight", a),
      (f"{name}.lora_up.weight", b),
      (f"{name}.alpha", np.array(2, np.float32)),
    )
  }


def as_diffusers(name):
  for ours, theirs in DIFFUSERS.items():
    name = name.replace(ours, theirs)
  return name


NAMINGS = {
  "peft": lambda given: pefts(given, "base_model.model."),
  "peft of the diffusers names": lambda given: pefts(given, "transformer.", as_diffusers),
  "prefixed": lambda given: pefts(given, "diffusion_model."),
  "of the pipeline": lambda given: pefts(given, "pipe.dit."),
  "down and up": lambda given: {
    key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value
    for key, value in pefts(given).items()
  },
  "kohya": lambda given: kohyas(given),
  "kohya of the diffusers names": lambda given: kohyas(given, as_diffusers),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_names_that_trainers_give(single, published, tmp_path, naming):
  targets = ["blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0"]
  given = updates(published["dit_0"], seed=7, targets=targets)
  save_file(NAMINGS[naming](given), tmp_path / "lora.safetensors")
  found = loaded(single, tmp_path / "lora.safetensors")
  assert set(found.updates) == {
    ("blocks/self_attn/q/kernel", 0), ("blocks/cross_attn/o/kernel", 1), ("blocks/mlp/up/kernel", 1)
  }  # fmt: skip
  assert found.ranks == [RANK]


def loaded(single, file):
  part = detect.source(single).parts["dit_0"]
  made = engine.moves(part.tensors, part.table, kinds.abstract(part, "dit"))
  return lora.load(file, "dit_0", made, part.tensors)


@pytest.mark.parametrize("place", ["tensor", "kohya", "header", "config"])
def test_alpha_over_rank_scales_it(single, published, tmp_path, place):
  """A number beside each pair, the notes of diffusers, or the config of PEFT."""
  given = updates(published["dit_0"], seed=8, targets=TARGETS[:2])
  file, tensors, notes = tmp_path / "adapter_model.safetensors", pefts(given, "transformer."), None
  if place == "tensor":
    tensors |= {f"transformer.{name}.alpha": np.array(2, np.float32) for name in given}
  if place == "kohya":
    tensors = kohyas(given)
  if place == "header":
    notes = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2, "transformer.r": 4})}
  if place == "config":
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 4}))
  save_file(tensors, file, notes)
  bundle = converted(single, tmp_path / "out", f"--lora={file}")
  wanted = expected(merged(published["dit_0"], given, scale=2 / RANK))
  chex.assert_trees_all_close(bundle.params[0], wanted, rtol=1e-6, atol=1e-6)


def test_another_scale_is_another_conversion(single, published, tmp_path):
  """The config of PEFT lies beside the file: an interrupted conversion must not mix two of them."""
  from jax_videoreason.convert import bundle

  file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
  save_file(pefts(updates(published["dit_0"], 8, targets=TARGETS[:2])), file)
  found = set()
  for alpha in (2, 3):
    config.write_text(json.dumps({"lora_alpha": alpha, "r": RANK}))
    plan = bundle.plan(detect.source(single), loras=lora.Wanted(given=(str(file),)))
    found.add(plan.fingerprint)
  assert len(found) == 2


@pytest.mark.torch
def test_the_order_of_diffsynth_rounds_as_pytorch_does(single, published, tmp_path):
  """W, A, B, their product, its multiple and the sum, each rounded to bfloat16.

  Small integers over powers of two have exact sums in float32, so that the two cannot differ by
  the order of summation, and what is compared is where they round.
  """
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(9)
  name = TARGETS[0]
  wide, narrow = published["dit_0"][f"{name}.weight"].shape
  a = (rng.integers(-99, 99, (RANK, narrow)) / 64).astype(np.float32)
  b = (rng.integers(-99, 99, (wide, RANK)) / 64).astype(np.float32)
  file = diffsynth({name: (a, b)}, tmp_path / "lora.safetensors")
  words = (f"--lora={file}", "--lora-alpha=0.7", "--lora-order=bf16")
  bundle = converted(single, tmp_path / "out", *words)

  def bf16(value):
    return torch.from_numpy(value.copy()).to(torch.bfloat16)

  weight = published["dit_0"][f"{name}.weight"]
  theirs = bf16(weight) + 0.7 * torch.mm(bf16(b), bf16(a))
  ours = np.asarray(bundle.params[0]["blocks"]["self_attn"]["q"]["kernel"][0])
  np.testing.assert_array_equal(ours, theirs.float().numpy().T)
  fine = weight + 0.7 * (b @ a)
  assert 0 < np.abs(ours.T - fine).max() < 0.1  # the rounding is there, and small


def test_into_bf16_it_is_rounded_once(single, published, tmp_path):
  given = updates(published["dit_0"], seed=10, targets=TARGETS[:1])
  file = diffsynth(given, tmp_path / "lora.safetensors")
  bundle = converted(single, tmp_path / "out", f"--lora={file}", "--dtype=bf16")
  ours = bundle.params[0]["blocks"]["self_attn"]["q"]["kernel"][0]
  a, b = given[TARGETS[0]]
  fine = (published["dit_0"][f"{TARGETS[0]}.weight"] + b @ a).astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(np.asarray(ours), fine.T)


@pytest.mark.slow
def test_another_lora_is_another_conversion(single, published, tmp_path):
  """An interrupted one must not go on with it."""
  from jax_videoreason.convert import bundle

  files = [
    diffsynth(updates(published["dit_0"], seed=s), tmp_path / f"{s}.safetensors") for s in (1, 2)
  ]
  source = detect.source(single)
  plans = [
    bundle.plan(source, loras=lora.Wanted(given=(str(file),), alpha=alpha, order=order))
    for file in files
    for alpha in (1.0, 0.5)
    for order in lora.ORDERS
  ]
  assert len({plan.fingerprint for plan in [*plans, bundle.plan(source)]}) == 9


def test_the_plan_names_it(original, published, tmp_path, capsys):
  file = diffsynth(updates(published["dit_0"], seed=1), tmp_path / "h.safetensors")
  assert cli.main(["convert", str(original), "--dry-run", f"--lora=high={file}"]) == 0
  assert "dit_0 + LoRA" in capsys.readouterr().out


def test_a_lora_for_another_base(published, tmp_path, refused):
  deep = {"blocks.7.self_attn.q": updates(published["dit_0"], 0)[TARGETS[0]]}
  some = updates(published["dit_0"], 0, targets=TARGETS[:1])
  file = diffsynth({**some, **deep}, tmp_path / "deep.safetensors")
  said = refused(f"--lora={file}")
  assert f"{file} has 1 updates of tensors that the transformer lacks, first blocks.7" in said
  wide = {TARGETS[0]: (np.zeros((4, 96), np.float32), np.zeros((128, 4), np.float32))}
  file = diffsynth({**wide, **some | {TARGETS[1]: wide[TARGETS[0]]}}, tmp_path / "w.safetensors")
  said = refused(f"--lora={file}")
  assert f"{TARGETS[1]} updates a (128, 96) tensor, the base has (128, 128)" in said


def test_a_lora_that_matches_nothing(tmp_path, refused):
  pair = (np.zeros((4, 8), np.float32), np.zeros((8, 4), np.float32))
  file = diffsynth({"unet.down.0.to_q": pair}, tmp_path / "sd.safetensors")
  assert f"{file} matches nothing in the transformer, first unet.down.0" in refused(
    f"--lora={file}"
  )
  save_file({"a.weight": np.zeros(3, np.float32)}, tmp_path / "none.safetensors")
  said = refused(f"--lora={tmp_path / 'none.safetensors'}")
  assert "a.weight is no LoRA tensor" in said
  assert "matches nothing" in said


def test_every_fault_of_every_file_at_once(original, published, tmp_path, refused):
  good = updates(published["dit_0"], 0, targets=TARGETS[:3])
  a, b = good[TARGETS[0]]
  ranks = diffsynth({**good, TARGETS[0]: (a[:2], b)}, tmp_path / "ranks.safetensors")
  half = tmp_path / "half.safetensors"
  save_file({f"{TARGETS[0]}.lora_A.weight": a, **pefts({TARGETS[1]: good[TARGETS[1]]})}, half)
  said = refused(f"--lora=high={ranks}", f"--lora=low={half}", source=original)
  assert "convert: 2 faults." in said
  assert f"the ranks of {TARGETS[0]} differ, lora_A (2, 128) and lora_B (128, 4)" in said
  assert f"{half}: {TARGETS[0]} has only {TARGETS[0]}.lora_A.weight" in said


def test_a_pair_under_two_names(published, tmp_path, refused):
  given = updates(published["dit_0"], 0, targets=TARGETS[:1])
  file = tmp_path / "twice.safetensors"
  save_file(pefts(given) | pefts(given, "transformer."), file)
  assert "are for the same tensor" in refused(f"--lora={file}")


@pytest.mark.parametrize(
  "naming", ["peft of the diffusers names", "kohya", "kohya of the diffusers names"]
)
def test_two_pairs_for_one_tensor_in_two_namings(published, tmp_path, refused, naming):
  given = updates(published["dit_0"], 0, targets=TARGETS[:1])
  other = {key: value for key, value in NAMINGS[naming](given).items() if ".alpha" not in key}
  file = tmp_path / "twice.safetensors"
  save_file(pefts(given, "diffusion_model.") | other, file)
  said = refused(f"--lora={file}")
  assert "convert: 1 fault." in said
  assert f"diffusion_model.{TARGETS[0]}.lora_A.weight" in said
  assert f"{next(key for key in other if 'lora_A' in key or 'lora_down' in key)}" in said
  assert "are for the same tensor: keep one of them." in said


def alpha_of(name, value):
  return {f"{name}.alpha": np.array(value, np.float32)}


@pytest.mark.parametrize(
  "name", ["transformer.blocks.0.attn1.to_q", "lora_unet_blocks_0_self_attn_q"]
)
def test_an_alpha_counts_in_any_naming(single, published, tmp_path, name):
  file = tmp_path / "lora.safetensors"
  pairs = pefts(updates(published["dit_0"], 0, targets=TARGETS[:2]), "diffusion_model.")
  save_file(pairs | alpha_of(name, 8), file)
  found = loaded(single, file).updates
  scales = {target: update.scale for target, update in found.items()}
  assert scales == {("blocks/self_attn/q/kernel", 0): 8 / RANK, ("blocks/self_attn/k/kernel", 0): 1}


def test_an_alpha_given_twice_or_of_nothing(published, tmp_path, refused):
  file = tmp_path / "lora.safetensors"
  pairs = pefts(updates(published["dit_0"], 0, targets=TARGETS[:1]))
  for other in ("transformer.blocks.0.attn1.to_q", f"diffusion_model.{TARGETS[0]}"):
    save_file(pairs | alpha_of(TARGETS[0], 8) | alpha_of(other, 2), file)
    said = refused(f"--lora={file}")
    assert f"{other}.alpha" in said and "are for the same tensor: keep one of them." in said
  for other in (TARGETS[1], "text.q"):
    save_file(pairs | alpha_of(other, 8), file)
    said = refused(f"--lora={file}")
    assert f"{file}: {other}.alpha has no lora_A and lora_B beside it: add them, or" in said


def test_words_that_do_not_fit(original, single, published, tmp_path, refused):
  file = diffsynth(updates(published["dit_0"], 0), tmp_path / "l.safetensors")
  assert "the model has two experts" in refused(f"--lora={file}", source=original)
  assert f"--lora=high={file}, wanted --lora=FILE alone" in refused(f"--lora=high={file}")
  assert "is not there: --lora wants a file" in refused(f"--lora={tmp_path}")
  assert "alpha nan, wanted a finite number" in refused(f"--lora={file}", "--lora-alpha=nan")
  file.write_bytes(file.read_bytes()[:-5])
  assert f"{file} is truncated" in refused(f"--lora={file}")


def test_scales_that_are_not_known_are_refused(published, tmp_path, refused):
  file = tmp_path / "adapter_model.safetensors"
  save_file(pefts(updates(published["dit_0"], 0, targets=TARGETS[:1])), file)
  (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "use_rslora": True}))
  assert "use_rslora or alpha_pattern: not supported yet" in refused(f"--lora={file}")


@pytest.mark.parametrize("alpha", ["two", None, 0, float("inf")])
def test_an_alpha_that_cannot_be_meant(published, tmp_path, refused, alpha):
  file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
  pairs = pefts(updates(published["dit_0"], 0, targets=TARGETS[:1]))
  save_file(pairs, file)
  config.write_text(json.dumps({"lora_alpha": alpha}))
  assert f"{config} says lora_alpha={json.dumps(alpha)}, wanted a number" in refused(
    f"--lora={file}"
  )
  save_file(pairs, file, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha})})
  assert f"{file} says lora_alpha={json.dumps(alpha)}, wanted a number" in refused(f"--lora={file}")


def test_damaged_notes_and_alphas(published, tmp_path, refused):
  file = tmp_path / "lora.safetensors"
  pairs = pefts(updates(published["dit_0"], 0, targets=TARGETS[:1]))
  for notes in ("{", "[]"):
    save_file(pairs, file, {"lora_adapter_metadata": notes})
    said = refused(f"--lora={file}")
    assert f"{file}: lora_adapter_metadata in its header is no JSON object" in said
  for alpha in ([1.0, 2.0], [np.nan]):
    save_file({**pairs, f"{TARGETS[0]}.alpha": np.array(alpha, np.float32)}, file)
    assert f"{file}: {TARGETS[0]}.alpha is [" in refused(f"--lora={file}")
  empty = {TARGETS[0]: (np.zeros((0, 128), np.float32), np.zeros((128, 0), np.float32))}
  save_file({**pefts(empty), f"{TARGETS[0]}.alpha": np.float32([1])}, file)
  assert f"{file}: {TARGETS[0]} is empty, lora_A (0, 128)" in refused(f"--lora={file}")


def test_half_precision_files_are_read(single, published, tmp_path):
  given = updates(published["dit_0"], seed=4, targets=TARGETS[:1], dtype=ml_dtypes.bfloat16)
  found = loaded(single, diffsynth(given, tmp_path / "half.safetensors"))
  update = next(iter(found.updates.values()))
  assert reader.read(update.a).dtype == ml_dtypes.bfloat16
  zero = np.zeros((128, 128), np.float32)
  a, b = (value.astype(np.float32) for value in given[TARGETS[0]])
  np.testing.assert_allclose(lora.merged(zero, update, 1.0, "fp32"), b @ a, rtol=1e-6, atol=1e-6)
