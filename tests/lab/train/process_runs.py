"""Runs of `foldconv train` in several processes, started by test_processes.py.

``process_runs.py train ...`` is ``foldconv train ...`` with one more network. ``process_runs.py jobs``
reads jobs from standard input, and for each forks the processes that a launcher would start: importing everything
takes longer than training does, and is done once. A job:

    name        its processes' output goes to NAME-0.txt, NAME-1.txt, ...
    arguments   of the command line
    processes   one mapping of environment variables per process
    stop_at     optional: the step in which all processes stop and wait to be sent `signal`
    backend     optional: of torch.compile
    copy        optional: the run to continue a copy of, in one process

Each process that trains to the end leaves in NAME-0.seen, ... what `look` finds, as JSON.
The exit codes go to standard output, as JSON: one list per name.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import sys
import time
import traceback

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked process hangs where its parent had a pool of threads
os.environ["FOLDCONV_PATH"] = "torch"  # which forked processes take anyway; the one that Lightning starts is none

import torch
from torch import nn

from foldconv.lab import zoo
from foldconv.lab.cli import main
from foldconv.lab.data import loaders
from foldconv.lab.train.loop import Training
from foldconv.lab.train.records import Records
from foldconv.lab.train.sharding import own_share
from foldconv.methods.doconv import DOConv2d

PATIENCE = 120  # seconds


def normless(num_classes, in_channels):
    """Each process' batch norms would see its own images only, so one process and two would not agree."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(72, num_classes)
    )


def stop_at(step, mark):
    """Training that comes to `step` leaves a file and goes no further."""
    original = Training._batch

    def stopped(self, images, labels, index):
        if self.step == step:
            mark.touch()
            time.sleep(PATIENCE)
        return original(self, images, labels, index)

    Training._batch = stopped


def look(file):
    """Write down how many numbers of the parameters this process holds when training ends, and how many kernels each
    validation composed.
    """
    composed, counts, compose = [], [], DOConv2d.compose
    original, close = Training.validate, Records.close

    def counted(self, *parameters):
        composed.append(self)
        return compose(self, *parameters)

    def validate(self):
        composed.clear()
        found = original(self)
        counts.append(len(composed))
        return found

    def closed(self):
        close(self)
        held = sum(own_share(parameter).numel() for parameter in self._training.module.network.parameters())
        file.write_text(json.dumps({"held": held, "composed": counts}))

    DOConv2d.compose = counted
    Training.validate, Records.close = validate, closed


def copy_for_one(source, target):
    """Another run with the same checkpoints, for one process."""
    shutil.copytree(source, target)
    config = pathlib.Path(target, "config.yaml")
    text = config.read_text().replace("devices: 2", "devices: 1").replace("strategy: fsdp", "strategy: auto")
    config.write_text(text)


def child(job, number):
    """What a forked process does; it never returns."""
    code = 70
    try:
        file = os.open(f"{job['name']}-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(job["processes"][number])
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        sys.argv[1:] = job["arguments"]  # Lightning starts other processes with the same command
        if "stop_at" in job:
            stop_at(job["stop_at"], pathlib.Path(f"{job['name']}-{number}.stopped"))
        if "backend" in job:
            torch.compile = functools.partial(torch.compile, backend=job["backend"])
        look(pathlib.Path(f"{job['name']}-{number}.seen"))
        code = main(job["arguments"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def run(job):
    """The exit codes of a job's processes."""
    if "copy" in job:
        copy_for_one(job["copy"], job["name"])
    sys.stdout.flush()
    started = []
    for number in range(len(job["processes"])):
        started.append(os.fork())
        if not started[-1]:
            child(job, number)
    codes = dict.fromkeys(started)
    deadline = time.monotonic() + PATIENCE
    marks = [pathlib.Path(f"{job['name']}-{number}.stopped") for number in range(len(started))]
    while None in codes.values():
        late = time.monotonic() > deadline
        if late or ("stop_at" in job and all(mark.exists() for mark in marks)):
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL if late else job["signal"])
            marks = [pathlib.Path("sent")]
        for process in [process for process, code in codes.items() if code is None]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return list(codes.values())


def run_all(jobs):
    """The first job runs in this process, so that what is imported late is there for all others."""
    with (
        open(f"{jobs[0]['name']}-0.txt", "w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        codes = {jobs[0]["name"]: [main(jobs[0]["arguments"])]}
    for job in jobs[1:]:
        codes[job["name"]] = run(job)
    return codes


if __name__ == "__main__":
    zoo._registry._BUILDERS["normless"] = normless
    loaders.EVALUATION_BATCH = 64  # several in each process
    if sys.argv[1:] == ["jobs"]:
        sys.stdout.write(json.dumps(run_all(json.load(sys.stdin))))
    else:
        sys.exit(main(sys.argv[1:]))
