"""A short run of benchmarks/fuzz.py: nothing but loading and our own errors comes of damaged files."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("h5py")


def test_damaged_files_end_in_our_errors(tmp_path):
    program = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
    command = [sys.executable, program, "--cases", "140", "--out", tmp_path / "fuzz.md"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    last = [row.split("|") for row in (tmp_path / "fuzz.md").read_text().splitlines() if row.startswith("| all")]
    loaded, refused, *faults = map(int, last[0][3:-1])
    assert loaded > 10
    assert refused > 50
    assert faults == [0, 0, 0, 0]
