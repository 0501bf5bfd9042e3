"""Settings: a plain mapping in, frozen dataclasses or one message with every fault out."""

import dataclasses

import pytest

from jax_videoreason import settings

LEAST = {"checkpoint": "mini", "frames": 17, "height": 32, "width": 32}


def read(**changes):
  return settings.from_config({**LEAST, **changes})


def test_defaults_are_wans():
  chosen = read()
  assert (chosen.steps, chosen.shift, chosen.guidance, chosen.solver) == (50, 5.0, (5.0,), "euler")
  assert chosen.seeds == (0,)
  assert chosen.taps == settings.TapSettings()


def test_settings_are_frozen_and_read_back_from_their_own_dict():
  chosen = read(seeds=[4, 2], guidance=(4, 3), boundary=0.875, taps={"sites": ["attn_out"]})
  assert settings.from_config(dataclasses.asdict(chosen)) == chosen
  with pytest.raises(dataclasses.FrozenInstanceError):
    chosen.steps = 3


@pytest.mark.parametrize(("given", "seeds"), [(3, (0, 1, 2)), ([7, 5], (7, 5)), ((0,), (0,))])
def test_a_number_of_seeds_or_the_seeds_themselves(given, seeds):
  assert read(seeds=given).seeds == seeds


@pytest.mark.parametrize(
  ("guidance", "guided"), [(1.0, False), ((1, 1), False), ((4, 1), True), (5, True)]
)
def test_guidance_of_one_needs_no_second_branch(guidance, guided):
  assert read(guidance=guidance).guided is guided


def test_taps_become_a_spec():
  spec = read(
    taps={"sites": ["attn_out"], "layers": 2, "reduce": ["norm", "attn_out/lens"]}
  ).taps.spec()
  assert (spec.sites, spec.layers, spec.reduce) == (("attn_out",), (2,), ("norm", "attn_out/lens"))
  assert spec.latents
  assert spec.x0


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"stepz": 3}, "no key 'stepz'; did you mean 'steps'?"),
    ({"zzz": 3}, "no key 'zzz'; there are: batch, boundary, checkpoint"),
    ({"taps": {"site": ()}}, "no key 'taps.site'; did you mean 'sites'?"),
    ({"taps": {"sites": ("resid_mid",)}}, "wanted one of resid_pre, attn_out"),
    ({"taps": {"reduce": ("nrom",)}}, "wanted one of norm"),
    ({"taps": {"reduce": ("resid_mid/norm",)}}, "or SITE/ and one of them for that site alone"),
    ({"taps": 3}, "taps=3, wanted a mapping of sites"),
    ({"solver": "eular"}, "solver='eular', wanted one of euler, unipc"),
    ({"grid": "linear"}, "grid='linear', wanted one of official"),
    ({"steps": 0}, "steps=0, wanted at least 1"),
    ({"steps": 2.5}, "steps=2.5, wanted a whole number"),
    ({"steps": True}, "steps=True, wanted a whole number"),
    ({"shift": float("nan")}, "shift=nan, wanted a finite number"),
    ({"shift": 0}, "shift=0, wanted a number above 0"),
    ({"boundary": 875}, "boundary=875, wanted a sigma in 0..1"),
    ({"seeds": []}, "seeds=[], wanted at least 1 of them"),
    ({"seeds": [2**32]}, "seeds=[4294967296], wanted numbers below 4294967296"),
    (
      {"seeds": 1234567890},
      "wanted at most 1000000, for it is a count; seeds themselves stand in brackets, as (7,)",
    ),
    ({"seeds": [-1]}, "seeds=[-1], wanted at least 0"),
    ({"negative_prompt": 3}, "negative_prompt=3, wanted a text"),
  ],
)
def test_a_fault_is_named_with_what_was_wanted(changes, said):
  with pytest.raises(ValueError) as caught:
    read(**changes)
  assert said in str(caught.value)


def test_all_faults_come_in_one_message():
  with pytest.raises(ValueError, match=r"^configuration: 4 faults\. ") as caught:
    settings.from_config({"stepz": 3, "shift": -1, "checkpoint": "mini", "height": 3, "width": 3.5})
  for said in ("stepz", "shift=-1", "width=3.5", "'frames' is missing"):
    assert said in str(caught.value)
