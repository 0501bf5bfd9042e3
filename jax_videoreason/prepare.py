"""From settings to what a run needs: the conditioning of its prompts and frames, its schedule."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_videoreason import checkpoint, conditioning, distributed, sharding
from jax_videoreason.axes import Params
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Conditioning, ModelBundle

Asked = tuple[Sequence[str], np.ndarray | None]


def encode(
  chosen: SampleSettings,
  groups: Sequence[Asked],
  *,
  shown: Sequence[Sequence[np.ndarray]] | None = None,
  mesh: Mesh | None = None,
  experts: int | None = None,
) -> tuple[ModelBundle, list[Conditioning]]:
  """The bundle ready to denoise and decode, and the conditioning of each group of runs, in numpy.

  groups: (R prompts, first frames R height width 3 or None), each encoded on its own.
  shown: for each group the R pictures, of any size, that an image tower is shown
    (`framing.shown_to_clip`); None = the first frames.
  experts: of the DiT that may be resident at once, None = all; where it has more, none is loaded,
    and `runs.run` asks `one_expert` for them.
  The text encoder and the DiT are never resident together; both lie on `mesh`, where one is given.
  """
  bundle = checkpoint.load(chosen.checkpoint, parts=("text", "clip", "vae"), mesh=mesh)
  bundle.card.latents.grid(chosen.frames, chosen.height, chosen.width)
  clips = [None] * len(groups)
  if shown is not None and bundle.parts.dit.config.clip_width is not None:
    clips = [conditioning.image_tokens(bundle, pictures) for pictures in shown]
  encoded = [
    distributed.fetch(
      conditioning.encode(
        bundle,
        prompts,
        first_frames,
        frames=chosen.frames,
        negative_prompt=chosen.negative_prompt,
        guided=chosen.guided,
        tiles=chosen.tiles,
        clip=clip,
      )
    )
    for (prompts, first_frames), clip in zip(groups, clips, strict=True)
  ]
  del bundle
  bundle = checkpoint.load(chosen.checkpoint, parts=("vae", "preview"))
  return with_experts(chosen, bundle, mesh, experts), encoded


def with_experts(
  chosen: SampleSettings, bundle: ModelBundle, mesh: Mesh | None, experts: int | None = None
) -> ModelBundle:
  """The bundle with the DiT of the settings on the mesh, or without, where `experts` are fewer; its
  VAE lies on each of the devices that decode, so that none is sent weights with its latents."""
  if mesh is not None and bundle.vae is not None:
    everywhere = NamedSharding(sharding.side_by_side(mesh), PartitionSpec())
    bundle = dataclasses.replace(bundle, vae=jax.device_put(bundle.vae, everywhere))
  if experts is not None and experts < len(bundle.params):
    return bundle
  loaded = checkpoint.load(chosen.checkpoint, parts=("dit",), mesh=mesh)
  return dataclasses.replace(bundle, params=loaded.params)


def one_expert(
  chosen: SampleSettings, mesh: Mesh | None
) -> Callable[[int], tuple[Params | None, ...]]:
  """What brings one expert of the settings' bundle onto the mesh, as `runs.run` asks for it."""
  return lambda number: (
    checkpoint.load(chosen.checkpoint, parts=(f"dit_{number}",), mesh=mesh).params
  )
