"""Which sequences of a decode batch begin with the same pages, which are then read once for them.

vLLM's prefix caching gives requests that begin with the same tokens the same pages.
`shared_prefixes` is the meaning, and what a CPU runs; `gpu/shared_prefix.py` finds the same without
leaving the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .block_indices import BLOCK

# Keys of a prefix that are worth reading apart from the rest: 4 sequences of 512 lose a tenth on a
# CPU, 8 of 1,024 gain one.
FEWEST = 1024
CPU_MEMBERS = 16  # sequences of a tile on a CPU, kMostTogether of its kernel


@dataclass(frozen=True)
class SharedPrefixes:
    """Tiles of sequences whose first keys lie in the same pages; each is in one tile at most."""

    keys: torch.Tensor  # int32 [S], so many first keys of a sequence are its tile's; 0: of none
    tile_keys: torch.Tensor  # int32 [Z], the same for each tile; 0: no tile
    members: torch.Tensor  # int32 [Z, M], its sequences in the batch's order; -1 after the last

    def fits(self, seqs: int) -> bool:
        """Whether these are of so many sequences, by their shapes."""
        tiles = self.tile_keys.numel()
        return self.keys.numel() == seqs and self.members.shape[0] == tiles


def room(seqs: int, members: int) -> tuple[int, int]:
    """(Z, M): most tiles of a batch, and most sequences of a tile, of which `members` may be more.

    Both follow from the next power of two of the batch's size alone, so that a captured graph has
    room for any batch. Twice the tiles that one prefix takes: where a batch has more prefixes than
    that, some are not shared.
    """
    seqs = 1 << max(seqs - 1, 0).bit_length()
    members = min(members, seqs)
    if members < 2:
        return 0, 1
    return min(seqs // 2, 2 * -(-seqs // members)), members


def page_compared(fewest: int, page: int) -> int:
    """The page of a sequence by which its tile is looked for: the last of the fewest keys.

    Raises:
        ValueError: no key is asked for.
    """
    if fewest < 1:
        raise ValueError(f"fewest: got {fewest}; give 1 or more keys")
    return -(-fewest // page) - 1


def shared_prefixes(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    seq_lens: torch.Tensor,
    *,
    page: int,
    members: int = CPU_MEMBERS,
    fewest: int = FEWEST,
) -> SharedPrefixes:
    """The tiles of a batch.

    Sequences with the same page at the place of the `fewest`-th key are a group; a group is cut, in
    the order of the batch, into tiles of up to `members`; tiles count in the order of their first
    sequences. The keys of a tile are those that all its sequences have in the same pages, up to its
    first query, in whole blocks of 64; with less than `fewest` it shares nothing.

    Args:
        block_table: int32 [S, P].
        query_start_loc: int32 [S + 1], None: one query each. Sequences without one are padding.
        seq_lens: int32 [S], queries included.
        page: keys of a page.
        members: most sequences of a tile.
        fewest: keys that are worth it, at least 1.
    """
    seqs = seq_lens.numel()
    at = page_compared(fewest, page)
    tiles, members = room(seqs, members)
    found = SharedPrefixes(
        torch.zeros(seqs, dtype=torch.int32),
        torch.zeros(tiles, dtype=torch.int32),
        torch.full((tiles, members), -1, dtype=torch.int32),
    )
    queries = 1 if query_start_loc is None else query_start_loc[1:] - query_start_loc[:-1]
    # Every query of a sequence sees them.
    complete = torch.where(torch.as_tensor(queries) > 0, (seq_lens - queries) // page, 0)
    able = (complete > at).nonzero()[:, 0].tolist()
    if tiles == 0 or len(able) < 2:
        return found
    groups: dict[int, list[int]] = {}
    for s, its_page in zip(able, block_table[able, at].tolist(), strict=True):
        groups.setdefault(its_page, []).append(s)
    cut = sorted(
        group[i : i + members] for group in groups.values() for i in range(0, len(group), members)
    )
    cut = [tile for tile in cut if len(tile) > 1]
    for z, tile in enumerate(cut[:tiles]):
        pages = block_table[tile, : int(complete[tile].min())]
        differs = (pages != pages[0]).any(0).nonzero()[:, 0]
        alike = int(differs[0]) if len(differs) else pages.shape[1]
        keys = alike * page // BLOCK * BLOCK
        if keys < fewest:
            continue
        found.keys[tile] = keys
        found.tile_keys[z] = keys
        found.members[z, : len(tile)] = torch.tensor(tile, dtype=torch.int32)
    return found
