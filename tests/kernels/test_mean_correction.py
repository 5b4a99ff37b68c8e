"""Blocks that a tile leaves out take part by their means: every instruction set, and the reference,
against the fp64 softmax over keys that were replaced by means."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_close, left_out_oracle, make_case, one_list, random_indices
from isas import implementations
from test_prefill import DTYPES, everything, shapes

from vllm_sparse.kernels import cpu, reference
from vllm_sparse.kernels.block_indices import BLOCK, TILE, BlockIndices, num_tiles

# One implementation of sparse_prefill.
prefill = implementations(reference.sparse_prefill, cpu.sparse_prefill)


def run(prefill, case: Case, indices: BlockIndices | None, **more) -> tuple:
    out = torch.full_like(case.q, torch.nan)
    return prefill(*case.args, indices, scale=case.scale, mean_correction=True, out=out, **more)


def check(prefill, case: Case, indices: BlockIndices) -> None:
    assert_close(case, indices, run(prefill, case, indices), meaning=left_out_oracle)


def sink_and_diagonal(case: Case) -> BlockIndices:
    """The first block and those that hold the tile's own rows."""
    parts = []
    for query_len, seq_len in zip(case.query_lens, case.seq_lens.tolist(), strict=True):
        mask = torch.zeros(num_tiles(query_len), case.q.shape[1], -(-seq_len // BLOCK)).bool()
        mask[:, :, 0] = True
        for tile in range(len(mask)):
            first = seq_len - query_len + tile * TILE
            mask[tile, :, first // BLOCK : (min(first + TILE, seq_len) - 1) // BLOCK + 1] = True
        parts.append(BlockIndices.from_masks(mask))
    return BlockIndices.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 1000])
def test_lengths(prefill, n, dtype):
    case = make_case([min(n, 130)], [n], heads=2, kv_heads=1, dtype=dtype)
    check(prefill, case, random_indices(case, 0.3))


@shapes
def test_shapes(prefill, heads, kv_heads, head_size, page):
    case = make_case(
        [70, 1, 129], [70, 300, 450], heads=heads, kv_heads=kv_heads, head_size=head_size, page=page
    )
    check(prefill, case, random_indices(case, 0.2))


def test_token_major_pages(prefill):
    case = make_case([90], [333], layout="token-major", page=32)
    check(prefill, case, random_indices(case, 0.2))


def test_more_left_out_blocks_than_are_attended_at_once(prefill):
    case = make_case([10], [64 * 140 + 30], heads=2, kv_heads=1)
    check(prefill, case, random_indices(case, 0.02))


def test_everything_selected_changes_nothing(prefill):
    case = make_case([100, 64, 1], [500, 64, 200])
    plain = prefill(*case.args, everything(case), scale=case.scale)
    for indices in (everything(case), None):
        corrected = run(prefill, case, indices)
        assert torch.equal(plain[0], corrected[0])
        assert torch.equal(plain[1], corrected[1])


def test_keys_that_are_alike_within_blocks_make_it_exact(prefill):
    case = make_case([130, 64], [1000, 512])
    for s, n in enumerate(case.seq_lens.tolist()):
        key = torch.arange(n)
        pages, offsets = case.block_table[s][key // 16].long(), key % 16
        first = key // BLOCK * BLOCK
        # Only keys have to be alike: the mean of values is exact where weights are the same.
        case.k_cache[pages, :, offsets] = case.k_cache[pages[first], :, offsets[first]]
    indices = sink_and_diagonal(case)
    plain = prefill(*case.args, indices, scale=case.scale)
    exact = prefill(*case.args, None, scale=case.scale)
    assert (plain[0] - exact[0]).abs().max() > 0.1  # much is left out
    corrected = run(prefill, case, indices)
    assert torch.allclose(corrected[0], exact[0], rtol=0, atol=2e-5)
    assert torch.allclose(corrected[1], exact[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_far_key_that_is_read_as_a_column_is_not_in_its_blocks_mean(prefill, dtype):
    case = make_case([64], [640], heads=1, kv_heads=1, dtype=dtype)
    far = 200
    page, offset = case.block_table[0, far // 16].long(), far % 16
    case.k_cache[page, :, offset] = (case.q[0, 0].float() * 8).to(dtype)
    case.v_cache[page, :, offset] = 50.0
    mask = torch.zeros(1, 1, 10, dtype=torch.bool)
    mask[..., [0, 9]] = True
    column = BlockIndices.from_masks(
        mask, torch.tensor([0, 1], dtype=torch.int32), torch.tensor([far], dtype=torch.int32)
    )
    check(prefill, case, column)
    # Not read, it is in the mean with the other 63.
    check(prefill, case, BlockIndices.from_masks(mask))


def test_a_block_of_which_every_key_is_a_column_has_no_mean(prefill):
    case = make_case([64], [640], heads=1, kv_heads=1)
    columns = torch.arange(128, 128 + BLOCK + 1, dtype=torch.int32)
    check(
        prefill, case,
        BlockIndices.from_masks(
            torch.zeros(1, 1, 10, dtype=torch.bool),
            torch.tensor([0, len(columns)], dtype=torch.int32), columns,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(("seq_len", "query_len"), [(190, 64), (191, 64), (192, 64), (193, 65)])
def test_blocks_that_a_row_does_not_see_whole_are_left_alone(prefill, seq_len, query_len):
    """Rows at 126, 127, 128: block 1 ends at key 127."""
    case = make_case([query_len], [seq_len], heads=1, kv_heads=1)
    nothing = BlockIndices.from_masks(
        torch.zeros(num_tiles(query_len), 1, -(-seq_len // BLOCK), dtype=torch.bool)
    )
    check(prefill, case, nothing)


def test_nothing_selected_and_nothing_seen_whole_is_empty(prefill):
    case = make_case([60], [60])
    nothing = BlockIndices.from_masks(torch.zeros(1, 4, 1, dtype=torch.bool))
    out, lse = run(prefill, case, nothing)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_invalid_and_repeated_entries_are_ignored(prefill):
    case = make_case([64], [300], heads=1, kv_heads=1)
    blocks = [-1, -(2**31), 2**31 - 1, 5, 1, 100]
    columns = [-1, 2**31 - 1, 300, 130, 140]
    indices = one_list(blocks, columns)
    check(prefill, case, indices)


@pytest.mark.parametrize("seed", range(3))
def test_the_sum_lies_between_the_uncorrected_and_the_exact_one(prefill, seed):
    case = make_case([150], [900], seed=seed)
    indices = random_indices(case, 0.2, seed)
    plain = prefill(*case.args, indices, scale=case.scale)[1]
    corrected = run(prefill, case, indices)[1]
    exact = prefill(*case.args, None, scale=case.scale)[1]
    assert (corrected >= plain).all()
    assert (corrected <= exact + 1e-5).all()
    assert (corrected - plain).max() > 0.1


def test_rows_of_a_chunk_are_those_of_the_whole_prompt(prefill):
    """Chunks that begin at a tile's edge see the same blocks, whatever is cached already."""
    case = make_case([640], [640])
    indices = random_indices(case, 0.2)
    whole = run(prefill, case, indices)
    heads, half = 4, slice(5 * 4, 10 * 4 + 1)
    part = make_case([640], [640])
    part.q, part.query_start_loc = case.q[320:], torch.tensor([0, 320], dtype=torch.int32)
    blocks, columns = indices.block_offsets[half], indices.column_offsets[half]
    chunk = BlockIndices(
        heads, torch.tensor([0, 5], dtype=torch.int32),
        blocks - blocks[0], indices.blocks[blocks[0] : blocks[-1]],
        columns - columns[0], indices.columns[columns[0] : columns[-1]],
    )  # fmt: skip
    out, lse = run(prefill, part, chunk)
    assert torch.equal(out, whole[0][320:])
    assert torch.equal(lse, whole[1][320:])


def test_huge_logits_stay_finite(prefill):
    case = make_case([65], [700], heads=2, kv_heads=1)
    case.q *= 30
    case.k_cache.mul_(30)
    out, lse = run(prefill, case, sink_and_diagonal(case))
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_sinks_take_part_beside_means(prefill):
    case = make_case([70], [500])
    indices, sinks = random_indices(case, 0.2), torch.tensor([0.0, 3.0, -3.0, 7.0])
    out, lse = run(prefill, case, indices, sinks=sinks)
    want = reference.add_sink(*left_out_oracle(case, indices), sinks)
    assert torch.allclose(out.double(), want[0], rtol=0, atol=2e-5)
    assert torch.allclose(lse.double(), want[1], rtol=0, atol=2e-5)


def test_more_threads_give_the_same_result():
    case = make_case([200, 40], [900, 500])
    indices = random_indices(case, 0.2)
    one = run(cpu.sparse_prefill, case, indices)
    try:
        cpu.set_threads(3)
        many = run(cpu.sparse_prefill, case, indices)
    finally:
        cpu.set_threads(1)
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])


def test_a_window_beside_it_is_refused(prefill):
    case = make_case([20], [50])
    with pytest.raises(ValueError, match="mean_correction: given with a window of 10"):
        run(prefill, case, None, window=10)
