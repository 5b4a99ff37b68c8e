"""What FP8 caches mean, and that the CPU's kernels refuse them."""

from __future__ import annotations

import pytest
import torch
from cases import in_fp8, make_case, random_indices

from vllm_sparse import kernels
from vllm_sparse.kernels import reference

SCALES = {"k_scale": torch.tensor(0.037), "v_scale": torch.tensor([1.7])}


def test_keys_and_values_are_what_is_stored_times_the_scales():
    stored, meant = in_fp8(make_case([70], [300]), 0.037, 1.7)
    indices = random_indices(stored, 0.3)
    for more in ({}, {"mean_correction": True}, {"sinks": torch.arange(4.0)}):
        got = reference.sparse_prefill(*stored.args, indices, scale=0.1, **SCALES, **more)
        want = reference.sparse_prefill(*meant.args, indices, scale=0.1, **more)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    unscaled = reference.sparse_prefill(*stored.args, indices, scale=0.1)
    assert not torch.allclose(unscaled[0], want[0], atol=0.1)


def test_decode_and_planning_read_the_same_keys():
    stored, meant = in_fp8(make_case([1], [300]), 0.037, 1.7)
    caches, row = (stored.k_cache, stored.v_cache), stored.block_table
    got = reference.paged_decode(stored.q, *caches, row, stored.seq_lens, scale=0.1, **SCALES)
    caches = (meant.k_cache, meant.v_cache)
    want = reference.paged_decode(meant.q, *caches, row, meant.seq_lens, scale=0.1)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    k_scale, heads = SCALES["k_scale"], torch.arange(2)
    where = (row[0], torch.tensor([299]), heads, 300)
    got = reference.row_scores(stored.q, stored.k_cache, *where, scale=0.1, k_scale=k_scale)
    want = reference.row_scores(meant.q, meant.k_cache, *where, scale=0.1)
    assert torch.equal(got.blocks, want.blocks)
    got = reference.block_means(stored.k_cache, row[0], 300, heads, k_scale)
    assert torch.equal(got, reference.block_means(meant.k_cache, row[0], 300, heads))


def test_what_is_written_is_divided_and_kept_within_the_format():
    key = torch.tensor([1.0, 3.3, 208.0, -208.0]).expand(1, 1, 16, 4).reshape(1, 1, 64)
    caches = torch.zeros(2, 1, 1, 16, 64).to(torch.float8_e4m3fn)
    slots = torch.tensor([5])
    kernels.write_kv(key, key, *caches, slots, torch.tensor(0.25), torch.tensor(2.0))
    assert caches[0, 0, 0, 5, :4].tolist() == [4.0, 13.0, 448.0, -448.0]
    assert caches[1, 0, 0, 5, :4].tolist() == [0.5, 1.625, 104.0, -104.0]


@pytest.mark.parametrize("scales", [{}, SCALES])
def test_cpu_kernels_refuse_fp8(scales):
    stored, meant = in_fp8(make_case([1], [50]), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"FP8 caches and their scales .* are for GPUs"):
        kernels.sparse_prefill(*stored.args, None, scale=0.1, **scales)
    given = (stored.q, stored.k_cache, stored.v_cache, stored.block_table, stored.seq_lens)
    with pytest.raises(ValueError, match=r"FP8 caches|k_scale, v_scale given for tensors"):
        kernels.paged_decode(*given, scale=0.1, **scales)
    if scales:
        with pytest.raises(ValueError, match="FP8 caches and"):
            kernels.sparse_prefill(*meant.args, None, scale=0.1, **scales)
    with pytest.raises(ValueError, match="k_cache: got torch"):
        where = (stored.block_table[0], torch.tensor([49]), torch.arange(2), 50)
        kernels.row_scores(stored.q, stored.k_cache, *where, scale=0.1)


def test_scales_of_each_head_are_refused():
    stored, _ = in_fp8(make_case([1], [50]), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"k_scale: got 2 entries .* of each head are not read"):
        reference.sparse_prefill(*stored.args, None, scale=0.1, k_scale=torch.ones(2))
