"""A package whose public names are written once, in its `_api.py`, and loaded one by one when they are first used.

`_api.py` is ordinary imports, so that type checkers and readers see where each name lives. It is read here, not run:
`foldconv.convert_weights` must load where torch is not installed, and a training config where Lightning is not.
"""

import ast
import functools
import importlib
import importlib.resources
import importlib.util
from collections.abc import Callable


def attach(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of the package of this name; its subpackages are found, too.

    >>> find, names = attach("foldconv")
    >>> find("expand").__module__, "fold" in names()
    ('foldconv.network.expand', True)
    """

    @functools.cache
    def homes() -> dict[str, str]:
        source = importlib.resources.files(package).joinpath("_api.py").read_text(encoding="utf-8")
        imports = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
        return {name.name: f"{'.' * node.level}{node.module}" for node in imports for name in node.names}

    def find(name: str) -> object:
        if name == "__all__":
            return sorted(homes())
        if name in homes():
            return getattr(importlib.import_module(homes()[name], package), name)
        part = f"{package}.{name}"
        if not name.startswith("_") and importlib.util.find_spec(part):
            return importlib.import_module(part)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*homes(), "__all__", "__name__", "__doc__", "__path__"})

    return find, names
