"""What pytest looks at, and which remarks of other libraries it lets pass."""

import importlib.util
import pathlib

HERE = pathlib.Path(__file__).parent
KERAS = [HERE / "src/foldconv/keras", HERE / "tests/keras"]


def pytest_ignore_collect(collection_path):
    """Keras is not among what most sessions install; `nox -s keras` does, and fails where it finds no test."""
    # A hook, as of several `collect_ignore` the innermost alone counts.
    return True if collection_path in KERAS and importlib.util.find_spec("keras") is None else None


def pytest_configure(config):
    """Keras' variables do not follow NumPy 2 yet."""
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation doesn't accept:DeprecationWarning")
