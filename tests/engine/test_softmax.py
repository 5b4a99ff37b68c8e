"""Decode's softmax modes in a running engine: the tokens of vLLM's own backend in all of them."""

from __future__ import annotations

import re

import pytest
from engine_run import DENSE, EVERYTHING, prompt, run

from vllm_sparse.patterns import PatternFile
from vllm_sparse.search import calibrate

BATCHES = [[prompt(n, n) for n in (10, 63, 64, 300, 1200)]]
NEW_TOKENS = 40
# Decode attends in 4 layers of 4 heads, once for each new token but the first.
ROWS = 4 * 4 * len(BATCHES[0]) * (NEW_TOKENS - 1)


def generate(llama, **settings):
    sparse = {**EVERYTHING["additional_config"]["sparse"], **settings}
    return run(
        llama, BATCHES, max_tokens=NEW_TOKENS,
        **{**EVERYTHING, "additional_config": {"sparse": sparse}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def dense(llama):
    return run(llama, BATCHES, max_tokens=NEW_TOKENS, **DENSE)


@pytest.fixture(scope="module")
def phi_file(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("phi") / "phi.json"
    calibrate.run(llama, path, length=1024, samples=1)
    return path


def test_online_and_lazy_give_the_dense_tokens(llama, dense):
    assert len({t for tokens in dense.tokens[0] for t in tokens}) > 10, "degenerate model"
    for softmax in ("online", "lazy"):
        result = generate(llama, softmax=softmax)
        assert result.tokens == dense.tokens, softmax
        assert f"softmax {softmax}, " in result.log
        assert [s["softmax_flagged"] for s in result.stats] == [0]


def test_unified_with_its_phi_computes_nothing_again(llama, dense, phi_file):
    result = generate(llama, softmax="unified", patterns=str(phi_file))
    assert result.tokens == dense.tokens
    assert "softmax unified, " in result.log
    assert [s["softmax_flagged"] for s in result.stats] == [0]
    assert "left the window of phi" not in result.log


def test_unified_with_a_wrong_phi_computes_every_row_again(llama, dense, phi_file, tmp_path):
    file = PatternFile.load(phi_file)
    wrong = tmp_path / "wrong.json"
    file.model_copy(update={"phi": {layer: [1e5] * 4 for layer in range(4)}}).save(wrong)
    result = generate(llama, softmax="unified", patterns=str(wrong))
    assert result.tokens == dense.tokens
    assert [s["softmax_flagged"] for s in result.stats] == [ROWS]
    assert len(re.findall("left the window of phi", result.log)) == 1  # counted, and said once
