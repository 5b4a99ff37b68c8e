"""What sampled decode answers on the retrieval model: needles, and averages over a whole prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_run import run
from retrieval.checkpoint import build_checkpoint
from retrieval.prompts import averaging_prompt, needle_prompt

# A chunk and one token: the last one, which asks, is decoded and not prefilled.
LENGTH = 4096 + 1
NEEDLES = [
    needle_prompt(LENGTH, depth, seed=round(100 * depth), distractors=2) for depth in (0.2, 0.7)
]
AVERAGES = [
    averaging_prompt(LENGTH, seed=i, **kind)
    for i, kind in enumerate(
        (
            {"shares": (0.5, 0.25, 0.25)},
            {"shares": (0.4, 0.3, 0.3)},
            {"shares": (0.6, 0.4), "late_minority": True},
        )
    )
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("lean"), "lean")


def right(checkpoint: Path, mode: str, questions: list) -> list[bool]:
    """Whether each is answered, with 256 tokens on the device and a sample of the rest."""
    settings = {"decode": mode, "window": 256, "host_gib": 0.5}
    result = run(
        str(checkpoint),
        [[q.token_ids] for q in questions],
        max_tokens=2,
        max_num_batched_tokens=4096,
        max_model_len=LENGTH + 16,
        attention_backend="sparse",
        additional_config={"sparse": settings},
    )
    return [
        tokens[0][: len(q.answer_ids)] == q.answer_ids[:2]
        for tokens, q in zip(result.tokens, questions, strict=True)
    ]


@pytest.mark.parametrize("mode", ["lsh", "vattention"])
def test_samplers_answer(mode: str, checkpoint):
    assert all(right(checkpoint, mode, NEEDLES + AVERAGES))


def test_top_k_finds_needles_and_cannot_average(checkpoint):
    answered = right(checkpoint, "topk", NEEDLES + AVERAGES)
    assert all(answered[: len(NEEDLES)])
    assert not all(answered[len(NEEDLES) :])
