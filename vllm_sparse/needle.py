"""Needle in a haystack, through the engine: length by depth, one backend against another."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_sparse.errors import UserError
from vllm_sparse.files import write_whole
from vllm_sparse.patterns import shown

# A haystack of our own words; a text of the user's takes its place with --haystack.
SENTENCES = (
    "The ferry leaves the northern pier at dawn and returns before the market closes.",
    "Most of the orchards on the hill were planted by people who never saw them bear fruit.",
    "A slow river carries more sand in one spring than a fast one does in ten.",
    "The clock above the station has been four minutes late for as long as anyone remembers.",
    "Bread keeps better in cloth than in paper, and better in a crock than in either.",
    "Every second house on the square has a bench beside its door, and nobody locks the gates.",
    "When the wind turns to the east the bells can be heard as far as the quarry.",
    "Old maps show a road where the reservoir is now, and a mill where the road bends.",
    "The baker's dog knows the school timetable and waits at the corner accordingly.",
    "In a dry year the wells at the lower end of the village are the last to fail.",
)
NEEDLE = "The keeper's word for the lighthouse door is {answer}."
QUESTION = "\n\nQuestion: what is the keeper's word for the lighthouse door?\nAnswer: the word is"
ANSWERS = ("marmalade", "telescope", "velvet", "compass", "thunder", "walnut", "lantern", "copper")
BACKENDS = ("sparse", "default")
OVERHEAD = 64  # tokens of an engine's context beside the longest prompt
CHUNK = 4096


class NeedleError(UserError, RuntimeError):
    """The grid cannot be run; the message says why."""


@dataclass(frozen=True)
class Grid:
    """What is asked, of whom."""

    model: str
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    backends: tuple[str, ...] = BACKENDS
    haystack: str = "\n".join(SENTENCES)
    needle: str = NEEDLE
    question: str = QUESTION
    answers: tuple[str, ...] = ANSWERS
    config: dict[str, Any] = field(default_factory=dict)  # of the sparse backend
    dtype: str = "auto"
    max_tokens: int = 16


@dataclass(frozen=True)
class Cell:
    """One prompt and what came of it; `found` is the share of the answer's words."""

    backend: str
    length: int
    depth: float
    expected: str
    answer: str
    found: float
    seconds: float


def run(grid: Grid, progress: Callable[[Cell], object] = lambda cell: None) -> list[Cell]:
    """Ask every backend, one engine after the other.

    Raises:
        NeedleError: vLLM is missing, a setting is wrong, or an engine does not start.
    """
    for name in grid.backends:
        if name not in BACKENDS:
            raise NeedleError(f"backend {shown(name)}; allowed: {', '.join(BACKENDS)}")
    if any(not 0 <= depth <= 1 for depth in grid.depths):
        raise NeedleError(f"depths {list(grid.depths)}; allowed: 0 (first) to 1 (last)")
    if "{answer}" not in grid.needle:
        raise NeedleError("the needle holds no {answer}, which the question is to find")
    cells = []
    for backend in grid.backends:
        with _engine(grid, backend) as (llm, sampling):
            tokenizer = llm.get_tokenizer()
            for length, depth, expected, ids in prompts(grid, tokenizer):
                begin = time.perf_counter()
                output = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
                seconds = time.perf_counter() - begin
                answer = output[0].outputs[0].text
                cell = Cell(
                    backend, length, depth, expected, answer, share_found(expected, answer), seconds
                )
                cells.append(cell)
                progress(cell)
    return cells


def prompts(grid: Grid, tokenizer: Any) -> Iterator[tuple[int, float, str, list[int]]]:
    """(length, depth, answer, token ids) of each cell: haystack, needle in it, question behind."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    hay, question = encode(grid.haystack), encode(grid.question)
    # What the tokenizer itself puts before a text.
    start = list(tokenizer.encode("", add_special_tokens=True))
    if end := getattr(tokenizer, "eos_token_id", None):
        start = [token for token in start if token != end]
    if not hay:
        raise NeedleError("the haystack is empty")
    number = 0
    for length in grid.lengths:
        for depth in grid.depths:
            expected = grid.answers[number % len(grid.answers)]
            needle = encode(f" {grid.needle.format(answer=expected)} ")
            size = length - len(start) - len(needle) - len(question)
            if size < 0:
                raise NeedleError(
                    f"length {length} is too short for needle and question; "
                    f"give {length - size} or more"
                )
            # Each prompt begins elsewhere in the haystack, so that none is another's prefix.
            shift = number * 97 % len(hay)
            repeats = -(-(size + shift) // len(hay))
            text = (hay * repeats)[shift : shift + size]
            place = round(depth * size)
            yield (
                length, depth, expected,
                [*start, *text[:place], *needle, *text[place:], *question],
            )  # fmt: skip
            number += 1


def share_found(expected: str, answer: str) -> float:
    """Share of the expected words that the answer holds."""
    words = expected.lower().split()
    given = {word.strip(".,;:!?\"'") for word in answer.lower().split()}
    return sum(word.strip(".,;:!?\"'") in given for word in words) / len(words)


def save(cells: Sequence[Cell], grid: Grid, path: Path) -> dict[str, Any]:
    """Write the grid and its cells as JSON; returns what was written."""
    text = {k: v for k, v in asdict(grid).items() if k != "haystack"}
    data = {
        "grid": text,
        "found": {b: mean([c.found for c in cells if c.backend == b]) for b in grid.backends},
        "cells": [asdict(cell) for cell in cells],
    }
    write_whole(path, json.dumps(data, indent=1) + "\n")
    return data


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@contextmanager
def _engine(grid: Grid, backend: str) -> Iterator[tuple[Any, Any]]:
    """An engine and its sampling parameters; it is shut down afterwards, whatever happens."""
    with _quiet_vllm():
        yield from _start(grid, backend)


@contextmanager
def _quiet_vllm() -> Iterator[None]:
    """Let vLLM and the processes that it starts log warnings only, unless told otherwise."""
    given = "VLLM_LOGGING_LEVEL" in os.environ
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        yield
    finally:
        if not given:
            os.environ.pop("VLLM_LOGGING_LEVEL", None)


def _start(grid: Grid, backend: str) -> Iterator[tuple[Any, Any]]:
    try:
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform
    except ImportError as error:
        raise NeedleError(f"vLLM does not import: {error}; see `vllm-sparse check`") from error
    settings: dict[str, Any] = {}
    if backend == "sparse":
        settings = {
            "attention_backend": "sparse",
            "additional_config": {"sparse": grid.config},
        }
    longest = max(grid.lengths) + OVERHEAD
    if current_platform.device_type == "cpu":
        settings["kv_cache_memory_bytes"] = 1 << 30
    try:
        llm = LLM(
            grid.model,
            dtype=grid.dtype,
            max_model_len=longest,
            max_num_batched_tokens=min(CHUNK, longest),
            max_num_seqs=1,
            enable_prefix_caching=False,
            enforce_eager=True,
            disable_log_stats=True,
            **settings,
        )
    except Exception as error:  # whatever keeps an engine from starting is the finding
        said = " ".join(str(error).split())[:400]
        raise NeedleError(
            f"the engine with the {backend} backend does not start: {said}"
        ) from error
    try:
        yield llm, SamplingParams(temperature=0, max_tokens=grid.max_tokens)
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=30)
