"""The public names of training; `foldconv.train` asks here when one is first used."""

# ruff: noqa: F401
from ..data import ImageData, create_data, list_data
from .checkpoint import open_network
from .config import TrainConfig
from .evaluation import evaluate
from .experiment import TrainResult, fit, resume
