"""The instruction sets of this CPU, and a fixture that goes through them."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_sparse.kernels import cpu


def available() -> list[str]:
    if cpu.native_error():
        return []
    names = []
    for name in cpu.ISAS:
        try:
            cpu.set_isa(name)
        except ValueError:
            continue
        names.append(name)
    cpu.set_isa("")
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
