"""Four CPU devices, strict numerics, and each program compiled once for all workers."""

import errno
import importlib
import os
import shutil
import sys
import tempfile

# Most of a test's time is compilation, which is quicker without the passes of LLVM.
# What XLA_FLAGS says already comes later and so holds.
os.environ["XLA_FLAGS"] = (
  "--xla_backend_optimization_level=0 "
  + os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")


def pytest_configure(config):
  """What is compiled is kept until the session ends; workers and commands inherit the place."""
  if hasattr(config, "workerinput"):
    return
  folder = tempfile.mkdtemp(prefix="videoreason-tests-")
  config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
  for name, value in (
    ("jax_compilation_cache_dir", folder),
    ("jax_persistent_cache_min_compile_time_secs", 0),
    ("jax_persistent_cache_min_entry_size_bytes", -1),
  ):
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


@pytest.fixture
def flat(monkeypatch):
  """Folders can't be renamed, as in a mounted bucket without a hierarchical namespace."""
  real = os.replace

  def replace(source, target):
    if os.path.isdir(source) and os.listdir(source):
      raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(source), None, str(target))
    real(source, target)

  monkeypatch.setattr(os, "rename", replace)
  monkeypatch.setattr(os, "replace", replace)


@pytest.fixture
def write_module(tmp_path, monkeypatch):
  """Writes a module of a user's, which is then imported anew: (name, text) -> its file."""
  monkeypatch.syspath_prepend(tmp_path)
  written = set()

  def write(name, text):
    file = tmp_path / f"{name}.py"
    file.write_text(text)
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    written.add(name)
    return file

  yield write
  for name in written:
    sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def published():
  """Part -> tensors in the original naming, of a small Wan2.2 I2V A14B."""
  from published import parts

  return parts()


@pytest.fixture(scope="session")
def original(published, tmp_path_factory):
  """The same as a folder of the hub."""
  from published import write_original

  return write_original(tmp_path_factory.mktemp("hub") / "Wan2.2-I2V-A14B", published)


@pytest.fixture(scope="session")
def single(published, tmp_path_factory):
  """Its first expert in one file."""
  from safetensors.numpy import save_file

  file = tmp_path_factory.mktemp("single") / "dit.safetensors"
  save_file(published["dit_0"], file)
  return file
