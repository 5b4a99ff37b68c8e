"""How sparse a checkpoint's attention is, by exact scores.

The block density of a head at coverage c: for each tile of queries, the fewest blocks of keys
whose mean attention mass over the tile's rows reaches c, summed over tiles, as a share of all
causal blocks. Tiles are sampled, so nothing of size T x T is ever held.

    python -m retrieval.density MODEL --length 16384        (from the folder examples/)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .forward import LayerInputs, load_model, run_layers
from .prompts import needle_prompt


@dataclass(frozen=True)
class HeadDensity:
    """One query head's density, and the share of its mass on the first token."""

    layer: int
    head: int
    kind: str
    density: float
    sink: float


def read_kinds(folder: str | Path) -> list[list[str]]:
    """The kinds of the query heads, [layer][head]."""
    kinds: list[list[str]] = json.loads((Path(folder) / "heads.json").read_text())["kinds"]
    return kinds


def tile_scores(q: torch.Tensor, k: torch.Tensor, start: int, rows: int) -> torch.Tensor:
    """Attention probabilities [rows, start + rows] of one head's queries at `start`.

    q [T, D] and k [T, D] are the head's queries and its KV head's keys.
    """
    stop = min(start + rows, len(q))
    scores = q[start:stop].float() @ k[:stop].float().T / q.shape[1] ** 0.5
    future = torch.ones(stop - start, stop, dtype=torch.bool).triu(start + 1)
    return scores.masked_fill_(future, float("-inf")).softmax(-1)


def block_count(probabilities: torch.Tensor, coverage: float, block: int) -> int:
    """The fewest key blocks whose mean mass over the rows [rows, keys] reaches `coverage`."""
    mass = probabilities.mean(0)
    mass = torch.nn.functional.pad(mass, (0, -len(mass) % block)).view(-1, block).sum(1)
    reached = mass.sort(descending=True).values.cumsum(0)
    return min(int((reached < coverage).sum()) + 1, len(mass))


def head_density(
    q: torch.Tensor, k: torch.Tensor, *, coverage: float = 0.95, block: int = 64, tiles: int = 24
) -> tuple[float, float]:
    """(block density, mean mass on the first token) of one head: q [T, D], k [T, D]."""
    count = -(-len(q) // block)
    edges = torch.linspace(0, count - 1, min(tiles, count) + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    selected = causal = 0
    sink = 0.0
    for tile in middles.round().long().tolist():
        probabilities = tile_scores(q, k, tile * block, block)
        selected += block_count(probabilities, coverage, block)
        causal += tile + 1
        sink += float(probabilities[:, 0].mean()) / len(middles)
    return selected / causal, sink


def layer_densities(
    inputs: LayerInputs, *, coverage: float = 0.95, block: int = 64, tiles: int = 24
) -> list[tuple[float, float]]:
    """`head_density` of every query head of a layer."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    return [
        head_density(
            inputs.q[:, head], inputs.k[:, head // group],
            coverage=coverage, block=block, tiles=tiles,
        )
        for head in range(inputs.q.shape[1])
    ]  # fmt: skip


def model_densities(
    folder: str | Path,
    token_ids: Sequence[int],
    *,
    coverage: float = 0.95,
    block: int = 64,
    tiles: int = 24,
) -> list[HeadDensity]:
    """The density of every head of a checkpoint on one prompt."""
    kinds = read_kinds(folder)
    found = []
    for layer, (inputs, _) in enumerate(run_layers(load_model(folder), token_ids)):
        measured = layer_densities(inputs, coverage=coverage, block=block, tiles=tiles)
        for head, (density, sink) in enumerate(measured):
            found.append(HeadDensity(layer, head, kinds[layer][head], density, sink))
    return found


def by_kind(heads: Sequence[HeadDensity]) -> dict[str, tuple[int, float, float]]:
    """Kind -> (number of heads, mean density, mean mass on the first token); and `all`."""
    groups: dict[str, list[HeadDensity]] = {}
    for head in heads:
        groups.setdefault(head.kind, []).append(head)
    groups["all"] = list(heads)
    return {
        kind: (
            len(members),
            sum(head.density for head in members) / len(members),
            sum(head.sink for head in members) / len(members),
        )
        for kind, members in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--coverage", type=float, default=0.95)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--tiles", type=int, default=24)
    parser.add_argument("--heads", action="store_true", help="also list every head")
    options = parser.parse_args()
    heads = model_densities(
        options.model,
        needle_prompt(options.length).token_ids,
        coverage=options.coverage,
        block=options.block,
        tiles=options.tiles,
    )
    if options.heads:
        for head in heads:
            print(f"{head.layer}.{head.head} {head.kind:10} {head.density:6.1%} {head.sink:6.1%}")
    print(f"{'kind':10} heads density  on sink")
    for kind, (count, density, sink) in by_kind(heads).items():
        print(f"{kind:10} {count:5} {density:7.1%} {sink:8.1%}")


if __name__ == "__main__":
    main()
