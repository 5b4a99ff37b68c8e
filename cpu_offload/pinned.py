"""Host memory that a GPU copies from at its full rate: page-locked, as CUDA calls it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial

import torch

logger = logging.getLogger("vllm_sparse.offload")


def pin(address: int, nbytes: int) -> Callable[[], object] | None:
    """Page-lock memory for the current GPU; returns what undoes it, to be called before the memory
    is given back. None, and a line in the log, where the system refuses: copies are right then, and
    slower."""
    runtime = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(address, nbytes, 0))
    if code == 0:
        return partial(runtime.cudaHostUnregister, address)
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # reports the error, which would be another call's else
    logger.warning(
        "The host store of %.2f GiB is not page-locked (cudaHostRegister says %d; `ulimit -l` may "
        "be too low): copies from it to the GPU are slower", nbytes / 2**30, code,
    )  # fmt: skip
    return None
