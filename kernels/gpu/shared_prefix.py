"""Which sequences of a decode batch begin with the same pages, found on the GPU in one launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..block_indices import BLOCK
from ..shared_prefix import FEWEST, SharedPrefixes, page_compared, room
from . import launch
from .integers import next_power_of_2
from .launch import Config, Target, kernel, unspecialized

_AT_ONCE = 32  # sequences that a step of counting compares with all others
PAGES = 128  # that a step of comparing takes
STEP_NUMBERS = ("num_seqs", "num_tiles", "page_at", "fewest", "table_row")
STEP_TENSORS = ("block_table", "query_start_loc", "seq_lens")


@triton.jit
def _groups(
    s, block_table, query_start_loc, seq_lens, num_seqs, page_at, table_row, none,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Of sequences s: pages before their first queries, and their groups; `none`: of no group."""
    is_seq = s < num_seqs
    lens = tl.load(seq_lens + s, mask=is_seq, other=0)
    queries = tl.load(query_start_loc + s + 1, mask=is_seq, other=0)
    queries -= tl.load(query_start_loc + s, mask=is_seq, other=0)
    complete = tl.where(queries > 0, (lens - queries) // PAGE, 0)
    at = block_table + s.to(tl.int64) * table_row + page_at
    return complete, tl.load(at, mask=complete > page_at, other=none)


@triton.jit(**unspecialized(STEP_NUMBERS, STEP_TENSORS))
def _shared_prefixes(
    keys_of,  # i32 [S]
    tile_keys,  # i32 [Z]
    members,  # i32 [Z, M]
    sharing,  # i64 [1], sequences of tiles are added to it; None: not counted
    block_table,  # i32 [S, pages]
    query_start_loc,  # i32 [S + 1]
    seq_lens,  # i32 [S]
    num_seqs,
    num_tiles,
    page_at,  # sequences of a group have the same page here
    fewest,
    table_row,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    SEQS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PAGES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """A program for each sequence: the first of a tile writes what is said of all of it, one that
    is in none writes for itself. See `..shared_prefix.shared_prefixes`."""
    me = tl.program_id(0)
    s = tl.arange(0, SEQS)
    complete, group = _groups(
        s, block_table, query_start_loc, seq_lens, num_seqs, page_at, table_row, -1, PAGE
    )
    able = complete > page_at

    # Of each sequence: how many of its group come before it, and how many there are.
    rank = tl.zeros([SEQS], tl.int32)
    size = tl.zeros([SEQS], tl.int32)
    for first in range(0, num_seqs, AT_ONCE):
        j = first + tl.arange(0, AT_ONCE)
        _, j_group = _groups(
            j, block_table, query_start_loc, seq_lens, num_seqs, page_at, table_row, -2, PAGE
        )
        same = (group[:, None] == j_group[None, :]).to(tl.int32)
        size += tl.sum(same, 1)
        rank += tl.sum(tl.where(j[None, :] < s[:, None], same, 0), 1)
    heads = able & (rank % MEMBERS == 0) & (size - rank > 1)
    tiles = tl.sum(heads.to(tl.int32), 0)
    place = tl.sum(tl.where(s < me, heads.to(tl.int32), 0), 0)

    m = tl.arange(0, MEMBERS)
    if (me < num_tiles) & (me >= tiles):  # there is no such tile
        tl.store(tile_keys + me, 0)
        tl.store(members + me * MEMBERS + m, -1)
    mine = s == me
    my_group = tl.max(tl.where(mine, group, -1), 0)
    my_rank = tl.sum(tl.where(mine, rank, 0), 0)
    in_tile = able & (group == my_group) & (rank // MEMBERS == my_rank // MEMBERS)
    count = tl.sum(in_tile.to(tl.int32), 0)
    # Tiles for which there is no room share nothing; their first sequences say so for all.
    is_head = tl.max(tl.where(mine, heads.to(tl.int32), 0), 0) == 1
    if (my_group < 0) | (count < 2):
        tl.store(keys_of + me, 0)
    if is_head:
        who = tl.sum(tl.where(in_tile[None, :] & (rank[None, :] - my_rank == m[:, None]),
                              s[None, :], 0), 1)  # fmt: skip
        valid = m < count
        most = tl.min(tl.where(in_tile, complete, 1 << 30), 0)
        most = tl.where(place < num_tiles, most, 0)
        p = tl.arange(0, PAGES)
        alike = 0
        going = 1
        while going == 1:
            page = alike + p
            inside = page < most
            theirs = tl.load(
                block_table + who.to(tl.int64)[:, None] * table_row + page[None, :],
                mask=inside[None, :] & valid[:, None], other=-1,
            )  # fmt: skip
            mine_too = tl.load(
                block_table + me.to(tl.int64) * table_row + page, mask=inside, other=-1
            )
            differs = (theirs != mine_too[None, :]) & valid[:, None]
            ends = tl.max(differs.to(tl.int32), 0) + (page >= most).to(tl.int32)
            step = tl.min(tl.where(ends > 0, p, PAGES), 0)
            alike += step
            going = (step == PAGES).to(tl.int32)
        keys = alike * PAGE // KEYS * KEYS
        keys = tl.where(keys >= fewest, keys, 0)
        if sharing is not None:
            tl.atomic_add(sharing, tl.where(keys > 0, count, 0).to(tl.int64))
        tl.store(keys_of + who, tl.zeros([MEMBERS], tl.int32) + keys, mask=valid)
        if place < num_tiles:
            tl.store(tile_keys + place, keys)
            tl.store(members + place * MEMBERS + m, tl.where(valid & (m * 0 + keys > 0), who, -1))


class Room:
    """Where the shared prefixes of every step of up to so many sequences are written to, so that
    captured graphs find them at the same address."""

    def __init__(self, seqs: int, members: int, device: torch.device) -> None:
        tiles, width = room(seqs, members)
        integers = {"dtype": torch.int32, "device": device}
        self.members = members
        self._keys = torch.zeros(seqs, **integers)
        # Of smaller batches: never more tiles, nor more sequences in them.
        self._tile_keys = torch.zeros(max(tiles, 1), **integers)
        self._members = torch.zeros(max(tiles, 1) * width, **integers)

    def of(self, seqs: int) -> SharedPrefixes:
        """What a batch of `seqs` sequences writes, and its layers read."""
        tiles, width = room(seqs, self.members)
        members = self._members[: tiles * width].view(tiles, width)
        return SharedPrefixes(self._keys[:seqs], self._tile_keys[:tiles], members)


def shared_prefixes(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page: int,
    members: int,
    fewest: int = FEWEST,
    into: Room | None = None,
    sharing: torch.Tensor | None = None,
) -> SharedPrefixes:
    """See `..shared_prefix.shared_prefixes`; found on the device, once for all layers of a step.

    Args:
        members: most sequences of a tile, a power of two: `paged_decode.members_of`.
        into: room that was made with these `members`; None: new.
        sharing: int64 [1]; the sequences that share are added to it.
    """
    seqs = seq_lens.numel()
    at = page_compared(fewest, page)
    into = Room(seqs, members, seq_lens.device) if into is None else into
    found = into.of(seqs)
    if not found.tile_keys.numel():
        found.keys.zero_()
        return found
    _shared_prefixes[(seqs,)](
        found.keys, found.tile_keys, found.members, sharing, block_table, query_start_loc,
        seq_lens, seqs, found.tile_keys.numel(), at, fewest, block_table.stride(0),
        **constants(seqs, found.members.shape[1], page), **launch.options(4, 1),
    )  # fmt: skip
    return found


def constants(seqs: int, members: int, page: int) -> dict[str, int]:
    return {
        "PAGE": page,
        "KEYS": BLOCK,
        "SEQS": next_power_of_2(seqs),
        "MEMBERS": members,
        "PAGES": PAGES,
        "AT_ONCE": _AT_ONCE,
    }


SIGNATURE = {
    "keys_of": "*i32", "tile_keys": "*i32", "members": "*i32", "sharing": "*i64",
    "block_table": "*i32", "query_start_loc": "*i32", "seq_lens": "*i32", "num_seqs": "i32",
    "num_tiles": "i32", "page_at": "i32", "fewest": "i32", "table_row": "i32",
}  # fmt: skip


@kernel(_shared_prefixes)
def configs(target: Target) -> Iterator[Config]:
    for seqs in (8, 256):
        yield Config(
            f"{seqs}-sequences", constants(seqs, min(seqs, 16), 16), 4, 1, SIGNATURE, serving=True,
            aligned=frozenset({"keys_of", "tile_keys", "members", "sharing"}),
        )  # fmt: skip
