"""Row scores of every instruction set, and the reference, against fp64 softmax."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_case
from isas import implementations

from vllm_sparse.kernels import cpu, reference
from vllm_sparse.kernels.block_indices import BLOCK
from vllm_sparse.kernels.reference import RowScores
from vllm_sparse.kernels.row_scoring import row_scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# One implementation of row_scores.
score = implementations(reference.row_scores, row_scores)


def truth(case: Case, positions: torch.Tensor, heads: torch.Tensor, dtype=torch.float64):
    """Mass of every key, [h, R, n]: softmax over the whole row, written apart from `reference`."""
    n, page = int(case.seq_lens[0]), case.k_cache.shape[2]
    key = torch.arange(n)
    pages = case.block_table[0][key // page].long()
    keys = case.k_cache[pages, :, key % page].to(dtype)  # [n, Hkv, D]
    group = case.q.shape[1] // keys.shape[1]
    mass = torch.zeros(len(heads), len(positions), n, dtype=torch.float64)
    for i, head in enumerate(heads.tolist()):
        for r, position in enumerate(positions.tolist()):
            if position < 0:
                continue
            logits = keys[: position + 1, head // group] @ case.q[r, head].to(dtype) * case.scale
            mass[i, r, : position + 1] = torch.softmax(logits.float().double(), 0)
    return mass


def rows_in(case: Case, count: int, seed: int = 0) -> torch.Tensor:
    """Ascending positions, the first and the last key among them."""
    n = int(case.seq_lens[0])
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(n, (count,), generator=generator)
    positions[0], positions[-1] = 0, n - 1
    return positions.sort().values


def check(
    case: Case,
    got: RowScores,
    positions: torch.Tensor,
    heads: torch.Tensor,
    base_from: torch.Tensor | None = None,
    by_heaviest: bool = False,
    logits: float = 4.0,
) -> None:
    mass = truth(case, positions, heads)
    n = mass.shape[2]
    # fp32 knows a logit to its magnitude times epsilon, summed over the head size.
    relative = 4e-6 * max(logits, 4.0)
    blocks = torch.nn.functional.pad(mass, (0, -n % BLOCK)).unflatten(-1, (-1, BLOCK))
    assert got.blocks.shape == blocks.shape[:3]
    torch.testing.assert_close(
        got.blocks.double(), blocks.sum(-1), rtol=relative, atol=relative * 1e-2
    )
    if got.squares is not None:
        squares = blocks.square().sum(-1)
        torch.testing.assert_close(
            got.squares.double(), squares, rtol=2 * relative, atol=relative * 1e-2
        )
    if base_from is not None:
        block = torch.arange(n) // BLOCK
        mass = mass.masked_fill((block == 0) | (block >= base_from[:, None]), 0.0)
    worth = mass.amax(1) if by_heaviest else mass.sum(1) - mass.amax(1)
    columns = got.columns
    assert columns.dtype == torch.int64 and ((columns >= 0) & (columns < n)).all()
    for row in columns.tolist():
        assert len(set(row)) == len(row)
    best = worth.topk(columns.shape[1]).values
    torch.testing.assert_close(
        worth.gather(1, columns), best, rtol=4 * relative, atol=4e-7 * len(positions)
    )
    wanted = mass.gather(2, columns[:, None].expand(-1, len(positions), -1))
    torch.testing.assert_close(
        got.column_mass.double(), wanted, rtol=relative, atol=relative * 1e-2
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 111, 2000])
def test_lengths(score, n, dtype):
    rows = min(n, 40)
    case = make_case([rows], [n], dtype=dtype)
    positions, heads = rows_in(case, rows), torch.arange(4)
    got = score(
        case.q, case.k_cache, case.block_table[0], positions, heads, n,
        scale=case.scale, columns=min(n, 70), squares=True,
    )  # fmt: skip
    check(case, got, positions, heads)


@pytest.mark.parametrize("by_heaviest", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 12, 16, 17, 32, 48, 63, 64])
def test_row_counts_and_bases(score, rows, by_heaviest):
    n = 700
    case = make_case([rows], [n], heads=6, kv_heads=2)
    positions, heads = rows_in(case, rows, rows), torch.tensor([0, 2, 3, 5])
    base_from = positions // BLOCK - 1
    got = score(
        case.q, case.k_cache, case.block_table[0], positions, heads, n,
        scale=case.scale, columns=100, base_from=base_from, by_heaviest=by_heaviest,
    )  # fmt: skip
    assert got.squares is None
    check(case, got, positions, heads, base_from, by_heaviest)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page", "layout"),
    [
        (1, 1, 64, 16, "head-major"),
        (8, 2, 128, 128, "token-major"),
        (6, 2, 96, 32, "head-major"),
        (5, 1, 80, 48, "head-major"),
        (2, 2, 256, 64, "token-major"),
        (34, 2, 64, 16, "head-major"),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_shapes(score, heads, kv_heads, head_size, page, layout, threads):
    n = 450
    case = make_case(
        [20], [n], heads=heads, kv_heads=kv_heads, head_size=head_size, page=page, layout=layout
    )
    positions, wanted = rows_in(case, 20), torch.arange(heads)
    cpu.set_threads(threads)
    try:
        got = score(
            case.q, case.k_cache, case.block_table[0], positions, wanted, n,
            scale=case.scale, columns=33, squares=True,
        )  # fmt: skip
    finally:
        cpu.set_threads(1)
    check(case, got, positions, wanted)


def test_strided_queries(score):
    case = make_case([30], [333])
    case.q = torch.randn(30, 7, 128)[:, 2:6, 32:96]
    positions, heads = rows_in(case, 30), torch.arange(4)
    got = score(
        case.q, case.k_cache, case.block_table[0], positions, heads, 333,
        scale=case.scale, columns=10,
    )  # fmt: skip
    check(case, got, positions, heads)


def test_without_columns_as_with_them(score):
    case = make_case([9], [1000])
    positions, heads = rows_in(case, 9), torch.arange(4)
    where = (case.q, case.k_cache, case.block_table[0], positions, heads, 1000)
    without = score(*where, scale=case.scale, squares=True)
    assert without.columns.shape == (4, 0) and without.column_mass.shape == (4, 9, 0)
    check(case, without, positions, heads)
    assert torch.equal(without.blocks, score(*where, scale=case.scale, columns=64).blocks)


def test_nothing_to_score(score):
    case = make_case([3], [100])
    table, positions = case.block_table[0], torch.tensor([5, 50, 99])
    none = torch.zeros(0, dtype=torch.int64)
    got = score(case.q, case.k_cache, table, positions, none, 100, scale=1.0, columns=5)
    assert got.blocks.shape == (0, 3, 2) and got.column_mass.shape == (0, 3, 5)
    got = score(case.q[:0], case.k_cache, table, none, torch.arange(4), 100, scale=1.0, columns=5)
    assert got.blocks.shape == (4, 0, 2)
    assert ((got.columns >= 0) & (got.columns < 100)).all()
    got = score(case.q, case.k_cache, table, positions - 99, torch.arange(4), 100, scale=1.0)
    assert (got.blocks[:, :2] == 0).all() and (got.blocks[:, 2, 0] == 1).all()


@pytest.mark.parametrize("logits", [30.0, 1e4, 1e30])
def test_huge_logits(score, logits):
    n = 500
    case = make_case([16], [n])
    case.q *= logits
    positions, heads = rows_in(case, 16), torch.arange(4)
    got = score(
        case.q, case.k_cache, case.block_table[0], positions, heads, n,
        scale=case.scale, columns=20, squares=True,
    )  # fmt: skip
    assert got.blocks.isfinite().all()
    if logits < 1e4:
        check(case, got, positions, heads, logits=8 * logits)
    # Above, a row is one key, of as good as the largest logit.
    torch.testing.assert_close(got.blocks.sum(-1), torch.ones(4, 16), rtol=1e-5, atol=0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_rows_that_are_not_finite_are_nan_and_no_others(score, poison, where):
    n = 300
    case = make_case([20], [n])
    positions, heads = torch.arange(n - 20, n), torch.arange(4)
    expected = torch.zeros(4, 20, dtype=torch.bool)
    if where == "query":
        case.q[7, 2, 3] = poison
        expected[2, 7] = True
    else:
        page = case.k_cache.shape[2]
        case.k_cache[case.block_table[0][290 // page].long(), 1, 290 % page, 3] = poison
        expected[2:, 10:] = True
    got = score(
        case.q, case.k_cache, case.block_table[0], positions, heads, n,
        scale=case.scale, columns=n, squares=True, base_from=positions // BLOCK,
    )  # fmt: skip
    assert torch.equal(got.blocks.isnan().all(-1), expected)
    assert torch.equal(got.blocks.isnan().any(-1), expected)
    assert torch.equal(got.squares.isnan().any(-1), expected)
    assert torch.equal(got.columns.sort(-1).values, torch.arange(n).expand(4, -1))


def test_ties_and_too_few_keys_with_mass(score):
    n = 300
    case = make_case([2], [n], heads=1, kv_heads=1)
    case.q.zero_()
    positions = torch.tensor([99, 99])
    got = score(
        case.q, case.k_cache, case.block_table[0], positions, torch.arange(1), n,
        scale=case.scale, columns=200,
    )  # fmt: skip
    check(case, got, positions, torch.arange(1))
    assert set(got.columns[0, :100].tolist()) == set(range(100))
    assert (got.column_mass[0, :, 100:] == 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"columns": 101}, "columns: got 101"),
        ({"columns": -1}, "columns: got -1"),
        ({"positions": torch.arange(4)}, "positions, base_from: got 4"),
        ({"base_from": torch.arange(4)}, "positions, base_from: got 3 and 4"),
        ({"q": torch.zeros(65, 4, 64)}, "q: got 65 rows"),
        ({"q": torch.zeros(3, 5, 64)}, "5 query heads"),
    ],
)
def test_arguments_that_do_not_fit(score, change, words):
    case = make_case([3], [100])
    arguments = {
        "q": case.q, "k_cache": case.k_cache, "block_table": case.block_table[0],
        "positions": torch.arange(3), "heads": torch.arange(4), "seq_len": 100, "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        score(**{**arguments, **change})
