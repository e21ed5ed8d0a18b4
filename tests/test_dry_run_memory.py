"""``--dry-run`` predicts the peak memory of the run that follows within a quarter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "images": ("--op", "denoise", "--solver", "measured"),
    "mri": ("--op", "mri", "--solver", "cgls", "--compare", "zero-filled"),
    "ct": ("--op", "ct-sparse", "--solver", "pnp", "--steps", "1", "--slices", "4:8", "--compare", "fbp"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_as_predicted(tmp_path, name):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = []
    for extra in (("--dry-run",), ()):
        command = [sys.executable, "-m", "invdiff", "reconstruct", *CASES[name], "--json", *extra]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0]["memory_mb"] == pytest.approx(found[1]["peak_memory_mb"], rel=0.25)
