"""What tests of the kernels go through."""

from __future__ import annotations

import pytest
from isas import available

from vllm_sparse.kernels import cpu


@pytest.fixture(params=available())
def isa(request):
    """Each instruction set in turn."""
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa("")


@pytest.fixture(autouse=True)
def threads(request):
    """As many as are asked for, in each test anew: some go back to one."""
    if count := request.config.getoption("--native-threads"):
        cpu.set_threads(count)
