"""Memory of the tests of operations: between guard bands, and full of what nobody would write."""

import pytest

from testing.guards import guarding


@pytest.fixture(autouse=True)
def guards():
    """Fails the test if a kernel writes outside of a tensor, see `testing/guards.py`."""
    with guarding() as guards:
        yield guards
