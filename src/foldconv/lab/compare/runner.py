"""`compare`: train what is missing, one process per run, and report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ...files.atomic import write_json
from ..machine import machine, versions
from ..run import RunFolder, locked
from .config import CONFIG, CompareConfig, Job
from .display import Display
from .reporting import MACHINES, report
from .results import finished, number, read_json

_PATIENCE = 20.0
"""Seconds that a run gets to end by itself after Ctrl-C."""


def compare(
    config: CompareConfig, root: str | os.PathLike[str], jobs: int = 1, console: Console | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Train every method with every seed, and write the report.

    Runs that are done are left alone and ones that were cut off are continued, so the same call goes on where another
    was stopped.

    Args:
        config: what is compared.
        root: the folder; new, or one of a comparison with the same settings (methods and seeds may be added).
        jobs: runs at once.
        console: where progress is shown; standard error by default.

    Returns:
        The report as `reporting.report` gives it, and of the runs that failed the last line of their log.

    Raises:
        UnsupportedError: an unknown method or option; the folder holds other settings, or another process works there.
        FileExistsError: the folder holds something else.
        KeyboardInterrupt: after Ctrl-C or a request to terminate; its text says how to continue.
    """
    root = Path(root)
    console = console or Console(stderr=True)
    with console.status("reading the methods"):
        for method in config.methods:
            config.job_config(Job(method, 0, root))
    _prepare(config, root)
    with locked(root) as locks:
        config.save(root)
        _note_machine(root)
        failures = _run_all(config, config.jobs(root), jobs, locks, Display(console))
        return report(root), failures


def _prepare(config: CompareConfig, root: Path) -> None:
    if (root / CONFIG).is_file():
        config.check_continues(CompareConfig.load(root), root)
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not the folder of a comparison (no {CONFIG}); choose another")
    root.mkdir(parents=True, exist_ok=True)


@dataclasses.dataclass
class Running:
    """A run in progress."""

    job: Job
    process: subprocess.Popen[bytes]
    begin: float


def _run_all(
    config: CompareConfig, jobs: Sequence[Job], at_once: int, locks: tuple[int, ...], display: Display
) -> dict[str, str]:
    waiting = [job for job in jobs if not finished(job)]
    running: list[Running] = []
    failures: dict[str, str] = {}
    ended = len(jobs) - len(waiting)
    at_once = max(1, min(at_once, len(waiting)))
    with display.shown(config, len(jobs), ended), _asked_to_stop() as asked:
        try:
            while waiting or running:
                if asked:
                    raise KeyboardInterrupt
                while waiting and len(running) < at_once:
                    running.append(_start(config, waiting.pop(0), at_once, locks))
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    error = _end(each)
                    ended += 1
                    if error is not None:
                        failures[each.job.folder.relative_to(each.job.root).as_posix()] = error
                    display.ended(each.job, time.perf_counter() - each.begin, ended, error)
                display.update([each.job for each in running])
                if running:
                    time.sleep(0.1)
        except KeyboardInterrupt:
            _stop(running, asked)
            left = len(waiting) + len(running)
            raise KeyboardInterrupt(
                f"stopped with {left} of {len(jobs)} runs to go; continue with the same command"
            ) from None
        finally:
            for each in running:
                each.process.kill()
    return failures


def _start(config: CompareConfig, job: Job, at_once: int, locks: tuple[int, ...]) -> Running:
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
    with open(job.beside(".log"), "ab" if continued else "wb") as log:
        process = subprocess.Popen(
            _command(job, file, continued),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=locks,
            start_new_session=True,  # Ctrl-C reaches us alone, who pass it on
        )
    return Running(job, process, time.perf_counter())


def _command(job: Job, file: Path, continued: bool) -> list[str]:
    what = ["--resume", str(job.folder)] if continued else ["--config", str(file), "--out", str(job.folder)]
    return [sys.executable, "-m", "foldconv", "train", *what]


def _end(each: Running) -> str | None:
    """Note the time that it took; its last line of log when it failed."""
    job, code = each.job, each.process.returncode
    if code == 0 and finished(job):
        record = read_json(job.beside(".json"))
        write_json(job.beside(".json"), {**record, "wall_seconds": round(time.perf_counter() - each.begin, 3)})
        return None
    try:
        lines = job.beside(".log").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was written to the log")
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {last.removeprefix('foldconv: error: ')}"


def _stop(running: Sequence[Running], asked: list[int]) -> None:
    """Ask all to end, then wait; who takes too long is killed, which costs the epoch that it was in."""
    before, deadline = len(asked), time.monotonic() + _PATIENCE
    for each in running:
        with contextlib.suppress(OSError):
            each.process.terminate() if platform.system() == "Windows" else each.process.send_signal(signal.SIGINT)
    while any(each.process.poll() is None for each in running):
        if time.monotonic() > deadline or len(asked) > before:  # a second Ctrl-C: at once, please
            for each in running:
                each.process.kill()
        time.sleep(0.05)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that is no longer empty after Ctrl-C, or a request to terminate, as schedulers of clusters send it.

    An exception could come in the middle of starting a run, which nobody would then stop.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    for which, handler in before.items():
        if handler != signal.SIG_IGN:  # as for a shell's background jobs
            signal.signal(which, lambda received, _: asked.append(received))
    try:
        yield asked
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def _note_machine(root: Path) -> None:
    """Where the runs are made; a comparison that is continued elsewhere has several."""
    path = root / MACHINES
    here = {"machine": {k: v for k, v in machine().items() if k not in ("gpu", "threads")}, "versions": versions()}
    known = read_json(path).get("machines", [])
    if here not in known:
        write_json(path, {"machines": [*known, here]})
