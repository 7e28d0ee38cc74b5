"""The script completes in a real shell: commands, options, names, a user's files."""

import shutil
import subprocess

import pytest

import foldconv
from foldconv.lab.cli import _COMMANDS

pytest.importorskip("shtab")
ASK = """
source ./script
COMP_WORDS=({line}) COMP_CWORD=$(( {count} - 1 ))
_shtab_foldconv "${{COMP_WORDS[0]}}" "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    from foldconv.lab.cli import parse
    from foldconv.lab.cli._completion import run

    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        (folder / shell).write_text(run(parse(["completion", shell]))[1])
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(scripts, tmp_path):
    (tmp_path / "script").write_text((scripts / "bash").read_text())
    (tmp_path / "mine.yaml").write_text("epochs: 1\n")

    def offered(*words):
        line = " ".join(word or "''" for word in words)
        code = ASK.format(line=line, count=len(words))
        done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stderr == ""
        return set(done.stdout.split())

    assert {name for name in _COMMANDS if " " not in name} <= offered("foldconv", "")
    assert offered("foldconv", "tr") == {"train"}
    assert {"--method", "--method-args", "--momentum"} <= offered("foldconv", "train", "--m")
    assert offered("foldconv", "train", "--method", "") == {"plain", *foldconv.list_methods()}
    assert offered("foldconv", "train", "--method", "ore") == {"orepa", "orepa_vgg"}
    assert "digits_resnet" in offered("foldconv", "train", "--architecture", "dig")
    assert offered("foldconv", "compare", "--config", "gluoncv/resnet50_v1") == {
        "gluoncv/resnet50_v1",
        "gluoncv/resnet50_v1b",
    }
    assert offered("foldconv", "train", "--config", "mi") == {"mine.yaml"}
    assert "mine.yaml" in offered("foldconv", "eval", "mi")
    assert offered("foldconv", "completion", "") >= {"bash", "zsh"}


def test_zsh_gets_its_own(scripts):
    script = (scripts / "zsh").read_text()
    assert script.startswith("#compdef foldconv\n")
    assert "recipes:recipe:(list cifar/" in script
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n", scripts / "zsh"], check=True)


def test_another_shell(fails):
    assert "unknown value 'fish'; " in fails("completion", "fish", code=2)
