"""Prefill kernels of every instruction set, and the reference, against fp64 masked softmax."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_close, make_case, one_list, random_indices
from isas import available, implementations

from vllm_sparse.kernels import cpu, reference
from vllm_sparse.kernels.block_indices import BlockIndices

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# One implementation of sparse_prefill.
prefill = implementations(reference.sparse_prefill, cpu.sparse_prefill)


def check(prefill, case: Case, indices: BlockIndices | None, logits: float = 0.0) -> None:
    # Poisoned and filled before the truth is known: nothing may be left over or borrowed.
    out = torch.full_like(case.q, torch.nan)
    got = prefill(*case.args, indices, scale=case.scale, out=out)
    assert got[0].data_ptr() == out.data_ptr()
    assert_close(case, indices, got, logits)


def everything(case: Case) -> BlockIndices:
    return BlockIndices.everything(case.query_lens, case.seq_lens.tolist(), case.q.shape[1])


def test_the_extension_is_built():
    assert cpu.native_error() is None
    assert "generic" in available()


shapes = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page"),
    [
        pytest.param(*t, id="H{}-KV{}-D{}-page{}".format(*t))
        for t in [
            (1, 1, 64, 16),
            (8, 2, 128, 128),
            (6, 2, 96, 32),
            (5, 1, 80, 48),
            (2, 2, 256, 64),
            (11, 1, 64, 16),
        ]
    ],
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 111, 2000])
def test_lengths(prefill, n, dtype):
    case = make_case([min(n, 130)], [n], heads=2, kv_heads=1, dtype=dtype)
    check(prefill, case, None)
    check(prefill, case, random_indices(case, 0.4))


@shapes
def test_shapes(prefill, heads, kv_heads, head_size, page):
    case = make_case(
        [70, 1, 129], [70, 300, 450], heads=heads, kv_heads=kv_heads, head_size=head_size, page=page
    )
    check(prefill, case, None)
    check(prefill, case, random_indices(case, 0.3))


def test_everything_selected_is_dense(prefill):
    case = make_case([100, 64, 1], [500, 64, 200], dtype=torch.float32)
    dense = prefill(*case.args, None, scale=case.scale)
    sparse = prefill(*case.args, everything(case), scale=case.scale)
    assert torch.equal(dense[0], sparse[0])
    assert torch.equal(dense[1], sparse[1])


def test_token_major_pages_and_strided_queries(prefill):
    case = make_case([90], [333], layout="token-major", page=32)
    wide = torch.randn(90, 7, 128)
    case.q = wide[:, 2:6, 32:96]
    out = torch.full((90, 4, 96), torch.nan)[..., 16:80]
    got = prefill(*case.args, everything(case), scale=case.scale, out=out)
    assert_close(case, None, got)


def test_rows_that_select_nothing(prefill):
    case = make_case([130], [400])
    nothing = BlockIndices.from_masks(torch.zeros(3, 4, 7, dtype=torch.bool))
    out, lse = prefill(
        *case.args, nothing, scale=case.scale, out=torch.full_like(case.q, torch.nan)
    )
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_invalid_entries_are_ignored(prefill):
    case = make_case([64], [200], heads=1, kv_heads=1)
    extremes = [-1, -(2**31), 2**31 - 1, 4, 100, 200 // 64 + 1]
    columns = [-1, -(2**31), 200, 2**31 - 1, 130]
    check(prefill, case, one_list([1, *extremes], columns))


def test_a_query_before_all_its_selected_keys(prefill):
    # The tile selects only its own diagonal block's later half: the first queries see nothing.
    case = make_case([64], [96], heads=1, kv_heads=1)
    indices = BlockIndices.from_masks(torch.tensor([[[False, True]]]))
    check(prefill, case, indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "logits", ["huge positive", "huge negative", "equal", "one dominates", "denormal"]
)
def test_logit_regimes(prefill, logits, dtype):
    case = make_case([65], [300], heads=2, kv_heads=1, dtype=dtype)
    keys = case.k_cache
    sign = torch.sign(case.q.float().mean((0, 1)))
    if logits in ("huge positive", "huge negative"):
        case.q = (sign * 8).expand_as(case.q).to(dtype)
        factor = 8 if logits == "huge positive" else -8
        # nan rows stay nan: they belong to nobody
        keys.copy_((keys.float().abs() * sign * factor).to(dtype))
    elif logits == "equal":
        case.q = torch.zeros_like(case.q)
    elif logits == "one dominates":
        page = case.block_table[0, 3]
        keys[page, :, 5] = (case.q[0, 0].float() * 6).to(dtype)
    elif logits == "denormal":
        case.q = (case.q.float() * 1e-5).to(dtype)
        keys.copy_((keys.float() * 1e-6).to(dtype))
    magnitude = 500.0 if "huge" in logits else 0.0
    check(prefill, case, None, magnitude)
    check(prefill, case, random_indices(case, 0.5), magnitude)


def test_more_threads_give_the_same_result():
    case = make_case([200, 40], [900, 40])
    one = cpu.sparse_prefill(*case.args, None, scale=case.scale)
    try:
        for threads in (2, 3, 1):
            cpu.set_threads(threads)
            assert cpu.num_threads() == threads
            many = cpu.sparse_prefill(*case.args, None, scale=case.scale)
            assert torch.equal(one[0], many[0])
            assert torch.equal(one[1], many[1])
    finally:
        cpu.set_threads(1)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"q": lambda c: c.q.double()}, "float64"),
        ({"q": lambda c: c.q[..., :48]}, "head size 48"),
        ({"q": lambda c: c.q[:, :3]}, "multiple of KV heads"),
        ({"block_table": lambda c: c.block_table.long()}, "int64"),
        ({"query_start_loc": lambda c: c.query_start_loc[:1]}, "query_start_loc"),
        (
            {"k_cache": lambda c: c.k_cache[:, :, :8], "v_cache": lambda c: c.v_cache[:, :, :8]},
            "pages of 8",
        ),
        ({"q": lambda c: c.q.transpose(0, 2).contiguous().transpose(0, 2)}, "stride"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wrong_arguments_are_named(change, names):
    case = make_case([20], [50])
    for field, make in change.items():
        setattr(case, field, make(case))
    with pytest.raises(ValueError, match=names):
        cpu.sparse_prefill(*case.args, None, scale=case.scale)


def test_indices_of_other_heads_are_refused():
    case = make_case([20], [50])
    with pytest.raises(ValueError, match="made for 2 query heads"):
        cpu.sparse_prefill(
            *case.args, BlockIndices.everything([20], [50], num_heads=2), scale=case.scale
        )
