"""Attention heads of known kinds, written down as projection matrices.

The four query heads of a KV head share its key and its value. The key therefore offers everything
that any kind needs, side by side (position, content, flags), and a query weighs what it wants.
All strengths below are logits, after the division by sqrt(HEAD_DIM).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .positions import FAST_PAIRS, HALF, HEAD_DIM, log_mass, odds, phases, recency, sharp
from .stream import CODE, CONSTANT, FLAG, PHASE, SPECIAL_FEATURES, Stream
from .vocabulary import SYMBOLS

KEY = 4.0
UNIT = HEAD_DIM**0.5 / KEY  # the query entry that makes a logit of one

# Key dimensions. Content fills both members of its pairs; flags sit on the slowest pairs of all.
_CONTENT = [
    *range(FAST_PAIRS, FAST_PAIRS + CODE // 2),
    *range(HALF + FAST_PAIRS, HALF + FAST_PAIRS + CODE // 2),
]
_BOS = FAST_PAIRS + CODE // 2
_SPECIAL = _BOS + 1
_SYMBOL = _SPECIAL + SPECIAL_FEATURES
_VALUE = _SYMBOL + 1
_NOISE = slice(HALF + _BOS, HEAD_DIM)

# Value dimensions: the word's code, its symbol, and a random view of the junk.
_V_CODE = slice(0, CODE)
_V_SYMBOL = slice(CODE, CODE + len(SYMBOLS))
_V_JUNK = slice(CODE + len(SYMBOLS), HEAD_DIM)

MATCH = 30.0


@dataclass(frozen=True)
class Head:
    """One query head. `sink` is the share of the mass that rests on the first token."""

    kind: str
    distance: int = 0
    width: float = 0.0
    sink: float = 0.5
    decay: float = 0.0
    taste: int = 0


def key_rows(stream: Stream, content: str, generator: torch.Generator) -> torch.Tensor:
    """Key projection [HEAD_DIM, hidden] whose content is the slice `content` of the stream."""
    rows = torch.zeros(HEAD_DIM, stream.hidden)
    rows[:FAST_PAIRS, stream.at("constant")] = KEY / CONSTANT
    # The first token has no position, else a near query would see it twice, as sink and as near.
    rows[:FAST_PAIRS, stream.at("bos")] = -KEY / FLAG
    source = stream[content]
    rows[_CONTENT, range(source.start, source.stop)] = KEY
    rows[_BOS, stream.at("bos")] = KEY / FLAG
    rows[_SYMBOL, stream.at("symbol")] = KEY / FLAG
    rows[_VALUE, stream.at("value")] = KEY / FLAG
    for i in range(SPECIAL_FEATURES):
        rows[_SPECIAL + i, stream.at("special", i)] = KEY / FLAG
    rows[_NOISE, stream["junk"]] = 0.6 * _noise(stream, HEAD_DIM - _NOISE.start, generator)
    return rows


def value_rows(stream: Stream, generator: torch.Generator) -> torch.Tensor:
    """Value projection [HEAD_DIM, hidden]."""
    rows = torch.zeros(HEAD_DIM, stream.hidden)
    rows[_V_CODE, stream["own"]] = torch.eye(CODE)
    rows[_V_SYMBOL, stream["which"]] = torch.eye(len(SYMBOLS))
    size = _V_JUNK.stop - _V_JUNK.start
    rows[_V_JUNK, stream["junk"]] = 0.06 * _noise(stream, size, generator)
    return rows


def query_rows(head: Head, stream: Stream, generator: torch.Generator) -> torch.Tensor:
    """Query projection [HEAD_DIM, hidden] of one head."""
    rows = torch.zeros(HEAD_DIM, stream.hidden)
    constant = stream.at("constant")

    def always(dimension: int, logit: float) -> None:
        rows[dimension, constant] += logit * UNIT / CONSTANT

    def if_flag(dimension: int, flag: str, logit: float) -> None:
        rows[dimension, stream.at(flag)] += logit * UNIT / FLAG

    def match(source: str, logit: float) -> None:
        part = stream[source]
        rows[_CONTENT, range(part.start, part.stop)] = logit * UNIT

    def at_distance(amplitude: torch.Tensor, distance: int) -> None:
        cos, sin = phases(distance).split(FAST_PAIRS)
        rows[:FAST_PAIRS, constant] = amplitude * cos * UNIT / CONSTANT
        rows[HALF : HALF + FAST_PAIRS, constant] = -amplitude * sin * UNIT / CONSTANT

    if head.kind in ("previous", "slash"):
        at_distance(sharp(), head.distance)
        always(_BOS, float(sharp().sum()) / 2)
    elif head.kind == "asked":
        cos, sin = stream.at("phase"), stream.at("phase", FAST_PAIRS)
        for i, amplitude in enumerate(sharp().tolist()):
            rows[i, cos + i] = amplitude * UNIT / PHASE
            rows[HALF + i, sin + i] = -amplitude * UNIT / PHASE
        always(_BOS, float(sharp().sum()) / 2)
    elif head.kind == "retrieve":
        match("asked", MATCH)
        always(_VALUE, MATCH / 3)
        always(_BOS, 0.85 * MATCH)
    elif head.kind == "hop":
        match("found", MATCH)
        always(_VALUE, MATCH / 3)
        always(_BOS, 2 * MATCH)
        if_flag(_BOS, "follow", -1.15 * MATCH)
    elif head.kind == "count":
        if_flag(_SYMBOL, "count", 14.0)
        always(_BOS, 18.0)
        if_flag(_BOS, "count", -14.0)
    elif head.kind in ("window", "local"):
        amplitude = recency(head.width)
        at_distance(amplitude, 0)
        if head.sink > 0:
            always(_BOS, log_mass(amplitude) + odds(head.sink))
    elif head.kind == "vertical":
        always(_SPECIAL + head.taste, 12.0)
        always(_BOS, 18.4 + odds(head.sink))  # some 400 columns of weight exp(12) and more
    elif head.kind == "same_word":
        amplitude = recency(head.width, head.decay)
        at_distance(amplitude, 0)
        match("own", 22.0)
        always(_BOS, 22.0 + float(amplitude.sum()) + 1.0 + odds(head.sink))
    else:
        raise ValueError(f"unknown kind of head {head.kind!r}")

    if head.kind in ("window", "local", "vertical", "same_word", "slash"):
        size = HEAD_DIM - _NOISE.start
        rows[_NOISE, stream["junk"]] = 0.5 * _noise(stream, size, generator)
    return rows


def output_columns(head: Head, stream: Stream, generator: torch.Generator) -> torch.Tensor:
    """Output projection [hidden, HEAD_DIM] of one head; most heads write junk only."""
    columns = torch.zeros(stream.hidden, HEAD_DIM)
    target = {"previous": "previous", "asked": "asked", "retrieve": "found", "hop": "hop"}
    if head.kind in target:
        columns[stream[target[head.kind]], _V_CODE] = torch.eye(CODE)
    elif head.kind == "count":
        columns[stream["tally"], _V_SYMBOL] = torch.eye(len(SYMBOLS))
    else:
        noise = torch.randn(stream.junk_size, HEAD_DIM, generator=generator)
        columns[stream["junk"]] = 0.25 * noise / stream.junk_size**0.5
    return columns


def _noise(stream: Stream, rows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, stream.junk_size, generator=generator)
