"""Which parts of the package have doctests that can run here."""

import importlib.util

# MXNet needs an environment of its own: ``nox -s gluon``.
collect_ignore_glob = ["foldconv/gluon/*.py"] if importlib.util.find_spec("mxnet") is None else []
