"""Questions with known answers, of an exact length in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .vocabulary import (
    BOS,
    COUNT,
    COUNT_TEMPLATE,
    FOLLOW,
    FOLLOW_TEMPLATE,
    KEYS,
    NOTE,
    RECALL,
    RECALL_TEMPLATE,
    STOP,
    SYMBOLS,
    VALUES,
    VOCABULARY,
)

# A prompt holds one special word for every so many tokens, up to a maximum: columns that attract
# many queries are a few hundred in a trained model too, however long the context.
SPECIAL_EVERY = 32
SPECIAL_MOST = 512


@dataclass(frozen=True)
class Question:
    """A prompt and its answer, each as text and as token ids.

    `token_ids` begins with the beginning-of-sequence token, which the tokenizer adds to `prompt`.
    `evidence` holds the positions of the words that the answer rests on.
    """

    kind: str
    prompt: str
    token_ids: list[int]
    answer: str
    answer_ids: list[int]
    evidence: list[int] = field(default_factory=list)

    def is_right(self, text: str) -> bool:
        """Whether generated text begins with the whole answer."""
        words = self.answer.split()
        return text.split()[: len(words)] == words


def needle_prompt(
    length: int, depth: float = 0.5, seed: int = 0, *, distractors: int = 0, words: int = 1
) -> Question:
    """Ask what follows a key: `length` tokens, the needle at `depth` (0 first, 1 last).

    `distractors` further needles with other keys stand at random depths; each needle has `words`
    value words.
    """
    rng = np.random.default_rng([seed, 1])
    keys = _pick(rng, KEYS, 1 + distractors)
    values = _pick(rng, VALUES, words * (1 + distractors))
    needles = [
        [NOTE, key, *values[i * words : (i + 1) * words], STOP] for i, key in enumerate(keys)
    ]
    depths = [depth, *rng.random(distractors)]
    question = [RECALL, keys[0], *RECALL_TEMPLATE]
    return _assemble(
        "multi-key" if distractors else "needle", length, rng, needles, depths, question,
        answer=[*values[:words], STOP], evidence=[(0, 2 + i) for i in range(words)],
    )  # fmt: skip


def two_hop_prompt(
    length: int, depths: Sequence[float] = (0.25, 0.75), seed: int = 0, *, distractors: int = 0
) -> Question:
    """A key leads to a word, that word to the answer; the two needles stand at `depths`.

    `distractors` further pairs of needles stand at random depths.
    """
    rng = np.random.default_rng([seed, 2])
    chains = 1 + distractors
    keys, values = _pick(rng, KEYS, chains), _pick(rng, VALUES, 2 * chains)
    needles, where = [], []
    for i, key in enumerate(keys):
        middle, last = values[2 * i : 2 * i + 2]
        # No full stop behind the first link: it would be one more word that follows the middle.
        needles += [[NOTE, key, middle], [NOTE, middle, last, STOP]]
        where += list(depths if i == 0 else rng.random(2))
    question = [FOLLOW, keys[0], *FOLLOW_TEMPLATE]
    return _assemble(
        "two-hop", length, rng, needles, where, question,
        answer=[values[1], STOP], evidence=[(0, 2), (1, 2)],
    )  # fmt: skip


def quiz_prompt(length: int, seed: int = 0, *, hops: int = 1, questions: int = 8) -> Question:
    """A text that asks again and again, the last time at its end; each question has its own needle.

    The questions stand at equal distances, each about a needle (for two `hops` a chain of two)
    somewhere before it. The answer is that of the last one.
    """
    if hops not in (1, 2):
        raise ValueError(f"hops={hops}: 1 or 2")
    rng = np.random.default_rng([seed, 6])
    keys = _pick(rng, KEYS, questions)
    drawn = _pick(rng, VALUES, hops * questions)
    values = [drawn[hops * i : hops * (i + 1)] for i in range(questions)]
    inserts, depths = [], []
    for i, (key, words) in enumerate(zip(keys, values, strict=True)):
        asked = (i + 1) / questions
        if hops == 1:
            needles = [[NOTE, key, words[0], STOP]]
        else:
            needles = [[NOTE, key, words[0]], [NOTE, *words, STOP]]
        inserts += needles
        depths += list(0.9 * asked * rng.random(len(needles)))
        if asked < 1:
            inserts.append(_asks(key, hops))
            depths.append(asked)
    return _assemble(
        "quiz", length, rng, inserts, depths, _asks(keys[-1], hops),
        answer=[values[-1][-1], STOP],
        evidence=[(len(inserts) - hops + i, 2) for i in range(hops)],
    )  # fmt: skip


def _asks(key: str, hops: int) -> list[str]:
    return [RECALL, key, *RECALL_TEMPLATE] if hops == 1 else [FOLLOW, key, *FOLLOW_TEMPLATE]


def averaging_prompt(
    length: int,
    seed: int = 0,
    *,
    shares: Sequence[float] = (0.5, 0.25, 0.25),
    rate: float = 0.2,
    late_minority: bool = False,
) -> Question:
    """Ask which symbol is the most frequent one: the first of `shares`, whichever word that is.

    `rate` is the share of symbols among the tokens of the haystack, and `shares` how they divide,
    counted exactly. With `late_minority` the symbols of the majority come first and the others
    last, so that neither a window nor the beginning alone gives the answer away: in the last
    third of the haystack the runner-up leads.
    """
    rng = np.random.default_rng([seed, 3])
    symbols = _pick_symbols(rng, shares)
    question = [COUNT, *COUNT_TEMPLATE]
    size = length - 1 - len(question)
    haystack, places = _tallied_haystack(rng, size, symbols, shares, rate, late_minority)
    words = [BOS, *haystack, *question]
    return _question("averaging", words, [symbols[0]], (places + 1).tolist())


def questions_on_one_text(
    length: int,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
    *,
    words: int = 1,
    shares: Sequence[float] = (0.6, 0.4),
    rate: float = 0.2,
    late_minority: bool = True,
) -> list[Question]:
    """The averaging question of `length` tokens, and one for a needle at each depth, on one text.

    All begin with the same tokens, so that a prefix cache reads the text once; the needles'
    questions are a few tokens longer or shorter than `length`.
    """
    rng = np.random.default_rng([seed, 5])
    symbols = _pick_symbols(rng, shares)
    keys = _pick(rng, KEYS, len(depths))
    drawn = _pick(rng, VALUES, words * len(keys))  # a word in two needles would be ambiguous
    values = [drawn[i : i + words] for i in range(0, len(drawn), words)]
    needles = [[NOTE, key, *value, STOP] for key, value in zip(keys, values, strict=True)]
    size = length - 2 - len(COUNT_TEMPLATE) - sum(map(len, needles))
    haystack, _ = _tallied_haystack(rng, size, symbols, shares, rate, late_minority)
    text = [BOS, *haystack]
    # From the last one on, so that places before it stay.
    for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
        place = 1 + round(depth * size)
        text[place:place] = needle
    places = [i for i, word in enumerate(text) if word in symbols]
    found = [_question("averaging", [*text, COUNT, *COUNT_TEMPLATE], [symbols[0]], places)]
    for key, value in zip(keys, values, strict=True):
        question, at = [RECALL, key, *RECALL_TEMPLATE], text.index(key)
        evidence = [*range(at + 1, at + 1 + words)]
        found.append(_question("multi-key", [*text, *question], [*value, STOP], evidence))
    return found


def haystack_ids(length: int, seed: int = 0) -> list[int]:
    """`length` tokens of plain text, with no question: for measuring."""
    words = _haystack(np.random.default_rng([seed, 4]), length - 1)
    return VOCABULARY.ids([BOS, *words])


def _haystack(rng: np.random.Generator, size: int) -> list[str]:
    """Words whose frequencies follow Zipf's law, with special words strewn in."""
    filler = VOCABULARY.filler
    weight = 1 / (np.arange(len(filler)) + 8.0)
    words = [filler[i] for i in rng.choice(len(filler), size, p=weight / weight.sum())]
    special = min(size // SPECIAL_EVERY, SPECIAL_MOST)
    for place in rng.choice(size, special, replace=False):
        words[place] = VOCABULARY.special[rng.integers(len(VOCABULARY.special))]
    return words


def _pick_symbols(rng: np.random.Generator, shares: Sequence[float]) -> list[str]:
    if not 2 <= len(shares) <= len(SYMBOLS) or max(shares[1:]) >= shares[0]:
        raise ValueError(f"shares={shares}: 2 to {len(SYMBOLS)}, the first the largest")
    return _pick(rng, SYMBOLS, len(shares))


def _tallied_haystack(
    rng: np.random.Generator,
    size: int,
    symbols: Sequence[str],
    shares: Sequence[float],
    rate: float,
    late_minority: bool,
) -> tuple[list[str], np.ndarray]:
    """A haystack with symbols in it, and their places; see `averaging_prompt`."""
    haystack = _haystack(rng, size)
    counts = np.floor(np.array(shares) / sum(shares) * rate * size).astype(int)
    places = np.sort(rng.choice(size, counts.sum(), replace=False))
    drawn = rng.permutation(np.repeat(np.arange(len(shares)), counts))
    if late_minority:
        # Move part of the majority forward: the last third keeps few of it.
        cut = len(drawn) * 2 // 3
        late = np.flatnonzero(drawn[cut:] == 0) + cut
        early = np.flatnonzero(drawn[:cut] != 0)
        swap = min(len(late) * 2 // 3, len(early))
        a, b = rng.choice(late, swap, replace=False), rng.choice(early, swap, replace=False)
        drawn[a], drawn[b] = drawn[b], drawn[a].copy()
    for place, symbol in zip(places, drawn, strict=True):
        haystack[place] = symbols[symbol]
    return haystack, places


def _pick(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    if count > len(words):
        raise ValueError(f"{count} distinct words asked for, there are {len(words)}")
    return [words[i] for i in rng.choice(len(words), count, replace=False)]


def _assemble(
    kind: str,
    length: int,
    rng: np.random.Generator,
    needles: list[list[str]],
    depths: Sequence[float],
    question: list[str],
    answer: list[str],
    evidence: list[tuple[int, int]],
) -> Question:
    """Strew the needles over a haystack of the size that is left, and append the question.

    `evidence` names the words that the answer rests on, as (needle, place in it).
    """
    size = length - 1 - len(question) - sum(len(needle) for needle in needles)
    if size < 0:
        raise ValueError(f"length={length} is too short, at least {length - size} is needed")
    if any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={list(depths)}: each must lie between 0 and 1")
    haystack = _haystack(rng, size)
    words = [BOS]
    begins: dict[int, int] = {}
    start = 0
    for i in sorted(range(len(needles)), key=lambda i: depths[i]):
        place = round(depths[i] * size)
        words += haystack[start:place]
        begins[i] = len(words)
        words += needles[i]
        start = place
    words += [*haystack[start:], *question]
    return _question(kind, words, answer, [begins[i] + offset for i, offset in evidence])


def _question(kind: str, words: list[str], answer: list[str], evidence: list[int]) -> Question:
    return Question(
        kind=kind,
        prompt=" ".join(words[1:]),
        token_ids=VOCABULARY.ids(words),
        answer=" ".join(answer),
        answer_ids=VOCABULARY.ids(answer),
        evidence=evidence,
    )
