"""The laboratory's ``train``, under the name that users import."""

import sys

from .lab import train

sys.modules[__name__] = train
