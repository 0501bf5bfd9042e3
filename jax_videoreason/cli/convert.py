"""Published weights become a bundle, which every command takes by --checkpoint.

  videoreason convert SRC --out DST --dtype bf16
  videoreason convert SRC --out DST --dry-run
  videoreason convert SRC --out DST --lora high=FILE --lora low=FILE
  videoreason convert BUNDLE --out DST --to diffusers

SRC is a folder in the original layout (config.json, diffusion_pytorch_model*.safetensors, or
high_noise_model/ and low_noise_model/) or the diffusers layout (model_index.json), one file with
a transformer, or hf://owner/name on the Hugging Face hub; which, is seen from keys and shapes. One
tensor is in memory at a time. Interrupted and started again it goes on; DST appears when it is
whole.
"""

import importlib
from pathlib import Path
from typing import Any

from absl.flags import (
  DEFINE_bool,
  DEFINE_enum,
  DEFINE_float,
  DEFINE_list,
  DEFINE_multi_string,
  DEFINE_string,
  FlagValues,
)

from jax_videoreason import bundles, cli, console, folders, leaves

WORDS = 1
ONLY_FORWARD = ("dtype", "parts", "numerics", "lora", "lora-alpha", "lora-order")


def define(flags: FlagValues) -> None:
  DEFINE_string("out", None, "the folder to write; must be new", flag_values=flags)
  DEFINE_bool("redo", False, "replace what is in --out, once that is whole", flag_values=flags)
  DEFINE_enum(
    "dtype",
    None,
    ["bf16", "fp32"],
    "of the transformer and the text encoder: bf16 or fp32; without it, and of the rest, as in SRC",
    flag_values=flags,
  )
  DEFINE_list("parts", None, "of dit,vae,text,clip; without it all", flag_values=flags)
  DEFINE_enum(
    "numerics",
    None,
    ["official", "diffusers", "diffsynth"],
    "which stack's arithmetic the model follows; without it that of the layout",
    flag_values=flags,
  )
  DEFINE_multi_string(
    "lora",
    [],
    "a LoRA to merge, in DiffSynth or PEFT names: high=FILE, low=FILE, or FILE for one expert",
    flag_values=flags,
  )
  DEFINE_float("lora-alpha", 1.0, "what the merged LoRA are multiplied by", flag_values=flags)
  DEFINE_enum(
    "lora-order",
    "fp32",
    ["fp32", "bf16"],
    "merge in float32, or round in the order of DiffSynth",
    flag_values=flags,
  )
  DEFINE_enum(
    "to", "bundle", ["bundle", "diffusers"], "diffusers writes a bundle back", flag_values=flags
  )
  DEFINE_bool("verify", False, "read both sides again and compare", flag_values=flags)
  DEFINE_bool("dry-run", False, "say what would be done, and stop", flag_values=flags)


def main(flags: FlagValues, words: list[str]) -> None:
  if not words:
    raise cli.UsageError("no source given: videoreason convert SRC --out DST.")
  back = flags.to == "diffusers"
  asked = cli.typed_path(words[0], "SRC") if back else _source(words[0], "SRC")
  if not flags["dry-run"].value:
    cli.required(flags, "out")
  if back:
    _back(flags, asked)
    return
  detect, bundle, lora, hub = map(_convert, ("detect", "bundle", "lora", "hub"))
  detect.check_parts(flags.parts)
  wanted = lora.Wanted(
    given=tuple(map(_lora, flags.lora)),
    alpha=flags["lora-alpha"].value,
    order=flags["lora-order"].value,
  )
  if flags["dry-run"].value:
    if _lacks(hub, [(asked, flags.parts), *((file, None) for file in wanted.addresses)]):
      return
  elif asked.startswith(hub.SCHEME) and not _compares(flags):
    leaves.refuse_existing(Path(flags.out), redo=flags.redo)
  for address in wanted.addresses:  # a wrong one is found before the rest is downloaded
    hub.local(address)
  source = hub.local(asked, flags.parts)
  found = detect.source(source, flags.parts)
  plan = bundle.plan(found, dtype=flags.dtype, numerics=flags.numerics, loras=wanted)
  show(bundle, plan)
  if flags["dry-run"].value:
    return
  out = Path(flags.out)
  folders.spare(out, plan.files)
  if _compares(flags):
    bundles.describe(out)  # refuses a damaged one, or one of a newer version
    with _bar(plan.read_bytes, "compare") as advance:
      bundle.verify(plan, out, advance=advance)
    console.say(f"{out.resolve()} holds what {source} holds.")
    return
  with _bar(plan.read_bytes, "convert") as advance:
    bundle.write(plan, out, redo=flags.redo, check=flags.verify, advance=advance)
  console.say(f"bundle: {out.resolve()}")


def _source(word: str, name: str) -> str:
  """An address on the hub as it is, a path as `cli.typed_path` has it; name: of the word."""
  return word if word.startswith(_convert("hub").SCHEME) else cli.typed_path(word, name)


def _lora(word: str) -> str:
  """One --lora with its `_source`, behind high= or low=."""
  expert, equals, file = (
    word.partition("=") if word.startswith(("high=", "low=")) else ("", "", word)
  )
  return f"{expert}{equals}{_source(file, '--lora')}"


def _compares(flags: FlagValues) -> bool:
  """Whether --verify finds a bundle to compare with."""
  there = (Path(flags.out) / bundles.DESCRIPTION).is_file()
  return flags.verify and there and not flags.redo


def _lacks(hub: Any, addresses: list[tuple[str, list[str] | None]]) -> bool:
  """Whether something would be downloaded first; says what."""
  files = [file for address, parts in addresses for file in hub.lacking(address, parts)]
  if not files:
    return False
  rows = [(name, f"{size / 1e9:.3f}") for name, size in files]
  console.table("to be downloaded", ("file", "GB"), rows)
  total = sum(size for _, size in files) / 1e9
  console.say(f"{total:.3f} GB would be downloaded; once they are here, more can be said.")
  return True


def _back(flags: FlagValues, source: str) -> None:
  """A bundle in the diffusers layout."""
  given = [name for name in ONLY_FORWARD if flags[name].value != flags[name].default]
  if given:
    raise cli.UsageError(f"--{given[0]} is for --to bundle: leave it out with --to diffusers.")
  export = _convert("export")
  parts = export.parts(source)
  console.table("diffusers layout", ("part", "to", "tensors", "dtype", "GB"), export.summary(parts))
  if flags["dry-run"].value:
    return
  with _bar(sum(part.nbytes for part in parts), "export") as advance:
    export.write(source, Path(flags.out), redo=flags.redo, check=flags.verify, advance=advance)
  console.say(f"diffusers folder: {Path(flags.out).resolve()}")


def show(bundle: Any, plan: Any) -> None:
  """The plan as a table."""
  title = f"{plan.source.layout} layout, {plan.numerics} numerics"
  columns = ("part", "from", "naming", "tensors", "dtype", "GB")
  console.table(title, columns, bundle.summary(plan))
  config = plan.parts.dit.config
  two = f", two experts, boundary {plan.source.boundary}" if "dit_1" in plan.target else ""
  console.say(
    f"transformer: {config.layers} layers, {config.width} wide, {config.heads} heads, "
    f"{config.in_channels} -> {config.out_channels} channels, images: {config.image_input}{two}; "
    f"{plan.read_bytes / 1e9:.3f} GB are read, {plan.written_bytes / 1e9:.3f} GB written."
  )


def _bar(total: int, title: str) -> Any:
  return console.progress(total, title, "B")


def _convert(name: str) -> Any:
  return importlib.import_module(f"jax_videoreason.convert.{name}")
