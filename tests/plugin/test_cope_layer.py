"""One layer of a CoPE model, as vLLM calls it: what it computes, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_sparse.kernels.cope_reference import cope_attention
from vllm_sparse.models import cope_backend
from vllm_sparse.models.cope_backend import CoPEBackend, CoPEImpl, CoPEMetadataBuilder
from vllm_sparse.models.cope_cuda import (
    CoPECudaBackend,
    CoPECudaImpl,
    CoPECudaMetadataBuilder,
)

HEADS, KV_HEADS, SIZE, PAGE, POSITIONS = 4, 2, 64, 16, 16
LAYER = {"num_heads": HEADS, "head_size": SIZE, "scale": SIZE**-0.5, "num_kv_heads": KV_HEADS}
IMPLS = [CoPEImpl, CoPECudaImpl]


def table(dtype=torch.float32) -> torch.nn.Parameter:
    rng = torch.Generator().manual_seed(1)
    values = torch.randn(POSITIONS, SIZE, generator=rng).to(dtype)
    return torch.nn.Parameter(values, requires_grad=False)


def step(rows: list[tuple[int, int]], **more) -> CommonAttentionMetadata:
    """(computed, new) tokens of each sequence, whose pages follow each other."""
    new = torch.tensor([n for _, n in rows])
    starts = torch.cat([torch.zeros(1), new.cumsum(0)]).int()
    total = torch.tensor([a + b for a, b in rows], dtype=torch.int32)
    width = -(-int(total.max()) // PAGE)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=total, num_reqs=len(rows),
        num_actual_tokens=int(new.sum()), max_query_len=int(new.max()),
        max_seq_len=int(total.max()), slot_mapping=torch.arange(0),
        block_table_tensor=torch.arange(len(rows) * width, dtype=torch.int32).view(-1, width),
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("impl_class", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mixed_step(impl_class, dtype):
    rng = torch.Generator().manual_seed(0)
    pos_emb = table(dtype)
    impl = impl_class(**LAYER, pos_emb=pos_emb)
    builder = CoPEMetadataBuilder(None, [], None, torch.device("cpu"))
    metadata = builder.build(0, step([(40, 1), (0, 30), (17, 20)]))
    cache = torch.randn(16, KV_HEADS, PAGE, 2 * SIZE, generator=rng).to(dtype)
    query = torch.randn(54, HEADS, SIZE, generator=rng).to(dtype)  # three rows of padding
    out = torch.full_like(query, 7.0)

    def check() -> torch.Tensor:
        assert impl.forward(None, query, None, None, cache, metadata, out) is out
        assert (out[51:] == 7.0).all()
        want, _ = cope_attention(
            query[:51], cache[..., :SIZE], cache[..., SIZE:], metadata.block_table,
            metadata.query_start_loc, metadata.seq_lens, pos_emb, scale=SIZE**-0.5,
        )  # fmt: skip
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(out[:51], want, atol=tolerance, rtol=tolerance)
        return out[:51].clone()

    before = check()
    # Weights that are loaded later count, whether they are copied or take the tensor's place.
    pos_emb.data.mul_(-1)
    copied = check()
    pos_emb.data = torch.zeros_like(pos_emb)
    replaced = check()
    assert (before - copied).abs().max() > 0.1 and (replaced - copied).abs().max() > 0.1


@pytest.mark.parametrize("impl_class", IMPLS)
def test_what_measures_memory_is_zeros(impl_class):
    impl = impl_class(**LAYER, pos_emb=table())
    out = torch.full((3, HEADS, SIZE), torch.nan)
    impl.forward(None, torch.zeros_like(out), None, None, torch.empty(0), None, out)
    assert (out == 0).all()


def test_keys_and_values_are_written_where_the_sparse_backend_writes_them():
    impl = CoPEImpl(**LAYER, pos_emb=table())
    cache = torch.zeros(4, KV_HEADS, PAGE, 2 * SIZE)
    key, value = torch.randn(2, 3, KV_HEADS, SIZE)
    impl.do_kv_cache_update(None, key, value, cache, torch.tensor([0, 17, -1]))
    assert torch.equal(cache[0, :, 0], torch.cat([key[0], value[0]], -1))
    assert torch.equal(cache[1, :, 1], torch.cat([key[1], value[1]], -1))
    assert cache.count_nonzero() == 2 * KV_HEADS * 2 * SIZE


@pytest.mark.parametrize("impl_class", IMPLS)
@pytest.mark.parametrize(
    "special, says",
    [
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"logits_soft_cap": 50.0}, "a logits soft cap of 50.0"),
        ({"kv_sharing_target_layer_name": "model.layers.1.attn"}, "KV shared with layer"),
        ({"sliding_window": 128}, "a sliding window"),
        ({"attn_type": "encoder_only"}, "attention of type 'encoder_only'"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"kv_cache_dtype": "fp8"}, "a KV cache of 'fp8' (give --kv-cache-dtype auto)"),
    ],
)
def test_layers_are_refused_by_their_own_features(impl_class, special, says):
    with pytest.raises(ValueError) as error:
        impl_class(**LAYER, pos_emb=table(), **special)
    assert str(error.value).startswith("Attention with contextual positions (CoPE) cannot run")
    assert says in str(error.value)


@pytest.mark.parametrize("builder_class", [CoPEMetadataBuilder, CoPECudaMetadataBuilder])
@pytest.mark.parametrize("causal", [False, torch.tensor([True])], ids=["no", "row by row"])
def test_a_batch_that_is_not_causal_is_refused(builder_class, causal):
    builder = object.__new__(builder_class)
    with pytest.raises(NotImplementedError, match="causal only"):
        builder.build(0, step([(0, 3)], causal=causal))


def test_the_backend_goes_by_the_platform(monkeypatch):
    def on(device: str) -> SimpleNamespace:
        return SimpleNamespace(
            is_cpu=lambda: device == "cpu", is_cuda=lambda: device == "cuda", device_type=device
        )

    for device, backend in (("cpu", CoPEBackend), ("cuda", CoPECudaBackend)):
        monkeypatch.setattr(cope_backend, "current_platform", on(device))
        assert cope_backend.backend_of_platform() is backend
        assert backend.get_name() == "COPE"
    monkeypatch.setattr(cope_backend, "current_platform", on("xpu"))
    with pytest.raises(ValueError, match="on CPUs and on NVIDIA GPUs, and vLLM runs on 'xpu'"):
        cope_backend.backend_of_platform()


def test_the_member_leads_to_the_backend():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    cope_backend.make_known(CoPEBackend)
    cope_backend.make_known(CoPEBackend)
    assert AttentionBackendEnum["COPE"].get_class() is CoPEBackend


SUPPORTED = AttentionSelectorConfig(
    head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None
)


@pytest.mark.parametrize(
    "change, reasons",
    [
        ({}, []),
        ({"head_size": 256}, []),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype not supported"]),
        ({"dtype": torch.float32}, ["torch.float32: supported are bfloat16 and float16 (--dtype)"]),
        ({"head_size": 40}, ["head_size not supported"]),
        ({"has_sink": True}, ["attention sinks not supported"]),
        ({"has_sliding_window": True}, ["sliding window not supported"]),
        ({"use_dcp": True}, ["DCP not supported"]),
        ({"use_pcp": True}, ["PCP not supported"]),
    ],
    ids=str,
)
def test_what_gpus_serve(change, reasons):
    capability = SimpleNamespace(major=9, minor=0)
    config = SUPPORTED._replace(**change)._asdict()
    assert CoPECudaBackend.validate_configuration(**config, device_capability=capability) == reasons


def test_no_graph_is_captured_of_what_was_not_tried():
    assert CoPECudaMetadataBuilder._cudagraph_support is AttentionCGSupport.NEVER
    assert CoPECudaBackend.get_builder_cls() is CoPECudaMetadataBuilder
    assert CoPECudaBackend.get_impl_cls() is CoPECudaImpl
    assert not CoPECudaBackend.forward_includes_kv_cache_update
