"""Where everything of a host store lies in its memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .store import DTYPES, LINE

PAGE_ROWS = 256  # shared prefixes are multiples of it, and a request wastes half of it on average


def aligned(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE


@dataclass(frozen=True)
class Layout:
    """Rows of all layers, cut into pages: layer by layer, each [pages][part of a page].

    A page of one layer is [kv_heads][rows][K, V][head_size], and behind it, for int8 rows, their
    scales fp32 [kv_heads][rows][K, V], and what samplers know of the keys (csrc/sketch.h).

    Args:
        layers: whose rows are kept; kv_heads, head_size: of each.
        dtype: how rows are kept: float32, bfloat16, float16, or int8 with a scale for each row.
        page_rows: a power of two from 16 to 65536.
        sketched: whether keys are kept in four bits as well, for samplers.
        hash_tables: of hash codes of a byte a row, for LSH.
    """

    layers: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    page_rows: int = PAGE_ROWS
    sketched: bool = False
    hash_tables: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"kv_dtype: got {self.dtype}; use one of {', '.join(map(str, DTYPES))}"
            )
        if self.layers < 1 or self.kv_heads < 1:
            raise ValueError(
                f"layers, kv_heads: got {self.layers}, {self.kv_heads}; give at least one of each"
            )
        if self.head_size % 16 or not 16 <= self.head_size <= 256:
            raise ValueError(
                f"head_size: got {self.head_size}; give a multiple of 16 from 16 to 256"
            )
        if self.page_rows & (self.page_rows - 1) or not 16 <= self.page_rows <= 1 << 16:
            raise ValueError(
                f"page_rows: got {self.page_rows}; give a power of two from 16 to 65536"
            )

    @property
    def row_bytes(self) -> int:
        """Of a key and its value."""
        return 2 * self.head_size * self.dtype.itemsize

    @property
    def rows_bytes(self) -> int:
        """Of the rows of a page of one layer."""
        return self.kv_heads * self.page_rows * self.row_bytes

    @property
    def index_at(self) -> int:
        """Where what samplers know begins in a page of one layer."""
        scales = self.kv_heads * self.page_rows * 8 if self.dtype == torch.int8 else 0
        return aligned(self.rows_bytes + scales)

    @property
    def index_bytes(self) -> int:
        """Of what samplers know of a page of one layer and KV head."""
        if not self.sketched:
            return 0
        centre_and_steps = 4 * self.head_size + 4 * self.page_rows
        numbers = self.page_rows * self.head_size // 2
        return aligned(centre_and_steps + numbers + self.hash_tables * self.page_rows)

    @property
    def part_bytes(self) -> int:
        """Of a page of one layer."""
        return self.index_at + self.kv_heads * self.index_bytes

    @property
    def page_bytes(self) -> int:
        """Of a page, all layers together."""
        return self.layers * self.part_bytes

    def rows(self, part: torch.Tensor) -> torch.Tensor:
        """The rows in pages of one layer, uint8 [pages, part_bytes]: a view
        [pages, kv_heads, page_rows, 2, head_size]."""
        rows = part[:, : self.rows_bytes].view(self.dtype)
        return rows.unflatten(1, (self.kv_heads, self.page_rows, 2, self.head_size))

    def scales(self, part: torch.Tensor) -> torch.Tensor:
        """The scales of int8 rows in pages of one layer, as `rows`: a view
        fp32 [pages, kv_heads, page_rows, 2]."""
        shape = (self.kv_heads, self.page_rows, 2)
        nbytes = 4 * torch.Size(shape).numel()
        scales = part[:, self.rows_bytes : self.rows_bytes + nbytes].view(torch.float32)
        return scales.unflatten(1, shape)

    def unpack(self, part: torch.Tensor, into: torch.Tensor) -> None:
        """What int8 rows in pages of one layer stand for, as `rows`, in the dtype of `into`."""
        torch.mul(self.rows(part), self.scales(part)[..., None], out=into)

    def pages(self, host_bytes: int) -> int:
        """How many fit.

        Raises:
            ValueError: none does.
        """
        count = host_bytes // self.page_bytes
        if count < 1:
            raise ValueError(
                f"host_bytes: got {host_bytes}; a page of {self.page_rows} rows takes "
                f"{self.page_bytes} bytes over {self.layers} layers, give room for many"
            )
        return count
