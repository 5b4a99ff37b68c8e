"""Decode's softmax modes in a running engine: the tokens of vLLM's own backend in all of them."""

from __future__ import annotations

import re

import pytest
from engine_run import DENSE, EVERYTHING, prompt, run
from engines_beside import beside

from vllm_sparse.patterns import PatternFile
from vllm_sparse.search import calibrate

BATCHES = [[prompt(n, n) for n in (10, 63, 64, 300, 1200)]]
NEW_TOKENS = 40
# Decode attends in 4 layers of 4 heads, once for each new token but the first.
ROWS = 4 * 4 * len(BATCHES[0]) * (NEW_TOKENS - 1)


def everything(**settings) -> dict:
    sparse = {**EVERYTHING["additional_config"]["sparse"], **settings}
    return {**EVERYTHING, "additional_config": {"sparse": sparse}}


@pytest.fixture(scope="module")
def engines(llama, tmp_path_factory):
    """Runs by name."""
    folder = tmp_path_factory.mktemp("phi")
    right, wrong = folder / "phi.json", folder / "wrong.json"
    with beside() as engines:

        def start(engine: dict):
            return engines.start(run, llama, BATCHES, max_tokens=NEW_TOKENS, **engine)

        started = {"dense": start(DENSE)}
        started |= {mode: start(everything(softmax=mode)) for mode in ("online", "lazy")}
        calibrate.run(llama, right, length=1024, samples=1)
        file = PatternFile.load(right)
        file.model_copy(update={"phi": {layer: [1e5] * 4 for layer in range(4)}}).save(wrong)
        for name, path in (("unified", right), ("wrong phi", wrong)):
            started[name] = start(everything(softmax="unified", patterns=str(path)))
        yield started


@pytest.fixture(scope="module")
def dense(engines):
    return engines["dense"].result()


def test_online_and_lazy_give_the_dense_tokens(engines, dense):
    assert len({t for tokens in dense.tokens[0] for t in tokens}) > 10, "degenerate model"
    for softmax in ("online", "lazy"):
        result = engines[softmax].result()
        assert result.tokens == dense.tokens, softmax
        assert f"softmax {softmax}, " in result.log
        assert [s["softmax_flagged"] for s in result.stats] == [0]


def test_unified_with_its_phi_computes_nothing_again(engines, dense):
    result = engines["unified"].result()
    assert result.tokens == dense.tokens
    assert "softmax unified, " in result.log
    assert [s["softmax_flagged"] for s in result.stats] == [0]
    assert "left the window of phi" not in result.log


def test_unified_with_a_wrong_phi_computes_every_row_again(engines, dense):
    result = engines["wrong phi"].result()
    assert result.tokens == dense.tokens
    assert [s["softmax_flagged"] for s in result.stats] == [ROWS]
    assert len(re.findall("left the window of phi", result.log)) == 1  # counted, and said once
