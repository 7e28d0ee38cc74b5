"""A run of two short epochs, shared by the tests that only look at what came out."""

import io

import pytest
from rich.console import Console

from foldconv.lab.train import TrainConfig, fit

TINY = {"architecture_args": {"width": 4}, "epochs": 2, "batch_size": 256, "accelerator": "cpu"}


@pytest.fixture
def silent():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def tiny():
    """Make a config of a small run."""
    return lambda **settings: TrainConfig(**{**TINY, **settings})


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run, and its result."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = fit(TrainConfig(**TINY, out=str(folder)), Console(file=io.StringIO()))
    return folder, result
