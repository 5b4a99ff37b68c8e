"""CoPE models are known to vLLM wherever the plugin is, and what cannot be is refused by name."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys

import pytest
from tiny_models import save_cope
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs

from vllm_sparse import compat, plugin


@pytest.fixture(autouse=True, scope="module")
def registered():
    plugin.register()


@pytest.fixture(scope="module")
def cope(tmp_path_factory) -> str:
    return save_cope(tmp_path_factory.mktemp("cope"))


def in_fresh_process(code: str, stdin: bytes = b"", *arguments: str) -> str:
    """Last line of `python -c code`; fails where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], input=stdin, capture_output=True, timeout=300,
        cwd="/", env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return done.stdout.decode().split("\n")[-2]


def configure(model: str, **engine):
    """What vLLM does before it starts any process."""
    return EngineArgs(model=model, skip_tokenizer_init=True, **engine).create_engine_config()


def test_registering_twice_is_registering_once():
    from transformers import AutoConfig

    from vllm_sparse.models import CoPEConfig

    known = ModelRegistry.models[plugin.COPE_MODEL]
    plugin.register()
    assert ModelRegistry.models[plugin.COPE_MODEL] is known
    assert type(AutoConfig.for_model("cope")) is CoPEConfig


def test_a_fresh_process_needs_no_more_than_the_folder(cope):
    code = (
        "import sys; from vllm.engine.arg_utils import EngineArgs;"
        "c = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config();"
        "m = c.model_config; print(m.architecture, type(m.hf_config).__name__, m.runner_type)"
    )
    assert in_fresh_process(code, b"", cope) == "CoPEForCausalLM CoPEConfig generate"


def test_the_configuration_unpickles_before_any_plugin_is_loaded(cope):
    # As the engine core does.
    code = (
        "import pickle, sys; c = pickle.load(sys.stdin.buffer);"
        "print(c.model_config.hf_config.cope_positions)"
    )
    assert in_fresh_process(code, pickle.dumps(configure(cope))) == "16"


def test_a_vllm_that_is_too_old_gets_no_model(monkeypatch):
    monkeypatch.setattr(compat, "check_version", lambda: False)
    monkeypatch.delitem(ModelRegistry.models, plugin.COPE_MODEL)
    plugin.register()
    assert plugin.COPE_MODEL not in ModelRegistry.models


def test_without_what_the_configuration_needs_the_rest_is_registered(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm_sparse.models", None)  # its import fails
    monkeypatch.delattr(sys.modules["vllm_sparse"], "models", raising=False)
    monkeypatch.delitem(ModelRegistry.models, plugin.COPE_MODEL)
    with caplog.at_level(logging.INFO, "vllm_sparse"):
        plugin.register()
    assert plugin.COPE_MODEL not in ModelRegistry.models
    assert "CoPE models cannot be served by this vLLM" in caplog.text


def test_what_is_supported(cope):
    assert configure(cope).model_config.architecture == "CoPEForCausalLM"
    configure(cope, dtype="bfloat16", block_size=32, enable_prefix_caching=False)


@pytest.mark.parametrize(
    "engine, says",
    [
        ({"attention_backend": "sparse"}, "--attention-backend sparse"),
        ({"attention_backend": "CPU_ATTN"}, "--attention-backend cpu_attn"),
        (
            {"attention_config": {"backend_per_kind": {"full_attention": "sparse"}}},
            "--attention-backend sparse",
        ),
    ],
    ids=str,
)
def test_another_backend_is_refused(engine, says, cope):
    with pytest.raises(ValueError) as error:
        configure(cope, **engine)
    assert f"{says}: CoPE models bring their own attention" in str(error.value)
    assert "Leave --attention-backend out" in str(error.value)


@pytest.mark.parametrize(
    "engine, says",
    [
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype 'fp8': supported is the model's own"),
        ({"dtype": "float32", "kv_cache_dtype": "bfloat16"}, "KV cache dtype 'bfloat16'"),
        ({"block_size": 8}, "KV block size 8: supported are the multiples of 16"),
        ({"hf_overrides": {"head_dim": 32}}, "head size 32: supported are the multiples of 16"),
    ],
    ids=str,
)
def test_what_is_refused(engine, says, cope):
    with pytest.raises(ValueError, match="CoPE models cannot be served like this: ") as error:
        configure(cope, **engine)
    assert says in str(error.value)


def test_context_parallelism_and_batch_invariance_are_refused(cope, monkeypatch):
    from vllm_sparse.cpu_platform import check_config

    config = configure(cope)
    config.parallel_config.decode_context_parallel_size = 2
    config.parallel_config.prefill_context_parallel_size = 2
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError) as error:
        check_config(config)
    for says in ("decode context", "prefill context", "VLLM_BATCH_INVARIANT"):
        assert says in str(error.value)


def test_a_table_of_another_size_is_refused():
    import torch

    from vllm_sparse.models.cope_vllm import load_table

    parameter = torch.nn.Parameter(torch.zeros(16, 64), requires_grad=False)
    with pytest.raises(ValueError, match=r"a table of \[64, 64\].*config.json says \[16, 64\]"):
        load_table(parameter, torch.zeros(64, 64))
    load_table(parameter, torch.ones(16, 64))
    assert bool((parameter == 1).all())
