"""What users write outside the package: found as `module:attribute`, told apart by its file."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from jax_videoreason.records import checksum

NAME = re.compile(r"(?!\.)[\w.-]+:[^\W\d]\w*")


def is_name(text: str) -> bool:
  """Whether a text has the form module:attribute."""
  return NAME.fullmatch(text) is not None


def load(name: str, *, what: str, form: str, of: str, example: str) -> Any:
  """What `module:attribute` names; the module is imported.

  what, form, of, example: the words of an error, such as "study", "module:function", "an
  @experiment" and a name.

  ValueError: another form, no such module or attribute, or what the code of the module raises.
  """
  if not is_name(name):
    raise ValueError(f"{name!r} names no {what}, wanted {form}, as in {example}.")
  module, _, attribute = name.partition(":")
  try:
    found = importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
      f"{name}: {str(error) or type(error).__name__}; wanted {form} of {of}, and on PYTHONPATH the "
      "folder of each module that is imported (PYTHONPATH=. is the one you are in)."
    ) from error
  except SystemExit as error:
    raise ValueError(
      f'{module} calls sys.exit when it is imported: put that under `if __name__ == "__main__"`.'
    ) from error
  except Exception as error:  # whatever the code of a user raises
    said = f": {error}" if str(error) else ""
    raise ValueError(f"{module}: {type(error).__name__}{said}; mend it there.") from error
  try:
    return getattr(found, attribute)
  except AttributeError as error:
    raise ValueError(f"{name}: {error}; wanted {form} of {of}.") from error


def source(written: Any) -> dict[str, str]:
  """Module and sha256 of the file in which a function or a class was written.

  Of one that has no file, such as one typed in, the sha256 is empty; the module is, where nobody
  knows it, as of a text that is executed.
  """
  try:
    file = Path(inspect.getsourcefile(inspect.unwrap(written)) or "")
  except (TypeError, OSError):
    file = Path()
  module = written.__module__ or ""
  return {"module": module, "sha256": checksum(file) if file.is_file() else ""}
