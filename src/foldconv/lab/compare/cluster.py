"""Runs of a comparison on a Ray cluster: each a task with its processors and share of a GPU.

A task trains as `processes` does on one machine: a process of its own that writes into a folder which all nodes share.
When a node dies, Ray gives its tasks to another one, where training goes on from the last checkpoint. Ray is imported
when a cluster is asked for, no sooner.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError, install
from ..machine import versions
from ..run import locked
from .config import CompareConfig, Job
from .processes import here, start_process, stop

LOG = "ray.log"
_RETRIES = 10
"""How often a run is started again because its node, or Ray's process there, has died."""
_PATIENCE = 120.0
"""Seconds that a node gets to answer, and that one which is given a run waits for the one before to let go of it."""


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """Which cluster, and what of it a run takes.

    Raises:
        UnsupportedError: a number that is no such share.

    >>> ClusterOptions(gpus=0.25).fit({"CPU": 8.0, "GPU": 1.0}), ClusterOptions(cpus=4).fit({"CPU": 8.0})
    (4, 2)
    """

    address: str | None = None
    """HOST:PORT of its head; None: the one that this machine belongs to (RAY_ADDRESS, `ray start`), else Ray is started
    here, with all processors and GPUs of this machine."""
    cpus: int = 1
    gpus: float | None = None
    """A share below 1, or a whole number; None: one where the cluster has any and training may use it, else none."""

    def __post_init__(self):
        if self.cpus < 1:
            raise UnsupportedError(f"--cpus-per-run: expected a number ≥ 1, received {self.cpus}")
        if self.gpus is not None and not (0 <= self.gpus < 1 or (self.gpus < 1e6 and self.gpus == int(self.gpus))):
            raise UnsupportedError(
                f"--gpus-per-run: expected a share from 0 to 1 or a whole number, received {self.gpus}"
            )

    def fit(self, resources: dict[str, float]) -> int:
        """How many runs a node with these resources holds at once."""
        runs = int(resources.get("CPU", 0) / self.cpus + 1e-6)
        return min(runs, int(resources.get("GPU", 0) / self.gpus + 1e-6)) if self.gpus else runs


@contextlib.contextmanager
def connected(options: ClusterOptions) -> Iterator[Cluster]:
    """The cluster, for as long as the block lasts.

    Raises:
        UnsupportedError: Ray is not installed, or no cluster answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # GPUs of which a run gets none are hidden from it; Ray warns where nothing says which way it is to be.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(f"--ray: this needs Ray ({error}); install it: {install('ray')}") from None
    ours = not ray.is_initialized()
    if ours:
        if options.address is not None:
            _check_address(options.address)
        try:
            ray.init(options.address, include_dashboard=False, log_to_driver=False, logging_level="error")
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UnsupportedError(f"--ray: no cluster at {options.address or 'this machine'}: {reason}") from None
    try:
        yield Cluster(options)
    finally:
        if ours:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself takes a minute and many lines to say that nobody answers."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise UnsupportedError(
            f"--ray: expected HOST:PORT of a cluster's head, as `ray start --head` prints it, received {address!r}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UnsupportedError(
            f"--ray: no cluster answers at {address} ({error}); start one there with `ray start --head`"
        ) from None


class Cluster:
    """A cluster that this process is connected to."""

    def __init__(self, options: ClusterOptions):
        self._options = options
        self._token = f".shared-{uuid.uuid4().hex}"
        self._train: Any = None

    @contextlib.contextmanager
    def log(self, root: Path) -> Iterator[None]:
        """What Ray prints of nodes that die, pages on standard output, goes to a file in the folder."""
        with open(root / LOG, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            yield

    def check(self, root: Path, config: CompareConfig) -> list[dict[str, Any]]:
        """Ask every node on which runs may be made; gives what each is, as `processes.here` tells.

        Raises:
            UnsupportedError: none can take a run; one does not see the folder, or lacks this version of foldconv.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in ray.nodes() if node["Alive"]]
        if self._options.gpus is None:
            gpu = config.train.accelerator != "cpu" and any(node["Resources"].get("GPU") for node in nodes)
            self._options = dataclasses.replace(self._options, gpus=1.0 if gpu else 0.0)
        able = [node for node in nodes if self._options.fit(node["Resources"])]
        if not able:
            has = "; ".join(f"{n['Resources'].get('CPU', 0):g} and {n['Resources'].get('GPU', 0):g}" for n in nodes)
            raise UnsupportedError(
                f"--ray: no node has {self._options.cpus} processors and {self._options.gpus:g} GPUs for a run, but "
                f"{has}; give less with --cpus-per-run and --gpus-per-run"
            )
        root = root.resolve()
        with _marked(root, self._token):
            look = ray.remote(num_cpus=0, max_retries=0)(_look)
            asked = [
                look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    str(root / self._token)
                )
                for node in able
            ]
            found = []
            for node, reference in zip(able, asked):
                name = node["NodeManagerAddress"]
                try:
                    sees, one = ray.get(reference, timeout=_PATIENCE)
                except ray.exceptions.RayError as error:
                    raise UnsupportedError(f"--ray: node {name} cannot run foldconv: {_reason(error)}") from None
                if not sees:
                    raise UnsupportedError(
                        f"--ray: node {name} does not see {root}; expected --out in a folder that all nodes share"
                    )
                if one["versions"]["foldconv"] != (ours := versions()["foldconv"]):
                    has = one["versions"]["foldconv"]
                    raise UnsupportedError(
                        f"--ray: node {name} has foldconv {has}, expected {ours}; install that there"
                    )
                found.append(one)
        share = {"num_cpus": self._options.cpus, "num_gpus": self._options.gpus}
        self._train = ray.remote(**share, max_retries=_RETRIES, scheduling_strategy="SPREAD")(_train)
        return found

    def start(self, config: CompareConfig, job: Job) -> Task:
        """Hand a run to the cluster, which begins it when a node has room."""
        job_there = dataclasses.replace(job, root=job.root.resolve())
        threads = os.environ.get("OMP_NUM_THREADS", str(self._options.cpus))
        return Task(job, self._train.remote(config, job_there, self._options, os.getcwd(), threads))


class Task:
    """A run that the cluster has, waiting or in progress."""

    def __init__(self, job: Job, reference: Any):
        self.job = job
        self._reference = reference

    def ended(self) -> bool:
        """Whether it has."""
        import ray

        return bool(ray.wait([self._reference], timeout=0)[0])

    def outcome(self) -> tuple[float, str | None]:
        """The seconds that it took on its last node, and why it failed."""
        import ray

        try:
            return ray.get(self._reference)
        except ray.exceptions.RayError as error:
            return 0.0, _reason(error)

    def ask(self) -> None:
        """To stop; one that waits is taken back."""
        self._cancel(force=False)

    def kill(self) -> None:
        """Stop it now."""
        self._cancel(force=True)

    def _cancel(self, force: bool) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.cancel(self._reference, force=force)


def _look(path: str) -> tuple[bool, dict[str, Any]]:
    """On a node: whether it sees a file, and what it is."""
    deadline = time.monotonic() + 5  # network file systems remember for seconds that a file was not there
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.2)
    return os.path.exists(path), here()


def _train(
    config: CompareConfig, job: Job, options: ClusterOptions, folder: str, threads: str
) -> tuple[float, str | None]:
    """On a node: make a run, or go on with what another node has left of it."""
    import ray

    if not job.root.is_dir():
        node = ray.util.get_node_ip_address()
        raise UnsupportedError(f"node {node} does not see {job.root}; expected a folder that all nodes share")
    with contextlib.suppress(OSError):  # relative paths of data are meant from where compare was called
        os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = threads
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[
            name
        ]  # where Slurm has started the cluster, Lightning would take the node's number for the run's
    own = ray.get_runtime_context().get_node_id()
    at_once = next((options.fit(node["Resources"]) for node in ray.nodes() if node["NodeID"] == own), 1)
    _wait_for(job.folder)
    running = start_process(config, job, at_once, (), tethered=True)
    try:
        while not running.ended():
            time.sleep(0.2)
    except KeyboardInterrupt:
        stop([running], [])
    return running.outcome()


def _wait_for(folder: Path) -> None:
    """Until nobody trains there: a node that Ray has lost sight of may yet be at it."""
    deadline = time.monotonic() + _PATIENCE
    while folder.is_dir():
        try:
            with locked(folder):
                return
        except UnsupportedError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


@contextlib.contextmanager
def _marked(root: Path, name: str) -> Iterator[None]:
    """A file in a folder, by which others can tell that it is this one."""
    path = root / name
    path.touch()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Of Ray's errors, which hold pages: the cause, in a line."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
