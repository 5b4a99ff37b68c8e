"""Sampled decode over host memory through the engine: crowds, prefixes, preemption, kills, ranks.

On the lean retrieval model, whose answers are wrong where rows are read wrongly.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_steps import Phase, Steps, run_steps
from engines_beside import on_two_cores
from retrieval.checkpoint import build_checkpoint
from retrieval.prompts import Question, haystack_ids, needle_prompt

from vllm_sparse.cpu_offload import actor

BLOCK_BYTES = 1 << 20  # 128 tokens x 4 layers x 2 heads x 2 x 128 x 4 bytes
DEVICE_BLOCKS = 22  # 1.2 requests of LENGTH, and vLLM's null block
LENGTH = 2050
ROWS = 256  # of about 1,650 in the host: fewer than the samplers' own choice would be
WORDS = 3
SAMPLERS = ("lsh", "vattention", "topk")
# The schedules are the same for all, and who answers beside the worker does not matter to them:
# actors (settings, and the command of those that are killed), or another rank.
ACTORS = {"lsh": ({"actors": 1}, "cpu_offload.worker")}
if actor.is_installed():
    ACTORS["topk"] = ({"actors": 1, "ray": True}, "OffloadActor")
RANKS = {"vattention": 2}
DTYPES = {"vattention": "int8"}  # of the host's rows

QUESTIONS = [
    needle_prompt(LENGTH, depth, seed=i, distractors=2, words=WORDS)
    for i, depth in enumerate((0.15, 0.4, 0.6))
]


def ask(token_ids: list[int], max_tokens: int = WORDS + 1, at: int = 0) -> dict:
    return {"prompt": token_ids, "max_tokens": max_tokens, "at": at, "cancel": None}


PHASES = {
    "crowd": [ask(q.token_ids, 24) for q in QUESTIONS],
    "prefix": [ask(QUESTIONS[0].token_ids)],
    # Requests of 2 blocks that come to need a third push out those that came last.
    "preempted": [
        *(ask(haystack_ids(250, i), 12) for i in range(9)),
        *(ask(q.token_ids, 12, at=1) for q in QUESTIONS[:2]),
    ],
}


@pytest.fixture(scope="module")
def lean(tmp_path_factory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("lean"), "lean")


@pytest.fixture(scope="module", params=SAMPLERS)
def served(request, lean) -> tuple[str, Steps]:
    actors, killed = ACTORS.get(request.param, ({}, ""))
    settings = {
        "decode": request.param, "window": 256, "rows": ROWS, "resident_layers": [],
        "break_even": 2048, "host_gib": 0.25, "host_dtype": DTYPES.get(request.param, "auto"),
        **actors,
    }  # fmt: skip
    ranks = RANKS.get(request.param, 1)
    steps = run_steps(
        str(lean), list(PHASES.values()), max_model_len=LENGTH + 100,
        kv_cache_memory_bytes=DEVICE_BLOCKS * BLOCK_BYTES // ranks, tensor_parallel_size=ranks,
        env=on_two_cores() if ranks > 1 else None,
        kill_at={12: killed} if killed else None, attention_backend="sparse",
        additional_config={"sparse": settings},
    )  # fmt: skip
    return request.param, steps


def phase(steps: Steps, name: str) -> Phase:
    return steps.phases[list(PHASES).index(name)]


def wrong(questions: list[Question], tokens: list[list[int]]) -> list[str]:
    return [
        f"{got[: WORDS + 1]} instead of {question.answer_ids}"
        for question, got in zip(questions, tokens, strict=True)
        if got[: WORDS + 1] != question.answer_ids
    ]


def test_a_crowd_is_answered_from_samples(served):
    sampler, steps = served
    crowd = phase(steps, "crowd")
    assert wrong(QUESTIONS, crowd.tokens) == []
    assert all(len(tokens) == 24 for tokens in crowd.tokens)
    assert max(crowd.running) == len(QUESTIONS)  # vLLM's own: 17 blocks each, one after another
    assert steps.blocks == DEVICE_BLOCKS - 1
    stats = steps.stats
    assert 0 < stats["rows_read"] < 0.2 * stats["rows_there"]
    assert 0.24 * 2**30 < stats["host_bytes"] <= 0.25 * 2**30  # what samplers know included
    assert ("tokens of 4 layers as int8, decode" in steps.log) == (sampler in DTYPES)
    if sampler in ACTORS:
        assert crowd.killed
        assert stats["restarts"] == len(crowd.killed)


def test_a_prefix_brings_its_index(served):
    _, steps = served
    prefix = phase(steps, "prefix")
    assert prefix.cached == [LENGTH // 256 * 256]
    assert wrong(QUESTIONS[:1], prefix.tokens) == []


def test_preempted_requests_go_on_with_samples(served):
    _, steps = served
    preempted = phase(steps, "preempted")
    assert preempted.preemptions > 0
    assert wrong(QUESTIONS[:2], preempted.tokens[-2:]) == []
    assert [len(tokens) for tokens in preempted.tokens] == [12] * 11
    for done in steps.phases:
        assert done.used[-1] == 0
        assert done.held[-1] == 0
