"""Every registered method × every check of the battery."""

import foldconv.testing


@foldconv.testing.parametrize_with_checks()
def test_conformance(method, check):
    check(method)
