"""What the CUDA backend settles once pages are laid out: break-even, sums of pages, ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cuda_layer import KV_HEADS, NAME, PAGE, SIZE, Layer
from gpu_cases import HAS_GPU
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparse import cuda_impl, cuda_metadata, cuda_runtime
from vllm_sparse.planner.break_even import NEVER
from vllm_sparse.planner.device_break_even import BreakEven, break_evens

pytestmark = pytest.mark.skipif(HAS_GPU, reason="stands in for a GPU; here is one")


@pytest.fixture
def layer(llama, monkeypatch):
    return lambda **settings: Layer(llama, monkeypatch, **settings)


def test_what_goes_by_pages_is_settled_once_for_the_pages_of_the_cache(layer):
    """vLLM makes builders twice, and may change its block size between layers and builders."""
    made = layer(break_even=300)
    assert [w["page"] for w in made.warm_ups] == [PAGE] and made.impl.break_even.tokens == 300
    made.build()
    assert len(made.warm_ups) == 1
    made.build(page=64)
    assert [w["page"] for w in made.warm_ups] == [PAGE, 64] and made.impl.page == 64


def test_a_layer_that_is_dense_has_no_say_in_the_break_even(layer, monkeypatch):
    """Without the hybrid KV cache manager, layers with and without a window share a group."""
    made = layer(break_even=5000)
    with_window = SimpleNamespace(
        impl=SimpleNamespace(
            always_dense=True,
            break_even=BreakEven.given(0),
            counters=None,
            members=0,
            settle=lambda *a: None,
        )
    )
    layers = {"model.layers.1.attn": with_window, NAME: made.layer}
    monkeypatch.setattr(cuda_metadata, "get_layers_from_vllm_config", lambda *a, **k: layers)
    spec = FullAttentionSpec(
        block_size=PAGE, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float16
    )
    builder = cuda_metadata.SparseCudaMetadataBuilder(
        spec, list(layers), made.config, torch.device("cpu")
    )
    made.builder = builder
    assert not builder.all_dense
    _, _, metadata = made.step([(0, 90)])
    assert metadata.segments is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_measures_for_all(rank, monkeypatch):
    group = SimpleNamespace(rank_in_group=rank, broadcast_object=lambda x: sent.append(x) or 4096)
    monkeypatch.setattr(cuda_impl, "get_tp_group", lambda: group)
    sent, measured = [], []
    found = cuda_impl.of_first_rank(lambda: measured.append(1) or 4096)
    assert found == 4096
    assert (sent, len(measured)) == (([4096], 1) if rank == 0 else ([None], 0))


def test_sums_follow_the_cache_that_vllm_binds(layer):
    """With graphs on, vLLM runs steps over a cache of a few blocks before the one that serves."""
    made = layer(break_even=1000)
    small = torch.zeros(4, KV_HEADS, PAGE, 2 * SIZE, dtype=torch.float16)
    made.impl.prepare(small)
    first = made.impl.sums
    made.impl.prepare(small)
    assert made.impl.sums is first and first.sums.shape[0] == 4
    made.step([(0, 700)])
    assert made.impl.sums.sums.shape[0] == made.cache.shape[0]
    table = torch.arange(44, dtype=torch.int32)
    got = made.impl.sums.means(table, 700, torch.tensor([0]))
    want = made.cache[:4, 0, :, :SIZE].flatten(0, 1).float().mean(0)
    torch.testing.assert_close(got[0, 0], want, rtol=1e-2, atol=1e-3)


def test_what_kept_sums_from_one_cache_does_not_keep_them_from_the_next(layer):
    made = layer(break_even=0)
    made.impl.prepare(torch.zeros(4, KV_HEADS, 48, 2 * SIZE, dtype=torch.float16))
    assert made.impl.sums is None
    made.impl.prepare(made.cache)
    assert made.impl.sums is not None


@pytest.mark.parametrize(
    "block, shared, caching, kept",
    [
        (16, 16, True, True),
        (128, 128, True, True),  # prefixes end where blocks do
        (128, 32, True, False),
        (128, 32, False, True),
        (16, None, True, True),  # a vLLM that shares whole blocks alone
    ],
)
def test_no_sums_are_kept_where_vllm_copies_parts_of_blocks(layer, block, shared, caching, kept):
    """A copied block has its keys' sums only where it is no longer than what a sum is over."""
    made = layer(break_even=0)
    config = made.config.cache_config
    config.enable_prefix_caching, config.num_gpu_blocks = caching, 1024 // block
    config.hash_block_size = shared
    made.impl.prepare(torch.zeros(64, KV_HEADS, PAGE, 2 * SIZE, dtype=torch.float16))
    assert (made.impl.sums is not None) == kept


def test_fewer_rows_have_a_break_even_of_their_own():
    asked = []

    def of_rows(rows: int) -> int:
        asked.append(rows)
        return {4096: 4096, 2048: 9000, 1024: NEVER}[rows]

    found = break_evens(4096, of_rows)
    assert asked == [4096, 2048, 1024]  # where it never pays, it does not with fewer
    assert found.tokens == 4096
    assert found.line() == "4096 rows: 4096 tokens, 2048 rows: 9000 tokens, 1024 rows: never"
    pays = [(4096, 4096), (2048, 9000), (4000, 9000), (4096, 100_000)]
    does_not = [(4095, 8999), (4096, 4095), (2047, 9000), (1024, 1 << 20), (2, 1 << 20)]
    assert all(found.pays(*case) for case in pays)
    assert not any(found.pays(*case) for case in does_not)
    assert break_evens(256, lambda rows: 512).steps == ((256, 512),)
    # What a user gives is for chunks of any length.
    assert BreakEven.given(200).pays(2, 200) and not BreakEven.given(200).pays(4096, 199)


def test_the_end_of_a_long_prompt_is_dense_where_its_rows_are_few(layer, monkeypatch):
    """Planning would read all keys for them, and so does dense attention, once."""
    monkeypatch.setattr(
        cuda_runtime.device_break_even, "break_even",
        lambda *a, **k: 500 if a[4] >= 1024 else NEVER,
    )  # fmt: skip
    made = layer(coverage=1.0)
    assert made.impl.break_even.steps == ((4096, 500), (2048, 500), (1024, 500), (512, NEVER))
    out, want, metadata = made.step([(800, 20)])
    assert metadata.segments is None and made.calls == [(20, 1)]
    torch.testing.assert_close(out, want, rtol=4e-3, atol=4e-3)
