"""Comparisons whose runs take no time: `fake_train.py` stands in for training."""

import io
import pathlib
import sys

import pytest
from rich.console import Console

from foldconv.lab.compare import processes
from foldconv.lab.compare.config import CompareConfig
from foldconv.lab.compare.runner import compare
from foldconv.lab.train import TrainConfig

FAKE = pathlib.Path(__file__).with_name("fake_train.py")


@pytest.fixture
def config():
    """``config("plain,doconv", seeds=3, epochs=2)``."""

    def make(methods="plain,doconv", seeds=3, **train):
        return CompareConfig(tuple(methods.split(",")), seeds, TrainConfig(**{"epochs": 2, **train}))

    return make


@pytest.fixture
def fake(monkeypatch):
    """Runs are done by the stand-in, in a mode: ``good``, ``fail`` or ``wait``; returns the commands in their order."""

    def use(mode="good"):
        calls = []

        def command(job, file, continued):
            calls.append((job.method, job.seed, continued))
            return [sys.executable, str(FAKE), mode, str(job.folder), "resume" if continued else str(file)]

        monkeypatch.setattr(processes, "_command", command)
        return calls

    return use


@pytest.fixture
def run(tmp_path):
    """``run(config) -> (report, failures, what was shown)``, in one folder per test."""

    def call(config, **settings):
        stream = io.StringIO()
        values, failures = compare(config, tmp_path / "out", console=Console(file=stream, width=200), **settings)
        return values, failures, stream.getvalue()

    return call
