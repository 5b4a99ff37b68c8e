"""BlockIndices: which keys each query tile reads. Planners return it, kernels consume it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TILE = 64  # query rows that share one selection
BLOCK = 64  # keys selected together; independent of the KV cache's page size


def num_tiles(query_len: int) -> int:
    """Number of query tiles of a chunk of `query_len` rows."""
    return -(-query_len // TILE)


@dataclass(frozen=True)
class BlockIndices:
    """Selected keys per (sequence, query tile, query head), as CSR lists of int32.

    Tiles cut the rows of a sequence's chunk: tile `t` holds chunk rows `[64 t, 64 t + 64)`.
    Blocks and columns are addressed in the sequence's own coordinates, whatever part of it is
    already cached. Row `r = tile * num_heads + head` of the lists, tiles counted over sequences.

    The kernel applies causality and ignores entries that are negative or beyond the sequence.
    """

    num_heads: int
    tile_offsets: torch.Tensor  # [num_seqs + 1] first tile of each sequence
    block_offsets: torch.Tensor  # [num_tiles * num_heads + 1]
    blocks: torch.Tensor  # [num_blocks] ascending in a row; block b is keys 64 b .. 64 b + 63
    column_offsets: torch.Tensor  # [num_tiles * num_heads + 1]
    columns: torch.Tensor  # [num_columns] ascending in a row, outside the row's blocks

    @classmethod
    def from_masks(
        cls,
        block_mask: torch.Tensor,
        column_offsets: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
    ) -> BlockIndices:
        """One sequence's indices.

        Args:
            block_mask: bool [tiles, heads, blocks].
            column_offsets: int32 [tiles * heads + 1], or None for no columns.
            columns: int32 [num_columns], outside the blocks of their row.
        """
        tiles, heads, _ = block_mask.shape
        counts = block_mask.sum(-1, dtype=torch.int32).flatten()
        blocks = block_mask.flatten(0, 1).nonzero()[:, 1].to(torch.int32)
        if column_offsets is None or columns is None:
            column_offsets = counts.new_zeros(tiles * heads + 1)
            columns = counts.new_zeros(0)
        return cls(
            num_heads=heads,
            tile_offsets=counts.new_tensor([0, tiles]),
            block_offsets=_offsets(counts),
            blocks=blocks,
            column_offsets=column_offsets,
            columns=columns,
        )

    @classmethod
    def everything(
        cls,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        num_heads: int,
        device: torch.device | str = "cpu",
    ) -> BlockIndices:
        """Every block that a query of the tile may see; what `coverage` 1.0 asks for."""
        parts = []
        for query_len, seq_len in zip(query_lens, seq_lens, strict=True):
            tile = torch.arange(num_tiles(query_len), device=device)
            last_key = (seq_len - query_len + (tile + 1) * TILE).clamp(max=seq_len) - 1
            block = torch.arange(-(-seq_len // BLOCK), device=device)
            mask = block[None, :] * BLOCK <= last_key[:, None]
            parts.append(cls.from_masks(mask[:, None, :].expand(-1, num_heads, -1)))
        return cls.cat(parts)

    @classmethod
    def cat(cls, parts: Sequence[BlockIndices]) -> BlockIndices:
        """The indices of several sequences after another."""
        if len(parts) == 1:
            return parts[0]
        if not parts or len({p.num_heads for p in parts}) != 1:
            raise ValueError(
                "BlockIndices.cat: got parts with the head counts "
                f"{[p.num_heads for p in parts]}; give at least one, all with the same heads"
            )
        return cls(
            num_heads=parts[0].num_heads,
            tile_offsets=_chain([p.tile_offsets for p in parts]),
            block_offsets=_chain([p.block_offsets for p in parts]),
            blocks=torch.cat([p.blocks for p in parts]),
            column_offsets=_chain([p.column_offsets for p in parts]),
            columns=torch.cat([p.columns for p in parts]),
        )

    def selected_keys(self, query_lens: Sequence[int], seq_lens: Sequence[int]) -> tuple[int, int]:
        """(key reads selected, key reads of causal attention), both in keys x tiles x heads.

        Counted at the granularity the kernel reads: a tile counts every key its rows may see, a
        block counts the keys of it that the tile's last row may see, a column counts one.
        """
        read = self.columns.numel()
        causal = 0
        tile0 = 0
        for query_len, seq_len in zip(query_lens, seq_lens, strict=True):
            tiles = num_tiles(query_len)
            tile = torch.arange(tiles, device=self.blocks.device)
            visible = (seq_len - query_len + (tile + 1) * TILE).clamp(max=seq_len)
            causal += int(visible.sum()) * self.num_heads
            rows = slice(tile0 * self.num_heads, (tile0 + tiles) * self.num_heads + 1)
            offsets = self.block_offsets[rows]
            per_row = visible.repeat_interleave(self.num_heads)
            limit = per_row.repeat_interleave((offsets[1:] - offsets[:-1]).long())
            blocks = self.blocks[int(offsets[0]) : int(offsets[-1])]
            keys = (limit - blocks.long() * BLOCK).clamp(0, BLOCK)
            read += int(keys.masked_fill(blocks < 0, 0).sum())
            tile0 += tiles
        return read, causal

    def density(self, query_lens: Sequence[int], seq_lens: Sequence[int]) -> float:
        """Share of causal key reads that is selected, 0 to 1."""
        read, causal = self.selected_keys(query_lens, seq_lens)
        return read / causal if causal else 0.0


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    offsets = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def _chain(offsets: list[torch.Tensor]) -> torch.Tensor:
    out, base = [offsets[0]], int(offsets[0][-1])
    for part in offsets[1:]:
        out.append(part[1:] + base)
        base += int(part[-1])
    return torch.cat(out)
