"""DDP and FSDP2 on two gloo processes compute what one process computes on the whole batch."""

import contextlib
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

SCRIPT = pathlib.Path(__file__).with_name("distributed_worker.py")
PATIENCE = 150

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def alone():
    """The same training in this process, on the whole batch."""
    spec = importlib.util.spec_from_file_location("distributed_worker", SCRIPT)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return {training: worker.train(worker.network(training), worker.images()) for training in (True, False)}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each of two processes computed; whatever happens, none of them outlives this."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback()}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(2):
            log = stack.enter_context(open(folder / f"{rank}.log", "w"))
            command = [sys.executable, str(SCRIPT), str(rank), str(folder)]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(timeout=PATIENCE)
    # Judged by the results: gloo's threads may still abort a process that is done and leaving.
    results = [folder / f"{rank}.pt" for rank in range(2)]
    assert all(path.exists() for path in results), "\n".join(path.with_suffix(".log").read_text() for path in results)
    return [torch.load(path, weights_only=True) for path in results]


def loopback():
    return "lo0" if sys.platform == "darwin" else "lo"


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store and interface names differ")
@pytest.mark.parametrize("job", ["ddp", "fsdp"])
def test_two_processes_equal_one(job, alone, together):
    results = [of_rank[job] for of_rank in together]
    for training in (True, False):
        wanted = alone[training]
        assert any("weight_extra" in what for what in wanted)
        for received in (result[training] for result in results):
            assert received.keys() == wanted.keys()
            for what, value in wanted.items():
                torch.testing.assert_close(
                    received[what], value, rtol=1e-9, atol=1e-9, msg=lambda text, what=what: f"{what}: {text}"
                )
        # The comparison means something: the network moved, and every evaluation differs from the one before.
        looks = [value for what, value in wanted.items() if "step" in what or "evaluation" in what]
        assert (looks[0] - looks[-1]).abs().max() > 1e-3
        assert (looks[-2] - looks[-1]).abs().max() > 1e-3
        for seen in (wanted, *(result[training] for result in results)):
            torch.testing.assert_close(
                seen["composed once"], seen["in evaluation, after an edit"], rtol=1e-9, atol=1e-9
            )
        for what, value in results[0][training].items():
            assert torch.equal(value, results[1][training][what]), f"the processes disagree about {what}"
