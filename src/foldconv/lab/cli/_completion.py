"""Print a script that lets a shell complete foldconv's commands, options and names.

bash: `eval "$(foldconv completion bash)"` in ~/.bashrc, or the script as a file of bash-completion's.
zsh: the script as the file _foldconv in a folder of $fpath.
"""

from __future__ import annotations

import argparse
from typing import Any

from ...errors import install
from ._common import Parser

HELP = "print a script for a shell's completion"
EXAMPLES = ("foldconv completion bash", "foldconv completion zsh")
_SHELLS = ("bash", "zsh")
_PATHS = {"CHECKPOINT", "FILE", "FOLDER", "IMAGE", "OUT", "RUN"}
"""What stands for a path in the help of options and arguments."""
# Files and names: shtab knows one or the other.
_RECIPES = {"bash": "_foldconv_recipes", "zsh": "{_foldconv_recipes}"}
_PREAMBLE = {
    "bash": '_foldconv_recipes() {{ compgen -f -- "$1"; compgen -W "{names}" -- "$1"; }}',
    "zsh": "_foldconv_recipes() {{ _alternative 'files:file:_files' 'recipes:recipe:({names})' }}",
}


def add_arguments(parser: Parser) -> None:
    """Which shell."""
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=f"one of {', '.join(_SHELLS)}")


def run(options: argparse.Namespace) -> tuple[dict[str, str], str]:
    """The script; as plain values and as text."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"completion needs shtab; install it: {install('train')}", name="shtab") from error
    from .. import recipes

    whole = options.parser_of_all(nested=False)
    (commands,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    names = _names()
    for action in (action for command in commands.choices.values() for action in command._actions):
        found = names.get(action.dest)
        if action.dest == "config":
            action.complete = _RECIPES
        elif found and action.choices is None:
            action.choices = found  # this parser is the script's alone
        elif action.metavar in _PATHS or action.dest == "data":
            action.complete = shtab.FILE
    recipe_names = " ".join(["list", *recipes.names()])
    preamble: Any = {shell: text.format(names=recipe_names) for shell, text in _PREAMBLE.items()}
    script = shtab.complete(whole, options.shell, preamble=preamble)
    return {"shell": options.shell, "script": script}, script.rstrip("\n")


def _names() -> dict[str, list[str]]:
    """The names that options and arguments take, where there are few enough to offer."""
    from ...methods import list_methods
    from ..train.config import PLAIN
    from ..zoo import list_architectures

    methods, architectures = list_methods(), list_architectures()
    return {
        "method": [PLAIN, *methods],
        "names": methods,
        "architecture": architectures,
        "network": [*architectures, "plot"],  # foldconv bench plot
    }
