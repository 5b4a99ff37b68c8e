"""Errors and counts of patterns on one layer, against attention written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_sparse.patterns import HeadPattern
from vllm_sparse.search.capture import LayerInputs, dense_attention
from vllm_sparse.search.evaluate import Layer, causal_blocks, evaluate
from vllm_sparse.search.maps import layer_maps


def inputs(length: int = 1000, heads: int = 4, kv_heads: int = 2) -> LayerInputs:
    rng = torch.Generator().manual_seed(length)
    q = torch.randn(length, heads, 64, generator=rng)
    k, v = (torch.randn(length, kv_heads, 64, generator=rng) for _ in range(2))
    # Heads 0 and 2 rest on the first token.
    k[0] = 0
    k[0, :, 0] = 20.0
    q[:, ::2, 0] = 20.0
    q[:, 1::2, 0] = 0.0
    out = dense_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), 0.125)
    return LayerInputs(0, q, k, v, 0.125, out[0].transpose(0, 1))


def test_all_keys_are_no_error_and_a_window_is_one_where_it_misses_something():
    patterns = [
        HeadPattern(kind="a_shape", sink=64, window=64),
        HeadPattern(kind="a_shape", sink=64, window=1000),
        HeadPattern(kind="dense"),
    ]
    done = []
    scores = evaluate(inputs(), patterns, done.append)
    assert sum(done) == 3
    narrow, wide, dense = scores.whole[0]
    assert narrow[0] < 1e-3 and narrow[2] < 1e-3 and min(narrow[1], narrow[3]) > 0.2
    assert (wide < 1e-5).all() and (dense == 0).all()
    assert (scores.worst >= scores.whole - 1e-12).all()
    assert (scores.blocks[1] == causal_blocks(1000)).all()
    assert (scores.blocks[2] == causal_blocks(1000)).all()
    assert (scores.blocks[0] < scores.blocks[1]).all() and (scores.columns == 0).all()
    joined = scores.joined(scores)
    np.testing.assert_array_equal(joined.whole, np.concatenate([scores.whole] * 2))
    np.testing.assert_array_equal(joined.blocks, 2 * scores.blocks)
    np.testing.assert_array_equal(joined.shares[1], scores.shares[0])


def test_shares_sum_up_to_the_layers_error():
    found = inputs()
    scores = evaluate(found, [HeadPattern(kind="a_shape", sink=64, window=64)])
    layer = Layer(found)
    out = layer.attend([HeadPattern(kind="a_shape", sink=64, window=64)] * 4)[0]
    wrong = (out - layer.truth).square().sum() / layer.truth.square().sum()
    assert scores.shares.sum() == pytest.approx(float(wrong), rel=1e-4)


def test_chunks_give_what_one_piece_gives():
    layer = Layer(inputs())
    pattern = [HeadPattern(kind="a_shape", sink=64, window=128)] * 4
    whole, blocks, _ = layer.attend(pattern)
    parts, blocks_too, _ = layer.attend(pattern, chunk=640)  # below 9 blocks a chunk is dense
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)
    np.testing.assert_array_equal(blocks, blocks_too)
    torch.testing.assert_close(layer.attend_densely(640), layer.truth, atol=1e-5, rtol=1e-4)


def test_the_worst_tile_is_told_and_nan_is_as_wrong_as_can_be():
    layer = Layer(inputs())
    out = layer.truth.clone()
    out[640:650, 1] = 0  # 10 rows of the tile 640..703
    whole, worst, last = layer.errors(out)
    assert whole[0] == worst[0] == 0 and 0 < whole[1] < 0.2 < worst[1]
    assert (last == 0).all()
    norm = layer.truth[640:704, 1].square().sum()
    share = layer.truth[640:650, 1].square().sum() / norm
    assert worst[1] == pytest.approx(float(share) ** 0.5, rel=1e-4)
    out[-3:, 2] = 0  # of the last 64 rows, which begin within a tile
    share = layer.truth[-3:, 2].square().sum() / layer.truth[-64:, 2].square().sum()
    assert layer.errors(out)[2][2] == pytest.approx(float(share) ** 0.5, rel=1e-4)
    out[5, 3] = torch.nan
    assert layer.errors(out)[0][3] == 1e9


def test_maps_hold_all_mass_and_what_the_pattern_selects():
    from vllm_sparse.patterns import ModelInfo, PatternFile

    file = PatternFile(
        model=ModelInfo(name="m", layers=1, heads=4, kv_heads=2, head_size=64),
        layers={0: {0: HeadPattern(kind="a_shape", sink=64, window=64)}},
    )
    found = layer_maps(inputs(), file)
    np.testing.assert_allclose(found.mass.sum(2), 1, atol=1e-5)
    tile = found.selected[0, 10]
    assert tile.nonzero()[0].tolist() == [0, 9, 10]
