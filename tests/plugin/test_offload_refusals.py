"""What decode over host memory does not go with is said before any process is started."""

from __future__ import annotations

import pickle

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_sparse import plugin
from vllm_sparse.cpu_offload import actor

EXACT = {"decode": "exact"}


def configure(model: str, settings: dict, **engine):
    plugin.register()
    return EngineArgs(
        model,
        skip_tokenizer_init=True,
        attention_backend="sparse",
        additional_config={"sparse": settings},
        **engine,
    ).create_engine_config()


def test_the_connector_is_put_in(llama):
    config = configure(llama, EXACT)
    assert config.kv_transfer_config.kv_connector == "SparseOffloadConnector"
    assert config.scheduler_config.disable_hybrid_kv_cache_manager is False
    again = pickle.loads(pickle.dumps(config))  # as vLLM's processes get it
    assert again.kv_transfer_config.kv_connector_module_path == "vllm_sparse.cpu_offload.connector"


def test_dense_decode_has_no_connector(llama):
    assert configure(llama, {}).kv_transfer_config is None
    assert configure(llama, {"decode": "dense", "host_gib": 1}).kv_transfer_config is None


@pytest.mark.parametrize(
    "settings, engine, says",
    [
        (
            {},
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "the KV connector 'ExampleConnector' of --kv-transfer-config",
        ),
        ({}, {"kv_offloading_size": 1.0}, "--kv-offloading-size 1.0"),
        ({}, {"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8: host memory has rows in the"),
        (
            {},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding; leave --speculative-config out",
        ),
        ({}, {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2; use 1"),
        ({"resident_layers": [0, 1, 2, 3]}, {}, "resident_layers [0, 1, 2, 3], which are all"),
        ({"resident_layers": [4]}, {}, "the model has the layers 0 to 3"),
        (
            {"decode": "lsh", "sampler_options": {"epsilon": 0.1}},
            {},
            "\"sampler_options\"]: sampler_options: 'lsh' has no option 'epsilon'; it has share",
        ),
        (
            {"decode": "lsh", "sampler_options": {"bits": 7.5}},
            {},
            '"sampler_options"]: bits: got 7.5; give a whole number',
        ),
        (
            {"decode": "vattention", "sampler_options": {"delta": 1}},
            {},
            "delta: got 1.0; give a number between 0 and 1",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(settings, engine, says, llama):
    with pytest.raises(ValueError) as error:
        configure(llama, EXACT | settings, **engine)
    assert says in str(error.value)


def test_models_with_windows_are_refused(gemma3):
    with pytest.raises(ValueError, match=r"other kinds than full attention \(sliding_attention\)"):
        configure(gemma3, EXACT)


@pytest.mark.parametrize("decode", ["lsh", "vattention", "topk"])
def test_samplers_go_in_like_exact(decode, llama):
    config = configure(llama, {"decode": decode, "rows": 256})
    assert config.kv_transfer_config.kv_connector == "SparseOffloadConnector"


def test_ray_actors_need_ray(llama, monkeypatch):
    settings = {"decode": "exact", "actors": 1, "ray": True}
    monkeypatch.setattr(actor, "is_installed", lambda: False)
    with pytest.raises(
        ValueError, match=r"Ray is not installed; run: pip install 'vllm-sparse\[ray"
    ):
        configure(llama, settings)
    monkeypatch.setattr(actor, "is_installed", lambda: True)
    assert configure(llama, settings).kv_transfer_config is not None
