"""MInference's published configurations as pattern files.

Theirs is a list with an object for each layer, {"head": [type, vertical, slash, score]}. What its
code does with an entry is kept: at least 30 columns and 50 diagonals, 100 blocks of 64 for
block-sparse, and 1000 columns and 6096 diagonals for a head without an entry
(microsoft/MInference, minference/modules/minference_forward.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_sparse import __version__
from vllm_sparse.patterns import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_TOKENS,
    HeadPattern,
    ModelInfo,
    PatternError,
    PatternFile,
    read_json,
    shown,
    whole,
)

LEAST_VERTICAL, LEAST_SLASH = 30, 50
BLOCKS = 100
DEFAULT = HeadPattern(kind="vertical_slash", vertical=1000, slash=6096)
TYPES = ("vertical_and_slash", "stream_llm", "block_sparse")


def convert(path: str | os.PathLike[str], model: ModelInfo | None = None) -> PatternFile:
    """A pattern file from MInference's JSON; with `model` it is held to that model's shape.

    Without it the number of heads is taken from the file, and the rest is not known.

    Raises:
        PatternError: the file is none of theirs, or of another model; says which entry and why.
    """
    where = f"file {whole(path)}"
    data = read_json(path, where, levels=3)
    if not isinstance(data, list) or not data or not all(isinstance(x, dict) for x in data):
        raise PatternError(
            f"{where} is not of MInference's form: a list with an object for each layer, "
            '{"head": [type, vertical, slash, score]}'
        )
    if len(data) > MAX_LAYERS:
        raise PatternError(f"{where} has {len(data)} layers; allowed: {MAX_LAYERS}")
    layers = [
        {_number(head, where, layer): _entry(entry, where, layer, head)
         for head, entry in heads.items()}
        for layer, heads in enumerate(data)
    ]  # fmt: skip
    heads = 1 + max((head for layer in layers for head in layer), default=-1)
    if heads == 0:
        raise PatternError(f"{where} names no head")
    if model is None:
        model = ModelInfo(name=Path(path).stem[:512], layers=len(layers), heads=heads)
    elif len(layers) != model.layers or heads > model.heads:
        raise PatternError(
            f"{where} is of another model than {shown(model.name)}: layers: file {len(layers)}, "
            f"model {model.layers}; heads: file {heads}, model {model.heads}"
        )
    return PatternFile(
        model=model,
        settings={"imported_from": "MInference", "file": Path(path).name[:512]},
        tools={"vllm-sparse": __version__},
        layers={
            number: {head: layer.get(head, DEFAULT) for head in range(model.heads)}
            for number, layer in enumerate(layers)
        },
    )


def _number(head: str, where: str, layer: int) -> int:
    if not (head.isascii() and head.isdigit() and len(head) < 10 and head == str(int(head))):
        raise PatternError(f"{where}: layer {layer}: head {shown(head)} is not a number like '7'")
    if int(head) >= MAX_HEADS:
        raise PatternError(f"{where}: layer {layer}: head {head}; allowed: 0 to {MAX_HEADS - 1}")
    return int(head)


def _entry(entry: Any, where: str, layer: int, head: str) -> HeadPattern:
    at = f"{where}: layer {layer}, head {head}"
    if not isinstance(entry, list) or len(entry) not in (3, 4) or entry[0] not in TYPES:
        raise PatternError(
            f"{at}: got {shown(entry)}; allowed: [type, vertical, slash, score] with a type of "
            f"{', '.join(TYPES)}"
        )
    kind, vertical, slash = entry[:3]
    for name, value in (("vertical", vertical), ("slash", slash)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_TOKENS:
            raise PatternError(
                f"{at}: {name}: got {shown(value)}; allowed: a whole number from 0, below 2^31"
            )
    if kind == "stream_llm":
        return HeadPattern(kind="a_shape", sink=vertical, window=max(slash, 1))
    if kind == "block_sparse":
        return HeadPattern(kind="block_sparse", blocks=BLOCKS)
    return HeadPattern(
        kind="vertical_slash",
        vertical=max(vertical, LEAST_VERTICAL),
        slash=max(slash, LEAST_SLASH),
    )
