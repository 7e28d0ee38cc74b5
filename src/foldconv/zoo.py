"""The laboratory's ``zoo``, under the name that users import."""

import sys

from .lab import zoo

sys.modules[__name__] = zoo
