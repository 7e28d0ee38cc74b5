"""The laboratory's ``zoo``, under the name that users import."""

from .lab.zoo import *  # noqa: F403
from .lab.zoo import __all__ as __all__
