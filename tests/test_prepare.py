"""What a run is asked for reaches its schedule and the encoders."""

import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from helpers import FREQ, replace, tiny_bundle
from jax_videoreason import checkpoint, conditioning, prepare, schedules, settings, sharding
from jax_videoreason.experiments import setting
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Conditioning
from jax_videoreason.vbvr import generate
from jax_videoreason.vbvr.jobs import Shape

CHOSEN = SampleSettings(
  checkpoint="tiny", frames=9, height=8, width=16, steps=6, shift=4.0, guidance=(3.0,)
)
BUILT = dict(steps=6, shift=4.0, guidance=3.0, freq_dim=FREQ)
COND = Conditioning(text=np.zeros((2, 1, 5, 12), np.float32))
PICTURE = np.zeros((8, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle():
  return tiny_bundle()


def equal(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))
  )


@pytest.mark.parametrize(
  ("chosen", "card", "built"),
  [
    (dict(steps=5), {}, dict(steps=5)),
    (dict(shift=3.0), {}, dict(shift=3.0)),
    (dict(guidance=(2.0,)), {}, dict(guidance=2.0)),
    (dict(guidance=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)), {}, dict(guidance=np.arange(1, 7))),
    (dict(guidance=(4.0, 3.0)), dict(boundary=0.9), dict(guidance=(4.0, 3.0), boundary=0.9)),
    (dict(boundary=0.6), dict(boundary=0.9), dict(boundary=0.6)),
    (dict(boundary=0.0), dict(boundary=0.9), dict(boundary=0.0)),
    (dict(solver="unipc"), {}, dict(solver="unipc")),
    (dict(grid="official"), {}, dict(grid="official")),
    (dict(grid="diffusers"), {}, dict(grid="diffusers")),
    ({}, dict(numerics="diffusers"), dict(numerics="diffusers")),
    ({}, dict(numerics="diffsynth"), dict(numerics="diffsynth")),
  ],
)
def test_the_schedule_is_that_of_the_settings_and_the_card(bundle, chosen, card, built):
  plain = settings.schedule(CHOSEN, bundle.card, bundle.parts)
  assert equal(plain, schedules.build(**BUILT))
  changed = settings.schedule(replace(CHOSEN, **chosen), replace(bundle.card, **card), bundle.parts)
  assert equal(changed, schedules.build(**BUILT | built))
  assert not equal(changed, plain)


def test_a_boundary_is_for_two_experts(bundle):
  with pytest.raises(ValueError, match=r"boundary=0\.5 of tiny, which has one expert, wanted None"):
    settings.schedule(replace(CHOSEN, boundary=0.5), bundle.card, bundle.parts)


def by_prepare(chosen):
  prepare.encode(chosen, [(["go"], PICTURE[None])])


def by_setting(chosen):
  setting.encode(chosen, [SimpleNamespace(prompt="go", first_frame=PICTURE)])


def by_generate(chosen):
  shape = Shape(frames=chosen.frames, height=chosen.height, width=chosen.width)
  sample = SimpleNamespace(prompt="go", first=lambda: PICTURE)
  generate.encode(chosen, [generate.Unit(seed=0, shape=shape, samples=(sample,))], None)


@pytest.mark.parametrize("encode", [by_prepare, by_setting, by_generate])
@pytest.mark.parametrize(
  ("chosen", "wanted"),
  [
    ({}, {}),
    (dict(frames=13), dict(frames=13)),
    (dict(negative_prompt="blurred"), dict(negative_prompt="blurred")),
    (dict(guidance=(1.0,)), dict(guided=False)),
    (dict(tiles="diffusers"), dict(tiles="diffusers")),
  ],
)
def test_what_is_encoded_is_that_of_the_settings(bundle, encode, chosen, wanted, monkeypatch):
  asked = []
  monkeypatch.setattr(checkpoint, "load", lambda *_, **__: bundle)

  def record(bundle, prompts, first_frames, **said):
    asked.append((prompts, first_frames, said))
    return COND

  monkeypatch.setattr(conditioning, "encode", record)
  encode(replace(CHOSEN, **chosen))
  ((prompts, first_frames, said),) = asked
  assert prompts == ["go"]
  assert first_frames.shape == (1, 8, 16, 3)
  assert said.pop("clip", None) is None
  assert said == {"frames": 9, "negative_prompt": "", "guided": True, "tiles": None} | wanted


def test_the_text_encoder_lies_over_a_mesh_and_is_let_go_before_the_dit_is_read(monkeypatch):
  monkeypatch.setattr(sharding, "SMALL", 100)  # else the leaves of a small model lie whole
  asked, text, alive, load = [], [], [], checkpoint.load

  def watched(where, parts, **options):
    left = sum(leaf() is not None for leaf in alive)
    bundle = load(where, parts, **options)
    asked.append((parts, left))
    if "text" in parts:
      text.extend((leaf.size, leaf.addressable_shards[0].data.size) for leaf in leaves(bundle.text))
      alive.extend(map(weakref.ref, leaves(bundle.text)))
    return bundle

  def encode(bundle, *said, **more):
    assert all(leaf() is not None for leaf in alive)
    return real(bundle, *said, **more)

  leaves, real = jax.tree.leaves, conditioning.encode
  monkeypatch.setattr(checkpoint, "load", watched)
  monkeypatch.setattr(conditioning, "encode", encode)
  chosen = replace(CHOSEN, checkpoint="mini", height=16)
  mesh = sharding.make_mesh(fsdp=4)
  picture = np.zeros((1, 16, 16, 3), np.uint8)
  bundle, (cond,) = prepare.encode(chosen, [(["go"], picture)], mesh=mesh)
  whole, held = map(sum, zip(*text, strict=True))
  assert held < 0.3 * whole  # of four devices
  assert asked == [(("text", "clip", "vae"), 0), (("vae", "preview"), 0), (("dit",), 0)]
  assert bundle.text is None and bundle.params[0] is not None
  assert all(isinstance(leaf, np.ndarray) for leaf in leaves(cond))


def test_a_study_decodes_and_encodes_anew_in_the_tiles_of_its_settings(bundle, monkeypatch):
  decoded, anew = [], []
  monkeypatch.setattr(checkpoint, "load", lambda *_, **__: bundle)
  monkeypatch.setattr(conditioning, "encode", lambda *_, **__: COND)
  monkeypatch.setattr(conditioning, "reframed", lambda *_, **said: anew.append(said) or COND)
  monkeypatch.setattr(setting, "decode_each", lambda *_, **said: decoded.append(said["tiles"]))
  chosen = replace(CHOSEN, height=16, tiles="diffsynth")
  case = SimpleNamespace(prompt="go", first_frame=np.zeros((16, 16, 3), np.uint8))
  made = setting.load(chosen, groups=[[case]])
  made.decode(np.zeros((1, 3, 4, 4, 4)))
  assert decoded == ["diffsynth"]
  made.encode(replace(chosen, frames=13), [case])
  made.encode(replace(chosen, tiles="diffusers"), [case])
  assert anew == [{"frames": 13, "tiles": "diffsynth"}, {"frames": 9, "tiles": "diffusers"}]
