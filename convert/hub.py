"""hf://owner/name -> files on this machine, in the cache of the Hugging Face hub.

Downloads go on where they were interrupted; with HF_HUB_OFFLINE=1 only the cache is looked at. The
only importer of huggingface_hub.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .engine import Faults

SCHEME = "hf://"
ADDRESS = re.compile(
  r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/\s]+))?(/(?P<file>.+))?/?"
)
# The files that a part may lie in, in either layout; examples and pictures are not downloaded.
FILES = {
  "dit": (
    "config.json",
    "model_index.json",
    "diffusion_pytorch_model*.safetensors*",
    "high_noise_model/*",
    "low_noise_model/*",
    "transformer/*",
    "transformer_2/*",
  ),
  "vae": ("Wan2.?_VAE.*", "vae/*"),
  "text": ("models_t5*", "google/umt5-xxl/*", "text_encoder/*", "tokenizer/*"),
  "clip": ("models_clip*", "image_encoder/*"),
}


def local(address: str, parts: Sequence[str] | None = None) -> Path:
  """The folder or file of an address, downloaded if need be; a plain path is given back.

  address: hf://owner/name, hf://owner/name@revision, or either with /file after it.
  parts: of `FILES`, None = all. Faults says what is wrong with the address or the hub.
  """
  return Path(_ask(address, parts) if address.startswith(SCHEME) else address)


def names_file(address: str) -> bool:
  """Whether an address is that of a single file."""
  found = ADDRESS.fullmatch(address)
  return found is not None and found["file"] is not None


def lacking(address: str, parts: Sequence[str] | None = None) -> list[tuple[str, int]]:
  """(file, bytes) of what `local` would download; nothing where the hub is not asked."""
  if not address.startswith(SCHEME):
    return []
  found = _ask(address, parts, dry_run=True)
  each = found if isinstance(found, list) else [found]
  return [(file.filename, file.file_size or 0) for file in each if file.will_download]


def _ask(address: str, parts: Sequence[str] | None, **more: Any) -> Any:
  """What huggingface_hub says of the files of an address."""
  found = ADDRESS.fullmatch(address)
  if not found:
    raise Faults([f"{address!r}, wanted hf://owner/name or hf://owner/name/file."])
  try:
    import huggingface_hub
    from huggingface_hub import constants
  except ImportError as error:
    raise Faults(
      [f"{address} is on the hub and huggingface_hub is missing: pip install huggingface_hub."]
    ) from error
  name, more = found["repository"], {"revision": found["revision"], **more}
  wanted = [pattern for part in parts or FILES for pattern in FILES.get(part, ())]
  if more.get("dry_run") and constants.HF_HUB_OFFLINE:
    return []
  try:
    if found["file"]:
      return huggingface_hub.hf_hub_download(name, found["file"], **more)
    return huggingface_hub.snapshot_download(name, allow_patterns=wanted, **more)
  except Exception as error:  # of the hub, of the library it connects by, of the one it loads by
    said = " ".join(str(error).split())
    raise Faults([f"{address} cannot be had from the hub: {said.rstrip('.')}."]) from error
