"""How vLLM's CUDA platform selects the CUDA backend. No GPU is here: the platform is told that its
capability is 9.0."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from gpu_cases import HAS_GPU
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_sparse import plugin
from vllm_sparse.cuda_backend import SparseCudaBackend

pytestmark = pytest.mark.skipif(HAS_GPU, reason="stands in for a GPU; here is one")


@pytest.fixture
def select(monkeypatch):
    """Path of the class that vLLM's CUDA platform selects."""
    # vLLM's CUDA platform imports its compiled ops, which a CPU build has not.
    for name in ("vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    from vllm.platforms.cuda import CudaPlatformBase

    plugin.register()
    member = AttentionBackendEnum["SPARSE"]
    monkeypatch.setattr(type(member), "get_class", lambda self: SparseCudaBackend)
    capability = [9, 0]
    monkeypatch.setattr(
        CudaPlatformBase, "get_device_capability",
        classmethod(lambda cls, device_id=0: DeviceCapability(*capability)),
    )  # fmt: skip

    def run(at: tuple[int, int] = (9, 0), **change) -> str:
        capability[:] = at
        config = AttentionSelectorConfig(
            head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None
        )
        return CudaPlatformBase.get_attn_backend_cls(member, config._replace(**change), num_heads=4)

    return run


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": torch.float16},
        {"has_sink": True},
        {"has_sliding_window": True},
        {"use_kv_connector": True},
        {"block_size": 64},
        {"at": (8, 0)},
        {"at": (8, 0), "head_size": 256},
        {"at": (8, 9)},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e4m3", "at": (8, 9)},
    ],
    ids=str,
)
def test_the_cuda_platform_selects_it(select, change):
    fields = AttentionSelectorConfig._fields
    if missing := set(change) - {*fields, "at"}:
        pytest.skip(f"this vLLM's selection knows no {missing}")
    assert select(**change) == plugin.CUDA_BACKEND_PATH


@pytest.mark.parametrize(
    "change, says",
    [
        ({"use_mla": True}, "MLA not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"head_size": 72}, "head_size not supported"),
        ({"head_size": 256, "at": (8, 9)}, "8.9 give a program 99 KiB"),
        ({"head_size": 144, "at": (12, 0)}, "head size 144: .* head sizes up to 128 run there"),
        ({"dtype": torch.float32}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8", "at": (8, 0)}, r"from compute capability 8.9 on, .* has 8.0"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "stores e4m3 under that name; give fp8"),
        ({"kv_cache_dtype": "fp8_per_token_head"}, "scales of each token and head are not read"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "scales of each token and head are not read"),
        ({"kv_cache_dtype": "nvfp4"}, "--kv-cache-dtype nvfp4: supported are auto, "),
        ({"use_per_head_quant_scales": True}, "FP8 scales of each head"),
        ({"at": (7, 5)}, "compute capability not supported"),
    ],
    ids=str,
)
def test_the_cuda_platform_is_refused_what_it_cannot_run(select, change, says):
    if missing := set(change) - {*AttentionSelectorConfig._fields, "at"}:
        pytest.skip(f"this vLLM's selection knows no {missing}")
    with pytest.raises(ValueError, match=says):
        select(**change)


def test_on_cuda_the_member_leads_to_the_cuda_backend(monkeypatch):
    from vllm_sparse import compat

    asked = []
    monkeypatch.setattr(compat, "backend_member", lambda *a: asked.append(a) or SimpleNamespace())
    monkeypatch.setattr("vllm.platforms.current_platform.is_cuda", lambda: True, raising=False)
    plugin.sparse_member()
    assert asked == [("SPARSE", plugin.CUDA_BACKEND_PATH)]


def test_what_graphs_may_hold_is_declared():
    builder = SparseCudaBackend.get_builder_cls()
    assert builder._cudagraph_support is AttentionCGSupport.UNIFORM_BATCH
