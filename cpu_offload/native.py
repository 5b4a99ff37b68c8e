"""The native kernels over a context: arguments laid out as in csrc/gather.h, results as tensors.

An item is what samples and reads together: G query heads of one token and KV head. Queries are
fp32 [T, kv_heads, E, G, D]: E items a token and KV head, one where all its heads share a sample,
as many as it has heads where each has its own. Where the extension could not be built, `reference`
computes the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from vllm_sparse.kernels import cpu

from . import reference
from .context import Context
from .hashing import INCLUSION_STEPS
from .store import quantise

_DTYPES = {**cpu.DTYPES, torch.int8: 3}
# Instruction sets of the sampled kernels; matrix tiles (AMX) have nothing to do here.
ISAS = tuple(name for name in cpu.ISAS if name != "amx")

_i64, _ptr = np.int64, np.uint64
_VIEW = np.dtype(
    [("rows", _ptr), ("scales", _ptr), ("segments", _ptr), ("shift", _i64), ("row_bytes", _i64),
     ("length", _i64)]
)  # fmt: skip
_LSH_ITEM = np.dtype(
    [("view", _VIEW), ("q", _ptr), ("segments", _ptr), ("kv_head", _i64), ("rows", _ptr),
     ("log_prob", _ptr), ("along", _ptr), ("capacity", _i64), ("count", _i64)]
)  # fmt: skip
_SCORE_ITEM = np.dtype([("view", _VIEW), ("q", _ptr), ("scores", _ptr)])
LSH_SEGMENT = np.dtype(
    [("ids", _ptr), ("offsets", _ptr), ("recent", _ptr), ("centre", _ptr), ("built", _i64),
     ("length", _i64), ("recent_stride", _i64)]
)  # fmt: skip


def _struct(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


_c64, _cptr, _cfloat = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_SHAPE = [("dtype", _c64), ("head_size", _c64), ("group", _c64), ("num_items", _c64)]
_View = _struct(
    "_View", ("rows", _cptr), ("scales", _cptr), ("segments", _cptr), ("shift", _c64),
    ("row_bytes", _c64), ("length", _c64),
)  # fmt: skip
_Gather = _struct(
    "_Gather", *_SHAPE, ("kv_heads", _c64), ("each", _c64), ("view", _View), ("head_bytes", _c64),
    ("head_scale_bytes", _c64), ("q", _cptr), ("rows", _cptr), ("rows_stride", _c64),
    ("log_prob", _cptr), ("log_prob_stride", _c64), ("counts", _cptr), ("out", _cptr),
    ("lse", _cptr), ("scale", _cfloat),
)  # fmt: skip
_Lsh = _struct(
    "_Lsh", *_SHAPE, ("bits", _c64), ("tables", _c64), ("directions", _cptr),
    ("log_inclusion", _cptr), ("items", _cptr),
)  # fmt: skip
_Score = _struct("_Score", *_SHAPE, ("scale", _cfloat), ("items", _cptr))
_LshTables = _struct(
    "_LshTables", ("ids", _cptr), ("offsets", _cptr), ("recent", _cptr), ("tables", _c64),
    ("bits", _c64), ("capacity", _c64), ("recent_stride", _c64), ("built", _c64), ("count", _c64),
)  # fmt: skip


@cache
def _library() -> ctypes.CDLL | None:
    library = cpu.native()
    if library is not None:
        library.vllm_sparse_offload_isa.restype = ctypes.c_char_p
        library.vllm_sparse_offload_set_isa.argtypes = [ctypes.c_char_p]
        library.vllm_sparse_read.argtypes = [_cptr, _c64, ctypes.POINTER(_cfloat)]
    return library


def isa() -> str:
    """Instruction set of the sampled kernels, one of ISAS; "torch" without the extension."""
    library = _library()
    return "torch" if library is None else library.vllm_sparse_offload_isa().decode()


def set_isa(name: str) -> None:
    """Use the kernels of one instruction set, "" for the best; for tests and benchmarks.

    Raises:
        ValueError: this CPU or build does not have it.
    """
    library = _library()
    if library is None or library.vllm_sparse_offload_set_isa(name.encode()) != 0:
        raise ValueError(
            f"set_isa: {name!r} is not available here; use one of {ISAS}, "
            "and no wider one than this CPU has"
        )


def read(memory: torch.Tensor) -> float:
    """Sum up a uint8 tensor as floats, a contiguous part by each thread; to compare with."""
    total = _cfloat()
    _call("vllm_sparse_read", memory.data_ptr(), memory.numel(), ctypes.byref(total))
    return total.value


def gather(
    context: Context,
    q: torch.Tensor,
    rows: torch.Tensor | None,
    log_prob: torch.Tensor | None,
    counts: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.gathered_attention` of every item.

    Args:
        q: fp32 [T, kv_heads, E, G, D].
        rows: int64 [items, W], the first counts[i] of which item i reads; None: all rows.
        log_prob: fp32 [items, W]; None: zeros.
        counts: int64 [items].

    Returns:
        out fp32 like q, lse fp32 [T, kv_heads, E, G].

    Raises:
        ValueError: a row is none of the context.
    """
    out, lse = torch.empty_like(q), torch.empty(q.shape[:-1])
    if _library() is None:
        for i, (queries, o, e) in enumerate(
            zip(q.flatten(0, 2), out.flatten(0, 2), lse.flatten(0, 2), strict=True)
        ):
            chosen = torch.arange(int(counts[i])) if rows is None else rows[i, : counts[i]]
            logs = None if log_prob is None else log_prob[i, : counts[i]]
            if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < context.length:
                raise _outside(context)
            k, v = context.rows(int(kv_heads(q)[i]), chosen)
            o[:], e[:] = reference.gathered_attention(queries, k, v, logs, scale)
        return out, lse
    store, (tokens, heads, each, group, size) = context.store, q.shape
    assert q.dtype == torch.float32 and q.is_contiguous() and heads == store.kv_heads
    assert counts.dtype == torch.int64 and counts.is_contiguous()
    segments = _segments(context)
    view = _View(
        store.address, store.address + store.rows_bytes, segments.ctypes.data,
        store.segment_rows.bit_length() - 1, store.row_bytes, context.length,
    )  # fmt: skip
    args = _Gather(
        _DTYPES[store.dtype], size, group, tokens * heads * each, heads, each, view,
        store.segment_rows * store.row_bytes, store.segment_rows * 8, q.data_ptr(),
        *_lists(rows), *_lists(log_prob), counts.data_ptr(), out.data_ptr(), lse.data_ptr(), scale,
    )  # fmt: skip
    if _call("vllm_sparse_gather", ctypes.byref(args)) == 2:
        raise _outside(context)
    return out, lse


def _lists(x: torch.Tensor | None) -> tuple[int | None, int]:
    """The address and the stride of lists [items, W]."""
    assert x is None or x.shape[1] < 2 or x.stride(1) == 1
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))


def _outside(context: Context) -> ValueError:
    return ValueError(
        f"rows: a proposed row is outside 0 to {context.length - 1}; a sampler must propose rows "
        "of the context"
    )


def scores(context: Context, q: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Logits of all rows: q fp32 [T, kv_heads, E, G, D] -> fp32 [items, G, length]."""
    found = torch.empty(q.shape[:3].numel(), q.shape[3], context.length)
    if _library() is None:
        every = torch.arange(context.length)
        for head, queries, logits in zip(kv_heads(q), q.flatten(0, 2), found, strict=True):
            logits[:] = queries @ context.rows(int(head), every)[0].T * scale
        return found
    table, keep = _items(_SCORE_ITEM, context, q)
    _score(table, context.store.dtype, q, found, scale)
    del keep
    return found


def scores_of(keys: Sequence[Int8Keys], q: torch.Tensor) -> torch.Tensor:
    """Products with keys that lie in no store: fp32 [T, kv_heads, E, G, D] -> [items, G, n].

    Args:
        keys: of one segment after another, all but the last full.
    """
    heads, capacity, size = keys[0].rows.shape
    found = torch.empty(q.shape[:3].numel(), q.shape[3], sum(k.count for k in keys))
    if _library() is None:
        every = torch.cat([(k.rows * k.scales[..., :1])[:, : k.count] for k in keys], 1)
        for head, queries, products in zip(kv_heads(q), q.flatten(0, 2), found, strict=True):
            products[:] = queries @ every[int(head)].T
        return found
    # Segments lie anywhere: their own addresses, from 0 on.
    segments = np.array([k.memory.data_ptr() for k in keys], _i64)
    table = _table(
        _SCORE_ITEM, q, segments, rows=0, scales=heads * capacity * size, segment_rows=capacity,
        row_bytes=size, length=found.shape[2],
    )  # fmt: skip
    _score(table, torch.int8, q, found, 1.0)
    return found


class Int8Keys:
    """Memory for int8 keys with a scale each, of one segment: [kv_heads, capacity, size]."""

    def __init__(self, kv_heads: int, capacity: int, size: int):
        count = kv_heads * capacity
        self.memory = torch.zeros(count * (size + 8), dtype=torch.uint8)
        self.rows = self.memory[: count * size].view(torch.int8).view(kv_heads, capacity, size)
        scales = self.memory[count * size :].view(torch.float32)
        self.scales = scales.view(kv_heads, capacity, 2)  # the second is not used
        self.count = 0

    def append(self, keys: torch.Tensor) -> None:
        """fp32 [kv_heads, n, size]."""
        place = slice(self.count, self.count + keys.shape[1])
        self.rows[:, place], self.scales[:, place, 0] = quantise(keys)
        self.count = place.stop


def _score(
    table: np.ndarray, dtype: torch.dtype, q: torch.Tensor, found: torch.Tensor, scale: float
) -> None:
    table["scores"] = _addresses(found)
    args = _Score(_DTYPES[dtype], q.shape[4], q.shape[3], len(table), scale, table.ctypes.data)
    _call("vllm_sparse_scores", ctypes.byref(args))


def lsh_query(
    context: Context,
    q: torch.Tensor,
    segments: np.ndarray,
    *,
    bits: int,
    tables: int,
    directions: torch.Tensor,
    log_inclusion: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that share at least two buckets with the mean direction of an item's queries.

    Args:
        q: fp32 [T, kv_heads, E, G, D].
        segments: LSH_SEGMENT [segments of the context].
        directions: fp32 [D, tables * bits]; log_inclusion: fp32 [INCLUSION_STEPS + 1].

    Returns:
        rows int64 [items, W] ascending, log_prob fp32 [items, W], along fp32 [items, W] (how far
        each key, less its segment's centre, goes along that direction), counts int64 [items].
    """
    assert log_inclusion.numel() == INCLUSION_STEPS + 1
    items = q.shape[:3].numel()
    width = max(context.length // 16, 256)
    while True:
        rows = torch.empty(items, width, dtype=torch.int64)
        log_prob, along = torch.empty(2, items, width)
        table, keep = _items(_LSH_ITEM, context, q)
        table["segments"] = segments.ctypes.data
        table["kv_head"] = kv_heads(q)
        table["rows"], table["log_prob"] = _addresses(rows), _addresses(log_prob)
        table["along"], table["capacity"] = _addresses(along), width
        args = _Lsh(
            *_shape(context, q), bits, tables, directions.data_ptr(), log_inclusion.data_ptr(),
            table.ctypes.data,
        )  # fmt: skip
        _call("vllm_sparse_lsh_query", ctypes.byref(args))
        del keep
        counts = torch.from_numpy(table["count"].copy())
        most = int(counts.max()) if items else 0
        if most <= width:
            return rows, log_prob, along, counts
        width = most


def lsh_enter(
    ids: np.ndarray, offsets: np.ndarray, recent: np.ndarray, bits: int, built: int, count: int
) -> None:
    """Enter rows built .. built + count - 1 into all tables of a segment, in place.

    Args:
        ids: uint16 [tables, capacity]; offsets: uint32 [tables, 2^bits + 1].
        recent: 16-bit codes [tables, >= count] of the rows to enter.
    """
    args = _LshTables(
        ids.ctypes.data, offsets.ctypes.data, recent.ctypes.data, ids.shape[0], bits, ids.shape[1],
        recent.shape[1], built, count,
    )  # fmt: skip
    _call("vllm_sparse_lsh_enter", ctypes.byref(args))


def available() -> bool:
    """Whether the native kernels are there."""
    return _library() is not None


def kv_heads(q: torch.Tensor) -> np.ndarray:
    """The KV head of each item of q [T, kv_heads, E, G, D]."""
    tokens, heads, each = q.shape[:3]
    return np.tile(np.repeat(np.arange(heads), each), tokens)


def _shape(context: Context, q: torch.Tensor) -> tuple[int, ...]:
    return _DTYPES[context.store.dtype], q.shape[4], q.shape[3], q.shape[:3].numel()


def _items(dtype: np.dtype, context: Context, q: torch.Tensor) -> tuple[np.ndarray, list]:
    """Items with their views and queries; what is returned last must outlive the call."""
    store = context.store
    assert q.shape[1] == store.kv_heads
    segments = _segments(context)
    table = _table(
        dtype, q, segments, rows=store.address, scales=store.address + store.rows_bytes,
        segment_rows=store.segment_rows, row_bytes=store.row_bytes, length=context.length,
    )  # fmt: skip
    return table, [segments, q]


def _segments(context: Context) -> np.ndarray:
    """Where they begin in the store."""
    step = context.store.segment_bytes
    return np.array([s.slot * step for s in context.segments] or [0], _i64)


def _table(
    dtype: np.dtype, q: torch.Tensor, segments: np.ndarray, *, rows: int, scales: int,
    segment_rows: int, row_bytes: int, length: int,
) -> np.ndarray:  # fmt: skip
    """Items with their views and queries; `rows` and `scales` are addresses for KV head 0."""
    assert q.dtype == torch.float32 and q.is_contiguous()
    head = kv_heads(q).astype(_ptr)
    table = np.zeros(len(head), dtype)
    view = table["view"]
    view["rows"] = rows + head * segment_rows * row_bytes
    view["scales"] = scales + head * segment_rows * 8
    view["segments"] = segments.ctypes.data
    view["shift"], view["row_bytes"] = segment_rows.bit_length() - 1, row_bytes
    view["length"] = length
    table["q"] = _addresses(q.flatten(0, 2))
    return table


def _addresses(x: torch.Tensor) -> np.ndarray:
    """Of x[0], x[1], ..."""
    step = x.stride(0) * x.element_size()
    return (x.data_ptr() + step * np.arange(len(x))).astype(_ptr)


def _call(name: str, *args: object) -> int:
    code = getattr(_library(), name)(*args)
    if code == 1:
        raise MemoryError(f"{name.removeprefix('vllm_sparse_')}: out of memory for scratch buffers")
    return code
