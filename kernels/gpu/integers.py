"""Integer arithmetic of launches. Triton's own takes 4 us a call on the host, as it is made for
kernels as well, and a layer makes twenty."""

from __future__ import annotations


def cdiv(number: int, by: int) -> int:
    """number / by, rounded up."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`, which is 1 or more."""
    return 1 << (number - 1).bit_length()
