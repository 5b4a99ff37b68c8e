"""The instruction sets of this CPU, and a fixture that goes through them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from vllm_sparse.kernels import cpu


def available(kernels: ModuleType = cpu) -> list[str]:
    """Instruction sets that run here, of the kernels for the device or of `cpu_offload.native`."""
    if cpu.native_error():
        return []
    names = []
    for name in kernels.ISAS:
        try:
            kernels.set_isa(name)
        except ValueError:
            continue
        names.append(name)
    kernels.set_isa("")
    assert names
    return names


def implementations(reference: Any, native: Any):
    """A fixture: the reference, and the native one with each instruction set."""

    @pytest.fixture(params=["reference", *available()])
    def implementation(request):
        if request.param == "reference":
            yield reference
            return
        cpu.set_isa(request.param)
        yield native
        cpu.set_isa("")

    return implementation
