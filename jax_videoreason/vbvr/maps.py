"""Pictures of the tokens of a video, with the file names of the official token tool.

step_0000/L00_norm.png          length of each token, frame by frame
step_0000/L00_pca.png           each token on three main axes, as red, green and blue
step_0000/L00_temporal.png      length of each latent frame
step_0000/L00_ch_imp.png        the channels that vary most over the tokens
step_0000/L00_top_ch.png        maps of the first of them
step_0000/layer_grid.png        the first, all layers below each other
step_0000/norm_across_layers.png    mean length of a token by layer
summary/norm_evolution.png      the same over all steps    summary/temporal_heatmap_L00.png
"""

from pathlib import Path

import numpy as np
from einops import rearrange

from jax_videoreason import plots
from jax_videoreason.experiments.layer_maps import colours
from jax_videoreason.folders import disk
from jax_videoreason.vbvr.tokens import Tokens

CHANNELS = 20
CELL = 96  # pixels of a frame


def draw(folder: Path, tokens: Tokens) -> None:
  """Draws everything into `folder`, over what an earlier call drew."""
  for row, step in enumerate(tokens.steps):
    place = folder / f"step_{step:04d}"
    with disk(place):
      place.mkdir(parents=True, exist_ok=True)
    _step(place, tokens, row)
  with disk(folder):
    (folder / "summary").mkdir(parents=True, exist_ok=True)
  steps, frames = range(len(tokens.sigma)), range(tokens.energy.shape[2])
  plots.curves(
    folder / "summary" / "norm_evolution.png",
    steps,
    {f"L{layer}": tokens.length[:, row] for row, layer in enumerate(tokens.layers)},
    x_name="denoising step",
    y_name="mean length of a token",
  )
  for row, layer in enumerate(tokens.layers):
    plots.heat_maps(
      folder / "summary" / f"temporal_heatmap_L{layer:02d}.png",
      {f"layer {layer}, length of each latent frame": tokens.energy[:, row]},
      x_name="latent frame",
      y_name="denoising step",
      value_name="length",
      x=frames,
      y=steps,
    )


def _step(place: Path, tokens: Tokens, row: int) -> None:
  """The pictures of one step."""
  step = int(tokens.steps[row])
  frames = range(tokens.norm.shape[2])
  named = {"columns": frames, "row_name": "layer", "column_name": "latent frame", "cell": CELL}
  plots.picture_grid(
    place / "layer_grid.png",
    tokens.norm[row],
    rows=[f"L{layer}" for layer in tokens.layers],
    title=f"step {step}, length of each token",
    **named,
  )
  plots.bars(
    place / "norm_across_layers.png",
    [f"L{layer}" for layer in tokens.layers],
    tokens.length[step],
    x_name="mean length of a token",
    title=f"step {step}",
  )
  for at, layer in enumerate(tokens.layers):
    start = f"L{layer:02d}"
    norm, share = tokens.norm[row, at], tokens.explained[row, at]
    plots.picture_grid(
      place / f"{start}_norm.png",
      norm[None],
      rows=[f"L{layer}"],
      title=f"step {step}, length of each token, {norm.min():.3g} to {norm.max():.3g}",
      **named,
    )
    plots.picture_grid(
      place / f"{start}_pca.png",
      rearrange(
        colours(rearrange(tokens.pca[row, at], "f h w c -> 1 (f h w) c")),
        "1 (f h w) c -> 1 f h w c",
        h=norm.shape[1],
        w=norm.shape[2],
      ),
      rows=[f"L{layer}"],
      title=f"step {step}, three main axes ({100 * share:.1f}% of the variance)",
      **named,
    )
    plots.curves(
      place / f"{start}_temporal.png",
      frames,
      {f"L{layer}": tokens.energy[step, at]},
      x_name="latent frame",
      y_name="length",
      title=f"step {step}",
    )
    most = np.argsort(-tokens.variance[row, at], kind="stable")[:CHANNELS]
    plots.bars(
      place / f"{start}_ch_imp.png",
      [str(channel) for channel in most],
      tokens.variance[row, at][most],
      x_name="variance over the tokens",
      title=f"step {step}, layer {layer}, channels that vary most",
    )
    plots.picture_grid(
      place / f"{start}_top_ch.png",
      rearrange(tokens.top[row, at], "f h w k -> k f h w"),
      rows=tokens.channels[row, at].tolist(),
      title=f"step {step}, layer {layer}, channels that vary most",
      **{**named, "row_name": "channel"},
    )
