"""`compare`: train what is missing, one process per run, and report."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ...files.atomic import write_json
from ..run import locked
from .cluster import ClusterOptions, connected
from .config import CONFIG, CompareConfig, Job
from .display import Display
from .processes import Running, here, start_process, stop
from .reporting import MACHINES, report
from .results import finished, read_json


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
        remote = None if cluster is None else left.enter_context(connected(cluster))
        _prepare(config, root)
        locks = left.enter_context(locked(root))
        config.save(root)
        waiting = [job for job in config.jobs(root) if not finished(job)]
        if remote is None:
            at_once = max(1, min(jobs, len(waiting)))
            note_machine(root, here())
            failures = _run_all(
                config, waiting, at_once, lambda job: start_process(config, job, at_once, locks), Display(console)
            )
        else:
            left.enter_context(remote.log(root))
            for each in remote.check(root, config):
                note_machine(root, each)
            failures = _run_all(config, waiting, len(waiting), lambda job: remote.start(config, job), Display(console))
        return report(root), failures


def _prepare(config: CompareConfig, root: Path) -> None:
    if (root / CONFIG).is_file():
        config.check_continues(CompareConfig.load(root), root)
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not the folder of a comparison (no {CONFIG}); choose another")
    root.mkdir(parents=True, exist_ok=True)


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


def note_machine(root: Path, one: dict[str, Any]) -> None:
    """Where runs are made; a comparison that is continued elsewhere has several."""
    path = root / MACHINES
    known = read_json(path).get("machines", [])
    if one not in known:
        write_json(path, {"machines": [*known, one]})
