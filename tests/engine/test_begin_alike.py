"""Decode of requests that begin with the same text: the tokens of vLLM's own backend."""

from __future__ import annotations

import functools

import pytest
import torch
from engine_run import DENSE, EVERYTHING, prompt, run
from engines_beside import beside
from paged_layer import PagedLayer

from vllm_sparse import impl, metadata
from vllm_sparse.kernels.shared_prefix import shared_prefixes
from vllm_sparse.stats import STATS

SYSTEM, OTHER = prompt(1500, 1), prompt(1100, 2)
ALONE = [SYSTEM, OTHER]  # into the prefix cache
# Two texts that several requests begin with, in turns, and two requests that are strangers.
TOGETHER = [
    SYSTEM + prompt(30, 3), OTHER + prompt(200, 4), prompt(1300, 5), SYSTEM + prompt(100, 6),
    OTHER + prompt(5, 7), SYSTEM + prompt(64, 8), prompt(9, 9), SYSTEM[:1200] + prompt(40, 10),
]  # fmt: skip
NEW_TOKENS = 24
SHARING = {0, 1, 3, 4, 5, 7}


def test_the_tokens_are_those_of_the_dense_backend(llama):
    given = {"max_tokens": NEW_TOKENS, "max_num_batched_tokens": 4096}
    with beside() as engines:
        both = [
            engines.start(run, llama, [ALONE, TOGETHER], **given, **backend)
            for backend in (DENSE, EVERYTHING)
        ]
        dense, ours = (one.result() for one in both)
    assert len({t for tokens in dense.tokens[1] for t in tokens}) > 10, "degenerate model"
    assert ours.tokens == dense.tokens
    assert [n > 1000 for n in ours.cached[1]] == [i in SHARING for i in range(len(TOGETHER))]
    # All tokens of these but the first are decoded, and together but where one starts a step late.
    [stats] = ours.stats
    every = len(SHARING) * (NEW_TOKENS - 1)
    assert every - len(SHARING) <= stats["shared_rows"] <= every


@pytest.mark.parametrize("shared_prefix", [None, False])
def test_it_can_be_turned_off(llama, shared_prefix, monkeypatch):
    """Also that a step of decodes and a prompt shares among the decodes, and nothing else."""
    monkeypatch.setattr(impl, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(metadata, "shared_prefixes", functools.partial(shared_prefixes, fewest=64))
    settings = {"coverage": 1.0, "break_even": 0, "shared_prefix": shared_prefix}
    layer = PagedLayer(
        llama, (4, 2, 64), 64, block_size=16, dtype="float32", max_model_len=4096,
        attention_backend="sparse", additional_config={"sparse": settings},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def step(*rows):
        tokens = sum(new for _, _, new in rows)
        parts = (torch.randn(tokens, heads, 64, generator=generator) for heads in (4, 2, 2))
        return layer.step(rows, *parts)

    layer.admit(0)
    step((0, 0, 200))
    for i in (1, 2):
        done = layer.admit(i, 0, 190)
        step((i, done, 210 - done))
    layer.admit(3)
    before = STATS.shared_rows
    out = step((0, 200, 1), (1, 210, 1), (2, 210, 1), (3, 0, 40))
    assert out.isfinite().all()
    assert STATS.shared_rows - before == (0 if shared_prefix is False else 3)
