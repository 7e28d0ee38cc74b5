"""The conformance battery: what every method must do, as small named checks. Public, for third parties' methods too.

In a test file of your own, after your method is registered::

    import foldconv.testing

    @foldconv.testing.parametrize_with_checks()
    def test_conformance(method, check):
        check(method)

Every check takes a method's config and raises AssertionError when the method falls short. Checks see a method only
through `expand`, `fold` and the public layer interface, on small networks of one convolution and one norm.
"""

from . import checks as checks  # registers them
from . import duties as duties
from .battery import CHECKS as CHECKS
from .battery import check as check
from .battery import parametrize_with_checks as parametrize_with_checks
from .cases import Case as Case
from .cases import cases as cases
from .cases import randomize as randomize

__all__ = ["CHECKS", "Case", "cases", "check", "parametrize_with_checks", "randomize"]
