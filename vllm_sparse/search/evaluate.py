"""Every candidate on one layer's queries, keys and values: its error, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse.kernels import sparse_prefill, write_kv
from vllm_sparse.kernels.block_indices import BLOCK, TILE, num_tiles
from vllm_sparse.patterns import HeadPattern
from vllm_sparse.planner import plan_prefill

from .capture import LayerInputs
from .cost import CHUNK, PAGE


@dataclass(frozen=True)
class Scores:
    """Of C candidates in H heads of one layer, over P prompts; float64.

    whole: [P, C, H], error relative to the exact output, over all rows of a prompt.
    worst: [P, C, H], the same over 64 rows, of the worst such tile.
    last: [P, C, H], the same over the last 64 rows, where questions stand.
    norm: [P, H], sum of squares of the exact output.
    blocks, columns: [C, H], read, counted over the tiles of all prompts.
    """

    whole: np.ndarray
    worst: np.ndarray
    last: np.ndarray
    norm: np.ndarray
    blocks: np.ndarray
    columns: np.ndarray

    def joined(self, other: Scores) -> Scores:
        """These prompts and the other's."""
        return Scores(
            np.concatenate([self.whole, other.whole]),
            np.concatenate([self.worst, other.worst]),
            np.concatenate([self.last, other.last]),
            np.concatenate([self.norm, other.norm]),
            self.blocks + other.blocks,
            self.columns + other.columns,
        )

    @property
    def shares(self) -> np.ndarray:
        """[P, C, H]: squared error as a share of the whole layer's sum of squares.

        Summed over heads and rooted it is the layer's relative error.
        """
        total = np.maximum(self.norm.sum(1), 1e-30)
        return self.whole**2 * (self.norm / total[:, None])[:, None]


class Layer:
    """One layer's keys and values in a paged cache, as they lie when serving."""

    def __init__(self, inputs: LayerInputs) -> None:
        q, k, v = (x.detach().to("cpu") for x in (inputs.q, inputs.k, inputs.v))
        self.q = q.contiguous()
        self.truth = inputs.out.detach().to("cpu")
        self.scale = inputs.scale
        self.length, self.heads, size = self.q.shape
        pages = -(-self.length // PAGE)
        cache = torch.zeros(pages, k.shape[1], PAGE, 2 * size, dtype=q.dtype)
        self.k_cache, self.v_cache = cache[..., :size], cache[..., size:]
        write_kv(k, v, self.k_cache, self.v_cache, torch.arange(self.length))
        self.table = torch.arange(pages, dtype=torch.int32)[None]
        self.norm = _square_sums(self.truth)

    def attend(
        self, patterns: Sequence[HeadPattern], chunk: int = CHUNK
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """(out [T, H, D], blocks [H], columns [H]) with a pattern for each head, in chunks."""
        out = torch.empty_like(self.q)
        blocks, columns = np.zeros(self.heads), np.zeros(self.heads)
        for begin in range(0, self.length, chunk):
            end = min(begin + chunk, self.length)
            where = (
                self.table,
                torch.tensor([0, end - begin], dtype=torch.int32),
                torch.tensor([end], dtype=torch.int32),
            )
            q = self.q[begin:end]
            indices = plan_prefill(
                q, self.k_cache, *where, patterns, scale=self.scale, coverage=0.95
            )
            sparse_prefill(
                q, self.k_cache, self.v_cache, *where, indices, scale=self.scale,
                out=out[begin:end],
            )  # fmt: skip
            blocks += _by_head(indices.block_offsets, self.heads)
            columns += _by_head(indices.column_offsets, self.heads)
        return out, blocks, columns

    def attend_densely(self, chunk: int = CHUNK) -> torch.Tensor:
        """What a server without sparsity computes, in chunks."""
        out = torch.empty_like(self.q)
        for begin in range(0, self.length, chunk):
            end = min(begin + chunk, self.length)
            sparse_prefill(
                self.q[begin:end], self.k_cache, self.v_cache, self.table,
                torch.tensor([0, end - begin], dtype=torch.int32),
                torch.tensor([end], dtype=torch.int32), None,
                scale=self.scale, out=out[begin:end],
            )  # fmt: skip
        return out

    def errors(self, out: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Relative error of the whole output, of its worst tile, of its last 64 rows: [H] each."""
        difference = _square_sums(out.float() - self.truth.float())
        whole = (difference.sum(0) / self.norm.sum(0).clamp(min=1e-30)).sqrt()
        tiles = (difference / self.norm.clamp(min=1e-30)).sqrt()
        end, truth = out[-TILE:].float(), self.truth[-TILE:].float()
        last = (_square_sums(end - truth)[0] / _square_sums(truth)[0].clamp(min=1e-30)).sqrt()
        # What is not finite is as wrong as can be.
        whole, worst, last = (
            np.nan_to_num(x.numpy(), nan=1e9, posinf=1e9) for x in (whole, tiles.amax(0), last)
        )
        return whole, worst, last


def evaluate(
    inputs: LayerInputs,
    patterns: Sequence[HeadPattern],
    progress: Callable[[int], object] = lambda done: None,
) -> Scores:
    """The scores of every pattern in every head; `progress` is told of each pattern done."""
    layer = Layer(inputs)
    rows = []
    for pattern in patterns:
        if pattern.kind == "dense":
            zero = np.zeros(layer.heads)
            rows.append((zero, zero, zero, np.full(layer.heads, causal_blocks(layer.length)), zero))
        else:
            out, blocks, columns = layer.attend([pattern] * layer.heads)
            rows.append((*layer.errors(out), blocks, columns))
        progress(1)
    whole, worst, last, blocks, columns = (
        np.array(column, dtype=np.float64) for column in zip(*rows, strict=True)
    )
    norm = layer.norm.sum(0).numpy().astype(np.float64)
    return Scores(whole[None], worst[None], last[None], norm[None], blocks, columns)


def causal_blocks(length: int) -> float:
    """Blocks that the tiles of a prompt read when dense."""
    return float(sum(-(-min((t + 1) * TILE, length) // BLOCK) for t in range(num_tiles(length))))


def _square_sums(rows: torch.Tensor) -> torch.Tensor:
    """[T, H, D] -> float64 [tiles, H]: sums of squares over each tile's rows."""
    squares = rows.float().square().sum(-1)
    whole = torch.nn.functional.pad(squares, (0, 0, 0, -len(squares) % TILE))
    return whole.view(-1, TILE, rows.shape[1]).sum(1).double()


def _by_head(offsets: torch.Tensor, heads: int) -> np.ndarray:
    counts = (offsets[1:] - offsets[:-1]).view(-1, heads)
    return counts.sum(0, dtype=torch.int64).numpy().astype(np.float64)
