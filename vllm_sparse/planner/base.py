"""What the patterns share: the geometry of a chunk, and the selection they write into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from vllm_sparse.kernels import BlockIndices, index_lists
from vllm_sparse.kernels.block_indices import BLOCK, TILE, num_tiles

# Above this share of the dense cost a selection does not pay: indexed blocks run at about 0.85 of
# the dense rate.
MAX_COST = 0.8


@dataclass(frozen=True)
class Chunk:
    """A chunk of `query_len` rows at the end of `seq_len` keys.

    Tile t holds the positions start + 64 t .. start + 64 t + 63. The block offset of a key block
    for a tile counts back from the block of the tile's last position: 0, or 0 and 1 where the
    chunk does not begin at a block's edge, hold the diagonal.
    """

    query_len: int
    seq_len: int
    device: torch.device

    @property
    def start(self) -> int:
        return self.seq_len - self.query_len

    @property
    def tiles(self) -> int:
        return num_tiles(self.query_len)

    @property
    def blocks(self) -> int:
        return -(-self.seq_len // BLOCK)

    @cached_property
    def first_key(self) -> torch.Tensor:
        """int64 [T]: position of each tile's first row."""
        return self.start + torch.arange(self.tiles, device=self.device) * TILE

    @cached_property
    def last_key(self) -> torch.Tensor:
        """int64 [T]: position of each tile's last row."""
        return (self.first_key + TILE).clamp(max=self.seq_len) - 1

    @cached_property
    def last_block(self) -> torch.Tensor:
        """int64 [T]: block of each tile's last row."""
        return self.last_key // BLOCK

    @cached_property
    def block(self) -> torch.Tensor:
        """int64 [nb]: 0, 1, .."""
        return torch.arange(self.blocks, device=self.device)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """int64 [T, nb]: block offset of each key block for each tile; negative: in the future."""
        return self.last_block[:, None] - self.block

    @cached_property
    def causal(self) -> torch.Tensor:
        """bool [T, nb]: blocks with a key that some row of the tile may see."""
        return self.offsets >= 0

    @cached_property
    def base(self) -> torch.Tensor:
        """bool [T, nb]: what every selection holds: block 0 (the sink), the diagonal and the block
        before it, without which a tile's first rows would see no neighbour."""
        base = (self.offsets == 0) | (self.offsets == 1)
        base[:, 0] = True
        return base

    @cached_property
    def flat_offsets(self) -> torch.Tensor:
        """int64 [T nb]: the offsets, 0 in the future."""
        return self.offsets.clamp(min=0).flatten()

    @cached_property
    def base_cost(self) -> float:
        """Keys of base blocks that a tile before the last reads on average."""
        ends = self._body_ends
        return sum(min(-(-end // BLOCK), 3) for end in ends) / len(ends) * BLOCK if ends else 0.0

    @cached_property
    def dense_cost(self) -> float:
        """Keys that a tile before the last reads on average when dense."""
        ends = self._body_ends
        return sum(ends) / len(ends) if ends else 0.0

    @property
    def _body_ends(self) -> list[int]:
        """Keys that the last row of each tile before the last sees; no tensor, which might lie on
        a GPU."""
        return [self.start + (tile + 1) * TILE for tile in range(self.tiles - 1)]


@lru_cache(maxsize=8)
def chunk_of(query_len: int, seq_len: int, device: torch.device) -> Chunk:
    """A chunk whose tensors are shared: the layers of a step ask for the same."""
    return Chunk(query_len, seq_len, device)


@dataclass
class Selection:
    """What the tiles of a chunk read, for all heads of a layer.

    blocks: bool [T, H, nb].
    columns: int32 [T, H, M], ascending where not negative; negative entries are no column.
    """

    chunk: Chunk
    blocks: torch.Tensor
    columns: torch.Tensor | None = None

    @classmethod
    def empty(cls, chunk: Chunk, heads: int) -> Selection:
        shape = (chunk.tiles, heads, chunk.blocks)
        return cls(chunk, torch.zeros(shape, dtype=torch.bool, device=chunk.device))

    def set_blocks(self, heads: torch.Tensor, mask: torch.Tensor) -> None:
        """Heads `heads` [h] read the blocks of `mask`, broadcastable to [T, h, nb]."""
        self.blocks[:, heads] = mask.expand(self.chunk.tiles, len(heads), -1)

    def set_columns(self, tiles: slice, heads: torch.Tensor, columns: torch.Tensor) -> None:
        """Heads `heads` [h] read `columns` (broadcastable to [t, h, M]) in the tiles `tiles`."""
        rows = range(self.chunk.tiles)[tiles]
        width = columns.shape[-1]
        have = 0 if self.columns is None else self.columns.shape[-1]
        if have < width:
            shape = (self.chunk.tiles, self.blocks.shape[1], width)
            wider = torch.full(shape, -1, dtype=torch.int32, device=columns.device)
            if self.columns is not None:
                wider[..., :have] = self.columns
            self.columns = wider
        if self.columns is None:
            return
        columns = columns.to(torch.int32).expand(len(rows), len(heads), -1)
        self.columns[tiles, heads, :width] = columns
        self.columns[tiles, heads, width:] = -1

    def add_columns(self, tile: int, heads: torch.Tensor, columns: torch.Tensor) -> None:
        """Heads `heads` [h] read `columns` [h, M], -1 for none, in a tile beside what they have."""
        if self.columns is None:
            return self.set_columns(slice(tile, tile + 1), heads, columns)
        both = torch.cat([self.columns[tile, heads], columns.to(torch.int32)], 1).sort(1).values
        both[:, 1:][both[:, 1:] == both[:, :-1]] = -1
        self.set_columns(slice(tile, tile + 1), heads, both)

    def build(self) -> BlockIndices:
        """CSR lists, without what causality hides and without columns inside selected blocks."""
        return index_lists(self.blocks, self.columns, self.chunk.last_key)
