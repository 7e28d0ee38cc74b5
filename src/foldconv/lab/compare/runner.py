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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from ...files.atomic import write_json
from ..machine import machine, versions
from ..run import RunFolder, locked
from . import tether
from .config import CONFIG, CompareConfig, Job
from .display import Display
from .reporting import MACHINES, report
from .results import finished, number, read_json

if TYPE_CHECKING:
    from .cluster import Cluster, ClusterOptions

_PATIENCE = 20.0
"""Seconds that a run gets to end by itself after Ctrl-C."""


def compare(
    config: CompareConfig,
    root: str | os.PathLike[str],
    jobs: int = 1,
    console: Console | None = None,
    cluster: ClusterOptions | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Train every method with every seed, and write the report.

    Runs that are done are left alone and ones that were cut off are continued, so the same call goes on where another
    was stopped.

    Args:
        config: what is compared.
        root: the folder; new, or one of a comparison with the same settings (methods and seeds may be added).
        jobs: runs at once.
        console: where progress is shown; standard error by default.
        cluster: run on a Ray cluster, as many at once as it holds, instead of as processes of this machine; `root` is
            then a folder that all its nodes share.

    Returns:
        The report as `reporting.report` gives it, and of the runs that failed the last line of their log.

    Raises:
        UnsupportedError: an unknown method or option; the folder holds other settings, or another process works there;
            no such cluster, or one of its nodes cannot run them.
        FileExistsError: the folder holds something else.
        KeyboardInterrupt: after Ctrl-C or a request to terminate; its text says how to continue.
    """
    root = Path(root)
    console = console or Console(stderr=True)
    with console.status("reading the methods"):
        for method in config.methods:
            config.job_config(Job(method, 0, root))
    with contextlib.ExitStack() as left:
        connected = None if cluster is None else left.enter_context(_connected(cluster))
        _prepare(config, root)
        locks = left.enter_context(locked(root))
        config.save(root)
        waiting = [job for job in config.jobs(root) if not finished(job)]
        if connected is None:
            at_once = max(1, min(jobs, len(waiting)))
            note_machine(root, here())
            failures = _run_all(
                config, waiting, at_once, lambda job: start_process(config, job, at_once, locks), Display(console)
            )
        else:
            left.enter_context(connected.log(root))
            for each in connected.check(root, config):
                note_machine(root, each)
            failures = _run_all(
                config, waiting, len(waiting), lambda job: connected.start(config, job), Display(console)
            )
        return report(root), failures


def _connected(options: ClusterOptions) -> contextlib.AbstractContextManager[Cluster]:
    from .cluster import connected

    return connected(options)


def _prepare(config: CompareConfig, root: Path) -> None:
    if (root / CONFIG).is_file():
        config.check_continues(CompareConfig.load(root), root)
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not the folder of a comparison (no {CONFIG}); choose another")
    root.mkdir(parents=True, exist_ok=True)


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


def _run_all(
    config: CompareConfig, waiting: list[Job], at_once: int, start: Callable[[Job], Running], display: Display
) -> dict[str, str]:
    running: list[Running] = []
    failures: dict[str, str] = {}
    total = len(config.jobs(""))
    ended = total - len(waiting)
    with display.shown(config, total, ended), _asked_to_stop() as asked:
        try:
            while waiting or running:
                if asked:
                    raise KeyboardInterrupt
                while waiting and len(running) < at_once:
                    running.append(start(waiting.pop(0)))
                for each in [each for each in running if each.ended()]:
                    running.remove(each)
                    seconds, error = each.outcome()
                    ended += 1
                    if error is not None:
                        failures[each.job.folder.relative_to(each.job.root).as_posix()] = error
                    display.ended(each.job, seconds, ended, error)
                display.update([each.job for each in running if each.job.beside(".json").is_file()])
                if running:
                    time.sleep(0.1)
        except KeyboardInterrupt:
            stop(running, asked)
            left = len(waiting) + len(running)
            raise KeyboardInterrupt(
                f"stopped with {left} of {total} runs to go; continue with the same command"
            ) from None
        finally:
            for each in running:
                each.kill()
    return failures


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


def here() -> dict[str, Any]:
    """This machine and what is installed on it."""
    return {"machine": {k: v for k, v in machine().items() if k not in ("gpu", "threads")}, "versions": versions()}


def note_machine(root: Path, one: dict[str, Any]) -> None:
    """Where runs are made; a comparison that is continued elsewhere has several."""
    path = root / MACHINES
    known = read_json(path).get("machines", [])
    if one not in known:
        write_json(path, {"machines": [*known, one]})
