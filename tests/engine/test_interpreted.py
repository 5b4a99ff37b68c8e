"""The CUDA backend in a running engine: vLLM's runner on a CPU, the Triton kernels interpreted."""

from __future__ import annotations

from itertools import chain

import interpreted_engine
import pytest
from engine_run import prompt, run
from engines_beside import beside
from tiny_models import save_llama

TEXT = prompt(300, 1)
REPEATS = prompt(100, 8) * 3
BATCHES = [
    [prompt(10, 3)],
    [TEXT],
    # Chunks, prefix hits, and steps that mix them with decodes.
    [TEXT + prompt(20, 2), TEXT[:200] + prompt(5, 4), prompt(90, 5)],
    # 10 pages each, of 31 that can be used, and the third new token of each needs an eleventh.
    [prompt(318, seed) for seed in (6, 7, 9)],
]
# Chunks that read the host's rows, sparsely and densely, steps that mix them with decodes, and a
# prefix of a whole host page.
LONG = prompt(600, 11)
OFFLOADED = [[LONG], [LONG[:300] + prompt(150, 2), LONG[:520], prompt(90, 5)]]
SIZES = {
    "max_tokens": 8, "max_num_batched_tokens": 256, "max_model_len": 512, "block_size": 32,
    "kv_cache_memory_bytes": 2 << 20,  # 32 pages of 32 tokens x 2 layers x 2 heads x 2 x 64 floats
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), layers=2)


def both(model, batches, sparse, dense=None, runner=None, **engine):
    """(vLLM's own backend, ours); `dense` holds what the first is given in place of `SIZES`."""

    def interpreted(env):
        return run(
            model, batches, function="interpreted_engine:generate",
            env=env | interpreted_engine.ENVIRONMENT | (runner or {}), attention_backend="sparse",
            additional_config={"sparse": {"coverage": 1.0, **sparse}}, **SIZES | engine,
        )  # fmt: skip

    with beside() as engines:
        peer = SIZES | (dense or {})
        runs = engines.start(run, model, batches, **peer), engines.start(interpreted)
        return [one.result() for one in runs]


def test_tokens_are_those_of_vllms_backend(model):
    dense, ours = both(model, BATCHES, {"break_even": 64, "shared_prefix": True})
    assert len({t for batch in dense.tokens for tokens in batch for t in tokens}) > 20
    assert ours.tokens == dense.tokens
    assert ours.cached[2] == [288, 192, 0]
    assert ours.preemptions[3] > 0
    [stats] = ours.stats
    assert stats["sparse_chunks"] > 8 and stats["dense_chunks"] >= 1
    assert stats["keys_read"] == stats["keys_causal"] > 0
    assert stats["shared_rows"] > 10
    assert "kernels Triton on Triton's interpreter" in ours.log


def test_speculated_tokens(model):
    """Found in the prompt, checked by decode: several rows a sequence, some of them thrown away."""
    speculative = {
        "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }  # fmt: skip
    batches = [[REPEATS, TEXT]]  # which has half of all tokens: the last one is often among them
    dense, ours = both(model, batches, {"break_even": 64}, speculative_config=speculative)
    assert ours.tokens == dense.tokens
    [stats] = ours.stats
    assert stats["decode_rows"] > 2 * (SIZES["max_tokens"] - 1)  # more than one a step


@pytest.fixture(scope="module")
def deeper(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("deeper"), layers=3)


# Of the peer: vLLM's own backend with all keys on the device.
WHOLE = {"max_model_len": 1024, "kv_cache_memory_bytes": 8 << 20}


def over_host_memory(model, peer, **settings):
    """(the peer, ours) in the runner that GPUs get by default."""
    sparse = {
        "decode": "exact", "window": 64, "sink": 16, "resident_layers": [1], "host_gib": 0.1,
        "break_even": 400, **settings,
    }  # fmt: skip
    sizes = {"max_model_len": 1024, "max_num_batched_tokens": 128}
    if peer is None:  # the CPU's backend, with the same settings
        peer = WHOLE | {
            "block_size": None, "kv_cache_memory_bytes": 16 << 20, "attention_backend": "sparse",
            "additional_config": {"sparse": {"coverage": 1.0, **sparse}},
        }  # fmt: skip
    peer, ours = both(model, OFFLOADED, sparse, peer, interpreted_engine.SECOND_RUNNER, **sizes)
    assert "Using V2 Model Runner" in ours.log
    assert ours.cached[1] == [256, 512, 0]
    return peer, ours


def test_decode_over_host_memory(deeper):
    dense, ours = over_host_memory(deeper, WHOLE)
    assert len({t for batch in dense.tokens for tokens in batch for t in tokens}) > 20
    assert ours.tokens == dense.tokens
    [stats] = ours.stats
    assert stats["sparse_chunks"] > 3 and stats["dense_chunks"] > 3


def test_int8_rows_in_host_memory(deeper):
    """As on a CPU, for as long as it does not matter that a GPU does not round a chunk's own rows
    while it reads them."""
    cpu, ours = over_host_memory(deeper, None, host_dtype="int8")
    for log in (cpu.log, ours.log):
        assert "tokens of 3 layers as int8, decode exact" in log
    for got, want in zip(chain(*ours.tokens), chain(*cpu.tokens), strict=True):
        assert got[:4] == want[:4]
