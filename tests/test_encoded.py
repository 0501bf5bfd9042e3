"""Encoded cases: which parts made them, which shards are there, in which order they are read."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason import encoded

CONFIG = {"width": 8, "mean": [0.0, 0.1], "dtype": "float32"}
PARAMS = {"conv": {"kernel": jnp.array([0.1, 0.2]), "bias": jnp.zeros(1)}}


@pytest.fixture
def words(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text("{}")
  return path


@pytest.fixture
def cases(tmp_path):
  return encoded.Encoded(tmp_path / "latents", 2 * encoded.SHARD + 3, (2, 1, 1, 4), 5)


def test_a_vae_has_one_mark_in_float32_and_in_bfloat16(words):
  stored = {"conv": {k: v.astype(jnp.bfloat16) for k, v in PARAMS["conv"].items()}}
  ours = encoded.marks(CONFIG, PARAMS, words)
  assert encoded.marks({**CONFIG, "dtype": "bfloat16"}, stored, words) == ours
  assert encoded.marks({**CONFIG, "mean": [0.0, 0.2]}, PARAMS, words)["vae"] != ours["vae"]
  other = {"conv": {**PARAMS["conv"], "bias": jnp.ones(1)}}
  assert encoded.marks(CONFIG, other, words)["vae"] != ours["vae"]
  words.write_text("{ }")
  assert encoded.marks(CONFIG, PARAMS, words)["tokenizer"] != ours["tokenizer"]


@pytest.mark.parametrize(
  ("other", "told"),
  [
    ({"vae": "x"}, "the vae of --init mini is not what the latents were made with: do this."),
    ({"tokenizer": "x"}, "the tokenizer of --init mini is not what"),
    ({"vae": "x", "tokenizer": "y"}, "the vae and the tokenizer of --init mini are not what"),
  ],
)
def test_latents_of_other_parts_are_refused(other, told):
  marks = {"vae": "a", "tokenizer": "b"}
  encoded.check(marks, dict(marks), "--init mini", "do this")
  with pytest.raises(ValueError, match=told):
    encoded.check(marks, marks | other, "--init mini", "do this")


def test_shards_are_missing_until_they_are_finished(cases):
  marks = {"vae": "a", "tokenizer": "b"}
  cases.create(marks)
  cases.open(write=True)["ids"][:] = 7
  assert cases.missing() == [0, 250, 500]
  cases.finish(250)
  with pytest.raises(ValueError, match="lacks 2 shards of 250 cases: run the stage 'encode'"):
    cases.open()
  cases.create(marks)  # goes on
  assert cases.missing() == [0, 500]
  cases.finish(0)
  cases.finish(500)
  assert (cases.open()["ids"] == 7).all()
  assert cases.open()["latents"].shape == (503, 2, 1, 1, 4)


def test_the_latents_of_another_vae_are_not_gone_on_with(cases):
  cases.create({"vae": "a", "tokenizer": "b"})
  with pytest.raises(ValueError, match=r"the vae of --work is not .*: remove .*latents"):
    cases.create({"vae": "z", "tokenizer": "b"})


def test_latents_of_nobody_knows_what_are_refused(cases):
  cases.create({"vae": "a", "tokenizer": "b"})
  (cases.folder / encoded.MADE_BY).unlink()
  with pytest.raises(ValueError, match="nobody knows which VAE made its latents"):
    cases.made_by()


def test_another_number_of_cases_is_refused(cases):
  cases.create({"vae": "a", "tokenizer": "b"})
  fewer = encoded.Encoded(cases.folder, 10, (2, 1, 1, 4), 5)
  for asks in (fewer.open, lambda: fewer.create({"vae": "a", "tokenizer": "b"})):
    with pytest.raises(ValueError, match=r"holds \(503, 2, 1, 1, 4\), wanted \(10, .*same --cases"):
      asks()


def test_a_kill_while_a_file_is_made_leaves_none_that_counts(cases, monkeypatch):
  def killed(path, mode, dtype, shape):
    path.write_bytes(b"\x93NUMPY")
    raise KeyboardInterrupt

  marks = {"vae": "a", "tokenizer": "b"}
  with monkeypatch.context() as patch:
    patch.setattr(np.lib.format, "open_memmap", killed)
    with pytest.raises(KeyboardInterrupt):
      cases.create(marks)
  cases.create(marks)
  assert cases.open(write=True)["latents"].shape == (503, 2, 1, 1, 4)


def test_a_file_that_is_cut_short_is_refused(cases):
  marks = {"vae": "a", "tokenizer": "b"}
  cases.create(marks)
  (cases.folder / "known.npy").write_bytes(b"\x93NUMPY")
  for asks in (cases.open, lambda: cases.create(marks)):
    with pytest.raises(
      ValueError, match=r"known\.npy is damaged: remove .*latents and encode again"
    ):
      asks()


def test_an_epoch_has_every_case_once_and_an_order_of_its_own():
  epochs = [[encoded.rows_of(4 * e + i, 5, 20) for i in range(4)] for e in range(2)]
  for epoch in epochs:
    assert sorted(np.concatenate(epoch)) == list(range(20))
    assert all((np.diff(rows) > 0).all() for rows in epoch)
  assert not np.array_equal(epochs[0], epochs[1])
  np.testing.assert_array_equal(encoded.rows_of(6, 5, 20), epochs[1][2])
