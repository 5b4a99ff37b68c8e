"""Attention with contextual positions on every instruction set, against fp64 and by hand."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_close, make_case
from cope_cases import cope_meaning, table
from isas import implementations
from test_prefill import DTYPES

from vllm_sparse import kernels
from vllm_sparse.kernels import cope, cope_reference, cpu

# One implementation of cope_attention.
attention = implementations(cope_reference.cope_attention, cope.cope_attention)


def check(attention, case: Case, positions: int = 17, logits: float = 0.0, **options) -> None:
    pos_emb = table(positions, case.q.shape[2], case.q.dtype)
    got = attention(*case.args, pos_emb, scale=case.scale, **options)
    assert_close(case, None, got, logits, cope_meaning(pos_emb))


def with_gates(case: Case, logit: float) -> Case:
    """The case with queries and keys whose products are all about this logit."""
    ones = torch.ones(case.q.shape[2])
    size = abs(logit) ** 0.5 / (case.scale * len(ones)) ** 0.5
    sign = 1 if logit > 0 else -1
    case.q = (ones * size + 0.01 * case.q.float()).to(case.q.dtype)
    case.k_cache = (ones * size * sign + 0.01 * case.k_cache.float()).to(case.q.dtype)
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 111, 2000])
def test_lengths(attention, n, dtype):
    check(
        attention, make_case([min(n, 70 if n < 200 else 9)], [n], heads=2, kv_heads=1, dtype=dtype)
    )


@pytest.mark.parametrize("positions", [1, 2, 17, 64, 65, 200])
def test_tables(attention, positions):
    check(attention, make_case([66, 1], [300, 250], heads=2, kv_heads=1), positions)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page"),
    [(8, 2, 128, 128), (6, 2, 96, 32), (5, 1, 80, 48), (2, 2, 256, 64), (11, 1, 64, 16)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(attention, heads, kv_heads, head_size, page, dtype):
    check(
        attention,
        make_case(
            [66, 1, 5], [66, 150, 90], heads=heads, kv_heads=kv_heads,
            head_size=head_size, page=page, dtype=dtype,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", [8.0, 0.5, -2.0, -30.0])
def test_how_soon_positions_end(attention, logit, dtype):
    # The last position is reached within a block, within a few, and never.
    case = with_gates(make_case([65, 1], [400, 400], heads=2, kv_heads=1, dtype=dtype), logit)
    check(attention, case, positions=64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", [600.0, -600.0])
def test_huge_logits(attention, logit, dtype):
    case = with_gates(make_case([65, 1], [200, 130], heads=2, kv_heads=1, dtype=dtype), logit)
    check(attention, case, logits=1000.0)


def test_token_major_pages_and_strided_tensors(attention):
    case = make_case([90], [333], layout="token-major", page=32)
    case.q = torch.randn(90, 7, 128)[:, 2:6, 32:96]
    out = torch.full((90, 4, 96), torch.nan)[..., 16:80]
    pos_emb = table(17, 128, torch.float32)[:, 64:]
    got = attention(*case.args, pos_emb, scale=case.scale, out=out)
    assert got[0] is out
    assert_close(case, None, got, meaning=cope_meaning(pos_emb))


def test_a_sequence_without_keys(attention):
    case = make_case([1, 2, 1], [0, 40, 0])
    out, lse = attention(*case.args, table(9, 64, torch.float32), scale=case.scale)
    assert (out[[0, 3]] == 0).all() and (lse[[0, 3]] == -torch.inf).all()
    check(attention, case)


def test_a_batch_is_its_sequences(attention):
    case = make_case([70, 1, 3], [130, 64, 65])
    pos_emb = table(9, 64, torch.float32)
    out, lse = attention(*case.args, pos_emb, scale=case.scale)
    for s in range(3):
        rows = slice(*case.query_start_loc[s : s + 2].tolist())
        alone = attention(
            case.q[rows], case.k_cache, case.v_cache, case.block_table[s : s + 1],
            torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
            case.seq_lens[s : s + 1], pos_emb, scale=case.scale,
        )  # fmt: skip
        assert torch.equal(out[rows], alone[0]) and torch.equal(lse[rows], alone[1])


def test_chunks_are_one_prompt(attention):
    # A position counts from the query backwards, so that chunks need nothing of each other.
    whole = make_case([300], [300])
    pos_emb = table(17, 64, torch.float32)
    expected, _ = attention(*whole.args, pos_emb, scale=whole.scale)
    for begin, end in ((0, 100), (100, 101), (101, 300)):
        starts = torch.tensor([0, end - begin], dtype=torch.int32)
        lens = torch.tensor([end], dtype=torch.int32)
        out, _ = attention(
            whole.q[begin:end], whole.k_cache, whole.v_cache, whole.block_table, starts, lens,
            pos_emb, scale=whole.scale,
        )  # fmt: skip
        torch.testing.assert_close(out, expected[begin:end], rtol=0, atol=1e-5)


def test_a_table_of_zeros_is_plain_attention(attention):
    case = make_case([70, 1], [200, 130])
    out, lse = attention(*case.args, torch.zeros(17, 64), scale=case.scale)
    plain = kernels.sparse_prefill(*case.args, None, scale=case.scale)
    torch.testing.assert_close((out, lse), plain, rtol=0, atol=1e-5)


def test_positions_by_hand(attention):
    # Logits of 0 make gates of 1/2: the fourth key of a query stands at position 2, the third at
    # 1.5. The query's product with position p's embedding is p.
    case = make_case([1], [4], heads=1, kv_heads=1)
    case.q = torch.zeros(1, 1, 64)
    case.q[0, 0, 0] = 1.0
    case.k_cache = torch.zeros_like(case.k_cache)
    pos_emb = torch.zeros(8, 64)
    pos_emb[:, 0] = torch.arange(8.0)
    _, lse = attention(*case.args, pos_emb, scale=1.0)
    expected = torch.logsumexp(torch.tensor([2.0, 1.5, 1.0, 0.5]), 0)
    assert lse.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_logits_that_are_not_finite_stay_in_their_row(attention, value, dtype):
    # A position that is no number must find its row of the table all the same.
    case = make_case([3], [100], heads=1, kv_heads=1, dtype=dtype)
    pos_emb = table(17, 64, dtype)
    expected, _ = attention(*case.args, pos_emb, scale=case.scale)
    case.q[1, 0, 0] = value
    out, _ = attention(*case.args, pos_emb, scale=case.scale)
    assert torch.equal(out[[0, 2]], expected[[0, 2]])
    assert out[1].isnan().all()


@pytest.mark.parametrize("logit", [8.0, 0.5, -30.0])
@pytest.mark.parametrize("positions", [1, 40])
def test_decode_in_ranges(attention, positions, logit):
    # The newest keys up to the last position, and the others as decode reads them: in ranges of
    # 1,024 keys and more where there are threads.
    case = make_case([1, 30, 1], [5000, 90, 65], heads=2, kv_heads=1)
    case = with_gates(case, logit)
    try:
        for threads in (1, 3):
            cpu.set_threads(threads)
            check(attention, case, positions)
    finally:
        cpu.set_threads(1)


def test_more_threads_give_the_same_result():
    case = make_case([200, 1], [900, 400])
    pos_emb = table(17, 64, torch.float32)
    one = cope.cope_attention(*case.args, pos_emb, scale=case.scale)
    try:
        for threads in (2, 3):
            cpu.set_threads(threads)
            many = cope.cope_attention(*case.args, pos_emb, scale=case.scale)
            assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])
    finally:
        cpu.set_threads(1)


@pytest.mark.parametrize(
    ("pos_emb", "starts", "names"),
    [
        (torch.zeros(8, 32), None, "head size 64"),
        (torch.zeros(8, 64, dtype=torch.bfloat16), None, "bfloat16"),
        (torch.zeros(0, 64), None, "at least one"),
        (torch.zeros(64), None, "must be"),
        (torch.zeros(8, 64), torch.zeros(3, dtype=torch.int32), "3 entries for 1 sequences"),
    ],
)
def test_wrong_arguments_are_named(pos_emb, starts, names):
    case = make_case([20], [50])
    if starts is not None:
        case.query_start_loc = starts
    with pytest.raises(ValueError, match=names):
        kernels.cope_attention(*case.args, pos_emb, scale=case.scale)


def test_fp8_caches_are_refused():
    case = make_case([20], [50])
    case.k_cache = case.k_cache.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="FP8"):
        kernels.cope_attention(*case.args, torch.zeros(8, 64), scale=case.scale)
