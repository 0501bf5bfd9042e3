"""Video diffusion models that reason along the denoising steps: run them, watch them, change them."""

from pathlib import Path

from jax_videoreason.version import __version__ as __version__

_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file():
    __path__.append(str(_root))
