"""Linear layers of few rows on every instruction set, against fp64 and by hand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from isas import available, implementations
from test_prefill import DTYPES

from vllm_sparse.kernels import cpu, linear_reference
from vllm_sparse.kernels.linear import PackedWeight, linear

# Passes of one to four rows, a group of 64 and a block of 256.
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 63, 64, 65, 130, 257]
OUTPUTS = [1, 3, 4, 5, 31, 32, 33, 65, 130]  # strips of 4, panels of 32
# Steps of 16 fp32 numbers or 32 of 16 bits, chunks of 1024 or 2048.
INPUTS = [1, 15, 16, 17, 33, 111, 1024, 1025, 2000, 2048, 2049, 4100]

any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
missing_or_not = pytest.mark.parametrize("missing", [False, True], ids=["native", "no library"])
needs_native = pytest.mark.skipif(
    cpu.native_error() is not None, reason="the native extension is not built"
)


def packed(x, weight, bias=None, *, out=None):
    return linear(x, PackedWeight(weight), bias, out=out)


# One implementation: (x, weight, bias, out=...), of weights as they are.
run = implementations(linear_reference.linear, packed)


@pytest.fixture
def set_threads():
    before = cpu.num_threads()
    yield cpu.set_threads
    cpu.set_threads(before)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def between_nans(rows: torch.Tensor, pad: int) -> torch.Tensor:
    """The rows, `pad` apart, with NaN before, between and after them."""
    wide = torch.full((len(rows) + 2, rows.shape[1] + pad), torch.nan, dtype=rows.dtype)
    inner = wide[1:-1, pad // 2 : pad // 2 + rows.shape[1]]
    return inner.copy_(rows)


@cache  # each implementation is held to the same
def problem(m: int, n: int, k: int, dtype: torch.dtype, biased: bool):
    """(x, weight, bias, truth in fp64, allowed), where this is how far each output may be off.

    |out - truth| <= 2 |torch in the same dtype - truth| + rounding. Rounding: half an epsilon of
    an output in 16 bits, and that of sums in fp32 in another order than torch's. A sum is made of
    many that are rounded, by half an epsilon of no more than the sum of all magnitudes: two of
    these epsilons, where 1.6 is the most that was seen.
    """
    x, weight = numbers(m, k, dtype=dtype, seed=k), numbers(n, k, dtype=dtype, seed=n + 1)
    bias = numbers(n, dtype=dtype, seed=n + 2) if biased else None
    added = bias.double() if biased else torch.zeros(n, dtype=torch.float64)
    truth = x.double() @ weight.double().T + added
    magnitudes = x.double().abs() @ weight.double().abs().T + added.abs()
    theirs = torch.nn.functional.linear(x, weight, bias).double()
    allowed = 2 * (theirs - truth).abs() + 2 * torch.finfo(torch.float32).eps * magnitudes
    if dtype != torch.float32:
        allowed += torch.finfo(dtype).eps / 2 * truth.abs()
    return x, weight, bias, truth, allowed


def assert_right(given, got: torch.Tensor) -> None:
    x, *_, truth, allowed = given
    assert got.shape == truth.shape and got.dtype == x.dtype
    excess = (got.double() - truth).abs() - allowed
    assert (excess <= 0).all(), f"beyond what is allowed by {excess.max():.3g}"  # NaN is as well


def check(run, m: int, n: int, k: int, dtype: torch.dtype, biased: bool = True) -> None:
    given = problem(m, n, k, dtype, biased)
    out = torch.full((m, n), torch.nan, dtype=dtype)
    assert run(*given[:3], out=out) is out
    assert_right(given, out)


@any_dtype
@pytest.mark.parametrize("m", ROWS)
def test_rows(run, m, dtype):
    check(run, m, 33, 111, dtype)
    check(run, m, 70, 1025, dtype, biased=False)


@any_dtype
@pytest.mark.parametrize("n", OUTPUTS)
def test_weights(run, n, dtype):
    for k in INPUTS:
        for m in (1, 2, 9):
            check(run, m, n, k, dtype, biased=m < 9)


@any_dtype
def test_groups_panels_and_chunks_together(run, dtype):
    check(run, 321, 130, 2049, dtype)


@any_dtype
@pytest.mark.parametrize("k", [1, 33, 1024, 4100])
def test_whole_numbers_are_exact(run, k, dtype):
    # The dtypes have all whole numbers up to 256, and no sum is larger: a product that is left
    # out, taken twice or put elsewhere shows, in 16 bits too.
    x, weight = (numbers(rows, k, dtype=dtype, seed=rows) for rows in (70, 37))
    x, weight = x.sign(), weight.sign() * (weight.abs() > 0.7)
    bias = torch.arange(37).to(dtype)
    truth = x.double() @ weight.double().T + bias.double()
    assert truth.abs().max() <= 256
    for m in (1, 3, 8, 13, 70):
        assert torch.equal(run(x[:m], weight, bias).double(), truth[:m])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sums_are_fp32_and_rounded_once(run, dtype):
    # 300 x 300 is beyond fp16, and bf16 has no 90001.
    x = torch.tensor([[300.0, 300.0, 1.0]], dtype=dtype)
    assert run(x, torch.tensor([[300.0, -300.0, 1.0]], dtype=dtype)).item() == 1
    # Neighbours are 2 apart here. Rounded before the bias as well, this would be `large`.
    large = 2 / torch.finfo(dtype).eps
    x = torch.tensor([[large, 0.5]], dtype=dtype)
    out = run(x, torch.ones(1, 2, dtype=dtype), torch.tensor([0.75], dtype=dtype))
    assert out.item() == large + 2


@any_dtype
@pytest.mark.parametrize(("m", "k"), [(1, 17), (5, 1024), (9, 1000), (66, 111)])
@pytest.mark.parametrize("pad", [1, 16])
def test_rows_of_wider_tensors(run, m, k, pad, dtype):
    given = problem(m, 37, k, dtype, True)
    x, weight, bias = given[:3]
    out = between_nans(torch.zeros(m, 37, dtype=dtype), pad)
    run(between_nans(x, pad), between_nans(weight, pad), bias, out=out)
    assert_right(given, out)


@any_dtype
def test_one_row_for_all(run, dtype):
    # As torch.expand makes it: rows with a stride of 0.
    given = problem(1, 37, 111, dtype, False)
    x, weight = given[:2]
    for row in run(x.expand(6, 111), weight).split(1):
        assert_right(given, row)


@any_dtype
@pytest.mark.parametrize("m", [0, 1, 3, 66])
def test_nothing_beside_the_output_is_written(run, m, dtype):
    given = problem(m, 37, 111, dtype, True)
    wide = torch.full((m + 2, 37 + 9), 7.0, dtype=dtype)
    inside = wide[1 : m + 1, 4 : 4 + 37]
    run(*given[:3], out=inside)
    assert_right(given, inside)
    inside.fill_(7.0)
    assert (wide == 7.0).all()


@any_dtype
def test_weights_in_columns(isa, dtype):
    """As a checkpoint of [K, N] is transposed; and every second input of wider rows."""
    given = problem(5, 37, 111, dtype, True)
    x, weight, bias = given[:3]
    assert_right(given, packed(x, weight.t().contiguous().t(), bias))
    wide = torch.full((37, 222), torch.nan, dtype=dtype)
    wide[:, ::2] = weight
    assert_right(given, packed(x, wide[:, ::2], bias))


def test_no_rows_and_no_outputs(run):
    assert run(torch.zeros(0, 5), torch.zeros(3, 5)).shape == (0, 3)
    assert run(torch.zeros(2, 5), torch.zeros(0, 5), torch.zeros(0)).shape == (2, 0)


@any_dtype
@pytest.mark.parametrize("m", [2, 5, 9, 70])
@pytest.mark.parametrize("at", [0, 16])
def test_what_is_not_finite_stays_in_its_row(run, at, m, dtype):
    # The last input stands beside the zeros that fill its step, and row 1 beside all passes.
    x, weight, bias, *_ = problem(m, 37, 17, dtype, True)
    expected = run(x, weight, bias)
    others = torch.arange(m) != 1
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = x.clone()
        bad[1, at] = value
        out = run(bad, weight, bias)
        assert torch.equal(out[others], expected[others])
        want = (value * weight[:, at].double()).to(dtype)
        torch.testing.assert_close(out[1], want, rtol=0, atol=0, equal_nan=True)


@any_dtype
@pytest.mark.parametrize("m", [1, 7])
def test_a_weight_that_is_not_finite_stays_in_its_output(run, m, dtype):
    x, weight, bias, *_ = problem(m, 37, 17, dtype, True)
    expected = run(x, weight, bias)
    bad = weight.clone()
    bad[36, 16], bad[2, 3] = torch.nan, torch.nan  # of a strip alone, and of one with others
    out = run(x, bad, bias)
    assert out[:, [2, 36]].isnan().all()
    others = [n for n in range(37) if n not in (2, 36)]
    assert torch.equal(out[:, others], expected[:, others])


@any_dtype
def test_a_call_leaves_nothing_to_the_next(isa, dtype):
    # Copies of the inputs are kept: those of more rows and of longer ones were here before.
    given = problem(7, 37, 33, dtype, True)
    packed(torch.full((300, 4100), torch.nan, dtype=dtype), numbers(40, 4100, dtype=dtype))
    assert_right(given, packed(*given[:3]))


@any_dtype
@pytest.mark.parametrize(("n", "k"), [(37, 111), (65, 4100)])
def test_a_row_has_the_same_bits_in_every_batch(isa, n, k, dtype):
    x, weight, bias, *_ = problem(257, n, k, dtype, True)
    weight = PackedWeight(weight)
    whole = linear(x, weight, bias)
    assert torch.equal(linear(x, weight, bias), whole)
    for m in ROWS:
        assert torch.equal(linear(x[:m], weight, bias), whole[:m]), m
        assert torch.equal(linear(x[257 - m :], weight, bias), whole[257 - m :]), m
    for row in range(0, 257, 5):
        assert torch.equal(linear(x[row : row + 1], weight, bias)[0], whole[row])


@needs_native
@any_dtype
def test_more_threads_give_the_same_result(set_threads, dtype):
    x, weight, bias, *_ = problem(321, 130, 2049, dtype, True)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        one = PackedWeight(weight)
        results.append([linear(x[:m], one, bias) for m in (1, 2, 9, 65, 130, 321)])
    for many in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], many, strict=True))


@needs_native
def test_callers_at_the_same_time(set_threads):
    set_threads(2)
    x = numbers(70, 2000, dtype=torch.float32)
    weights = [PackedWeight(numbers(130, 2000, dtype=x.dtype, seed=i)) for i in range(4)]
    expected = [linear(x + i, weight) for i, weight in enumerate(weights)]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(5):
            got = callers.map(lambda i: linear(x + i, weights[i]), range(4))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@any_dtype
@missing_or_not
def test_the_given_weights_are_not_needed_any_more(missing, dtype, monkeypatch):
    if missing:
        monkeypatch.setattr(cpu, "native", lambda: None)
    given = problem(5, 37, 111, dtype, True)
    x, weight, bias = given[:3]
    for mine in (weight.clone(), between_nans(weight, 3), torch.nn.Parameter(weight.clone())):
        one = PackedWeight(mine)
        mine.data.fill_(torch.nan)
        assert_right(given, linear(x, one, bias))


@any_dtype
def test_packed_weights_serve_every_instruction_set(dtype):
    given = problem(5, 37, 111, dtype, True)
    one = PackedWeight(given[1])
    try:
        for name in available():
            cpu.set_isa(name)
            assert_right(given, linear(given[0], one, given[2]))
            assert torch.equal(PackedWeight(given[1]).data, one.data)
    finally:
        cpu.set_isa("")


@needs_native
@pytest.mark.parametrize(
    ("n", "k", "dtype", "nbytes"),
    [
        (32, 64, torch.float32, 32 * 64 * 4),
        (32, 64, torch.bfloat16, 32 * 64 * 2),
        (33, 65, torch.float16, 36 * 192),
        (1, 1, torch.float32, 4 * 64),
        (0, 5, torch.float32, 0),
    ],
)
def test_packed_weights_are_as_large_as_the_weights_but_for_what_fills_them(n, k, dtype, nbytes):
    assert PackedWeight(torch.zeros(n, k, dtype=dtype)).nbytes == nbytes


@any_dtype
def test_without_the_library_the_reference_runs(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "native", lambda: None)
    for m in (0, 1, 9):
        x, weight, bias, *_ = problem(m, 37, 111, dtype, True)
        expected = linear_reference.linear(x, weight, bias)
        for one in (weight, weight.t().contiguous().t(), between_nans(weight, 3)):
            one = PackedWeight(one)
            assert one.nbytes == weight.nbytes
            out = torch.full_like(expected, torch.nan)
            assert linear(x, one, bias, out=out) is out and torch.equal(out, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 7)}, r"weight: got shape \(8, 16\) for x \(2, 7\); .* \[N, 7\]"),
        ({"x": torch.zeros(2, 3, 16)}, r"x: got shape \(2, 3, 16\); give \[M, K\]"),
        ({"x": torch.zeros(2, 0)}, r"x: got shape \(2, 0\); .* K of at least 1"),
        ({"x": torch.zeros(2, 16, dtype=torch.float64)}, "x: got torch.float64; give one of .*16"),
        ({"x": torch.zeros(2, 16).bfloat16()}, "weight: got torch.float32 for x of .*bfloat16"),
        ({"x": torch.zeros(16, 2).T}, "x: the last dimension has stride 2; it must be 1"),
        ({"x": torch.zeros(2, 16, device="meta")}, "weight: is on cpu, x on meta"),
        ({"bias": torch.zeros(7)}, r"bias: got shape \(7,\) .* it must be \[8\]"),
        ({"bias": torch.zeros(8).half()}, "bias: got torch.float16 for x of torch.float32"),
        ({"bias": torch.zeros(16)[::2]}, "bias: the last dimension has stride 2"),
        ({"out": torch.zeros(2, 7)}, r"out: got shape \(2, 7\); it must be \[2, 8\]"),
        ({"out": torch.zeros(2, 8).half()}, "out: got torch.float16 for x of torch.float32"),
        ({"out": torch.zeros(8, 2).T}, "out: the last dimension has stride 2"),
    ],
)
@missing_or_not
def test_what_does_not_fit_is_an_error(missing, change, message, monkeypatch):
    if missing:
        monkeypatch.setattr(cpu, "native", lambda: None)
    given = {"x": torch.zeros(2, 16), "weight": PackedWeight(torch.zeros(8, 16))} | change
    with pytest.raises(ValueError, match=message):
        linear(**given)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(8), r"weight: got \(8,\) of torch.float32; give \[N, K\]"),
        (torch.zeros(8, 0), r"weight: got \(8, 0\) .* K of at least 1"),
        (torch.zeros(8, 16, dtype=torch.float64), "of torch.float64; .* torch.float16"),
        (torch.zeros(8, 16, device="meta"), "weight: is on meta; .* takes CPU tensors"),
    ],
)
def test_weights_that_cannot_be_packed_are_named(weight, message):
    with pytest.raises(ValueError, match=message):
        PackedWeight(weight)
