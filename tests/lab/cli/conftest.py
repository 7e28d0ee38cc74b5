"""A finished run for the commands that read one, and a way to call commands and see both streams."""

import io
import json

import pytest
from rich.console import Console

from foldconv.lab.cli import main
from foldconv.lab.train import TrainConfig, fit


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """The folder of a finished run of two short epochs; read only."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    config = TrainConfig(architecture_args={"width": 4}, epochs=2, batch_size=256, accelerator="cpu", out=str(folder))
    fit(config, Console(file=io.StringIO()))
    return folder


@pytest.fixture
def call(capsys):
    """``call("eval", path) -> (exit code, standard output, standard error)``."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def call_json(call):
    """The same with ``--json``: asserts success and returns the parsed output."""

    def run(*arguments):
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def fails(call):
    """The one line on standard error of a command that must fail, by default with exit code 1."""

    def run(*arguments, code=1):
        received, out, err = call(*arguments)
        assert received == code, (received, out, err)
        assert out == ""
        assert err.endswith("\n"), err
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        return err.strip()

    return run
