"""The Triton sparse prefill against fp64 masked softmax."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_close, make_case, random_indices
from gpu_cases import ANY_DTYPE, BFLOAT16, FLOAT16, FLOAT32, caches_to_device, to_device

from vllm_sparse.kernels import reference
from vllm_sparse.kernels.block_indices import BlockIndices
from vllm_sparse.kernels.gpu import sparse_prefill as kernel
from vllm_sparse.kernels.gpu.sparse_prefill import sparse_prefill

DTYPES = [FLOAT32, FLOAT16, BFLOAT16]


def run(case: Case, indices: BlockIndices | None, **more) -> tuple[torch.Tensor, torch.Tensor]:
    on = caches_to_device(case)
    # Poisoned and filled before the truth is known: nothing may be left over or borrowed.
    out = torch.full_like(on.q, torch.nan)
    indices = None if indices is None else to_device(indices)
    more = {k: to_device(v) if isinstance(v, torch.Tensor) else v for k, v in more.items()}
    got = sparse_prefill(*on.args, indices, scale=case.scale, out=out, **more)
    assert got[0].data_ptr() == out.data_ptr()
    return got[0].cpu(), got[1].cpu()


def check(case: Case, indices: BlockIndices | None, logits: float = 0.0) -> None:
    assert_close(case, indices, run(case, indices), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 111, 2000])
def test_lengths(n, dtype):
    case = make_case([min(n, 130)], [n], heads=2, kv_heads=1, dtype=dtype)
    check(case, None)
    check(case, random_indices(case, 0.4))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page"),
    [
        pytest.param(*t, id="H{}-KV{}-D{}-page{}".format(*t))
        for t in [(1, 1, 64, 16), (4, 1, 128, 128), (3, 1, 96, 32), (5, 1, 80, 48), (2, 2, 256, 64)]
    ],
)
def test_shapes(heads, kv_heads, head_size, page):
    case = make_case(
        [70, 1, 66], [70, 200, 190], heads=heads, kv_heads=kv_heads, head_size=head_size,
        page=page, dtype=ANY_DTYPE,
    )  # fmt: skip
    check(case, None)
    check(case, random_indices(case, 0.3))


def test_token_major_pages_and_strided_queries():
    case = make_case([90], [200], layout="token-major", page=32, dtype=ANY_DTYPE)
    wide = torch.randn(90, 7, 128).to(ANY_DTYPE)
    case.q = wide[:, 2:6, 32:96]
    check(case, random_indices(case, 0.5))


def test_chunks_give_what_the_whole_prompt_gives():
    whole = make_case([256], [256], heads=2, kv_heads=1, dtype=ANY_DTYPE)
    chunk = make_case([128], [256], heads=2, kv_heads=1, dtype=ANY_DTYPE)
    chunk.q = whole.q[128:]
    chunk.k_cache, chunk.v_cache = whole.k_cache, whole.v_cache
    chunk.block_table = whole.block_table
    all_rows, last_rows = run(whole, None), run(chunk, None)
    torch.testing.assert_close(all_rows[0][128:], last_rows[0])
    torch.testing.assert_close(all_rows[1][128:], last_rows[1])


def test_rows_that_select_nothing():
    case = make_case([130], [300], dtype=ANY_DTYPE)
    out, lse = run(case, BlockIndices.from_masks(torch.zeros(3, 4, 5, dtype=torch.bool)))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_no_queries_and_no_keys():
    case = make_case([0, 5], [0, 5], dtype=ANY_DTYPE)
    check(case, None)
    empty = make_case([0], [0], dtype=ANY_DTYPE)
    out, lse = run(empty, None)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_invalid_entries_are_ignored():
    case = make_case([64], [200], heads=2, kv_heads=1, dtype=ANY_DTYPE)
    blocks = [[1, -1, -(2**31), 2**31 - 1, 4, 100, 2, 200 // 64 + 1], [7, -3, 1]]
    columns = [[-1, 3, -(2**31), 200, 2**31 - 1, 20], [5000, 3]]
    indices = BlockIndices(
        num_heads=2,
        tile_offsets=torch.tensor([0, 1], dtype=torch.int32),
        block_offsets=torch.tensor([0, 8, 11], dtype=torch.int32),
        blocks=torch.tensor([*blocks[0], *blocks[1]], dtype=torch.int32),
        column_offsets=torch.tensor([0, 6, 8], dtype=torch.int32),
        columns=torch.tensor([*columns[0], *columns[1]], dtype=torch.int32),
    )
    check(case, indices)


def test_lists_that_are_longer_than_what_they_hold():
    """Lists made on a GPU have room for more than the offsets reach; what is there is anything."""
    case = make_case([100], [300], dtype=ANY_DTYPE)
    indices = random_indices(case, 0.4)
    junk = torch.randint(-(2**31), 2**31 - 1, (500,)).to(torch.int32)
    longer = BlockIndices(
        indices.num_heads,
        indices.tile_offsets,
        indices.block_offsets,
        torch.cat([indices.blocks, junk]),
        indices.column_offsets,
        torch.cat([indices.columns, junk]),
    )
    assert_close(case, indices, run(case, longer))


def test_a_query_before_all_its_selected_keys():
    # The tile selects only its own diagonal block's later half: the first queries see nothing.
    case = make_case([64], [96], heads=1, kv_heads=1, dtype=ANY_DTYPE)
    check(case, BlockIndices.from_masks(torch.tensor([[[False, True]]])))


@pytest.mark.parametrize("shared", ["heads", "tiles", "nothing"])
def test_either_pairing_reads_what_each_list_selects(shared):
    """Two tiles of two heads whose lists are alike across heads, across tiles, or not at all."""
    case = make_case([128], [1500], heads=2, kv_heads=1, dtype=ANY_DTYPE)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 2, 24, generator=generator) < 0.4
    if shared == "heads":
        mask[:, 1] = mask[:, 0]
    elif shared == "tiles":
        mask[1] = mask[0]
    # More of them outside the blocks than are handled at once.
    columns = torch.arange(0, 1430, dtype=torch.int32).expand(2, 2, -1)
    last_key = torch.tensor([1435, 1499])
    check(case, reference.index_lists(mask, columns, last_key))


def test_tiles_with_the_most_keys_go_first(monkeypatch):
    """A head that reads everything beside heads of one block: its tiles are not among the last."""
    case = make_case([400, 70], [3000, 900], heads=4, kv_heads=2, dtype=ANY_DTYPE)
    parts = [torch.zeros(7, 4, 47, dtype=torch.bool), torch.zeros(2, 4, 15, dtype=torch.bool)]
    for mask in parts:
        mask[:, 1] = True
        mask[..., 0] = True
    indices = BlockIndices.cat([BlockIndices.from_masks(mask) for mask in parts])
    kept = []
    pack = kernel._pack
    monkeypatch.setattr(kernel, "_pack", lambda *a: kept.append(pack(*a)) or kept[0])
    check(case, indices)
    records, order = kept[0][0].cpu(), kept[0][1].cpu().long()
    assert order.sort().values.tolist() == list(range(len(records)))
    keys = torch.where(records[:, 0] < 0, 0, records[:, 6] * 64 + records[:, 7])[order]
    assert keys[0] > 2900 and (keys[1:] <= keys[:-1] * 1.25).all()
    assert (keys.cummin(0).values * 1.25 >= keys).all()


@pytest.mark.parametrize("window", [1, 64, 100, 1000])
@pytest.mark.parametrize("density", [None, 0.5])
def test_a_window(window, density):
    case = make_case([130], [300], heads=3, kv_heads=1, dtype=ANY_DTYPE)
    indices = None if density is None else random_indices(case, density)
    got = run(case, indices, window=window)
    want = reference.sparse_prefill(*case.args, indices, scale=case.scale, window=window)
    close(case, got, want)


def test_sinks():
    case = make_case([70, 3], [130, 3], heads=4, kv_heads=2, dtype=ANY_DTYPE)
    sinks = torch.tensor([-torch.inf, 0.0, 2.5, 40.0])
    for indices in (None, random_indices(case, 0.3)):
        got = run(case, indices, sinks=sinks)
        want = reference.sparse_prefill(*case.args, indices, scale=case.scale, sinks=sinks)
        close(case, got, want)


def close(case: Case, got: tuple, want: tuple) -> None:
    tolerance = 2e-5 if case.q.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", ["huge positive", "huge negative", "equal", "one dominates"])
def test_logit_regimes(logits, dtype):
    case = make_case([65], [200], heads=2, kv_heads=1, dtype=dtype)
    sign = torch.sign(case.q.float().mean((0, 1)))
    if "huge" in logits:
        case.q = (sign * 8).expand_as(case.q).to(dtype).contiguous()
        factor = 8 if logits == "huge positive" else -8
        # nan rows stay nan: they belong to nobody
        case.k_cache.copy_((case.k_cache.float().abs() * sign * factor).to(dtype))
    elif logits == "equal":
        case.q = torch.zeros_like(case.q)
    else:
        case.k_cache[case.block_table[0, 3], :, 5] = (case.q[0, 0].float() * 6).to(dtype)
    check(case, random_indices(case, 0.5), 500.0 if "huge" in logits else 0.0)


def test_two_halves_merge_into_the_whole():
    case = make_case([64], [256], heads=2, kv_heads=1, dtype=ANY_DTYPE)
    half = torch.tensor([True, False, True, False]).expand(1, 2, 4)
    a = run(case, BlockIndices.from_masks(half))
    b = run(case, BlockIndices.from_masks(~half))
    assert_close(case, None, reference.merge(*a, *b))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"q": lambda c: c.q.double()}, "float64"),
        ({"q": lambda c: c.q[..., :48]}, "head size 48"),
        ({"q": lambda c: c.q[:, :3]}, "multiple of KV heads"),
        ({"block_table": lambda c: c.block_table.long()}, "block_table: got torch.int64"),
        ({"query_start_loc": lambda c: c.query_start_loc[:1]}, "query_start_loc"),
        ({"scale": lambda c: 0.0}, "scale: got 0.0"),
        ({"v_cache": lambda c: c.v_cache.contiguous()}, "strides"),
        (
            {"k_cache": lambda c: c.k_cache[:, :, :8], "v_cache": lambda c: c.v_cache[:, :, :8]},
            "pages of 8",
        ),
        ({"q": lambda c: c.q.transpose(0, 2).contiguous().transpose(0, 2)}, "stride"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wrong_arguments_are_named(change, names):
    case = make_case([20], [50], dtype=ANY_DTYPE)
    for field, make in change.items():
        setattr(case, field, make(case))
    with pytest.raises(ValueError, match=names):
        sparse_prefill(*case.args, None, scale=case.scale)


def test_indices_of_other_heads_are_refused():
    case = make_case([20], [50], dtype=ANY_DTYPE)
    indices = BlockIndices.everything([20], [50], num_heads=2)
    with pytest.raises(ValueError, match="made for 2 query heads"):
        sparse_prefill(*case.args, indices, scale=case.scale)
