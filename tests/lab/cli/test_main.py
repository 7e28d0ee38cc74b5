"""What all commands have in common: help, usage errors, one-line errors, exit codes, no needless imports."""

import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import foldconv
from foldconv.errors import install
from foldconv.lab import cli
from foldconv.lab.cli import _COMMANDS, main


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_has_an_example_and_every_option(command, call):
    code, out, err = call(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert f"\n  foldconv {command} " in out
    assert "--json" in out
    assert "--debug" in out


@pytest.mark.parametrize("command", _COMMANDS)
def test_examples_of_the_help_parse(command):
    for example in _COMMANDS[command].EXAMPLES:
        assert example.startswith(f"foldconv {command}")
        assert cli.parse(example.split()[1:]).command == command


def test_commands_of_the_page_parse():
    text = (Path(__file__).parents[3] / "docs" / "command-line.md").read_text(encoding="utf-8")
    section = text.partition("```sh")[2].partition("```")[0]
    lines = [shlex.split(line, comments=True)[1:] for line in section.splitlines() if line.startswith("foldconv ")]
    assert {line[0] for line in lines} >= {"train", "eval", "fold", "inspect", "compare", "import-checkpoint"}
    for line in lines:
        cli.parse(line)


def test_overview_names_every_command(call):
    code, out, _ = call("--help")
    assert code == 0
    assert all(f"\n    {name}" in out for name in _COMMANDS)


def test_without_a_command_the_help_is_shown_and_nothing_succeeds(call):
    _, overview, _ = call("--help")
    assert call() == (2, "", overview)


def test_version(call):
    assert call("--version") == (0, f"foldconv {foldconv.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            "unknown value 'trian'; did you mean 'train'?; expected one of: train, eval, fold, export, predict, ",
        ),
        (["train", "--epoch", "3"], "foldconv train: unknown argument '--epoch'; did you mean '--epochs'?"),
        (["train", "--epoch=3"], "unknown argument '--epoch'; did you mean '--epochs'?"),
        (["train", "--epochs", "many"], "foldconv train: argument --epochs: invalid int value: 'many'"),
        (["train", "--init", "papr"], "unknown value 'papr'; did you mean 'paper'?"),
        (["train", "--architecture-args", "width"], "expected KEY=VALUE, received 'width'"),
        (["train", "--architecture-args", "width=["], "expected a value in YAML after width="),
        (["eval"], "foldconv eval: the following arguments are required: CHECKPOINT; see foldconv eval --help"),
        (["fold", "a.ckpt"], "required: OUT"),
        (["eval", "a.ckpt", "b.ckpt"], "foldconv eval: unknown argument 'b.ckpt'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments, message, fails):
    assert message in fails(*arguments, code=2)


def test_debug_shows_the_traceback(call):
    code, out, err = call("eval", "nowhere.ckpt", "--debug")
    assert (code, out) == (1, "")
    assert "Traceback" in err
    assert "open_network" in err
    assert err.splitlines()[-1].startswith("foldconv: error: nowhere.ckpt: no such file; expected ")


def test_unforeseen_errors_are_one_line_too(monkeypatch, fails):
    def broken(options):
        raise RuntimeError("two\n  lines")

    monkeypatch.setattr(_COMMANDS["eval"], "run", broken)
    assert fails("eval", "x") == "foldconv: error: RuntimeError: two lines (--debug shows where)"


def test_what_is_not_installed_is_told_with_the_remedy_alone(monkeypatch, fails):
    def lacking(options):
        raise ModuleNotFoundError(".onnx: ONNX needs onnx; install it: pip install onnx", name="onnx")

    monkeypatch.setattr(_COMMANDS["eval"], "run", lacking)
    assert fails("eval", "x") == "foldconv: error: .onnx: ONNX needs onnx; install it: pip install onnx"


def test_interrupt_has_its_own_code(monkeypatch, fails):
    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(_COMMANDS["eval"], "run", stopped)
    assert fails("eval", "x", code=130) == "foldconv: interrupted"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["trian"], ["train", "--epoch"]])
def test_help_and_usage_errors_need_nothing_heavy(arguments):
    heavy = "{'torch', 'lightning', 'timm', 'sklearn', 'matplotlib', 'rich', 'yaml', 'numpy'}"
    code = (
        f"import sys; from foldconv.lab.cli import main; main({arguments}); print(); print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("lightning", ["train"]), ("rich", ["train"]), ("sklearn", ["eval", "FILE"]), ("timm", ["inspect", "resnet18"])],
)
def test_missing_extras_are_named(missing, arguments, run_folder, python):
    arguments = [str(run_folder / "last.ckpt") if word == "FILE" else word for word in arguments]
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from foldconv.lab.cli import main; sys.exit(main({arguments}))"
    )
    done = python(code)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert f"no {missing}" in done.stderr
    assert install("train") in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_streams_without_unicode_get_other_characters(encoding, monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert main(["inspect", "digits_resnet"]) == 0
    assert main(["inspect", "é中"]) == 1
    out, err = (stream.buffer.getvalue() for stream in streams.values())
    assert out.decode(encoding).splitlines()[1].startswith("-----")
    assert err.count(b"\n") == 1
    assert b"unknown architecture " in err


def test_a_reader_that_leaves_early_is_no_error(run_folder):
    command = [sys.executable, "-c", "import sys; from foldconv.lab.cli import main; sys.exit(main())"]
    with subprocess.Popen(
        [*command, "inspect", str(run_folder / "last.ckpt")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_main_uses_the_process_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["foldconv", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("foldconv ")
