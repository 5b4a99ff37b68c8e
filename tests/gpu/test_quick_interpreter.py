"""What `quick_interpreter` leaves out of Triton's interpreter changes nothing that kernels do."""

from __future__ import annotations

import pytest
import quick_interpreter
import torch
import triton
from gpu_cases import HAS_GPU
from triton import language as tl

pytestmark = pytest.mark.skipif(HAS_GPU, reason="nothing is interpreted where there is a GPU")


@triton.jit
def _sum_of_run(key_a, a, key_b, b):
    return key_b, tl.where(key_a == key_b, a + b, b)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _doubled(x):
    return _larger(x, x) * 2


@triton.jit
def _scans(keys, values, sums, largest, ROWS: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)
    key, value = tl.load(keys + at), tl.load(values + at)
    _, total = tl.associative_scan((key, value), 1, _sum_of_run, reverse=REVERSE)
    tl.store(sums + at, total)
    tl.store(largest + at, _doubled(tl.associative_scan(value, 0, _larger)))


@triton.jit
def _overflows(x, out):
    tl.store(out, _doubled(tl.load(x)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows, n", [(1, 64), (4, 16), (2, 1)])
def test_scans(rows, n, reverse):
    generator = torch.Generator().manual_seed(n)
    keys = torch.randint(3, (rows, n), generator=generator).sort(1, descending=reverse).values
    values = torch.randint(-9, 9, (rows, n), generator=generator)
    sums, largest = torch.empty_like(values), torch.empty_like(values)
    _scans[(1,)](keys, values, sums, largest, ROWS=rows, N=n, REVERSE=reverse)
    for row in range(rows):
        for i in range(n):
            part = slice(i, None) if reverse else slice(0, i + 1)
            same = keys[row, part] == keys[row, i]
            assert sums[row, i] == values[row, part][same].sum()
    assert torch.equal(largest, 2 * values.cummax(0).values)


def test_integers_wrap_around_as_on_a_gpu():
    x, out = torch.tensor([2**30], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _overflows[(1,)](x, out)
    assert int(out) == -(2**31)


def test_the_language_is_as_it_was_after_a_kernel_and_after_one_that_fails():
    before = tl.load, tl.range, tl.core.arange
    x = torch.ones(1, dtype=torch.int32)
    _overflows[(1,)](x, x)
    with pytest.raises(triton.runtime.errors.InterpreterError):
        _overflows[(1,)](x, 3.5)
    assert (tl.load, tl.range, tl.core.arange) == before
    _overflows[(1,)](x, x)
    assert int(x) == 4


def test_types_are_told_apart_by_what_their_scalars_are_called():
    asked = []

    def slow(dtype):
        asked.append(dtype)
        return dtype.scalar.name

    quick = quick_interpreter.remembered_by_name(slow)
    types = [tl.int32, tl.uint8, tl.float32, tl.pointer_type(tl.int32), tl.pointer_type(tl.int8)]
    for dtype in types:
        block = tl.block_type(dtype, [4])
        assert quick(dtype) == quick(block) == quick(dtype) == slow(dtype)
    assert len(asked) == 2 * len(types)  # half of them by the last call of each
