"""CSR lists of a selection, made on the device: see `reference.index_lists`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from ..block_indices import BlockIndices
from . import launch
from .launch import Config, Target, kernel, unspecialized

CHUNK = 256
WARPS, STAGES = 4, 2


@triton.jit(
    **unspecialized(
        numbers=(
            "row0", "num_rows", "num_heads", "num_blocks", "width", "column_tile", "column_head",
        ),
        pointers=("mask", "columns", "last_keys", "offsets", "blocks", "column_list"),
    )
)  # fmt: skip
def _index_lists(
    mask,  # u8 [T, H, nb]
    columns,  # i32 [T, H, M]
    last_keys,  # i64 [T]
    offsets,  # i32 [2, rows of all parts + 1]; counts, one place on, where not filling
    row0,  # of this part's first row
    num_rows,  # of all parts
    blocks,
    column_list,
    num_heads,
    num_blocks,
    width,
    column_tile,  # strides: ranges of tiles may share their columns
    column_head,
    FILL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row of the lists: blocks up to the tile's last key, columns outside of them."""
    row = tl.program_id(0)
    last_key = tl.load(last_keys + row // num_heads).to(tl.int32)
    here = offsets + row0 + row
    block_at = tl.load(here) * 0
    column_at = block_at
    if FILL:
        block_at = tl.load(here)
        column_at = tl.load(here + num_rows + 1)
    tile, head = (row // num_heads).to(tl.int64), row % num_heads
    of_columns = columns + tile * column_tile + head * column_head
    of_mask = mask + row.to(tl.int64) * num_blocks
    for first in range(0, tl.minimum(last_key // 64 + 1, num_blocks), CHUNK):
        block = first + tl.arange(0, CHUNK)
        keep = (block < num_blocks) & (block <= last_key // 64)
        keep = keep & (tl.load(of_mask + block, mask=keep, other=0) != 0)
        if FILL:
            rank = tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(blocks + block_at + rank, block, mask=keep)
        block_at += tl.sum(keep.to(tl.int32), 0)
    for first in range(0, width, CHUNK):
        i = first + tl.arange(0, CHUNK)
        column = tl.load(of_columns + i, mask=i < width, other=-1)
        keep = (column >= 0) & (column <= last_key)
        keep = keep & (tl.load(of_mask + column // 64, mask=keep, other=0) == 0)
        if FILL:
            rank = tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(column_list + column_at + rank, column, mask=keep)
        column_at += tl.sum(keep.to(tl.int32), 0)
    if not FILL:
        tl.store(here + 1, block_at)
        tl.store(here + num_rows + 2, column_at)


@kernel(_index_lists)
def _configs(target: Target) -> Iterator[Config]:
    signature = {
        "mask": "*u8", "last_keys": "*i64", "row0": "i32", "num_rows": "i32", "num_heads": "i32",
        "num_blocks": "i32", "width": "i32", "column_tile": "i32", "column_head": "i32",
    } | dict.fromkeys(("columns", "offsets", "blocks", "column_list"), "*i32")  # fmt: skip
    for name, fill in (("count", False), ("fill", True)):
        yield Config(name, {"FILL": fill, "CHUNK": CHUNK}, WARPS, STAGES, signature, True)


def index_lists(
    mask: torch.Tensor, columns: torch.Tensor | None, last_key: torch.Tensor
) -> BlockIndices:
    """See `reference.index_lists`: same arguments, same meaning. The lists are as long as they
    could be; what the offsets do not reach is not written."""
    return index_lists_of([(mask, columns, last_key)])


def index_lists_of(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]],
    tiles: Sequence[int] | None = None,
) -> BlockIndices:
    """The lists of adjacent ranges of tiles, each as `reference.index_lists` takes it.

    Args:
        tiles: of each sequence; None: each part is one.
    """
    first = parts[0][0]
    heads = first.shape[1]
    rows = [mask.shape[0] * heads for mask, _, _ in parts]
    offsets = torch.zeros(2, sum(rows) + 1, dtype=torch.int32, device=first.device)
    lengths = (
        sum(mask.numel() for mask, _, _ in parts),
        sum(columns.numel() for _, columns, _ in parts if columns is not None),
    )
    lists = [first.new_empty(max(length, 1), dtype=torch.int32) for length in lengths]
    for fill in (False, True):
        row0 = 0
        for (mask, columns, last_key), count in zip(parts, rows, strict=True):
            if count:
                mask = mask.contiguous().view(torch.uint8)
                width = 0 if columns is None else columns.shape[2]
                columns = lists[1][None, None] if columns is None else columns
                columns = columns if columns.stride(2) == 1 else columns.contiguous()
                _index_lists[(count,)](
                    mask, columns, last_key, offsets, row0, sum(rows), *lists, heads,
                    mask.shape[2], width, *columns.stride()[:2],
                    FILL=fill, CHUNK=CHUNK, **launch.options(WARPS, STAGES),
                )  # fmt: skip
            row0 += count
        if not fill:
            offsets = offsets.cumsum(1, dtype=torch.int32)
    tiles = tiles or [mask.shape[0] for mask, _, _ in parts]
    ends = torch.tensor(tiles, device="cpu").cumsum(0)
    tile_offsets = torch.nn.functional.pad(ends, (1, 0)).int()
    return BlockIndices(
        heads, upload(tile_offsets, first.device), offsets[0], lists[0], offsets[1], lists[1]
    )


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on the device, without waiting for what the device is doing."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)
