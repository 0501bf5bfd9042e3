"""Pictures and prompts are prepared as PyTorch, diffusers and transformers prepare them."""

import numpy as np
import pytest
from einops import rearrange

from jax_videoreason import framing, tokenizer

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
SIZES = [((37, 61), (48, 32)), ((64, 48), (20, 21)), ((16, 16), (16, 16))]


def picture(height, width):
  rng = np.random.default_rng(height)
  rough = rng.integers(0, 256, (height, width, 3))
  return rough.astype(np.uint8)


@pytest.mark.parametrize(("size", "wanted"), SIZES)
def test_the_official_resize_is_that_of_torch(size, wanted):
  """Float32 sums against float64; 1e-5 on -1..1. Values beyond 1 stay."""
  image = picture(*size)
  given = torch.tensor(rearrange(image, "h w c -> 1 c h w")).float() / 255
  made = torch.nn.functional.interpolate((given - 0.5) / 0.5, wanted, mode="bicubic")
  ours = framing.stretched(image, *wanted, "official")
  np.testing.assert_allclose(ours, rearrange(made.numpy(), "1 c h w -> h w c"), atol=1e-5)


@pytest.mark.parametrize(("size", "wanted"), SIZES)
def test_the_resize_of_diffusers_is_that_of_its_processor(size, wanted):
  from diffusers.video_processor import VideoProcessor
  from PIL import Image

  image = picture(*size)
  made = VideoProcessor(vae_scale_factor=1).preprocess(Image.fromarray(image), *wanted)
  ours = framing.stretched(image, *wanted, "diffusers").astype(np.float32) / 127.5 - 1
  np.testing.assert_allclose(ours, rearrange(made.numpy(), "1 c h w -> h w c"), atol=1e-6)


@pytest.mark.parametrize("size", [(40, 71), (71, 40), (28, 28), (300, 200)])
def test_squares_are_those_of_the_processor(size):
  import transformers
  from PIL import Image

  processor = transformers.CLIPImageProcessor(
    size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_normalize=False
  )
  image = picture(*size)
  made = processor(images=Image.fromarray(image), return_tensors="np")["pixel_values"]
  ours = framing.square([image], 28, "diffusers")
  np.testing.assert_allclose(ours, rearrange(made, "1 c h w -> 1 h w c"), atol=1e-6)


@pytest.mark.parametrize(
  "prompt",
  [
    "a  plain\tprompt \n",
    "&amp;lt;b&amp;gt; twice &amp;amp; once",
    "mojibake: schÃ¶n \u2019quoted\u2019",
    "ﬁne ligatures, full-width \uff21\uff22, a zero\u200bwidth space",
    "色调艳丽，过曝，静态，细节模糊不清",
    "\u2028 line\u2029 separators\u00a0 and \x0b tabs",
    "",
  ],
)
def test_prompts_are_cleaned_as_diffusers_cleans_them(prompt):
  from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean

  assert tokenizer.clean(prompt) == prompt_clean(prompt)
