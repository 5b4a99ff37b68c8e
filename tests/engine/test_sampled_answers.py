"""Answers at 16K from sampled decode with its default settings, through a real server."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import ask
from retrieval.checkpoint import build_checkpoint
from retrieval.prompts import questions_on_one_text
from server import Server, ends_on_signals

READY_S = 300
CHUNK = 4096
# One more token than whole chunks: the last one, from which the answer comes, is alone in its
# chunk and reads the host as decode does. The needles' questions find the text in the prefix cache;
# of their answers the first word comes from prefill, the others from decode.
LENGTH = 4 * CHUNK + 1
TALLY, *NEEDLES = questions_on_one_text(LENGTH, seed=1, words=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("lean"), "lean")


@pytest.fixture(scope="module", params=["lsh", "vattention", "topk"])
def server(request, checkpoint, tmp_path_factory) -> Iterator[tuple[str, Server]]:
    settings = [
        "--served-model-name", "lean", "--dtype", "float32", "--max-model-len", "16640",
        "--max-num-batched-tokens", str(CHUNK), "--kv-cache-memory-bytes", str(128 * 2**20),
        "--enforce-eager", "--attention-backend", "sparse",
        "--additional-config.sparse.decode", request.param,
        "--additional-config.sparse.break_even", "2048",
        "--additional-config.sparse.host_gib", "1",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("logs") / f"{request.param}.log"
    with ends_on_signals(), Server(checkpoint, log, *settings) as server:
        for _ in server.wait_until_ready(READY_S):
            pass
        yield request.param, server


def test_answers_at_16k(server):
    sampler, running = server
    tally = ask(running, TALLY)
    # Rows that are heaviest by a little are those nearest to the question, where the symbol that
    # is rarer in the whole leads. Taking nothing for the others, top-k cannot know.
    assert TALLY.is_right(tally) == (sampler != "topk"), f"{tally!r}, not {TALLY.answer!r}"
    answers = [ask(running, question) for question in NEEDLES]
    wrong = [
        f"{answer!r} instead of {question.answer!r}"
        for question, answer in zip(NEEDLES, answers, strict=True)
        if not question.is_right(answer)
    ]
    assert not wrong, "; ".join(wrong)
    with urllib.request.urlopen(f"{running.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    read, there = (
        float(re.search(rf"^vllm:sparse_offload_{name}_total\{{.*\}} (\S+)$", text, re.M)[1])
        for name in ("rows_read", "rows_there")
    )
    assert 0 < read < 0.1 * there
