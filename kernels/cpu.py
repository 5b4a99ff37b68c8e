"""The CPU kernels: the native extension behind the signatures of `reference`, which replaces it
where it could not be built."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from . import left_out, reference, softmax_modes
from .block_indices import BlockIndices
from .paged_cache import refuse_fp8
from .shared_prefix import CPU_MEMBERS, SharedPrefixes

logger = logging.getLogger("vllm_sparse.kernels")

# A build of the extension to load instead of the installed one: for tests, before the first call.
LIBRARY_FILE: Path | None = None

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Instruction sets that the native kernels are built for, the narrowest first.
ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")

_i64, _ptr = ctypes.c_int64, ctypes.c_void_p


class PagedKV(ctypes.Structure):
    _fields_ = [
        ("k", _ptr), ("v", _ptr),
        ("k_page_stride", _i64), ("k_head_stride", _i64), ("k_row_stride", _i64),
        ("v_page_stride", _i64), ("v_head_stride", _i64), ("v_row_stride", _i64),
        ("block_table", _ptr), ("table_stride", _i64), ("page_size", _i64), ("num_pages", _i64),
    ]  # fmt: skip


class Shape(ctypes.Structure):
    _fields_ = [
        ("dtype", _i64), ("num_seqs", _i64), ("num_heads", _i64), ("num_kv_heads", _i64),
        ("head_size", _i64), ("scale", ctypes.c_float),
    ]  # fmt: skip


QUERY_FIELDS = [
    ("shape", Shape), ("kv", PagedKV),
    ("q", _ptr), ("q_row_stride", _i64), ("q_head_stride", _i64),
    ("out", _ptr), ("out_row_stride", _i64), ("out_head_stride", _i64),
    ("lse", _ptr),
]  # fmt: skip


class _Prefill(ctypes.Structure):
    _fields_ = [
        *QUERY_FIELDS,
        ("query_start_loc", _ptr), ("seq_lens", _ptr),
        ("block_offsets", _ptr), ("blocks", _ptr), ("column_offsets", _ptr), ("columns", _ptr),
        ("mean_correction", _i64), ("k_means", _ptr), ("v_means", _ptr),
    ]  # fmt: skip


class _Decode(ctypes.Structure):
    _fields_ = [
        *QUERY_FIELDS,
        ("seq_lens", _ptr), ("softmax", _i64), ("phi", _ptr), ("flagged", _ptr),
        ("num_tiles", _i64), ("most_members", _i64),
        ("shared_keys", _ptr), ("tile_keys", _ptr), ("members", _ptr),
    ]  # fmt: skip


def library_file() -> Path | None:
    """Where the extension lies, if it was built."""
    return LIBRARY_FILE or min(Path(__file__).parent.glob("_cpu*.so"), default=None)


@cache
def _library() -> ctypes.CDLL | str:
    """The loaded extension, or why there is none."""
    if (file := library_file()) is None:
        return (
            "it was not built; reinstall vllm-sparse where a C++17 compiler is installed "
            "(Debian: g++) to build it"
        )
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return f"it does not load: {error}; reinstall vllm-sparse to build it for this machine"
    library.vllm_sparse_isa.restype = ctypes.c_char_p
    library.vllm_sparse_set_isa.argtypes = [ctypes.c_char_p]
    library.vllm_sparse_set_threads.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
    library.vllm_sparse_prefill.argtypes = [ctypes.POINTER(_Prefill)]
    library.vllm_sparse_decode.argtypes = [ctypes.POINTER(_Decode)]
    # Their structures are beside their wrappers: row_scoring.py, plan_steps.py, cope.py, ...
    for name in (
        "row_scores", "block_means", "tile_means", "heaviest", "index_lists",
        "cheapest_window", "cheapest_columns", "cheapest_threshold", "cheapest_union",
        "least_keys", "sort_columns", "cope", "linear", "pack_linear",
    ):  # fmt: skip
        getattr(library, f"vllm_sparse_{name}").argtypes = [ctypes.c_void_p]
    return library


@cache
def native() -> ctypes.CDLL | None:
    library = _library()
    if isinstance(library, str):
        logger.warning(
            "The native CPU kernels are missing (%s). Plain torch runs instead, "
            "right but many times slower.",
            library,
        )
        return None
    return library


def native_error() -> str | None:
    """Why the native extension is not used, or None when it is."""
    library = _library()
    return library if isinstance(library, str) else None


def isa() -> str:
    """Instruction set of the kernels, one of ISAS; "torch" without the extension."""
    library = _library()
    return "torch" if isinstance(library, str) else library.vllm_sparse_isa().decode()


def set_isa(name: str) -> None:
    """Use the kernels of one instruction set, "" for the best; for tests and benchmarks.

    Raises:
        ValueError: this CPU or build does not have it.
    """
    library = _library()
    if isinstance(library, str) or library.vllm_sparse_set_isa(name.encode()) != 0:
        raise ValueError(
            f"set_isa: {name!r} is not available here; use one of {ISAS}, "
            "and no wider one than this CPU has"
        )


def set_threads(count: int, cpu_ids: Sequence[int] | None = None) -> None:
    """Size the kernels' thread pool; the calling thread is the first of its threads.

    Args:
        count: threads in all, at least 1.
        cpu_ids: the CPU of each thread (the first entry, the caller's, is left alone);
            None leaves them where the scheduler puts them.
    """
    if count < 1 or (cpu_ids is not None and len(cpu_ids) < count):
        raise ValueError(
            f"set_threads: got count={count}, cpu_ids={cpu_ids}; give a count of at least 1 and, "
            "if any, one CPU id for each thread"
        )
    library = native()
    if library is None:
        return
    cpus = None if cpu_ids is None else (ctypes.c_int * count)(*cpu_ids[:count])
    if library.vllm_sparse_set_threads(count, cpus) != 0:
        raise RuntimeError(f"set_threads: the system refused to start {count} threads")


def num_threads() -> int:
    """Threads of the kernels' pool, the calling one included."""
    library = _library()
    return 1 if isinstance(library, str) else library.vllm_sparse_num_threads()


def sparse_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    indices: BlockIndices | None,
    *,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    mean_correction: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sparse_prefill`: same arguments, same meaning, but no window and no FP8.

    Raises:
        ValueError: arguments that do not fit together, a window, an FP8 cache or a scale of one.
    """
    left_out.check_window(mean_correction, window)
    refuse_fp8(k_cache, v_cache, k_scale, v_scale)
    library = native()
    if library is None:
        return reference.sparse_prefill(
            q, k_cache, v_cache, block_table, query_start_loc, seq_lens, indices,
            scale=scale, window=window, sinks=sinks, mean_correction=mean_correction, out=out,
        )  # fmt: skip
    if window is not None:
        raise ValueError(
            f"window: got {window}; the CPU kernels know no sliding window, leave it out or use "
            "kernels.reference"
        )
    args = _Prefill(mean_correction=mean_correction)
    out, lse, keep = fill(args, q, k_cache, v_cache, block_table, seq_lens, scale, out)
    starts = query_starts(query_start_loc, args.shape.num_seqs)
    args.query_start_loc = starts.data_ptr()
    if indices is not None:
        if indices.num_heads != q.shape[1]:
            raise ValueError(
                f"indices: made for {indices.num_heads} query heads, q has {q.shape[1]}; "
                "plan with the same heads"
            )
        lists = [indices.block_offsets, indices.blocks, indices.column_offsets, indices.columns]
        lists = [int32("indices", x) for x in lists]
        args.block_offsets, args.blocks, args.column_offsets, args.columns = (
            # An empty tensor has no address; the kernel tells dense from sparse by the address.
            x.data_ptr() or lists[0].data_ptr()
            for x in lists
        )
        keep += lists
    check(library.vllm_sparse_prefill(ctypes.byref(args)), "sparse_prefill")
    if sinks is not None:
        shrunk, lse = reference.add_sink(out, lse, sinks)
        out.copy_(shrunk)
    return out, lse


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    softmax: softmax_modes.Softmax = "online",
    phi: torch.Tensor | None = None,
    flagged: torch.Tensor | None = None,
    shared: SharedPrefixes | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.paged_decode`: same meaning, for one query a sequence, no window, no sinks.

    shared: from `shared_prefixes`: first keys that are read from memory once for several sequences.
    """
    library = native()
    if library is None:
        return reference.paged_decode(
            q, k_cache, v_cache, block_table, seq_lens, scale=scale, out=out,
            softmax=softmax, phi=phi, flagged=flagged,
        )  # fmt: skip
    softmax_modes.check(softmax, phi, flagged, q.shape[1])
    refuse_fp8(k_cache, v_cache)
    args = _Decode()
    out, lse, _keep = fill(args, q, k_cache, v_cache, block_table, seq_lens, scale, out)
    args.softmax = softmax_modes.MODES.index(softmax)
    if phi is not None:
        phi = phi.contiguous()
        args.phi = phi.data_ptr()
    if flagged is not None:
        args.flagged = flagged.data_ptr()
    if shared is not None and shared.tile_keys.numel():
        args.num_tiles, args.most_members = shared.members.shape
        tensors = [int32("shared", x) for x in (shared.keys, shared.tile_keys, shared.members)]
        args.shared_keys, args.tile_keys, args.members = (x.data_ptr() for x in tensors)
        _keep += tensors
    code = 2
    if shared is None or shared.fits(seq_lens.numel()):
        code = library.vllm_sparse_decode(ctypes.byref(args))
    if code == 2:
        raise ValueError(
            f"shared: {shared} is not of sequences with {seq_lens.tolist()} keys; make it by "
            f"shared_prefixes of the same batch, with up to {CPU_MEMBERS} members"
        )
    check(code, "paged_decode")
    return out, lse


def fill(
    args: ctypes.Structure,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Check and enter QUERY_FIELDS and seq_lens; what is returned last must outlive the call."""
    heads, head_size = q.shape[1:]
    kv_heads = k_cache.shape[1]
    if q.dtype not in DTYPES or k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        raise ValueError(
            f"dtypes: got q {q.dtype}, k_cache {k_cache.dtype}, v_cache {v_cache.dtype}; "
            f"give one of {', '.join(map(str, DTYPES))} for all three"
        )
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != head_size:
        raise ValueError(
            f"caches: got k {tuple(k_cache.shape)}, v {tuple(v_cache.shape)} for head size "
            f"{head_size}; both must be [pages, kv_heads, page, {head_size}]"
        )
    check_keys(q, k_cache)
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(
            f"out: got {tuple(out.shape)} {out.dtype}, it must be {tuple(q.shape)} {q.dtype}"
        )
    _check_rows(v_cache=v_cache, out=out)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    table, lens = int32("block_table", block_table), int32("seq_lens", seq_lens)
    args.shape = Shape(DTYPES[q.dtype], lens.numel(), heads, kv_heads, head_size, scale)
    args.kv = PagedKV(
        k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.stride()[:3], *v_cache.stride()[:3],
        table.data_ptr(), table.stride(0), k_cache.shape[2], k_cache.shape[0],
    )  # fmt: skip
    args.q, args.q_row_stride, args.q_head_stride = q.data_ptr(), q.stride(0), q.stride(1)
    args.out, args.out_row_stride, args.out_head_stride = (
        out.data_ptr(), out.stride(0), out.stride(1),
    )  # fmt: skip
    args.lse = lse.data_ptr()
    args.seq_lens = lens.data_ptr()
    return out, lse, [table, lens]


def check_keys(q: torch.Tensor, k_cache: torch.Tensor) -> None:
    """Raises ValueError where the kernels do not take these queries and cached keys."""
    heads, head_size = q.shape[1:]
    kv_heads = k_cache.shape[1]
    if k_cache.dtype != q.dtype or k_cache.shape[3] != head_size:
        raise ValueError(
            f"k_cache: got {k_cache.dtype} of head size {k_cache.shape[3]} for q of {q.dtype}, "
            f"{head_size}; both must be alike"
        )
    if heads % kv_heads:
        raise ValueError(
            f"heads: got {heads} query heads and {kv_heads} KV heads; query heads must be a "
            "multiple of KV heads"
        )
    check_cache(k_cache)
    _check_rows(q=q)


def check_queries(q: torch.Tensor) -> None:
    """Raises ValueError where the kernels do not take these queries."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q: got {q.dtype}; give one of {', '.join(map(str, DTYPES))}")
    if q.shape[-1] % 16:
        raise ValueError(f"q: got head size {q.shape[-1]}; it must be a multiple of 16")
    _check_rows(q=q)


def check_cache(k_cache: torch.Tensor) -> None:
    """Raises ValueError where the kernels do not take this cache."""
    _, _, page, head_size = k_cache.shape
    if k_cache.dtype not in DTYPES:
        raise ValueError(f"dtypes: got {k_cache.dtype}; give one of {', '.join(map(str, DTYPES))}")
    if page % 16:
        raise ValueError(f"caches: got pages of {page} tokens; a page must be a multiple of 16")
    if head_size % 16:
        raise ValueError(f"caches: got head size {head_size}; it must be a multiple of 16")
    _check_rows(k_cache=k_cache)


def _check_rows(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: the last dimension has stride {tensor.stride(-1)}; it must be 1 "
                "(use .contiguous())"
            )
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: is on {tensor.device}; these kernels take CPU tensors")


def int32(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.int32 or tensor.device.type != "cpu":
        raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}; give int32 on the CPU")
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def query_starts(query_start_loc: torch.Tensor, num_seqs: int) -> torch.Tensor:
    starts = int32("query_start_loc", query_start_loc)
    if starts.numel() != num_seqs + 1:
        raise ValueError(
            f"query_start_loc: got {starts.numel()} entries for {num_seqs} sequences; it needs one "
            "more than there are sequences"
        )
    return starts


def check(code: int, name: str) -> None:
    if code != 0:
        raise MemoryError(f"{name}: out of memory for the kernel's scratch buffers")
