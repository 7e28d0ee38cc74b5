"""Training: `TrainConfig` says what, `fit` does it, `open_network` reads what came out.

Names are loaded when first used: a config alone needs neither torch nor Lightning.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from ..._lazy import attach as _attach

if _TYPE_CHECKING:
    from ._api import *  # noqa: F403

__getattr__, __dir__ = _attach(__name__)
