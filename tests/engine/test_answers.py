"""The retrieval model through a real server, with the sparse backend as it comes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import ask
from retrieval.checkpoint import build_checkpoint
from retrieval.prompts import averaging_prompt, needle_prompt
from server import Server, ends_on_signals

READY_S = 300
DEPTHS = {1024: [i / 10 for i in range(11)], 4096: [0, 0.25, 0.5, 0.75, 1]}
DEPTHS[16384] = DEPTHS[4096]
# The majority's share and the others'; the last one's minority stands nearest to the question.
AVERAGING = [
    {"shares": (0.5, 0.25, 0.25)},
    {"shares": (0.4, 0.3, 0.3)},
    {"shares": (0.6, 0.4), "late_minority": True},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("lean"), "lean")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def server(request, checkpoint, tmp_path_factory) -> Iterator[Server]:
    settings = [
        "--served-model-name", "lean", "--dtype", request.param, "--max-model-len", "16640",
        "--max-num-batched-tokens", "4096", "--kv-cache-memory-bytes", str(512 * 2**20),
        "--enforce-eager", "--attention-backend", "sparse",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("logs") / f"{request.param}.log"
    with ends_on_signals(), Server(checkpoint, log, *settings) as server:
        for _ in server.wait_until_ready(READY_S):
            pass
        yield server
        text = server.log_text()
    # What was answered was answered by the sparse path, 16K tokens at a time at least.
    assert "Sparse attention active: coverage 0.95" in text
    longest = [int(n) for n in re.findall(r"Sparse prefill: (\d+) tokens", text)]
    assert max(longest) >= 16000


@pytest.mark.parametrize("length", DEPTHS, ids=lambda n: f"{n // 1024}K")
def test_a_needle_at_every_depth(server, length):
    questions = [
        needle_prompt(length, depth, seed=round(100 * depth) + length, distractors=2)
        for depth in DEPTHS[length]
    ]
    answers = [ask(server, question) for question in questions]
    wrong = [
        f"depth {depth}: {answer!r} instead of {question.answer!r}"
        for depth, question, answer in zip(DEPTHS[length], questions, answers, strict=True)
        if not question.is_right(answer)
    ]
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("length", DEPTHS, ids=lambda n: f"{n // 1024}K")
def test_averages_over_the_whole_prompt(server, length):
    questions = [averaging_prompt(length, seed=i, **kind) for i, kind in enumerate(AVERAGING)]
    answers = [ask(server, question) for question in questions]
    wrong = [
        f"{kind}: {answer!r} instead of {question.answer!r}"
        for kind, question, answer in zip(AVERAGING, questions, answers, strict=True)
        if not question.is_right(answer)
    ]
    assert not wrong, "; ".join(wrong)
