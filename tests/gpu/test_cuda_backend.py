"""The CUDA backend's steps on the CPU: the kernels are interpreted, and reference attention stands
in for vLLM's own, which does not run without a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from cuda_layer import HEADS, KV_HEADS, PAGES, SIZE, Layer
from gpu_cases import HAS_GPU
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_sparse import cuda_impl, cuda_metadata, cuda_runtime
from vllm_sparse.cuda_dense import Flash
from vllm_sparse.kernels import reference
from vllm_sparse.kernels.gpu.shared_prefix import shared_prefixes
from vllm_sparse.patterns import PatternFile
from vllm_sparse.stats import STATS

pytestmark = pytest.mark.skipif(HAS_GPU, reason="stands in for a GPU; here is one")


@pytest.fixture
def layer(llama, monkeypatch):
    return lambda **settings: Layer(llama, monkeypatch, **settings)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_a_mixed_step_is_cut_where_dense_and_sparse_meet(layer, cache):
    made = layer(coverage=1.0, break_even=200, kv_cache_dtype=cache)
    before = STATS.sparse_chunks, STATS.dense_chunks, STATS.decode_rows
    # Two decodes, a short prompt, a long chunk, a short one, speculated tokens of a long one.
    rows = [(300, 1), (7, 1), (0, 70), (180, 66), (0, 5), (250, 3)]
    prompts = [False, False, True, True, True, False]
    out, want, metadata = made.step(rows, prompts)
    torch.testing.assert_close(out, want, rtol=4e-3, atol=4e-3)
    assert [(s.sparse, s.decodes, len(s.seq_lens)) for s in metadata.segments] == [
        (False, True, 2), (False, False, 1), (True, False, 1), (False, False, 2),
    ]  # fmt: skip
    assert made.calls == [(70, 1), (8, 2)]  # decodes are ours
    after = STATS.sparse_chunks, STATS.dense_chunks, STATS.decode_rows
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 3, 2]
    read, causal = STATS.keys_read, STATS.keys_causal
    made.impl.counters.settle()
    # Everything was selected: what was read is what causality leaves.
    assert STATS.keys_read - read == STATS.keys_causal - causal == HEADS * (244 + 246)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_a_long_chunk_is_planned_and_read_sparsely(layer, cache):
    made = layer(coverage=0.5, break_even=0, kv_cache_dtype=cache)
    out, want, metadata = made.step([(700, 130)])
    assert made.impl.sums.sums.dtype == torch.float16
    assert made.calls == [] and metadata.segments[0].sparse
    assert not torch.equal(out, want) and out.isfinite().all()
    assert (out - want).abs().max() < 1.0
    read, causal = STATS.keys_read, STATS.keys_causal
    made.impl.counters.settle()
    assert 0 < STATS.keys_read - read < STATS.keys_causal - causal


def test_dense_chunks_go_to_flash_attention_where_vllm_has_it(layer, monkeypatch):
    calls = []

    def attend(self, q, *where, out, sinks, **given):
        assert sinks is None
        calls.append((len(q), given["longest_query"], given["longest"], given["window"]))
        reference.sparse_prefill(q, *where, None, scale=given["scale"], out=out)

    monkeypatch.setattr(Flash, "attend", attend)
    monkeypatch.setattr(cuda_impl, "flash_for", lambda *a: Flash(attend, 3))
    made = layer(coverage=1.0, break_even=200)
    rows = [(300, 1), (0, 70), (180, 66), (0, 5), (250, 3)]
    out, want, _ = made.step(rows, [False, True, True, True, False])
    torch.testing.assert_close(out, want, rtol=4e-3, atol=4e-3)
    out, want, _ = made.step([(0, 90)])
    torch.testing.assert_close(out, want)
    assert calls == [(70, 70, 70, None), (8, 5, 253, None), (90, 90, 90, None)]
    assert made.calls == []  # nothing is left to vLLM's Triton kernel


def test_steps_that_are_not_long_are_vllms_whole(layer):
    made = layer(break_even=1000)
    out, want, metadata = made.step([(0, 90)])
    assert metadata.segments is None and made.calls == [(90, 1)]
    torch.testing.assert_close(out, want)


def phi_file(path, phi: float) -> str:
    model = {"name": "m", "layers": 4, "heads": 4, "kv_heads": 2, "head_size": 64}
    PatternFile(model=model, phi={i: [phi] * 4 for i in range(4)}).save(path)
    return str(path)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("softmax", ["online", "lazy", "unified"])
def test_a_step_of_decodes_is_ours(layer, softmax, cache, tmp_path):
    phi = {"patterns": phi_file(tmp_path / "phi.json", 0.0)} if softmax == "unified" else {}
    made = layer(break_even=1000, softmax=softmax, kv_cache_dtype=cache, **phi)
    out, want, metadata = made.step([(50, 1), (3, 1)])
    assert metadata.segments is None and made.calls == []
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)


def test_speculated_tokens_are_ours(layer):
    made = layer(coverage=1.0, break_even=200, speculated=2)
    before = STATS.decode_rows
    # A decode with two tokens after it, one with one, a short prompt, a long chunk.
    rows = [(300, 3), (250, 2), (0, 3), (180, 66)]
    out, want, metadata = made.step(rows, [False, False, True, True])
    torch.testing.assert_close(out, want, rtol=4e-3, atol=4e-3)
    assert [(s.sparse, s.decodes) for s in metadata.segments] == [
        (False, True), (False, False), (True, False),
    ]  # fmt: skip
    assert made.calls == [(3, 1)] and STATS.decode_rows - before == 5
    out, want, metadata = made.step([(50, 3), (3, 1)], [False, False])
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
    assert metadata.segments is None and metadata.decodes and made.calls == [(3, 1)]


@pytest.fixture
def short_prefixes(monkeypatch):
    monkeypatch.setattr(
        cuda_metadata, "shared_prefixes", functools.partial(shared_prefixes, fewest=64)
    )


@pytest.mark.parametrize("setting", [None, True])
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_decode_reads_a_shared_prefix_once_where_it_is_asked_to(
    layer, cache, setting, short_prefixes
):
    made = layer(break_even=0, shared_prefix=setting, kv_cache_dtype=cache)
    out, want, metadata = made.step([(300, 1), (250, 1), (270, 1)], shared=10)
    torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)
    if setting is None:
        assert metadata.shared is None
        return
    assert metadata.shared.keys.tolist() == [128] * 3
    before = STATS.shared_rows
    made.impl.counters.settle()
    assert STATS.shared_rows - before == 3
    # At the same address in every step: captured graphs look there.
    at = metadata.shared.members.data_ptr()
    _, _, metadata = made.step([(300, 1), (250, 1), (270, 1)])
    assert metadata.shared.members.data_ptr() == at
    assert not metadata.shared.keys.any()


def test_the_decodes_of_a_mixed_step_share_among_themselves(layer, short_prefixes):
    made = layer(break_even=64, shared_prefix=True)
    out, want, metadata = made.step([(300, 1), (250, 1), (180, 100)], shared=10)
    torch.testing.assert_close(out[:2], want[:2], atol=2e-3, rtol=2e-3)
    assert [s.decodes for s in metadata.segments] == [True, False]
    assert metadata.segments[0].metadata.shared.keys.tolist() == [128] * 2
    assert metadata.segments[1].metadata.shared is None


def test_speculated_tokens_share_a_prefix(layer, short_prefixes):
    made = layer(break_even=0, shared_prefix=True, speculated=3)
    rows = [(300, 4), (250, 2), (270, 1)]
    out, want, metadata = made.step(rows, prompts=[False] * 3, shared=10)
    torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)
    assert metadata.shared.keys.tolist() == [128] * 3


@pytest.mark.parametrize("break_even", [0, 1000], ids=["sparse", "dense"])
def test_a_graph_finds_what_this_step_shares_where_prompts_end(layer, break_even, short_prefixes):
    """vLLM replays graphs of decoding for ends of prompts that have as few rows."""
    made = layer(break_even=break_even, shared_prefix=True, speculated=2)
    rows = [(300, 3), (250, 3), (270, 3)]
    _, _, first = made.step(rows, prompts=[False] * 3, shared=10)
    held = first.shared  # the addresses that a captured graph has
    assert held.keys.tolist() == [128] * 3
    step = {}
    attend = made.impl.attend

    def watched(layer, q, k, v, cache, metadata, output):
        step.update(q=q, cache=cache)
        return attend(layer, q, k, v, cache, metadata, output)

    made.impl.attend = watched
    out, want, metadata = made.step(rows, prompts=[False, False, True], seed=7)
    torch.testing.assert_close(out, want, atol=4e-3, rtol=4e-3)
    assert not held.keys.any() and not held.tile_keys.any()
    tokens = metadata.num_actual_tokens
    replayed = torch.zeros_like(step["q"][:tokens])
    graphs = replace(metadata, decodes=True, segments=None, shared=held)
    made.impl.decode(made.layer, graphs, step["q"][:tokens], step["cache"], replayed)
    torch.testing.assert_close(replayed, want, atol=2e-3, rtol=2e-3)


def test_a_graph_is_captured_of_decoding_alone(layer):
    """A made-up batch of the longest contexts must not be planned, whatever vLLM says of it."""
    made = layer(break_even=0, speculated=2)
    starts = torch.tensor([0, 3, 6], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=torch.tensor([900, 900]),
        num_reqs=2, num_actual_tokens=6, max_query_len=3, max_seq_len=900,
        block_table_tensor=torch.zeros(2, 57, dtype=torch.int32), slot_mapping=torch.arange(6),
    )  # fmt: skip
    metadata = made.builder.build_for_cudagraph_capture(common)
    assert metadata.segments is None and metadata.decodes


def test_rows_that_leave_phi_are_counted_when_the_counters_are_settled(layer, tmp_path):
    path = phi_file(tmp_path / "phi.json", 1e5)
    made = layer(break_even=1000, softmax="unified", patterns=path)
    before = STATS.softmax_flagged
    out, want, _ = made.step([(50, 1), (3, 1)])
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
    made.impl.counters.settle()
    assert STATS.softmax_flagged - before == 2 * HEADS


def test_dense_layers_are_vllms_whole(layer):
    made = layer(break_even=0, dense_layers=[0])
    out, want, _ = made.step([(100, 90)])
    assert made.calls == [(90, 1)]
    torch.testing.assert_close(out, want)


def test_memory_for_planning_is_shown_while_vllm_measures(layer):
    made = layer(break_even=0)
    out = torch.full((4, HEADS, SIZE), torch.nan)
    made.impl.forward(made.layer, out, None, None, torch.zeros(0), None, out)
    assert (out == 0).all()
    short = cuda_runtime.workspace_bytes(8192, 32768, 32, 128)
    assert 2**25 < short < cuda_runtime.workspace_bytes(8192, 131072, 32, 128) < 2**30


def test_the_builder_makes_room_for_sums_before_the_first_write(layer):
    made = layer(break_even=0)
    made.builder.layers[0].kv_cache = made.cache
    made.step([(0, 64)])
    assert made.impl.sums is not None
    got = made.impl.sums.means(torch.arange(4, dtype=torch.int32), 64, torch.tensor([0]))
    want = made.cache[:4, 0, :, :SIZE].flatten(0, 1).float().mean(0)
    torch.testing.assert_close(got[0, 0], want, rtol=1e-2, atol=1e-3)


def test_sums_follow_the_cache_that_vllm_binds(layer):
    """vLLM captures graphs over a cache of a few pages first, to see what they take."""
    made = layer(break_even=0)
    few = made.cache[:4].clone()
    made.impl.prepare(few)
    assert made.impl.sums.sums.shape == (4, KV_HEADS, SIZE)
    made.impl.prepare(made.cache)
    kept = made.impl.sums
    assert kept.sums.shape == (PAGES, KV_HEADS, SIZE)
    made.impl.prepare(made.cache)
    assert made.impl.sums is kept


def test_pages_that_no_sums_are_kept_of_are_told_and_counted(layer):
    made = layer(break_even=0)
    before = STATS.fallbacks.get("means_from_keys", 0)
    cache = torch.zeros(4, KV_HEADS, 48, 2 * SIZE)
    made.impl.prepare(cache)
    made.impl.prepare(cache)
    assert made.impl.sums is None
    assert STATS.fallbacks["means_from_keys"] == before + 1


def test_mean_correction_brings_a_sparse_chunk_nearer(layer):
    errors = []
    for corrected in (False, True):
        made = layer(coverage=0.5, break_even=0, mean_correction=corrected)
        out, want, metadata = made.step([(700, 130)])
        assert metadata.segments[0].sparse
        errors.append((out - want).float().norm() / want.float().norm())
    assert errors[1] < 0.8 * errors[0]


def test_mean_correction_is_refused_for_large_heads(llama):
    config = EngineArgs(
        model=llama, skip_tokenizer_init=True,
        additional_config={"sparse": {"mean_correction": True}},
    ).create_engine_config()  # fmt: skip
    with (
        set_current_vllm_config(config),
        pytest.raises(ValueError, match="mean_correction: got head size 256"),
    ):
        cuda_impl.SparseCudaImpl(HEADS, 256, 0.0625, KV_HEADS)


@pytest.mark.parametrize(
    "special, says",
    [
        ({"alibi_slopes": [0.5] * HEADS}, "ALiBi"),
        ({"logits_soft_cap": 50.0}, "a logits soft cap of 50.0"),
        ({"kv_sharing_target_layer_name": "model.layers.1.attn"}, "KV shared with layer"),
        ({"chunk_lookback": 3}, "chunk_lookback = 3"),
        ({"kv_cache_dtype": "fp8_per_token_head"}, "scales of each token and head are not read"),
    ],
)
def test_layers_are_refused_by_their_own_features(special, says):
    with pytest.raises(ValueError, match=says):
        cuda_impl.SparseCudaImpl(HEADS, SIZE, 0.125, KV_HEADS, **special)


def test_queries_stay_in_the_models_dtype_and_fp8_scales_of_heads_are_refused(layer):
    made = layer(break_even=0, kv_cache_dtype="fp8")
    assert made.impl.supports_quant_query_input is False
    made.layer._k_scale = torch.ones(KV_HEADS + 1)
    made.impl.workspace = made.impl.page = None  # as if it were new
    with pytest.raises(ValueError, match="k_scale: got 2 entries"):
        made.build()


def test_what_is_measured_and_compiled_at_start_has_the_caches_dtype(layer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        cuda_runtime.device_break_even, "break_even",
        lambda *a, cache_dtype, **k: seen.append(cache_dtype) or 4096,
    )  # fmt: skip
    for cache, dtype in (("auto", torch.float16), ("fp8", torch.float8_e4m3fn)):
        made = layer(kv_cache_dtype=cache)
        assert made.impl.break_even.tokens == 4096 and seen.pop() == dtype
        compiled = made.warm_ups[-1]
        assert compiled["cache_dtype"] == dtype
