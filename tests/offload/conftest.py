"""What tests of the kernels over host memory go through."""

from __future__ import annotations

import pytest
import torch
from isas import available

from vllm_sparse.cpu_offload import native
from vllm_sparse.kernels import cpu


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Torch's small operations take longer with several threads than with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", *available(native)])
def isa(request, monkeypatch):
    """Each instruction set, and what runs where there is no extension."""
    if request.param == "torch":
        for module, name in ((cpu, "native"), (native, "_library")):
            monkeypatch.setattr(module, name, lambda: None)
        yield request.param
        return
    native.set_isa(request.param)
    yield request.param
    native.set_isa("")
