"""Runs of a comparison as processes of the machine that this is called on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ...files.atomic import write_json
from ..machine import machine, versions
from ..run import RunFolder
from . import tether
from .config import CompareConfig, Job
from .results import finished, number, read_json

_PATIENCE = 20.0
"""Seconds that a run gets to end by itself after Ctrl-C."""


class Running(Protocol):
    """A run in progress, wherever it is."""

    job: Job

    def ended(self) -> bool:
        """Whether it has."""
        ...

    def outcome(self) -> tuple[float, str | None]:
        """Of one that has ended: the seconds that it took, and why it failed."""
        ...

    def ask(self) -> None:
        """To stop, after its epoch's last checkpoint or the one before."""
        ...

    def kill(self) -> None:
        """Stop it now."""
        ...


@dataclasses.dataclass
class Process:
    """A run in progress on this machine."""

    job: Job
    process: subprocess.Popen[bytes]
    begin: float

    def ended(self) -> bool:
        """Whether its process has."""
        return self.process.poll() is not None

    def outcome(self) -> tuple[float, str | None]:
        """Note the time that it took; its last line of log when it failed."""
        job, code, seconds = self.job, self.process.returncode, time.perf_counter() - self.begin
        if code == 0 and finished(job):
            record = read_json(job.beside(".json"))
            write_json(job.beside(".json"), {**record, "wall_seconds": round(seconds, 3)})
            return seconds, None
        try:
            lines = job.beside(".log").read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            lines = []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was written to the log")
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return seconds, f"{how}: {last.removeprefix('foldconv: error: ')}"

    def ask(self) -> None:
        """By the signal of Ctrl-C."""
        with contextlib.suppress(OSError):
            if platform.system() == "Windows":
                self.process.terminate()
            else:
                self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Stop it now, which costs the epoch that it was in."""
        if self.process.stdin is not None:
            self.process.stdin.close()  # the tether kills it
        else:
            self.process.kill()


def start_process(
    config: CompareConfig, job: Job, at_once: int, locks: tuple[int, ...], tethered: bool = False
) -> Process:
    """Start or continue a run; `tethered`: one that dies with this process, however that ends."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    continued = any(path.is_file() for path in RunFolder(job.folder).checkpoints())
    if not continued and job.folder.exists():  # killed before there was anything to continue from
        shutil.rmtree(job.folder)
    file, record = job.beside(".yaml"), read_json(job.beside(".json"))
    config.job_config(job).save(file)
    starts = int(number(record.get("starts")) or 0) + 1 if continued else 1
    parallel = max(at_once, int(number(record.get("parallel")) or 0) if continued else 0)
    write_json(job.beside(".json"), {"starts": starts, "parallel": parallel})
    environment = dict(os.environ)
    if at_once > 1:  # else every run takes all cores, and they wait for each other
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (machine()["cores"] or 1) // at_once)))
    command = _command(job, file, continued)
    if tethered:
        command = [sys.executable, tether.__file__, *command]
    with open(job.beside(".log"), "ab" if continued else "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if tethered else subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=locks,
            start_new_session=True,  # Ctrl-C reaches us alone, who pass it on
        )
    return Process(job, process, time.perf_counter())


def _command(job: Job, file: Path, continued: bool) -> list[str]:
    what = ["--resume", str(job.folder)] if continued else ["--config", str(file), "--out", str(job.folder)]
    return [sys.executable, "-m", "foldconv", "train", *what]


def stop(running: Sequence[Running], asked: list[int]) -> None:
    """Ask all to end, then wait; who takes too long is killed, which costs the epoch that it was in."""
    before, deadline = len(asked), time.monotonic() + _PATIENCE
    for each in running:
        each.ask()
    while not all(each.ended() for each in running):
        if time.monotonic() > deadline or len(asked) > before:  # a second Ctrl-C: at once, please
            for each in running:
                each.kill()
        time.sleep(0.05)


def here() -> dict[str, Any]:
    """This machine and what is installed on it."""
    return {"machine": {k: v for k, v in machine().items() if k not in ("gpu", "threads")}, "versions": versions()}
