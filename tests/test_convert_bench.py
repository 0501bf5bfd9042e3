"""Half a gigabyte is converted in little memory, at a speed near that of hashing and copying it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_convert.py"


@pytest.mark.slow
def test_memory_and_speed(tmp_path):
  """Memory is firm. Shared machines vary in time, so a tenth of the copy's speed is asked for."""
  words = [sys.executable, str(SCRIPT), "--dtype=bf16", f"--dir={tmp_path}"]
  done = subprocess.run(words, capture_output=True, text=True, check=True)
  found = json.loads(done.stdout)
  assert 0.4 <= found["gigabytes"] <= 0.6
  assert found["peak_rss_mb"] <= found["limit_mb"]
  assert found["largest_tensor_mb"] >= 50
  assert found["speed_started"] >= 0.1
  assert not list(tmp_path.iterdir())
