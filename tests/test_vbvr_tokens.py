"""Maps of tokens: they are what the hidden states give, and have the official tool's names."""

import dataclasses

import numpy as np
import pytest

import helpers
from jax_videoreason import runs
from jax_videoreason.vbvr import maps, tokens

LAYERS, STEPS, RUNS = (0, 2), (1, 3), 2
KINDS = ("ch_imp", "norm", "pca", "temporal", "top_ch")
TOKENS = (3, 2, 2)  # of helpers.GRID


@pytest.fixture(scope="module")
def pieces() -> list[tuple[int, dict[str, np.ndarray]]]:
  """(first step, taps) of both pieces of a run of the tiny model; hidden states among the taps."""
  spec = tokens.taps(LAYERS, x0=False)
  found = []
  noise, cond = helpers.tiny_inputs(RUNS)
  runs.run(
    helpers.tiny_bundle(),
    noise,
    cond,
    helpers.tiny_schedule(4),
    taps=helpers.replace(spec, reduce=(*spec.reduce, "full")),
    piece=2,
    on_piece=lambda trace, at, part: found.append((at.start, dict(trace.taps))),
  )
  return found


def tokens_of(pieces, run: int) -> tokens.Tokens:
  kept = [tokens.of_piece(found, first, STEPS) for first, found in pieces]
  return tokens.of_run(kept, run, TOKENS, layers=LAYERS, steps=STEPS, sigma=np.arange(4.0))


def drawn() -> tokens.Tokens:
  """Tokens of random numbers."""
  rng = np.random.default_rng(0)
  return tokens.Tokens(
    steps=np.asarray(STEPS[:1]),
    layers=np.asarray(LAYERS),
    sigma=np.linspace(1, 0.2, 4),
    energy=rng.random((4, 2, 3)),
    length=rng.random((4, 2)),
    norm=rng.random((1, 2, *TOKENS)),
    pca=rng.normal(size=(1, 2, *TOKENS, 3)),
    variance=rng.random((1, 2, 24)),
    top=rng.random((1, 2, *TOKENS, 6)),
    channels=rng.integers(0, 24, (1, 2, 6)),
  )


def test_maps_are_what_the_hidden_states_give(pieces):
  whole = np.concatenate([found["resid_post/full"] for _, found in pieces])
  hidden = whole[:, :, 0, 1]  # S L T D of the second run
  made = tokens_of(pieces, run=1)
  length = np.linalg.norm(hidden, axis=-1)
  close = {"rtol": 1e-4, "atol": 1e-5}
  np.testing.assert_allclose(made.length, length.mean(-1), **close)
  np.testing.assert_allclose(made.norm, length[list(STEPS)].reshape(2, 2, *TOKENS), **close)
  energy = np.linalg.norm(length.reshape(4, 2, 3, 4), axis=-1)
  np.testing.assert_allclose(made.energy, energy, **close)
  kept = hidden[list(STEPS)]
  np.testing.assert_allclose(made.variance, kept.var(2), **close)
  most = np.argsort(-kept.var(2), axis=-1)[..., :6]
  assert (made.channels == most).all()
  top = np.take_along_axis(kept, most[:, :, None], axis=3)
  np.testing.assert_array_equal(made.top, top.reshape(2, 2, *TOKENS, 6))
  singular = np.linalg.svd(kept - kept.mean(2, keepdims=True), compute_uv=False) ** 2
  share = singular[..., :3].sum(-1) / singular.sum(-1)
  np.testing.assert_allclose(made.explained, share, rtol=0.02)
  assert made.pca.shape == (2, 2, *TOKENS, 3)


def test_the_files_have_the_names_of_the_official_tool(tmp_path):
  maps.draw(tmp_path, drawn())
  of_layer = [f"L{n:02d}_{name}" for n in LAYERS for name in KINDS]
  names = [*of_layer, "layer_grid", "norm_across_layers"]
  wanted = {f"step_0001/{name}.png" for name in names}
  wanted |= {f"summary/temporal_heatmap_L{n:02d}.png" for n in LAYERS}
  wanted.add("summary/norm_evolution.png")
  assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")} == wanted


def test_the_numbers_are_kept_beside_the_pictures(tmp_path):
  made = drawn()
  tokens.write(tmp_path / tokens.FILE, made)
  with np.load(tmp_path / tokens.FILE) as again:
    assert set(again) == {field.name for field in dataclasses.fields(made)}
    for name in again:
      np.testing.assert_array_equal(again[name], getattr(made, name))
