"""The public names of training; `foldconv.train` asks here when one is first used."""

# `as` the same name: of a package that brings types, checkers take only such names for public.
from ..data import ImageData as ImageData
from ..data import create_data as create_data
from ..data import list_data as list_data
from .checkpoint import open_network as open_network
from .config import TrainConfig as TrainConfig
from .evaluation import evaluate as evaluate
from .experiment import TrainResult as TrainResult
from .experiment import fit as fit
from .experiment import resume as resume
