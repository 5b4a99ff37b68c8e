"""What the backend cannot serve is refused at start-up with the reason and what to do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_sparse import plugin
from vllm_sparse.impl import SparseAttentionImpl, layer_index
from vllm_sparse.metadata import SparseMetadataBuilder, _refuse_special
from vllm_sparse.plugin import BACKEND_PATH

SUPPORTED = AttentionSelectorConfig(
    head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=None
)


@pytest.fixture(autouse=True, scope="module")
def registered():
    plugin.register()


def select(backend: str | None = "SPARSE", **change) -> str:
    """Path of the class that vLLM's CPU platform selects."""
    from vllm.platforms import current_platform

    if missing := set(change) - set(SUPPORTED._fields):
        pytest.skip(f"this vLLM's selection knows no {missing}")
    member = AttentionBackendEnum[backend] if backend else None
    return current_platform.get_attn_backend_cls(member, SUPPORTED._replace(**change), num_heads=4)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "kv_cache_dtype": "float16"},
        {"use_kv_connector": True},
        *({"head_size": n} for n in (64, 80, 96, 112, 128, 256)),
        *({"block_size": n} for n in (16, 32, 48, 64, 128)),
    ],
    ids=str,
)
def test_what_is_supported(change):
    assert select(**change) == BACKEND_PATH


@pytest.mark.parametrize(
    "change, says",
    [
        ({"use_mla": True}, "multi-head latent attention"),
        ({"use_mla": True, "use_sparse": True}, "trained sparse attention"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"attn_type": "encoder"}, "encoder"),
        ({"attn_type": "encoder_decoder"}, "encoder_decoder"),
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype 'fp8': supported is the model's own"),
        ({"kv_cache_dtype": "bfloat16"}, "KV cache dtype 'bfloat16'"),  # of a float32 model
        ({"head_size": 32}, "head size 32: supported are the multiples of 16 from 64 to 256"),
        ({"head_size": 72}, "head size 72"),
        ({"head_size": 512}, "head size 512"),
        ({"dtype": torch.float64}, "torch.float64: supported are float32, bfloat16 and float16"),
        ({"block_size": 8}, "KV block size 8: supported are the multiples of 16"),
        ({"block_size": 40}, "KV block size 40"),
        ({"use_mm_prefix": True}, "prefix LM"),
        ({"use_non_causal": True}, "attention in both directions"),
        ({"use_dcp": True}, "decode context parallelism"),
        ({"use_pcp": True}, "prefill context parallelism"),
        ({"use_batch_invariant": True}, "VLLM_BATCH_INVARIANT"),
        ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
        ({"use_rswa": True}, "R-SWA not supported"),
        # A window does not hide what else is wrong with an MLA model.
        ({"use_mla": True, "has_sliding_window": True}, "multi-head latent attention"),
    ],
    ids=str,
)
def test_what_is_refused(change, says):
    with pytest.raises(ValueError) as error:
        select(**change)
    text = str(error.value)
    assert text.startswith("The sparse attention backend cannot run: ")
    assert says in text
    assert "Leave --attention-backend out" in text


def test_every_reason_is_said():
    with pytest.raises(ValueError, match=r"head size 40.*KV cache dtype 'fp8'"):
        select(head_size=40, kv_cache_dtype="fp8")


@pytest.mark.parametrize("change", [{"has_sliding_window": True}, {"has_sink": True}])
def test_windows_and_sinks_stay_with_vllm(change):
    assert select(**change) == select(None, **change) == AttentionBackendEnum.CPU_ATTN.get_path()


def test_other_backends_are_selected_as_before():
    assert select("CPU_ATTN") == AttentionBackendEnum.CPU_ATTN.get_path()
    assert select(None) == AttentionBackendEnum.CPU_ATTN.get_path()


def test_other_platforms_are_refused(monkeypatch):
    from vllm_sparse import backend

    other = SimpleNamespace(is_cpu=lambda: False, device_type="xpu")
    monkeypatch.setattr(backend, "current_platform", other)
    reasons = backend.SparseAttentionBackend.validate_configuration(
        device_capability=(9, 0), **SUPPORTED._asdict()
    )
    assert len(reasons) == 1
    assert "vLLM runs on 'xpu'; beside CPUs it has NVIDIA GPUs only" in reasons[0]


@pytest.mark.parametrize(
    "special, says",
    [
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"logits_soft_cap": 50.0}, "a logits soft cap of 50.0"),
        ({"kv_sharing_target_layer_name": "model.layers.1.attn"}, "KV shared with layer"),
        ({"sliding_window": 128}, "a sliding window"),
        ({"attn_type": "encoder_only"}, "attention of type 'encoder_only'"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"chunk_lookback": 3}, "chunk_lookback = 3"),
    ],
)
def test_layers_are_refused_by_their_own_features(special, says):
    arguments = {"num_heads": 4, "head_size": 64, "scale": 0.125, "num_kv_heads": 2, **special}
    with pytest.raises(ValueError) as error:
        SparseAttentionImpl(**arguments)
    assert says in str(error.value)
    assert "Leave --attention-backend out" in str(error.value)


def test_attention_derived_from_the_backend_is_refused():
    # Llama 4's chunked layers ask for an ordinary backend and subclass it.
    from vllm_sparse.backend import SparseAttentionBackend

    class Chunked(SparseAttentionBackend):
        pass

    layer = SimpleNamespace(attn_backend=Chunked, head_size=64, head_size_v=64)
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.attn'.*not ordinary"):
        _refuse_special("model.layers.0.attn", layer)
    layer = SimpleNamespace(attn_backend=SparseAttentionBackend, head_size=192, head_size_v=128)
    with pytest.raises(ValueError, match="keys have size 192 and its values 128"):
        _refuse_special("model.layers.0.attn", layer)


def test_a_batch_that_is_not_causal_is_refused():
    builder = object.__new__(SparseMetadataBuilder)
    with pytest.raises(NotImplementedError, match="causal only"):
        builder.build(0, SimpleNamespace(causal=False))


@pytest.mark.parametrize(
    "name, index",
    [
        ("model.layers.3.self_attn.attn", 3),
        ("language_model.model.layers.12.self_attn.attn", 12),
        ("transformer.h.0.attn", 0),
        ("3", 3),
    ],
)
def test_layer_index(name, index):
    assert layer_index(name) == index


def test_a_layer_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="cannot tell the layer number from 'attn2'"):
        layer_index("attn2")


def configure(model: str, **settings) -> None:
    """What vLLM does before it starts any process."""
    EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        attention_backend="sparse",
        additional_config={"sparse": settings},
    ).create_engine_config()


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"coverge": 0.9}, 'did you mean "coverage"?'),
        ({"coverage": 2}, "allowed is a number from 0"),
        ({"dense_layers": [4]}, "the model has the layers 0 to 3"),
        ({"decode": "hash"}, 'allowed is "dense", "exact", "lsh"'),
        ({"resident_layers": [7], "decode": "exact"}, "the model has the layers 0 to 3"),
        ({"softmax": "unified"}, "vllm-sparse calibrate MODEL -o FILE"),
        ({"patterns": "/no/such/file.json"}, "cannot be read"),
    ],
    ids=json.dumps,
)
def test_bad_settings_are_refused_before_any_process_starts(settings, says, llama):
    with pytest.raises(ValueError) as error:
        configure(llama, **settings)
    assert says in str(error.value)


def test_a_pattern_file_of_another_model_is_refused(llama, tmp_path):
    model = {"name": "other", "layers": 4, "heads": 8, "kv_heads": 2, "head_size": 64}
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps({"schema_version": 1, "model": model, "layers": {}}))
    with pytest.raises(ValueError, match="heads: file 8, model 4"):
        configure(llama, patterns=str(path))


def test_a_model_of_windows_only_is_refused(tmp_path):
    from transformers import MistralConfig

    config = MistralConfig(hidden_size=256, num_attention_heads=4, sliding_window=128)
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"nothing to do: every layer .* window \(of 128 tokens"):
        configure(str(tmp_path))
