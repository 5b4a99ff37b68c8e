"""What a search runs the model over: text files, or synthetic prompts made for its vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sparse.errors import UserError
from vllm_sparse.patterns import whole

MIN_TOKENS = 256  # below it nothing is left to choose
MAX_TEXT_BYTES = 64 << 20
# A passage stays with its subject, and half of its words belong to the subject.
PASSAGE = (64, 512)
SUBJECTS, SUBJECT_WORDS = 24, 64
# Quotations of earlier text, which a retrieving head follows: a tenth of the tokens.
QUOTE, QUOTED = (8, 32), 0.1
CUE = 16  # tokens at the end that repeat what stood somewhere before


class PromptError(UserError, ValueError):
    """A prompt that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Prompt:
    """A name for people, and token ids."""

    name: str
    token_ids: list[int]

    @property
    def digest(self) -> str:
        """Says whether two prompts are the same."""
        data = np.asarray(self.token_ids, dtype=np.int64).tobytes()
        return hashlib.sha256(data).hexdigest()[:16]


def load_tokenizer(name: str) -> Any:
    """Raises PromptError where the model brings none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = " ".join(str(error).split())[:300]
        raise PromptError(f"tokenizer of {whole(name)} cannot be loaded: {said}") from error


def text_prompts(files: Sequence[Path], tokenizer: Any, length: int) -> list[Prompt]:
    """A prompt of each file, cut in the middle to `length` tokens: a question stands at the end.

    Raises:
        PromptError: a file cannot be read, is no text, or is too short.
    """
    prompts = []
    for file in files:
        try:
            with open(file, "rb") as opened:
                data = opened.read(MAX_TEXT_BYTES + 1)
            text = data.decode()
        except OSError as error:
            raise PromptError(
                f"prompt {whole(file)} cannot be read: {error.strerror or error}"
            ) from error
        except UnicodeDecodeError as error:
            raise PromptError(f"prompt {whole(file)} is not UTF-8 text: {error}") from error
        if len(data) > MAX_TEXT_BYTES:
            raise PromptError(
                f"prompt {whole(file)} is over {MAX_TEXT_BYTES >> 20} MiB, the most allowed"
            )
        ids = list(tokenizer(text)["input_ids"])
        if len(ids) < MIN_TOKENS:
            raise PromptError(
                f"prompt {whole(file)} has {len(ids)} tokens; give {MIN_TOKENS} or more"
            )
        if len(ids) > length:
            ids = ids[: length - length // 2] + ids[-(length // 2) :]
        prompts.append(Prompt(file.name, ids))
    return prompts


def synthetic_prompts(
    count: int, length: int, vocabulary: int, special: Sequence[int], bos: int | None, seed: int
) -> list[Prompt]:
    """Texts of random words that return to their subjects, quote themselves, and end in a cue.

    Args:
        vocabulary: ids run from 0 to here.
        special: ids that are not drawn.
        bos: what a prompt of this model begins with, if anything.

    Raises:
        PromptError: lengths or vocabularies that leave nothing to draw.
    """
    if length < MIN_TOKENS:
        raise PromptError(f"length: got {length} tokens; allowed: {MIN_TOKENS} or more")
    words = np.setdiff1d(np.arange(vocabulary), np.asarray(list(special), dtype=np.int64))
    if len(words) < 2 * SUBJECT_WORDS:
        raise PromptError(
            f"the vocabulary has {len(words)} ordinary tokens; synthetic prompts need "
            f"{2 * SUBJECT_WORDS}: give text files"
        )
    return [
        Prompt(f"synthetic {i}", _synthetic(np.random.default_rng([seed, i]), length, words, bos))
        for i in range(count)
    ]


def _synthetic(
    rng: np.random.Generator, length: int, words: np.ndarray, bos: int | None
) -> list[int]:
    words = rng.permutation(words)
    weight = 1 / (np.arange(len(words)) + 8.0)  # Zipf's law, flattened at its head
    weight /= weight.sum()
    subjects = rng.choice(words, (SUBJECTS, SUBJECT_WORDS))
    text: list[int] = [] if bos is None else [bos]
    begin = len(text)
    size = length - CUE
    while len(text) < size:
        passage = int(rng.integers(*PASSAGE))
        general = rng.choice(words, passage, p=weight)
        own = rng.choice(subjects[rng.integers(SUBJECTS)], passage)
        new = np.where(rng.random(passage) < 0.5, own, general).tolist()
        quotes = rng.binomial(passage, QUOTED / (sum(QUOTE) / 2))
        for _ in range(quotes if len(text) > 2 * QUOTE[1] else 0):
            span = int(rng.integers(*QUOTE))
            source = int(rng.integers(begin, len(text) - span))
            place = int(rng.integers(len(new)))
            new[place:place] = text[source : source + span]
        text += new
    text = text[:size]
    source = int(rng.integers(begin, max(size - 2 * CUE, begin + 1)))
    return text + text[source : source + CUE]
