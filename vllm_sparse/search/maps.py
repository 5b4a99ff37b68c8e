"""A model's attention by blocks, and what a pattern file selects of it: for pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse.kernels.block_indices import BLOCK, TILE, num_tiles
from vllm_sparse.patterns import PatternFile
from vllm_sparse.planner import plan_prefill

from .capture import LayerInputs, capture
from .evaluate import Layer


@dataclass(frozen=True)
class Maps:
    """mass: [heads, tiles, blocks], mean over a tile's rows; selected: bool of that shape."""

    layer: int
    mass: np.ndarray
    selected: np.ndarray


def attention_maps(
    model: torch.nn.Module, token_ids: Sequence[int], file: PatternFile
) -> Iterator[Maps]:
    """The maps of every layer that the sparse backend serves."""
    found: list[Maps] = []

    def visit(inputs: LayerInputs) -> None:
        if inputs.window is None:
            found.append(layer_maps(inputs, file))

    capture(model, token_ids, visit)
    yield from found


def layer_maps(inputs: LayerInputs, file: PatternFile) -> Maps:
    """The maps of one layer, planned as one chunk."""
    layer = Layer(inputs)
    tiles, blocks = num_tiles(layer.length), -(-layer.length // BLOCK)
    group = layer.heads // inputs.k.shape[1]
    mass = np.zeros((layer.heads, tiles, blocks))
    keys = inputs.k.detach().cpu().float()
    for tile in range(tiles):
        rows = slice(tile * TILE, min((tile + 1) * TILE, layer.length))
        hidden = torch.arange(rows.stop) > torch.arange(rows.start, rows.stop)[:, None]
        for head in range(layer.heads):
            logits = layer.q[rows, head].float() @ keys[: rows.stop, head // group].T
            logits = (logits * layer.scale).masked_fill_(hidden, -torch.inf)
            share = torch.softmax(logits, -1).mean(0)
            share = torch.nn.functional.pad(share, (0, -len(share) % BLOCK))
            mass[head, tile, : len(share) // BLOCK] = share.view(-1, BLOCK).sum(1).numpy()
    where = (
        layer.table,
        torch.tensor([0, layer.length], dtype=torch.int32),
        torch.tensor([layer.length], dtype=torch.int32),
    )
    indices = plan_prefill(
        layer.q, layer.k_cache, *where, file.for_layer(inputs.layer), scale=layer.scale,
        coverage=0.95,
    )  # fmt: skip
    selected = np.zeros((tiles * layer.heads, blocks), dtype=bool)
    for offsets, entries, size in (
        (indices.block_offsets, indices.blocks, 1),
        (indices.column_offsets, indices.columns, BLOCK),
    ):
        counts = (offsets[1:] - offsets[:-1]).long()
        row = torch.arange(len(counts)).repeat_interleave(counts)
        selected[row.numpy(), (entries.long() // size).numpy()] = True
    return Maps(inputs.layer, mass, selected.reshape(tiles, layer.heads, blocks).transpose(1, 0, 2))
