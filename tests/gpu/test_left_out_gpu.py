"""The Triton mean correction against the fp64 softmax over keys that were replaced by means."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_close, left_out_oracle, make_case, one_list, random_indices
from gpu_cases import ANY_DTYPE, BFLOAT16, FLOAT16, FLOAT32
from test_prefill_gpu import run

from vllm_sparse.kernels import reference
from vllm_sparse.kernels.block_indices import BlockIndices


def check(case: Case, indices: BlockIndices) -> None:
    got = run(case, indices, mean_correction=True)
    assert_close(case, indices, got, meaning=left_out_oracle)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 1000])
def test_lengths(n, dtype):
    case = make_case([min(n, 130)], [n], heads=2, kv_heads=1, dtype=dtype)
    check(case, random_indices(case, 0.3))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page"),
    [
        pytest.param(*t, id="H{}-KV{}-D{}-page{}".format(*t))
        for t in [(4, 2, 128, 128), (3, 1, 96, 32), (5, 1, 80, 48), (2, 2, 64, 64)]
    ],
)
def test_shapes(heads, kv_heads, head_size, page):
    case = make_case(
        [70, 1, 66], [70, 200, 450], heads=heads, kv_heads=kv_heads, head_size=head_size,
        page=page, dtype=ANY_DTYPE,
    )  # fmt: skip
    check(case, random_indices(case, 0.2))


def test_more_left_out_blocks_and_columns_than_are_taken_at_once():
    case = make_case([10], [64 * 70 + 30], heads=1, kv_heads=1, dtype=ANY_DTYPE)
    indices = random_indices(case, 0.3, seed=2)
    assert indices.columns.numel() > 128
    check(case, indices)


def test_everything_selected_changes_nothing():
    case = make_case([100, 64, 1], [300, 64, 200], dtype=ANY_DTYPE)
    lists = BlockIndices.everything(case.query_lens, case.seq_lens.tolist(), case.q.shape[1])
    for indices in (lists, None):
        plain = run(case, indices)
        corrected = run(case, indices, mean_correction=True)
        assert torch.equal(plain[0], corrected[0])
        assert torch.equal(plain[1], corrected[1])


def test_nothing_selected_and_nothing_seen_whole_is_empty():
    case = make_case([60], [60], dtype=ANY_DTYPE)
    nothing = BlockIndices.from_masks(torch.zeros(1, 4, 1, dtype=torch.bool))
    out, lse = run(case, nothing, mean_correction=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_nothing_selected_is_all_means():
    case = make_case([66], [300], dtype=ANY_DTYPE)
    check(case, BlockIndices.from_masks(torch.zeros(2, 4, 5, dtype=torch.bool)))


def test_invalid_and_repeated_entries_are_ignored():
    case = make_case([64], [300], heads=1, kv_heads=1, dtype=ANY_DTYPE)
    blocks, columns = [-1, 1, 2**31 - 1, 100], [-1, 2**31 - 1, 130, 300, 140, -5]
    indices = one_list(blocks, columns)
    check(case, indices)


def test_sinks_take_part_beside_means():
    case = make_case([70], [300], dtype=ANY_DTYPE)
    indices, sinks = random_indices(case, 0.2), torch.tensor([0.0, 3.0, -3.0, 7.0])
    out, lse = run(case, indices, sinks=sinks, mean_correction=True)
    want = reference.add_sink(*left_out_oracle(case, indices), sinks)
    assert torch.allclose(out.double(), want[0], rtol=0, atol=4 * torch.finfo(ANY_DTYPE).eps)
    assert torch.allclose(lse.double(), want[1], rtol=0, atol=2e-5)


def test_a_window_beside_it_is_refused():
    case = make_case([20], [50], dtype=ANY_DTYPE)
    with pytest.raises(ValueError, match="mean_correction: given with a window of 10"):
        run(case, None, mean_correction=True, window=10)


def test_heads_that_it_is_not_made_for_are_refused():
    case = make_case([20], [50], heads=1, kv_heads=1, head_size=256, dtype=ANY_DTYPE)
    with pytest.raises(ValueError, match="mean_correction: got head size 256"):
        run(case, random_indices(case, 0.5), mean_correction=True)
