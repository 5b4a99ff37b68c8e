"""The retrieval model through a real server, with the sparse backend as it comes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from asking import ask
from engines_beside import on_core
from retrieval.checkpoint import build_checkpoint
from retrieval.prompts import Question, averaging_prompt, needle_prompt
from server import Server, ends_on_signals

READY_S = 300
DTYPES = ("float32", "bfloat16")
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


@pytest.fixture(scope="module")
def servers(checkpoint, tmp_path_factory) -> Iterator[dict[str, Server]]:
    """By dtype, each on a core of its own."""
    settings = [
        "--served-model-name", "lean", "--max-model-len", "16640",
        "--max-num-batched-tokens", "4096", "--kv-cache-memory-bytes", str(512 * 2**20),
        "--enforce-eager", "--attention-backend", "sparse", "--dtype",
    ]  # fmt: skip
    logs = tmp_path_factory.mktemp("logs")
    with ends_on_signals(), ExitStack() as stack:
        started = {}
        for i, dtype in enumerate(DTYPES):
            server = Server(
                checkpoint, logs / f"{dtype}.log", *settings, dtype, environment=on_core(i)
            )
            started[dtype] = stack.enter_context(server)
        for server in started.values():
            for _ in server.wait_until_ready(READY_S):
                pass
        yield started
        texts = [server.log_text() for server in started.values()]
    # What was answered was answered by the sparse path, 16K tokens at a time at least.
    for text in texts:
        assert "Sparse attention active: coverage 0.95" in text
        longest = [int(n) for n in re.findall(r"Sparse prefill: (\d+) tokens", text)]
        assert max(longest) >= 16000


def wrong(servers: dict[str, Server], questions: dict[str, Question]) -> list[str]:
    """Puts all questions to each server, to both at once; what they say that is not right."""
    with ThreadPoolExecutor(len(servers)) as pool:
        asked = {
            (dtype, name): pool.submit(ask, server, question)
            for name, question in questions.items()
            for dtype, server in servers.items()
        }
        answers = {key: answer.result() for key, answer in asked.items()}
    return [
        f"{dtype}, {name}: {answer!r} instead of {questions[name].answer!r}"
        for (dtype, name), answer in answers.items()
        if not questions[name].is_right(answer)
    ]


@pytest.mark.parametrize("length", DEPTHS, ids=lambda n: f"{n // 1024}K")
def test_a_needle_at_every_depth(servers, length):
    questions = {
        f"depth {depth}": needle_prompt(
            length, depth, seed=round(100 * depth) + length, distractors=2
        )
        for depth in DEPTHS[length]
    }
    assert wrong(servers, questions) == []


@pytest.mark.parametrize("length", DEPTHS, ids=lambda n: f"{n // 1024}K")
def test_averages_over_the_whole_prompt(servers, length):
    questions = {
        str(kind): averaging_prompt(length, seed=i, **kind) for i, kind in enumerate(AVERAGING)
    }
    assert wrong(servers, questions) == []
