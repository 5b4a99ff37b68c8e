"""The native side of a host store: ctypes mirrors of csrc/host.h, and the library's entries.

Loads no torch: the processes that answer beside a worker start in a tenth of the time without it.
"""

from __future__ import annotations

import ctypes
import dataclasses
from functools import cache

SAMPLERS = {"exact": 0, "topk": 1, "vattention": 2, "lsh": 3}
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}


class StoreLost(RuntimeError):
    """What a host store holds cannot be relied on any more; only a new one helps."""


_i64, _ptr, _float = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


def struct(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


Host = struct(
    "Host", ("parts", _ptr), ("table", _ptr),
    *((n, _i64) for n in (
        "layers", "layer_bytes", "part_bytes", "scales_at", "index_at", "index_bytes", "dtype",
        "head_size", "kv_heads", "group", "shift", "pages", "max_requests", "max_pages", "sampler",
        "rows", "least", "bits", "tables",
    )),
    *((n, _float) for n in ("scale", "share", "even", "epsilon", "quantile")),
    ("directions", _ptr), ("log_inclusion", _ptr),
)  # fmt: skip
HostAppend = struct(
    "HostAppend", ("layer", _i64), ("count", _i64), ("jobs", _ptr), ("dtype", _i64), ("k", _ptr),
    ("v", _ptr), ("k_row_stride", _i64), ("k_head_stride", _i64), ("v_row_stride", _i64),
    ("v_head_stride", _i64),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HostShape:
    """Everything of a `Host` but where it lies in memory: plain numbers, to be sent anywhere.

    As in csrc/host.h. `directions_at` and `inclusion_at` count bytes from the start of a region.
    """

    layers: int
    layer_bytes: int
    part_bytes: int
    scales_at: int
    index_at: int
    index_bytes: int
    dtype: int
    head_size: int
    kv_heads: int
    group: int
    shift: int
    pages: int
    max_requests: int
    max_pages: int
    sampler: int
    rows: int
    least: int
    bits: int
    tables: int
    scale: float
    share: float
    even: float
    epsilon: float
    quantile: float
    table_at: int
    directions_at: int
    inclusion_at: int
    parts_at: int

    def at(self, address: int) -> ctypes.Structure:
        """The Host of a region that begins at an address of this process."""
        host = Host()
        names = [name for name, _ in Host._fields_]
        for name in set(names) - {"parts", "table", "directions", "log_inclusion"}:
            setattr(host, name, getattr(self, name))
        host.parts, host.table = address + self.parts_at, address + self.table_at
        host.directions = address + self.directions_at
        host.log_inclusion = address + self.inclusion_at
        return host


@cache
def load(file: str) -> ctypes.CDLL:
    """The entries of the native extension in a file.

    Raises:
        OSError: it does not load on this machine.
    """
    library = ctypes.CDLL(file)
    library.vllm_sparse_host_append.argtypes = [_ptr, _ptr]
    library.vllm_sparse_ring_bytes.argtypes = [_ptr, _i64, _i64]
    library.vllm_sparse_ring_bytes.restype = _i64
    for name, *arguments in (
        ("ask", _ptr, _ptr, _ptr), ("collect", _ptr, _ptr, _ptr), ("start", _ptr, _ptr, _i64),
        ("serve", _ptr, _ptr, _i64, _i64, _i64), ("close", _ptr, _ptr), ("beat", _ptr, _ptr, _i64),
        ("busy_ns", _ptr, _ptr, _i64), ("items", _ptr, _ptr, _i64),
    ):  # fmt: skip
        getattr(library, f"vllm_sparse_ring_{name}").argtypes = arguments
    for name in ("ask", "close", "start"):
        getattr(library, f"vllm_sparse_ring_{name}").restype = None
    for name in ("beat", "busy_ns", "items"):
        getattr(library, f"vllm_sparse_ring_{name}").restype = _i64
    library.vllm_sparse_offload_isa.restype = ctypes.c_char_p
    library.vllm_sparse_offload_set_isa.argtypes = [ctypes.c_char_p]
    return library
