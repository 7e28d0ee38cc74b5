"""A comparison on a Ray cluster of two nodes: stopped, continued, bereft of a node, and it reports the same."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from foldconv.errors import UnsupportedError
from foldconv.lab.compare import cluster as module
from foldconv.lab.compare.cluster import ClusterOptions
from foldconv.lab.compare.results import curve, finished, read_json
from foldconv.lab.run import RunFolder, locked

pytest.importorskip("ray")

NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # others may need the machine's memory
        patch.setenv("RAY_worker_niceness", "0")  # else 15: on a machine that does other work, too, they starve
        two = Cluster(initialize_head=True, head_node_args=NODE)
        yield two
        two.shutdown()


def when(condition, act):
    """Do something in the middle of what the main thread does; returns what to call at its end."""
    done = threading.Event()

    def watch():
        while not done.is_set():
            if condition():
                act()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return lambda: (done.set(), thread.join())


def children(process):
    """The command lines of a process' children and theirs."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == process:
                yield (folder / "cmdline").read_text()
                yield from children(int(folder.name))


def test_the_report_is_the_undisturbed_one(cluster, config, run, tmp_path):
    what = config(seeds=1, epochs=40, batch_size=256, architecture_args={"width": 4}, accelerator="cpu")
    options = ClusterOptions(cluster.address, gpus=0.5)
    node = cluster.add_node(**NODE)
    jobs = what.jobs(tmp_path / "out")

    def begun():
        return [job for job in jobs if RunFolder(job.folder).checkpoint.is_file()]

    finish = when(begun, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="stopped with 2 of 2 runs to go; continue with the same command"):
        run(what, cluster=options)
    finish()
    stopped = begun()
    for job in stopped:
        with locked(job.folder):  # nobody is at it any more
            pass

    def its_run_has_a_checkpoint():
        ours = list(children(node.all_processes["raylet"][0].process.pid))
        return any(str(job.folder) in command for job in begun() if not finished(job) for command in ours)

    finish = when(its_run_has_a_checkpoint, lambda: cluster.remove_node(node, allow_graceful=False))
    values, failures, _ = run(what, cluster=options)
    finish()
    starts = [read_json(job.beside(".json"))["starts"] for job in jobs]
    assert (failures, values["runs_at_once"]) == ({}, 1)
    assert sum(starts) == 2 + len(stopped) + 1  # those that Ctrl-C stopped, and the dead node's
    assert (tmp_path / "out" / module.LOG).stat().st_size
    assert not list((tmp_path / "out").glob(".shared-*"))

    (tmp_path / "out").rename(tmp_path / "disturbed")
    same, _, _ = run(what)
    for name, method in values["methods"].items():
        for key in ("accuracies", "mean", "parameters_training", "macs_folded", "largest_output_difference"):
            assert same["methods"][name][key] == method[key]
    for job in jobs:
        before = RunFolder(tmp_path / "disturbed" / job.folder.relative_to(tmp_path / "out"))
        assert before.folded.read_bytes() == RunFolder(job.folder).folded.read_bytes()
        assert len(curve(job)) == 40


def test_a_node_that_does_not_see_the_folder(cluster, config, run, monkeypatch):
    monkeypatch.setattr(module, "_marked", lambda *_: contextlib.nullcontext())
    with pytest.raises(UnsupportedError, match=r"node [\d.]+ does not see .*out; expected --out in a folder that all"):
        run(config(seeds=1), cluster=ClusterOptions(cluster.address))


def test_what_no_node_has(cluster, config, run):
    with pytest.raises(UnsupportedError, match="no node has 3 processors and 1 GPUs for a run, but 1 and 1"):
        run(config(seeds=1), cluster=ClusterOptions(cluster.address, cpus=3))


def test_runs_that_fail(cluster, config, run, tmp_path):
    with pytest.raises(UnsupportedError, match="nothing to report: none of 2 runs has ended well"):
        run(config(seeds=1, lr=1e30, accelerator="cpu"), cluster=ClusterOptions(cluster.address))
    assert "are not finite at step" in (tmp_path / "out" / "plain" / "seed-0.log").read_text()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"no cluster answers at 127.0.0.1:1 \(.*refused.*\); start one there with `ray start --head`"),
        ("no-such-host.invalid:6379", "no cluster answers at no-such-host.invalid:6379"),
        ("127.0.0.1:99999", "no cluster answers at"),
        ("ray://127.0.0.1:10001", "expected HOST:PORT of a cluster's head"),
        ("head", "expected HOST:PORT"),
    ],
)
def test_no_cluster_there(address, message, config, run, tmp_path):
    with pytest.raises(UnsupportedError, match=message):
        run(config(seeds=1), cluster=ClusterOptions(address))
    assert not (tmp_path / "out").exists()
