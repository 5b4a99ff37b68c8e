"""Decode over keys and values in host memory: tokens of `exact`, what the device still holds."""

from __future__ import annotations

import re

import pytest
from engine_run import prompt, run
from engine_steps import Phase, Steps, run_steps
from engines_beside import beside, on_two_cores

from vllm_sparse.cpu_offload import numa

BLOCK_BYTES = 512 << 10  # 128 tokens x 4 layers x 2 heads x 2 x 64 x 4 bytes
LONGEST = 4096  # tokens: 32 blocks


def exact(**more) -> dict:
    settings = {"coverage": 1.0, "break_even": 0, "decode": "exact", "window": 256, "sink": 16}
    settings |= {"resident_layers": [], "host_gib": 0.25}
    return {"attention_backend": "sparse", "additional_config": {"sparse": settings | more}}


def ask(
    length: int, seed: int, max_tokens: int = 40, at: int = 0, cancel: int | None = None, **more
):
    return {
        "prompt": prompt(length, seed), "max_tokens": max_tokens, "at": at, "cancel": cancel,
        **more,
    }  # fmt: skip


def alike(seed: int, **more) -> dict:
    """11 whole pages of 256 tokens that others begin with as well, and 284 of its own."""
    asked = ask(284, seed, **more)
    asked["prompt"] = prompt(11 * 256, 60) + asked["prompt"]
    return asked


PHASES = {
    # Eight requests that take 27 blocks each with all their keys on the device.
    "crowd": [ask(3300, i, max_tokens=70) for i in range(8)],
    "mixed": [ask(n, n) for n in (1, 10, 63, 64, 65, 300, 700, 2000)],
    # 2 blocks each, and the 7th new token of each needs a third.
    "preempted": [ask(250, 100 + i) for i in range(18)],
    "prefix": [ask(2000, 50), ask(2000, 50, at=60)],
    # Cancelled while it decodes, while it prefills, and while it waits.
    "cancelled": [
        ask(2000, 51, cancel=20), ask(3000, 52, at=3, cancel=6), ask(600, 53),
        ask(3900, 54, at=1, cancel=1),
    ],
    # Input that comes while the one before is answered, and after it was.
    "sessions": [
        ask(1000, 70, max_tokens=9, more=[[4, prompt(100, 71)], [50, prompt(800, 72)]]),
        ask(250, 73, max_tokens=5, at=1, more=[[30, prompt(3, 74)]]), ask(600, 75),
    ],
    # They hold 14 pages each, 13, and 2 each; when all is forgotten, each of the last wants 13.
    "reset": [
        ask(3300, 80), ask(3300, 81), alike(61), *(alike(n, at=20) for n in range(62, 66)),
        alike(66, at=20, reset=25),
    ],
}  # fmt: skip
# 1.2 requests of the longest kind; one block is vLLM's null block.
DEVICE_BYTES = 40 * BLOCK_BYTES


def serve(model: str, *names: str, **engine) -> Steps:
    engine = {"kv_cache_memory_bytes": DEVICE_BYTES, "max_model_len": LONGEST, **engine}
    return run_steps(model, [PHASES[n] for n in names], **engine)


def phase(steps: Steps, name: str) -> Phase:
    return steps.phases[list(PHASES).index(name)]


@pytest.fixture(scope="module")
def engines(llama):
    """Runs by name, all but those that take both cores or are timed."""
    with beside() as engines:
        yield {
            "dense": engines.start(serve, llama, *PHASES),
            "offloaded": engines.start(serve, llama, *PHASES, **exact()),
            # 14 pages of 256 rows a request, of 1 MiB each; two layers are kept on the device too.
            "full host": engines.start(
                serve, llama, "crowd", "mixed", "prefix", "sessions", "reset",
                kv_cache_memory_bytes=256 << 20, **exact(host_gib=0.05, resident_layers=[0, 2]),
            ),
            "numa": engines.start(serve, llama, "mixed", **exact(actors="numa")),
        }  # fmt: skip


@pytest.fixture(scope="module")
def dense(engines):
    return engines["dense"].result()


@pytest.fixture(scope="module")
def offloaded(engines):
    return engines["offloaded"].result()


@pytest.mark.parametrize("name", PHASES)
def test_tokens_equal_full_kv(name: str, dense, offloaded):
    want, got = phase(dense, name), phase(offloaded, name)
    assert len({t for tokens in want.tokens for t in tokens}) > 10, "degenerate model"
    for request, a, b in zip(PHASES[name], got.tokens, want.tokens, strict=True):
        if request["cancel"] is None:
            assert len(a) == request["max_tokens"] * (1 + len(request.get("more", ())))
            assert a == b
        else:  # cut at another token, as the one engine has come further
            assert a[: len(b)] == b[: len(a)]


def test_the_phases_are_what_they_claim(dense, offloaded):
    assert phase(offloaded, "preempted").preemptions > 0
    # All whole pages of 256 rows but the one with the last token, which is always computed.
    assert phase(offloaded, "prefix").cached == [0, 7 * 256]
    started = phase(offloaded, "cancelled").tokens
    assert 0 < len(started[0]) < 40
    assert started[1] == started[3] == []
    reset = phase(offloaded, "reset")
    assert reset.running[24] == 8 <= reset.preemptions
    assert reset.cached == [0] * 3 + [11 * 256] * 5


def test_device_blocks_are_freed(dense, offloaded):
    assert dense.blocks == offloaded.blocks == 39
    # vLLM's own: 27 blocks each, so one after another.
    assert max(phase(dense, "crowd").running) == 1
    crowd = phase(offloaded, "crowd")
    assert max(crowd.running) == 8
    for done in offloaded.phases:
        assert done.used[-1] == 0
        assert done.held[-1] == 0


def test_counters(offloaded):
    stats = offloaded.stats
    assert stats["rows_read"] == stats["rows_there"] > 0
    assert stats["decode_rows"] > 8 * 4 * 60  # the crowd alone
    tokens = sum(len(r["prompt"]) for name in PHASES for r in PHASES[name] if name != "reset")
    reset = phase(offloaded, "reset")  # writes what it does not find, and that again
    for request, found in zip(PHASES["reset"], reset.cached, strict=True):
        tokens += 2 * (len(request["prompt"]) - found)
    row = 4 * 2 * 2 * 64 * 4  # layers, heads, K and V, size, bytes
    assert stats["mirrored_bytes"] > 0.8 * tokens * row
    assert stats["loaded_bytes"] > 0
    assert stats["restarts"] == 0
    assert stats["host_bytes"] <= 0.25 * 2**30


def test_a_full_host_queues(engines, dense):
    result = engines["full host"].result()
    crowd, mixed, prefix, sessions, reset = result.phases
    assert crowd.tokens == phase(dense, "crowd").tokens
    assert mixed.tokens == phase(dense, "mixed").tokens
    assert prefix.tokens == phase(dense, "prefix").tokens
    assert prefix.cached == [0, 7 * 256]
    assert sessions.tokens == phase(dense, "sessions").tokens
    assert reset.tokens == phase(dense, "reset").tokens
    assert reset.running[24] == 8  # the host is full, to the last page
    assert max(crowd.held) == max(crowd.running) == 3
    assert result.stats["queued"] > 0


def test_one_actor_for_each_numa_node(engines, dense):
    result = engines["numa"].result()
    assert result.phases[0].tokens == phase(dense, "mixed").tokens
    assert result.stats["rows_read"] > 0
    made = re.search(r"decode exact by (\d+) process(es)? and the worker", result.log)
    assert 1 <= int(made[1]) <= max(len(numa.nodes()), 1)


def test_a_request_longer_than_the_device(llama, dense):
    device = {"kv_cache_memory_bytes": 20 * BLOCK_BYTES, "max_model_len": LONGEST}
    assert "KV cache is needed" in run(llama, [[[1]]], expect_failure=True, **device)
    device["kv_cache_memory_bytes"] //= 2  # of each rank, which has half of the heads
    names = ["crowd", "preempted", "prefix"]
    result = serve(
        llama, *names, tensor_parallel_size=2, env=on_two_cores(), **device, **exact(),
    )  # fmt: skip
    assert result.blocks == 19  # 2,432 tokens
    for name, got in zip(names, result.phases, strict=True):
        assert got.tokens == phase(dense, name).tokens
    assert result.phases[names.index("prefix")].cached == [0, 7 * 256]


def test_an_actor_is_killed_while_it_decodes(llama, dense):
    result = serve(
        llama, "crowd", kill_at={80: "cpu_offload.worker", 100: "cpu_offload.worker"},
        **exact(actors=1),
    )  # fmt: skip
    (crowd,) = result.phases
    assert len(crowd.killed) >= 1
    assert crowd.tokens == phase(dense, "crowd").tokens
    assert max(crowd.seconds[80:]) < 2.0
