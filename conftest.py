"""What pytest looks at, and which remarks of other libraries it lets pass."""

import importlib.util

# Keras is not among what most sessions install; `nox -s keras` names these paths, and fails where there is nothing.
if importlib.util.find_spec("keras") is None:
    collect_ignore = ["src/foldconv/keras", "tests/keras"]


def pytest_configure(config):
    """Keras' variables do not follow NumPy 2 yet."""
    config.addinivalue_line(
        "filterwarnings", "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
    )
