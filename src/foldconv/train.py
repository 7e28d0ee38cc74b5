"""The laboratory's ``train``, under the name that users import; its names are loaded when first used."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from .lab.train import __dir__ as __dir__
from .lab.train import __getattr__ as __getattr__

if _TYPE_CHECKING:
    from .lab.train._api import *  # noqa: F403
