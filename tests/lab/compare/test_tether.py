"""A tethered command ends with its owner, takes Ctrl-C, and hands on its exit code."""

import os
import signal
import subprocess
import sys
import time

import pytest

from foldconv.lab.compare import tether

CODE = "import sys, time; print('ready', flush=True); time.sleep(600)"


def start(code):
    command = [sys.executable, tether.__file__, sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="sends a Unix signal")
def test_a_tethered_command(tmp_path):
    with start("raise SystemExit(7)") as process:
        assert process.wait(60) == 7
    for end, code in ((lambda p: p.stdin.close(), 128 + signal.SIGKILL), (lambda p: p.send_signal(signal.SIGINT), 1)):
        with start(f"try:\n    {CODE}\nexcept KeyboardInterrupt:\n    sys.exit(1)") as process:
            assert process.stdout.readline() == "ready\n"
            end(process)
            assert process.wait(60) == code


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="asks Linux for a process")
def test_it_dies_with_its_owner():
    owner = f"""
import subprocess, sys, os
child = subprocess.Popen({
        [
            sys.executable,
            tether.__file__,
            sys.executable,
            "-c",
            "import os, time; print(os.getpid(), flush=True); time.sleep(600)",
        ]
    }, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(child.stdout.readline().decode(), flush=True)
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", owner], capture_output=True, text=True, timeout=60)
    command = int(done.stdout)
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{command}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
