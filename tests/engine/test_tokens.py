"""With everything selected, greedy tokens equal those of vLLM's own CPU backend, in fp32."""

from __future__ import annotations

import re

import pytest
from engine_run import DENSE, EVERYTHING, prompt, run
from engines_beside import beside, on_two_cores

# What each batch of the two engines shows. Chunks are 512 tokens, pages 128.
CASES = {
    "10": [prompt(10, 1)],
    "300": [prompt(300, 2)],
    "3000": [prompt(3000, 3)],
    "mixed-8": [prompt(n, n) for n in (1, 10, 63, 64, 65, 300, 700, 2000)],
    # 3000 again, and a prompt that shares its first 1500 tokens: 23 and 11 whole pages.
    "prefix-hit": [prompt(3000, 3), prompt(3000, 3)[:1500] + prompt(400, 4)],
    # 8 times 7 pages, of 63 that can be used, and the 17th new token of each needs an eighth.
    "preempted": [prompt(880, 100 + i) for i in range(8)],
}
KV_BYTES = (
    32 << 20
)  # 64 pages of 128 tokens x 4 layers x 2 heads x 2 x 64 x 4 bytes; one is vLLM's null page


SHORT = [[prompt(10, 1), prompt(700, 2)]]
HALVES = {"bfloat16": 16, "float16": 64}  # block sizes


@pytest.fixture(scope="module")
def engines(llama, gemma3):
    """Runs by name, all but those that take both cores."""
    cases = {"max_tokens": 40, "kv_cache_memory_bytes": KV_BYTES, "processes": True}
    sparse = {"attention_backend": "sparse", "additional_config": {"sparse": {"break_even": 0}}}
    with beside() as engines:
        yield {
            "dense": engines.start(run, llama, list(CASES.values()), **cases, **DENSE),
            "sparse": engines.start(run, llama, list(CASES.values()), **cases, **EVERYTHING),
            **{
                dtype: engines.start(run, llama, SHORT, dtype=dtype, block_size=size, **sparse)
                for dtype, size in HALVES.items()
            },
            "gemma": engines.start(run, gemma3, SHORT, **EVERYTHING),
            "dense gemma": engines.start(run, gemma3, SHORT, **DENSE),
        }


@pytest.fixture(scope="module")
def dense(engines):
    return engines["dense"].result()


@pytest.fixture(scope="module")
def sparse(engines):
    return engines["sparse"].result()


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_dense(case: str, dense, sparse):
    i = list(CASES).index(case)
    assert len({t for tokens in dense.tokens[i] for t in tokens}) > 10, "degenerate model"
    assert sparse.tokens[i] == dense.tokens[i]


def test_the_cases_are_what_they_claim(sparse):
    names = list(CASES)
    assert sparse.cached[names.index("prefix-hit")] == [23 * 128, 11 * 128]
    assert sparse.preemptions[names.index("preempted")] > 0
    assert sum(sparse.cached[names.index("mixed-8")]) == 0


def test_one_line_says_that_it_is_active(sparse):
    lines = re.findall(r"Sparse attention active: .*", sparse.log)
    assert len(lines) == 1
    assert re.fullmatch(
        r"Sparse attention active: coverage 1, break-even 0 tokens \(given\), patterns adaptive, "
        r"decode dense, softmax online, kernels \w+ x \d+ threads?",
        lines[0],
    )
    assert re.search(r"INFO .*\[\w+\.py:\d+\] Sparse attention active", sparse.log)  # vLLM's format


def test_the_work_is_logged(sparse):
    assert re.search(r"Sparse prefill: \d+ tokens in \d+ chunks .*density 100.0%", sparse.log)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_runs(dtype: str, engines):
    # Equal tokens are no fair demand here: two correct backends differ where logits nearly tie.
    result = engines[dtype].result()
    assert result.logprobs_finite
    assert len({t for tokens in result.tokens[0] for t in tokens}) > 4


def test_sliding_window_layers_stay_with_vllm(engines):
    result = engines["gemma"].result()
    assert "Sliding-window layers stay with vLLM's own CPU backend" in result.log
    fallbacks = re.findall(r'"fallbacks": (\{.*?\})', result.log)
    assert fallbacks[-1] == '{"sliding_window": 4}'
    assert result.tokens == engines["dense gemma"].result().tokens


def test_tensor_parallel(llama, dense):
    names = ["10", "300", "mixed-8"]
    result = run(
        llama,
        [CASES[n] for n in names],
        max_tokens=40,
        tensor_parallel_size=2,
        env=on_two_cores(),
        **EVERYTHING,
    )
    assert result.tokens == [dense.tokens[list(CASES).index(n)] for n in names]
    assert len(re.findall("Sparse attention active", result.log)) == 2  # one line a worker
