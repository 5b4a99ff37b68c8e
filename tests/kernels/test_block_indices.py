"""The lists that pass from planning to kernels."""

from __future__ import annotations

import pytest
import torch
from cases import make_case, random_indices

from vllm_sparse.kernels.block_indices import BLOCK, TILE, BlockIndices


def test_everything_is_causal():
    indices = BlockIndices.everything([130, 64, 1], [130, 300, 65], num_heads=2)
    assert indices.tile_offsets.tolist() == [0, 3, 4, 5]
    counts = (indices.block_offsets[1:] - indices.block_offsets[:-1]).tolist()
    assert counts == [1, 1, 2, 2, 3, 3, 5, 5, 2, 2]
    assert indices.density([130, 64, 1], [130, 300, 65]) == 1.0


def test_density_counts_keys():
    # Two tiles at positions 128..255 see 192 and 256 keys; one whole block and two columns each.
    mask = torch.zeros(2, 1, 4, dtype=torch.bool)
    mask[:, 0, 0] = True
    indices = BlockIndices.from_masks(
        mask,
        torch.tensor([0, 2, 4], dtype=torch.int32),
        torch.tensor([64, 70, 64, 70], dtype=torch.int32),
    )
    assert indices.selected_keys([128], [256]) == (2 * (BLOCK + 2), 192 + 256)


def test_cat_keeps_each_sequence():
    case = make_case([70, 200], [300, 200])
    one = random_indices(make_case([70], [300]), 0.3, seed=1)
    two = random_indices(make_case([200], [200]), 0.3, seed=2)
    both = BlockIndices.cat([one, two])
    assert both.tile_offsets.tolist() == [0, 2, 2 + -(-200 // TILE)]
    read, causal = both.selected_keys(case.query_lens, case.seq_lens.tolist())
    parts = [one.selected_keys([70], [300]), two.selected_keys([200], [200])]
    assert (read, causal) == tuple(map(sum, zip(*parts, strict=True)))
    first = both.block_offsets[one.block_offsets.numel() - 1 :]
    assert torch.equal(both.blocks[int(first[0]) :], two.blocks)


def test_cat_refuses_other_heads():
    with pytest.raises(ValueError, match=r"head counts \[2, 3\]"):
        BlockIndices.cat(
            [BlockIndices.everything([1], [1], 2), BlockIndices.everything([1], [1], 3)]
        )
