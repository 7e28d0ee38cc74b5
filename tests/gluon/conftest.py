"""MXNet needs an environment of its own: ``nox -s gluon``."""

import importlib.util

collect_ignore_glob = ["*.py"] if importlib.util.find_spec("mxnet") is None else []
