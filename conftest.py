"""What pytest looks at, and which remarks of other libraries it lets pass."""

import importlib.util
import pathlib

HERE = pathlib.Path(__file__).parent
KERAS = [HERE / "src/foldconv/keras", HERE / "tests/keras"]
HOSTS = {"mm": "mmengine", "ultralytics": "ultralytics"}  # of integrations, what a session may lack


def pytest_ignore_collect(collection_path):
    """Keras and others' trainers are not in most sessions; `nox -s keras hosts` have them, and fail without a test."""
    # A hook, as of several `collect_ignore` the innermost alone counts.
    lacks = collection_path in KERAS and "keras"
    if collection_path.parent in (HERE / "src/foldconv/integrations", HERE / "src/foldconv"):
        lacks = HOSTS.get(collection_path.stem, lacks)
    return True if lacks and importlib.util.find_spec(lacks) is None else None


def pytest_configure(config):
    """Keras' variables do not follow NumPy 2 yet."""
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation doesn't accept:DeprecationWarning")
