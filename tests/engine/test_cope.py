"""CoPE models served by vLLM: greedy tokens are those of the model in plain torch, in fp32."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from engine_run import prompt, run
from engines_beside import beside, on_two_cores
from safetensors.torch import load_file, save_file
from tiny_models import save_cope

NEW = 16
# Chunks are 128 tokens, pages 16.
CASES = {
    "1": [prompt(1, 1)],
    "10": [prompt(10, 1)],
    "300": [prompt(300, 2)],
    # 300 again, and a prompt that shares its first 200 tokens: 18 and 12 whole pages.
    "prefix-hit": [prompt(300, 2), prompt(300, 2)[:200] + prompt(50, 4)],
    # Decodes and chunks of prompts in one step, and so in one call of the kernel.
    "mixed-7": [prompt(n, n) for n in (1, 10, 63, 64, 65, 200, 600)],
    # 8 times 7 pages, of 61 that can be used, and the second new token of each needs an eighth.
    "preempted": [prompt(111, 100 + i) for i in range(8)],
}
PAGE_BYTES = 16 * 3 * 2 * 2 * 64 * 4  # tokens x layers x heads x (key, value) x size x fp32
SIZES = {
    "max_tokens": NEW, "max_num_batched_tokens": 128, "max_model_len": 768, "block_size": 16,
    "kv_cache_memory_bytes": 62 * PAGE_BYTES,  # one page is vLLM's null page
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_cope(tmp_path_factory.mktemp("cope"))


@pytest.fixture(scope="module")
def engines(model, tmp_path_factory):
    """Runs by name, all but the one that takes both cores."""
    with beside() as engines:
        yield {
            # Compiled, as models are unless told otherwise.
            "served": engines.start(
                run, model, list(CASES.values()), enforce_eager=False, processes=True, **SIZES
            ),
            "no table": engines.start(
                run, without_table(model, tmp_path_factory.mktemp("no-table")), [],
                expect_failure=True, **SIZES,
            ),
        }  # fmt: skip


@pytest.fixture(scope="module")
def served(engines):
    return engines["served"].result()


def without_table(model: str, path: Path) -> str:
    """The checkpoint without the table of one layer."""
    shutil.copy(Path(model) / "config.json", path)
    weights = load_file(Path(model) / "model.safetensors")
    del weights["model.layers.1.self_attn.pos_emb"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(path)


@functools.cache
def in_torch(path: str, positions: bool = True):
    """The checkpoint in Hugging Face's hands; without positions: its tables zeroed."""
    from transformers import AutoModelForCausalLM

    import vllm_sparse.models  # noqa: F401  makes it known

    found = AutoModelForCausalLM.from_pretrained(path).eval()
    if not positions:
        for layer in found.model.layers:
            layer.self_attn.pos_emb.data.zero_()
    return found


@torch.no_grad()
def greedy(reference, text: list[int], tokens: list[int]) -> list[int]:
    """What the reference takes for the likeliest at each place of `tokens`, after those before."""
    logits = reference(torch.tensor([text + tokens])).logits[0]
    return logits[len(text) - 1 : -1].argmax(-1).tolist()


def expected(reference, texts: list[list[int]], tokens: list[list[int]]) -> list[list[int]]:
    return [greedy(reference, *each) for each in zip(texts, tokens, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_plain_torch(case: str, model, served):
    texts, tokens = CASES[case], served.tokens[list(CASES).index(case)]
    assert [len(x) for x in tokens] == [NEW] * len(texts)
    assert len({t for each in tokens for t in each}) > 10, "degenerate model"
    assert tokens == expected(in_torch(model), texts, tokens)


@pytest.mark.parametrize("case", ["300", "mixed-7"])
def test_positions_decide_the_tokens(case: str, model, served):
    texts, tokens = CASES[case], served.tokens[list(CASES).index(case)]
    for text, given, other in zip(
        texts, tokens, expected(in_torch(model, positions=False), texts, tokens), strict=True
    ):
        same = sum(a == b for a, b in zip(given, other, strict=True))
        assert same < NEW / 2 or len(text) < 10


def test_the_cases_are_what_they_claim(served):
    names = list(CASES)
    assert served.cached[names.index("prefix-hit")] == [288, 192]
    assert served.preemptions[names.index("preempted")] > 0
    assert sum(served.cached[names.index("mixed-7")]) == 0


def test_one_line_says_what_attends(served):
    assert served.log.count("CoPE attention: kernels ") == 1


def test_a_checkpoint_without_a_table_is_refused(engines):
    log = engines["no table"].result()
    assert "not initialized from checkpoint" in log
    assert "model.layers.1.self_attn.pos_emb" in log


def test_tensor_parallel_with_tied_embeddings_and_biases(tmp_path):
    model = save_cope(tmp_path, tie_word_embeddings=True, attention_bias=True)
    texts = CASES["mixed-7"]
    sizes = SIZES | {"kv_cache_memory_bytes": 100 * PAGE_BYTES}
    result = run(model, [texts], tensor_parallel_size=2, env=on_two_cores(), **sizes)
    assert len({t for each in result.tokens[0] for t in each}) > 10
    assert result.tokens[0] == expected(in_torch(model), texts, result.tokens[0])
