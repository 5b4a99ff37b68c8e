"""The planner's entry: a step's queries, cached keys and head patterns -> BlockIndices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from vllm_sparse.kernels import BlockIndices, tile_means
from vllm_sparse.patterns import HeadPattern

from . import a_shape, adaptive, block_sparse, vertical_slash
from .base import Chunk, Selection, chunk_of
from .scores import Keys

# With so few blocks a selection cannot save what making it costs.
SHORT_BLOCKS = 8
LAST_ROWS = 64  # rows that fixed vertical-slash budgets are estimated from


def plan_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    patterns: Sequence[HeadPattern],
    *,
    scale: float,
    coverage: float,
) -> BlockIndices:
    """What each query tile of a step's sequences reads.

    The chunk's own keys must be in the cache already.

    Args:
        q: [T, H, D], the sequences' new queries after another.
        k_cache: [num_pages, Hkv, page, D].
        block_table: int32 [S, P]; query_start_loc: int32 [S + 1]; seq_lens: int32 [S].
        patterns: one for each of the H heads.
        scale: factor on the logits.
        coverage: share of attention mass that heads without fixed budgets cover; 1: everything.
    """
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()  # waits, where on a GPU
    query_lens = [end - begin for begin, end in pairwise(starts)]
    if len(patterns) != q.shape[1]:
        raise ValueError(f"patterns: got {len(patterns)} for {q.shape[1]} heads; give one for each")
    if not 0.0 <= coverage <= 1.0:
        raise ValueError(f"coverage: got {coverage}; allowed: 0 to 1")
    if not q.is_cpu:
        from .device import plan_on_device

        return plan_on_device(
            q, k_cache, block_table, query_lens, lengths, patterns, scale=scale, coverage=coverage
        )
    if coverage == 1.0:
        return BlockIndices.everything(query_lens, lengths, q.shape[1], q.device)
    parts = []
    for s, (query_len, seq_len) in enumerate(zip(query_lens, lengths, strict=True)):
        chunk = chunk_of(query_len, seq_len, q.device)
        if query_len == 0 or chunk.blocks <= SHORT_BLOCKS:
            part = BlockIndices.everything([query_len], [seq_len], q.shape[1], q.device)
        else:
            keys = Keys(k_cache, block_table[s], seq_len, scale)
            queries = q[starts[s] : starts[s + 1]]
            part = plan_chunk(chunk, queries, keys, patterns, coverage)
        parts.append(part)
    return BlockIndices.cat(parts)


def plan_chunk(
    chunk: Chunk,
    queries: torch.Tensor,
    keys: Keys,
    patterns: Sequence[HeadPattern],
    coverage: float,
) -> BlockIndices:
    """One sequence's chunk: queries [Tq, H, D]."""
    selection = Selection.empty(chunk, len(patterns))

    def heads_of(kind: str) -> list[int]:
        return [i for i, p in enumerate(patterns) if p.kind == kind and p.fixed]

    dense = [
        i for i, p in enumerate(patterns) if p.kind == "dense" or (p.coverage or coverage) == 1.0
    ]
    dense = [i for i in dense if not patterns[i].fixed]
    if dense:
        selection.set_blocks(torch.tensor(dense, device=chunk.device), chunk.causal[:, None])
    if heads := heads_of("a_shape"):
        sink, window = _numbers(patterns, heads, ("sink", "window"), chunk.device)
        index = torch.tensor(heads, device=chunk.device)
        selection.set_blocks(index, a_shape.fixed(chunk, sink, window))
    if heads := heads_of("vertical_slash"):
        _vertical_slash(selection, heads, queries, keys, patterns)
    if heads := heads_of("block_sparse"):
        (count,) = _numbers(patterns, heads, ("blocks",), chunk.device)
        index = torch.tensor(heads, device=chunk.device)
        group = len(patterns) // keys.heads
        score = block_sparse.scores(
            tile_means(queries, index),
            keys.block_means(index // group),
            keys.scale,
        )
        selection.set_blocks(index, block_sparse.fixed(chunk, score, count))
    rest = [i for i, p in enumerate(patterns) if not p.fixed and i not in dense]
    if rest:
        request = adaptive.Request.of(rest, [patterns[i] for i in rest], coverage, chunk.device)
        adaptive.plan(selection, request, queries, keys)
    return selection.build()


def _numbers(
    patterns: Sequence[HeadPattern], heads: list[int], fields: tuple[str, ...], device: torch.device
) -> torch.Tensor:
    """int64 [fields, h]: the budgets of these heads."""
    return torch.tensor([[getattr(patterns[i], f) for i in heads] for f in fields], device=device)


def _vertical_slash(
    selection: Selection,
    heads: list[int],
    queries: torch.Tensor,
    keys: Keys,
    patterns: Sequence[HeadPattern],
) -> None:
    chunk, group = selection.chunk, len(patterns) // keys.heads
    rows = torch.arange(max(chunk.query_len - LAST_ROWS, 0), chunk.query_len, device=chunk.device)
    index = torch.tensor(heads, device=chunk.device)
    for kv in (index // group).unique().tolist():
        mine = index[index // group == kv]
        mass = keys.attention(queries[rows[:, None], mine], chunk.start + rows, kv)
        vertical, slash = _numbers(patterns, mine.tolist(), ("vertical", "slash"), chunk.device)
        blocks, columns = vertical_slash.fixed(chunk, mass.transpose(0, 1), vertical, slash)
        selection.set_blocks(mine, blocks)
        selection.set_columns(slice(None), mine, columns)
