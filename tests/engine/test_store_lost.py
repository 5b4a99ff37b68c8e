"""A host store that is lost under a running engine: every request is computed again."""

from __future__ import annotations

import pytest
from engine_run import prompt
from engine_steps import Steps, run_steps
from engines_beside import beside, on_two_cores

BLOCK_BYTES = 512 << 10  # 128 tokens x 4 layers x 2 heads x 2 x 64 x 4 bytes
# 8 requests that prefill for some 26 steps and decode for 60, and what is asked afterwards.
CROWD = [(1500 + 64 * i, i, 60) for i in range(8)]
LATER = [[(n, n, 30) for n in (1, 65, 700, 2000)], [(2000, 50, 30)], [(2000, 50, 30)]]
SAID = "The host store is lost: "


def ask(length: int, seed: int, max_tokens: int) -> dict:
    return {"prompt": prompt(length, seed), "max_tokens": max_tokens, "at": 0, "cancel": None}


def serve(model: str, **engine) -> Steps:
    phases = [[ask(*x) for x in phase] for phase in (CROWD, *LATER)]
    engine = {"kv_cache_memory_bytes": 64 * BLOCK_BYTES, "max_model_len": 4096, **engine}
    return run_steps(model, phases, **engine)


def lossy(call_at: dict[int, list], **more) -> dict:
    settings = {"coverage": 1.0, "break_even": 0, "decode": "exact", "window": 256, "sink": 16}
    settings |= {"resident_layers": [], "host_gib": 0.25, **more}
    return {
        "attention_backend": "sparse", "additional_config": {"sparse": settings},
        "worker_extension_cls": "engine_faults.Faults",
        "call_at": {step: ["lose_store", *call] for step, call in call_at.items()},
    }  # fmt: skip


# In a step of prefill, between two of decode, and in one of decode after its tokens are known to be
# wrong only at its end. Each time all is prefilled again, in some 30 steps.
IN_STEPS = {10: ["append"], 60: ["head"], 120: ["pages"]}
# Two KV cache groups, where vLLM's own handling of failed loads gives up.
OF_AN_ACTOR = {40: ["head"], 90: ["collect"]}
OVER_AND_OVER = {step: ["head"] for step in (2, 4, 6, 8)}


@pytest.fixture(scope="module")
def engines(llama):
    """Runs by name, all but the one that takes both cores."""
    with beside() as engines:
        yield {
            "dense": engines.start(serve, llama),
            "in steps": engines.start(serve, llama, **lossy(IN_STEPS)),
            "of an actor": engines.start(
                serve, llama, **lossy(OF_AN_ACTOR, actors=1, resident_layers=[0, 2])
            ),
            "over and over": engines.start(serve, llama, **lossy(OVER_AND_OVER)),
        }


@pytest.fixture(scope="module")
def dense(engines):
    return engines["dense"].result()


def check(got: Steps, dense: Steps, losses: int) -> None:
    assert len({t for tokens in dense.phases[0].tokens for t in tokens}) > 10, "degenerate model"
    for a, b in zip(got.phases, dense.phases, strict=True):
        assert a.tokens == b.tokens
        assert a.used[-1] == a.held[-1] == 0
    # The new store is one: it keeps prefixes.
    assert got.phases[-2].cached == [0] and got.phases[-1].cached == [7 * 256]
    assert got.stats["regions_lost"] == losses
    assert got.log.count(SAID) == losses
    assert got.phases[0].preemptions >= losses


def test_a_store_is_lost_in_prefill_and_in_decode(engines, dense):
    got = engines["in steps"].result()
    check(got, dense, 3)
    for cause in ("out of memory", "the head of the region was", "the page lists in the region"):
        assert got.log.count(SAID + cause) == 1
    assert got.stats["rows_read"] == got.stats["rows_there"] > 0


def test_an_actor_s_region_is_lost_beside_resident_layers(engines, dense):
    got = engines["of an actor"].result()
    assert "'Region'" in got.log
    check(got, dense, 2)


def test_a_store_that_is_lost_over_and_over_ends_the_engine(engines):
    with pytest.raises(AssertionError, match="The host store is lost for the 4th time") as caught:
        engines["over and over"].result()
    assert "look for what writes to this process's memory" in str(caught.value)


def test_one_rank_of_two_loses_its_store(llama, dense):
    device = {"kv_cache_memory_bytes": 32 * BLOCK_BYTES, "tensor_parallel_size": 2}
    calls = {10: ["pages", 1], 60: ["head", 0]}
    check(serve(llama, env=on_two_cores(), **device, **lossy(calls)), dense, 2)
