"""The residual stream: which of its dimensions hold what, and what each word puts there."""

from __future__ import annotations

import torch

from .positions import FAST_PAIRS, phases
from .vocabulary import (
    BOS,
    COUNT_TEMPLATE,
    FOLLOW_TEMPLATE,
    RECALL_TEMPLATE,
    STOP,
    SYMBOLS,
    VALUES,
    VOCABULARY,
)

CODE = 64
SPECIAL_FEATURES = 4

# A constant that outweighs everything else keeps the norm of the stream, which RMSNorm divides
# by, within a few percent of a known number; so every weight below can be written down.
CONSTANT = 6.0
NORM_SQUARED = 42.0
FLAG = 0.5
PHASE = 0.25

_SIZES = {
    "constant": 1,
    "bos": 1,
    "special": SPECIAL_FEATURES,
    "symbol": 1,
    "value": 1,
    "count": 1,
    "follow": 1,
    "stop": 1,
    "which": len(SYMBOLS),
    "phase": 2 * FAST_PAIRS,
    "own": CODE,
    "previous": CODE,
    "asked": CODE,
    "found": CODE,
    "hop": CODE,
    "tally": len(SYMBOLS),
}


class Stream:
    """Named slices of the `hidden` dimensions; what no name claims is `junk`."""

    def __init__(self, hidden: int) -> None:
        self.hidden = hidden
        self._slices: dict[str, slice] = {}
        start = 0
        for name, size in _SIZES.items():
            self._slices[name] = slice(start, start + size)
            start += size
        if start + 64 > hidden:
            raise ValueError(f"hidden={hidden} is too small, at least {start + 64} is needed")
        self._slices["junk"] = slice(start, hidden)

    def __getitem__(self, name: str) -> slice:
        return self._slices[name]

    def at(self, name: str, offset: int = 0) -> int:
        """The dimension `offset` places into slice `name`."""
        return self._slices[name].start + offset

    @property
    def junk_size(self) -> int:
        return self.hidden - self._slices["junk"].start


def word_codes(generator: torch.Generator) -> torch.Tensor:
    """Unit codes [words, CODE] with entries of one size, which bfloat16 holds exactly.

    The beginning-of-sequence token has none: attention at rest there retrieves nothing.
    """
    signs = torch.randint(0, 2, (len(VOCABULARY.words), CODE), generator=generator) * 2 - 1
    codes = signs.float() / CODE**0.5
    codes[VOCABULARY.id(BOS)] = 0
    return codes


def embedding(stream: Stream, codes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The embedding matrix [words, hidden]; every row has the same norm."""
    table = torch.zeros(len(VOCABULARY.words), stream.hidden)
    table[:, stream["constant"]] = CONSTANT
    table[:, stream["own"]] = codes

    def flag(name: str, words: list[str] | tuple[str, ...]) -> None:
        table[VOCABULARY.ids(words), stream.at(name)] = FLAG

    flag("bos", [BOS])
    flag("symbol", SYMBOLS)
    flag("value", [*VALUES, STOP])
    flag("count", COUNT_TEMPLATE)
    flag("follow", FOLLOW_TEMPLATE)
    flag("stop", [STOP, *SYMBOLS])
    for i, word in enumerate(SYMBOLS):
        table[VOCABULARY.id(word), stream.at("which", i)] = 1.0
        # Top-k by score would keep the symbols with the larger keys only. The slope is small
        # enough to leave the true order of the counts as it is.
        table[VOCABULARY.id(word), stream.at("symbol")] = FLAG * (1 + 0.004 * i)

    # How much a special word attracts, for each of several tastes: different heads see
    # different columns.
    special = VOCABULARY.ids(VOCABULARY.special)
    strength = 1 + 0.1 * torch.randn(len(special), SPECIAL_FEATURES, generator=generator)
    table[special, stream["special"]] = FLAG * strength.clamp(0.7, 1.3)

    # How far back the asked word is: its place in the template; 0 for a value word, which asks
    # for what stood behind itself.
    for template in (RECALL_TEMPLATE, FOLLOW_TEMPLATE):
        for distance, word in enumerate(template, start=1):
            table[VOCABULARY.id(word), stream["phase"]] = PHASE * phases(distance)
    table[VOCABULARY.ids(VALUES), stream["phase"]] = PHASE * phases(0)

    junk = torch.randn(len(table), stream.junk_size, generator=generator)
    left = NORM_SQUARED - table.square().sum(1, keepdim=True)
    if bool((left <= 0).any()):
        raise ValueError("a word's named slices are longer than the norm of the stream")
    table[:, stream["junk"]] = junk / junk.norm(dim=1, keepdim=True) * left.sqrt()
    return table
