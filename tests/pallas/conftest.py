import pytest

from pallas_kernels import compat


@pytest.fixture
def no_races():
    """Fails the test if the interpreter saw a race; leaves it usable after an exception inside a kernel."""
    compat.reset_interpreter()
    yield
    found = compat.races_found()
    compat.reset_interpreter()
    assert not found, "the interpreter found a data race"
