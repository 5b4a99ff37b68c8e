"""What a request holds on the device, and that decode never reads a block beyond it."""

from __future__ import annotations

import types

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparse import offload
from vllm_sparse.cpu_offload.kv_spec import OffloadWindowManager, offloaded

BLOCK = 16


def manager(window: int, sink: int, blocks: int = 200) -> OffloadWindowManager:
    full = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)
    pool = BlockPool(blocks, enable_caching=True, hash_block_size=BLOCK)
    made = get_manager_for_kv_cache_spec(
        offloaded(full, window, sink), max_in_flight_tokens=64, max_model_len=2048,
        block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=BLOCK,
    )  # fmt: skip
    assert isinstance(made, OffloadWindowManager)
    return made


def held(made: OffloadWindowManager) -> list[int]:
    return [i for i, b in enumerate(made.req_to_blocks["r"]) if not b.is_null]


@pytest.mark.parametrize("window, sink", [(64, 4), (100, 0), (16, 33), (65, 16)])
def test_decode_reads_only_what_is_held(window: int, sink: int):
    made = manager(window, sink)
    made.acknowledged = lambda request: 1 << 30
    length, most = 0, 0
    for new in [64] * 5 + [1] * 60 + [37, 1, 1]:
        made.remove_skipped_blocks("r", length)
        length += new
        made.allocate_new_blocks("r", length, length)
        begin = offload.first_block(length, window, BLOCK)
        sinks = -(-sink // BLOCK)
        if new == 1 and begin > sinks:
            rows = length - begin * BLOCK
            assert window <= rows < window + BLOCK
            wanted = [*range(sinks), *range(begin, -(-length // BLOCK))]
            assert set(wanted) <= set(held(made))
        most = max(most, len(held(made)))
        assert len(held(made)) <= made.max_admission_blocks_per_request
    assert most < -(-length // BLOCK)
    made.free("r")
    assert made.block_pool.get_num_free_blocks() == 199


def test_workers_keep_the_sinks_blocks_in_their_tables():
    """vLLM 0.33 strikes out the entries below `reach`, where that is above 0."""
    made = manager(64, 16)
    made.acknowledged = lambda request: 1 << 30
    made.allocate_new_blocks("r", 320, 320)
    made.remove_skipped_blocks("r", 320)
    reach = made.kv_cache_spec.num_retained_tokens
    struck_out = max(320 - reach, 0) // BLOCK if reach > 0 else 0
    assert held(made)[0] == 0 and struck_out == 0


def test_nothing_is_freed_that_the_host_has_not_acknowledged():
    made = manager(64, 16)
    made.allocate_new_blocks("r", 320, 320)
    made.remove_skipped_blocks("r", 320)
    assert len(held(made)) == 20  # nobody has said that the host has a row
    made.acknowledged = {"r": 160}.get
    made.remove_skipped_blocks("r", 320)
    assert held(made) == [0, *range(6, 20)]


def test_a_request_from_the_host_gets_sink_and_window():
    made = manager(64, 20)
    needed = made.get_num_blocks_to_allocate("r", 321, [], 320, 0, 321)
    before = made.block_pool.get_num_free_blocks()
    made.add_local_computed_blocks("r", [], 0, 320)
    made.allocate_external_computed_blocks("r", 0, 320)
    made.allocate_new_blocks("r", 321, 321)
    assert held(made) == [0, 1, *range(16, 21)]
    assert needed == 7 == before - made.block_pool.get_num_free_blocks()


def test_the_block_table_of_decode_is_made_of_what_is_held():
    layer = object.__new__(offload.OffloadedLayer)
    layer.window, layer.sink = 64, 20
    layer.place = types.SimpleNamespace(store=0, layer=0)
    layer.host = types.SimpleNamespace(slots={"a": [7], "b": [3], "c": [5]})
    table = torch.arange(1, 61, dtype=torch.int32).reshape(3, 20)
    batch = offload.Batch(["a", "b", "c"])
    near = layer.near(batch, 0, [300, 112, 113], table, BLOCK)
    assert layer.near(batch, 0, [300, 112, 113], table, BLOCK) is near  # once for all layers
    # 300: blocks 0, 1 and 14 to 18, as 236 // 16 is 14; 112: 48 // 16 is 3.
    assert near.block_table[0].tolist() == [1, 2, 15, 16, 17, 18, 19]
    assert near.block_table[1, :6].tolist() == [21, 22, 24, 25, 26, 27]
    assert near.block_table[2].tolist() == [41, 42, 44, 45, 46, 47, 48]
    assert near.seq_lens.tolist() == [300 - 12 * 16, 112 - 16, 113 - 16]
    assert near.far.rows.tolist() == [0, 1, 2]
    assert (near.far.slots, near.far.first, near.far.last) == (
        [7, 3, 5], [32, 32, 32], [224, 48, 48],
    )  # fmt: skip


def test_a_short_sequence_is_read_on_the_device_alone():
    layer = object.__new__(offload.OffloadedLayer)
    layer.window, layer.sink = 64, 16
    layer.place = types.SimpleNamespace(store=0, layer=0)
    layer.host = types.SimpleNamespace(slots={"a": [7]})
    table = torch.arange(1, 11, dtype=torch.int32)[None]
    near = layer.near(offload.Batch(["a"]), 0, [95], table, BLOCK)
    assert near.far is None
    assert near.block_table[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert near.seq_lens.tolist() == [95]
