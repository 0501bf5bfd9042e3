"""The door: `videoreason COMMAND ...`. Finds the command, its flags and its config; reports errors.

A command is a module of this package with `define(flags)` and `main(flags, words)`; its docstring
is its help, with what `told(words)` adds where it has that, and with the options that are named by
`takes(words)`, else all. Nothing is imported before the command is known, so `videoreason --help`
is quick.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from absl.flags import FlagValues
  from ml_collections import ConfigDict

COMMANDS = {
  "demo": "unseen cases of three tasks through the model that ships, and a report",
  "sample": "from a first frame and a prompt to a video, a trace of every step and a report",
  "evaluate": "scores on unseen cases, with intervals, beside clips that no model made",
  "convert": "published weights (Wan 2.1, 2.2; original or diffusers layout) to a bundle",
  "sweep": "cases x seeds x edits, resumable: one table, one page to browse",
  "run": "carries out an experiment, or all of them, with intervals and a page",
  "vbvr": "VBVR-Bench: videos, official scores, tables, and what they are worth",
  "plan": "memory, seconds and mesh of a config on a device kind, before it is paid for",
  "report": "draws the report of a run folder again",
  "tasks": "writes cases of the tasks in the benchmark's folder layout",
}
FAULT = 1
BAD_INPUT = 2
INTERRUPTED = 130
GPU_MEMORY = "0.92"  # share that JAX may take, as `plan` counts; by itself it takes .75
HELP = ("-h", "--help")
CONFIG = "config"
SWEEPS = "sweeps"
EDITS = "edits."  # of the config of a sweep, whose names are free
# options that name a file or a folder
PATHS = (
  *("out", "from", "image", "noise", "data", "videos", "evalkit", "environment", "checkpoint"),
  *("status", "against"),
)


class UsageError(ValueError):
  """What was typed can't be understood."""


class UnknownKey(UsageError):
  """The argument of a config names a key that the config has not; base: of its name."""

  def __init__(self, base: str, key: str, config: "ConfigDict") -> None:
    self.key = key
    super().__init__(_no_key(base, key, [name for name, _ in _flat(config)]))


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns the exit status: 0, 2 for bad input (one sentence), 130.

  Of several processes, those that are done wait for the others; one that fails ends here, and so
  ends them (with status 1 where the fault may be another's).
  """
  words = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in words
  words = [word for word in words if word != "--debug"]
  status = FAULT
  try:
    status = _attempt(words, debug=debug)
  except BaseException:
    if not _others():
      raise
    traceback.print_exc()
    print(
      "videoreason: this process can't go on. If another one has ended, the output of that one "
      "says why; when that is mended, start all again.",
      file=sys.stderr,
    )
  finally:  # also where nothing can be printed
    if status and (others := _others()):
      others.leave(status)
  return status


def _attempt(words: list[str], *, debug: bool) -> int:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("always", UserWarning)
      warnings.showwarning = _warn
      status = _dispatch(words)
      # else those that are done first take the one that writes a report for dead
      if status == 0 and (others := _others()):
        others.meet("ended")
      return status
  except KeyboardInterrupt:
    print("videoreason: interrupted.", file=sys.stderr)
    return INTERRUPTED
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAULT if _others() else 0
  except (ValueError, OSError, MemoryError, RuntimeError) as error:
    if isinstance(error, RuntimeError) and not out_of_memory(error):
      raise
    if debug:
      traceback.print_exc()
    print(f"videoreason: {_sentence(error)}", file=sys.stderr)
    return BAD_INPUT


def _others() -> Any:
  """`distributed` where this is one of several processes, else None; imports nothing for that."""
  jax = sys.modules.get("jax")
  if jax is None or not jax.distributed.is_initialized():
    return None
  return importlib.import_module("jax_videoreason.distributed")


def _warn(message: Any, category: Any, filename: str, *_: Any, **__: Any) -> None:
  """A warning meant for users as one sentence; those for developers are not shown."""
  if issubclass(category, UserWarning):
    print(f"videoreason: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _dispatch(words: list[str]) -> int:
  if not words or words[0] in (*HELP, "help"):
    print(_help())
    return 0 if words else BAD_INPUT
  if words[0] == "--version":
    from jax_videoreason.version import __version__

    print(f"videoreason {__version__}")
    return 0
  command, *rest = words
  if command not in COMMANDS:
    raise UsageError(f"no command {command!r}; {did_you_mean(command, COMMANDS)}")
  module = importlib.import_module(f"jax_videoreason.cli.{command}")
  if any(word in HELP for word in rest):
    print(_command_help(module, [word for word in rest if word not in HELP]))
    return 0
  from absl import logging

  logging.set_verbosity(logging.ERROR)
  _take_memory()
  module.main(*parse(module, rest))
  return 0


def _take_memory() -> None:
  """Lets JAX have as much of a GPU as `plan` says fits, unless the user has said how much."""
  said = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # both at once are refused
  policy = "xla_gpu_memory_fraction_policy" in os.environ.get("XLA_FLAGS", "")
  if not policy and not any(os.environ.get(name) for name in said):
    os.environ[said[0]] = GPU_MEMORY


def _no_key(name: str, key: str, known: Collection[str]) -> str:
  """What is said of a key that the config of that name has not; known: those that it has."""
  said = f"config {name} has no key {key!r}; {did_you_mean(key, known)}"
  if key.startswith(EDITS) and any(other.startswith(EDITS) for other in known):
    base = name.partition(":")[0]
    said += (
      " Edits of other names and arguments are given as a whole: "
      f"--config \"{base}:edits={{'mine':{{'edit':'noise_at','mode':'add'}}}}\" (see sweep --help)."
    )
  return said


def typed() -> list[str]:
  """The command as a manifest keeps it."""
  return ["videoreason", *sys.argv[1:]]


def did_you_mean(word: str, known: Iterable[str]) -> str:
  """'did you mean ...?' where a known word is near, else the list of all."""
  from jax_videoreason.settings import nearest

  return nearest(word, known)


def out_of_memory(error: BaseException) -> bool:
  """Of the host, or of a device: jax has no type for that, but names it first."""
  return isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED")


def _sentence(error: BaseException) -> str:
  """One line of what an error says."""
  if isinstance(error, OSError) and error.strerror:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}."
  if out_of_memory(error):
    return "out of memory: use fewer runs (seeds, cases), a smaller batch, or fewer taps."
  return " ".join(str(error).split()) or type(error).__name__


# Help


def _help() -> str:
  lines = ["usage: videoreason COMMAND [options]", ""]
  lines += [f"  {name:<9}{summary}" for name, summary in COMMANDS.items()]
  lines += ["", "videoreason COMMAND --help says more; --debug before or after shows tracebacks."]
  return "\n".join(lines)


def _command_help(module: Any, words: Sequence[str]) -> str:
  flags = new_flags()
  module.define(flags)
  lines = [(module.__doc__ or "").strip(), ""]
  if hasattr(module, "told"):
    lines += [module.told(words), ""]
  lines.append("options:")
  if hasattr(module, "takes"):
    for name in set(flags) - set(module.takes(words)):
      delattr(flags, name)
  wide = max([12, *(len(name) + 2 for name in flags)])
  for name in sorted(flags):
    flag = flags[name]
    default = "" if flag.default in (None, False, "", []) else f" (default: {flag.default_as_str})"
    lines.append(f"  --{name:<{wide}}{' '.join(flag.help.split())}{default}")
  if CONFIG in flags:
    lines.append("  --config.KEY=VALUE  changes one value of the config, as --config.steps=10")
  return "\n".join(lines)


# Flags and configs


def new_flags() -> "FlagValues":
  from absl import flags

  return flags.FlagValues()


def define_out(flags: "FlagValues", default: str | None = None, *, goes_on: bool = False) -> None:
  """--out and --redo. goes_on: whether the same command takes up what it left there."""
  from absl.flags import DEFINE_bool, DEFINE_string

  said = "folder to write; must be empty or new"
  if goes_on:
    said += ", or that of the same command, which goes on there"
  DEFINE_string("out", default, said, flag_values=flags)
  DEFINE_bool("redo", False, "do it again and replace the run in --out", flag_values=flags)


def define_mesh(flags: "FlagValues") -> None:
  """--mesh, of the devices of this process."""
  from absl.flags import DEFINE_string

  said = "devices of this process, as seed=2,context=2; without it one device"
  DEFINE_string("mesh", None, said, flag_values=flags)


def define_room(flags: "FlagValues") -> None:
  """--sequential and --experts, which take less memory and more time."""
  from absl.flags import DEFINE_bool, DEFINE_integer

  DEFINE_bool("sequential", False, "guidance branches one after the other", flag_values=flags)
  DEFINE_integer(
    "experts", None, "that are loaded at once; None = all", lower_bound=1, flag_values=flags
  )


def check_experts(flags: "FlagValues", count: int) -> None:
  """UsageError: --experts above the number that a model has."""
  if flags.experts is not None and flags.experts > count:
    there = "1 expert" if count == 1 else f"{count} experts"
    raise UsageError(f"--experts={flags.experts} of a model of {there}: leave it out, or give 1.")


def define_route(flags: "FlagValues") -> None:
  """--route, of keys and values between the devices of a mesh."""
  from absl.flags import DEFINE_enum

  from jax_videoreason.attention import ROUTES

  DEFINE_enum(
    "route", None, ROUTES, "of keys and values on a mesh; None = by their size", flag_values=flags
  )


def define_config(flags: "FlagValues", default: str) -> None:
  """--config, --config.KEY=VALUE and --checkpoint."""
  from absl.flags import DEFINE_string

  help_config = "a path or a shipped name, NAME or NAME:key=value,..."
  help_checkpoint = "name or folder of a bundle, instead of the config's"
  DEFINE_string(CONFIG, default, help_config, flag_values=flags)
  DEFINE_string("checkpoint", None, help_checkpoint, flag_values=flags)


def parse(module: Any, words: Sequence[str]) -> tuple["FlagValues", list[str]]:
  """The flags of a command, and the words that are no flags (at most `module.WORDS`, else none).

  `flags.config` becomes the locked ConfigDict, with every --config.KEY=VALUE in it.
  """
  from absl import flags as absl_flags

  flags = new_flags()
  module.define(flags)
  words = list(words)
  try:
    if CONFIG in flags:
      own = getattr(module, "OWN_KEYS", ())
      words = _parse_config(flags, words, getattr(module, "complete", None), own)
    left = flags(["videoreason", *words])[1:]
  except absl_flags.Error as error:
    raise UsageError(f"{error}; --help says more.") from error
  _find_home(flags)
  most = getattr(module, "WORDS", 0)
  if len(left) > most:
    raise UsageError(f"unexpected word {left[most]!r}: options begin with --.")
  return flags, left


def _find_home(flags: "FlagValues") -> None:
  """Puts the home folder for a leading ~ in the options of `PATHS`."""
  for name in PATHS:
    given = flags[name].value if name in flags and flags[name].present else None
    if given is not None:
      flags[name].value = typed_path(given, f"--{name}")


def typed_path(given: str, name: str) -> str:
  """A path with the home folder for a leading ~, which shells leave in --out=~/runs.

  ValueError: it is empty, or an address as gs://bucket/runs; name: of the option or the word.
  """
  from jax_videoreason import folders

  if not given:
    raise UsageError(
      f"{name} is empty, wanted a path: give one, or set the shell variable given there."
    )
  folders.local(given)
  return os.path.expanduser(given)


def _parse_config(
  flags: "FlagValues",
  words: list[str],
  complete: Callable[..., "ConfigDict"] | None,
  own: Collection[str],
) -> list[str]:
  """Puts the config in the place of its name; returns the words without --config NAME.

  complete: (config, words) -> the config with the keys that the command adds. own: keys in whose
  place the command has an option; typed for the config, they would be lost.
  """
  from ml_collections import config_flags

  name = str(flags[CONFIG].default)
  named = False
  rest = []
  pending = iter(words)
  for word in pending:
    option, equals, value = word.partition("=")
    if option.lstrip("-") == CONFIG and word.startswith("-"):
      name = value if equals else next(pending, "")
      if not name:
        raise UsageError("--config wants a path or a shipped name.")
      named = True
    else:
      rest.append(word)
  refuse_typed(own, words)
  config = _completed(name, words, complete or (lambda config, words: config))
  rest = _spelled(rest, config, name)
  delattr(flags, CONFIG)
  config_flags.DEFINE_config_dict(
    CONFIG, config, flag_values=flags, sys_argv=["videoreason", *rest], lock_config=True
  )
  flags[CONFIG].using_default_value = not named
  return rest


def _completed(
  name: str, words: Sequence[str], complete: Callable[..., "ConfigDict"]
) -> "ConfigDict":
  """The config of that name with the keys that the command adds, which its argument may set too."""
  common = importlib.import_module("jax_videoreason.configs.common")
  try:
    return complete(load_config(name), words)
  except UnknownKey:
    base, _, argument = name.partition(":")
    plain = load_config(base)
    own = set(plain)
    every = complete(plain, words)
    of_command = {
      key for key in common.named(argument) if key.partition(".")[0] in set(every) - own
    }
  of_config, late = common.split(argument, of_command)
  try:
    config = complete(load_config(f"{base}:{of_config}"), words)
  except UnknownKey as error:
    raise UnknownKey(base, error.key, every) from error
  try:
    return common.parse(config, late)
  except KeyError as error:
    raise UnknownKey(base, error.args[0], config) from error
  except ValueError as error:
    raise UsageError(f"config {name}: {error}") from error


def typed_option(words: Sequence[str], option: str) -> str | None:
  """What is typed for an option, the last time; None = it is not."""
  found = None
  for place, word in enumerate(words):
    name, equals, value = word.partition("=")
    if word.startswith("-") and name.lstrip("-") == option:
      found = value if equals else next(iter(words[place + 1 :]), found)
  return found


def typed_argument(words: Sequence[str]) -> str:
  """What is typed after NAME: of --config."""
  return (typed_option(words, CONFIG) or "").partition(":")[2]


def refuse_typed(keys: Iterable[str], words: Sequence[str]) -> None:
  """UsageError where one of the keys is typed for the config."""
  typed = importlib.import_module("jax_videoreason.configs.common").named(typed_argument(words))
  options = {word.lstrip("-").partition("=")[0] for word in words if word.startswith("-")}
  for key in keys:
    if key in typed or f"{CONFIG}.{key}" in options:
      raise UsageError(f"{key} of the config is not used here: give --{key} (see --help).")


def _spelled(words: Sequence[str], config: "ConfigDict", name: str) -> list[str]:
  """The words with --config.KEY VALUE as one, and several values as a Python tuple.

  UsageError: the config of that name has no such key.
  """
  common = importlib.import_module("jax_videoreason.configs.common")
  known = {key for key, _ in _flat(config)}
  left, spelled = list(words), []
  while left:
    option, equals, value = left.pop(0).partition("=")
    if option.startswith("-") and option.lstrip("-").startswith(f"{CONFIG}."):
      key = option.lstrip("-").removeprefix(f"{CONFIG}.")
      if key not in known:
        raise UsageError(_no_key(name, key, known))
      place, last = common.place_of(config, key)
      kind = place.get_type(last)
      if not equals and kind is not bool and left and not left[0].startswith("-"):
        equals, value = "=", left.pop(0)
      if equals and value.strip() == "None":  # the parsers of most kinds know none
        place[last] = None
        continue
      if equals and kind is tuple:
        value = repr(common.several(value.strip()))
    spelled.append(f"{option}{equals}{value}")
  return spelled


def _flat(config: "ConfigDict", prefix: str = "") -> list[tuple[str, Any]]:
  from ml_collections import ConfigDict

  found = []
  for key, value in config.items(preserve_field_references=True):
    deeper = isinstance(value, ConfigDict)
    found += _flat(value, f"{prefix}{key}.") if deeper else [(f"{prefix}{key}", value)]
  return found


def load_config(name: str) -> "ConfigDict":
  """The config of a path or shipped name, with its argument after a colon.

  Raises:
    ValueError: no such config, an address, or one that refuses its argument.
  """
  from ml_collections import ConfigDict

  from jax_videoreason import folders

  folders.local(name)  # before the colon of gs:// is taken for that of an argument
  base, _, argument = name.partition(":")
  path = config_path(base)
  is_shipped = path.parent in (shipped(), shipped() / SWEEPS)
  module_name = f"jax_videoreason.configs.{path.stem}" if is_shipped else path.stem
  spec = importlib.util.spec_from_file_location(module_name, path)
  if spec is None or spec.loader is None:
    raise UsageError(f"{path} is no Python file: a config ends in .py.")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = _made(module, base, argument)
  except UsageError:
    raise
  except SystemExit as error:
    raise UsageError(f"config {base} calls sys.exit: take that out.") from error
  except Exception as error:  # whatever the code of a config may raise
    raise UsageError(_refused(error, base, argument)) from error
  if not isinstance(config, ConfigDict):
    raise UsageError(f"get_config of {path} returned {type(config).__name__}, wanted a ConfigDict.")
  return config.lock()


def _made(module: Any, base: str, argument: str) -> Any:
  """What get_config returns, given the argument where it takes one.

  UsageError: there is no get_config, or no such key or argument.
  """
  make = getattr(module, "get_config", None)
  if make is None:
    raise UsageError(f"config {base} has no get_config: define one that returns a ConfigDict.")
  if not _takes_argument(make):
    if argument:
      raise UsageError(
        f"config {base} takes no argument, {argument!r} was given: leave it out, or write "
        "get_config(argument=None)."
      )
    return make()
  try:
    return make(argument or None)
  except KeyError as error:
    key = str(error.args[0]) if error.args else ""
    if not key or key not in argument:
      raise
    raise UnknownKey(base, key, make(None)) from error


def _takes_argument(make: Callable[..., Any]) -> bool:
  try:
    inspect.signature(make).bind(None)
  except TypeError:
    return False
  return True


def _refused(error: Exception, base: str, argument: str) -> str:
  """One sentence of what the code of a config raised."""
  cause: Any = error
  while cause.args and isinstance(cause.args[0], BaseException):  # a ConfigDict wraps its own
    cause = cause.args[0]
  text = str(cause.args[0] if isinstance(cause, KeyError) and cause.args else cause)
  if unknown := re.match(r'Key "(.+?)" does not exist', text):
    near = re.search(r'Did you mean "(.+?)"', text)
    said = (
      f"did you mean {near[1]!r}?"
      if near
      else "it takes no new ones: leave it out, or add it inside `with config.unlocked()`."
    )
    return f"config {base} has no key {unknown[1]!r}; {said}"
  if isinstance(error, ValueError) and text:  # the sentence of one that refuses its argument
    return f"config {base}{argument and ':'}{argument}: {text}"
  return f"config {base}: {type(error).__name__}{text and ': '}{text}"


def shipped() -> Path:
  """The folder of the configs that ship."""
  package = importlib.import_module("jax_videoreason.configs")
  return Path(package.__path__[0]).resolve()


def config_path(base: str) -> Path:
  """The file of a config: a path that is there, or a shipped name."""
  given = Path(base).expanduser()
  if given.is_file():
    return given.resolve()
  found = [*shipped().glob("*.py"), *(shipped() / SWEEPS).glob("*.py")]
  names = {p.stem: p for p in found if p.stem not in ("__init__", "common", "presets")}
  if base in names:
    return names[base]
  raise UsageError(f"no config {base!r}, as a file or a shipped one; {did_you_mean(base, names)}")


def resolved(flags: "FlagValues") -> dict[str, Any]:
  """The config of a parsed command as a plain mapping, --checkpoint in its place.

  UsageError: neither names a checkpoint, or it is no path.
  """
  values = flags.config.to_dict()
  named = flags.checkpoint or values.get("checkpoint")
  if named is None:
    raise UsageError("the config names no checkpoint: give --checkpoint, or set config.checkpoint.")
  if isinstance(named, str):
    values["checkpoint"] = typed_path(named, "checkpoint of the config")
  return values


def given(flags: "FlagValues") -> list[str]:
  """The names of the options that were typed, as config or config.steps."""
  return [name for name in flags if not flags[name].using_default_value]


def numbers(name: str, words: Sequence[str]) -> list[int]:
  """The whole numbers typed for an option, each once."""
  from jax_videoreason import settings

  try:
    found = [int(word) for word in words]
  except ValueError as error:
    raise UsageError(f"--{name}={','.join(words)}, wanted numbers as 0,1,2.") from error
  if any(not 0 <= number < settings.SEEDS for number in found) or len(set(found)) < len(found):
    raise UsageError(
      f"--{name}={','.join(words)}, wanted numbers in 0..{settings.SEEDS - 1}, each once."
    )
  return found


def required(flags: "FlagValues", *names: str) -> None:
  """Refuses a command line that lacks an option."""
  missing = [f"--{name}" for name in names if flags[name].value is None]
  if missing:
    raise UsageError(f"{' and '.join(missing)} must be given; --help says more.")
