"""Decode attention on a GPU: `split_decode` and what it needs around it."""

from __future__ import annotations

from functools import cache

import torch

from .. import softmax_modes
from ..shared_prefix import SharedPrefixes
from . import launch, split_decode
from .integers import cdiv, next_power_of_2
from .shared_prefix import shared_prefixes
from .sparse_prefill import check

EVERY_KEY = 1 << 30  # a window that no sequence reaches
# Programs of split_decode that an SM holds, by registers and shared memory of its compiled code:
# 168 x 128 threads and 71 KiB (237 and 39 KiB over an FP8 cache), or 176 x 256 threads (sm_90, head
# size 128). Three of the first fit, but not beside what other streams run.
PROGRAMS_EACH_SM = {4: 2, 8: 1}
_ON = "{name}: is on {got}, q is on {device}; all must be on the same"


class Workspace:
    """Where partial results and arrivals lie, of one device and one stream at a time.

    It grows with what it is asked for, and arrivals are 0 between launches: one that is shared by
    launches that run beside each other gives wrong results. Under a graph capture it must have
    grown before (`paged_decode` once with the largest batch).
    """

    def __init__(self) -> None:
        self._floats: torch.Tensor | None = None
        self._arrivals: torch.Tensor | None = None

    def reserve(self, head_size: int, device: torch.device) -> None:
        """Room for every batch of up to 65,536 (sequence, KV head, 64 rows), before a capture.

        Where there are splits, there are fewer than 16 times the slots of them.
        """
        rows = split_decode.MAX_ROWS if head_size <= 128 else split_decode.MAX_ROWS // 2
        most = 16 * max(_slots(device, warps) for warps in PROGRAMS_EACH_SM)
        self.take(most * rows * (next_power_of_2(head_size) + 2), 1 << 16, device)

    def take(self, floats: int, places: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        if self._floats is None or self._floats.numel() < floats or self._floats.device != device:
            self._floats = torch.empty(floats, dtype=torch.float32, device=device)
        if (
            self._arrivals is None
            or self._arrivals.numel() < places
            or self._arrivals.device != device
        ):
            self._arrivals = torch.zeros(places, dtype=torch.int32, device=device)
        return self._floats, self._arrivals


@cache
def shared_workspace(device: torch.device) -> Workspace:
    """The workspace of all layers of a process: they run after another."""
    return Workspace()


@cache
def _slots(device: torch.device, warps: int) -> int:
    """Programs of split_decode that run at once."""
    return launch.sms_of(device) * PROGRAMS_EACH_SM[warps]


@cache
def warm_up(
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_size: int,
    page: int,
    longest: int,
    most_seqs: int,
    softmax: softmax_modes.Softmax,
    window: int | None,
    sinks: bool,
    most_rows: int = 1,
    shares: bool = False,
) -> None:
    """Compile what decode steps of layers of this shape launch: one form for each power of two of
    sequences, and for each number of rows up to `most_rows` of one (vLLM speculates fewer tokens at
    times). `longest` is the most keys of a sequence; `shares`: shared prefixes are read once."""
    floats = {"dtype": torch.float32, "device": device}  # whatever torch's default is now
    cache = torch.zeros(1, kv_heads, page, 2 * head_size, **floats).to(cache_dtype)
    k_cache, v_cache = cache.chunk(2, -1)
    k_scale = torch.ones(1, **floats) if cache_dtype != dtype else None
    phi = torch.zeros(heads, **floats) if softmax == "unified" else None
    sink = torch.zeros(heads, **floats) if sinks else None
    # Tiles are cut for the most rows, whatever a step has.
    members = members_of(heads // kv_heads, head_size, most_rows) if shares else 0
    seqs = 1
    while True:
        for rows in range(1, most_rows + 1):
            table = torch.zeros(seqs, cdiv(longest, page), dtype=torch.int32, device=device)
            lens = torch.zeros(seqs, dtype=torch.int32, device=device)
            shared = None
            if members > 1 and seqs > 1:
                starts = torch.zeros(seqs + 1, dtype=torch.int32, device=device)
                shared = shared_prefixes(table, starts, lens, page=page, members=members)
            paged_decode(
                torch.zeros(seqs, heads, head_size, dtype=dtype, device=device), k_cache, v_cache,
                table, lens, scale=1.0, softmax=softmax, phi=phi, sinks=sink, window=window,
                k_scale=k_scale, v_scale=k_scale, max_query_len=rows, shared=shared,
                workspace=shared_workspace(device),
            )  # fmt: skip
        if seqs >= most_seqs:
            return
        seqs *= 2


def members_of(group: int, head_size: int, max_query_len: int = 1) -> int:
    """Most sequences whose rows one program takes, where they share a prefix; below 2: none are."""
    rows = group * max_query_len
    return split_decode.max_rows(head_size) // next_power_of_2(rows)


def most_splits(seqs: int, tiles: int, programs_each: int, slots: int, waves: int = 4) -> int:
    """Splits that a launch leaves room for: enough for so many waves of a batch of this size.

    It depends on nothing that changes between the replays of a graph.
    """
    wanted = cdiv(waves * slots, max(seqs * programs_each, 1))
    most = min(wanted, max(tiles, 1), split_decode.MAX_SPLITS)
    return next_power_of_2(max(most, 1))


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
    query_start_loc: torch.Tensor | None = None,
    max_query_len: int = 1,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    shared: SharedPrefixes | None = None,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.paged_decode`; beside it:

    Args:
        max_query_len: the most rows that a sequence has in q.
        shared: from `shared_prefixes`, with the `members_of` this shape: first keys that are read
            once for several sequences, in a launch of its own. Not with a window.
        workspace: kept by the caller from launch to launch; None: a new one, which costs a memset.

    Raises:
        ValueError: arguments that do not fit together.
    """
    out = check(q, k_cache, v_cache, out, None, scale)
    scales = launch.scales(q.device, k_scale, v_scale)
    softmax_modes.check(softmax, phi, flagged, q.shape[1])
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}; give 1 or more keys, or None for all")
    if shared is not None and window is not None:
        raise ValueError("shared: a prefix is shared only where there is no window; leave one out")
    seqs, device = seq_lens.numel(), q.device
    if query_start_loc is None:
        query_start_loc = torch.arange(seqs + 1, dtype=torch.int32, device=device)
    for name, tensor in (
        ("block_table", block_table), ("seq_lens", seq_lens), ("query_start_loc", query_start_loc),
    ):  # fmt: skip
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name}: got {tensor.dtype}; it must be int32")
        if tensor.device != device:
            raise ValueError(_ON.format(name=name, got=tensor.device, device=device))
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=device)
    if not seqs or not q.shape[0]:
        return out, lse
    workspace = Workspace() if workspace is None else workspace
    if flagged is None and softmax == "unified":
        flagged = torch.zeros(1, dtype=torch.int64, device=device)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    common = {
        "scale": scale, "softmax": softmax, "phi": phi, "flagged": flagged, "scales": scales,
        "workspace": workspace,
    }  # fmt: skip
    prefix = None
    if shared is not None and shared.tile_keys.numel():
        # Only rows of sequences that share are written, and only those are read.
        prefix_out = torch.empty(q.shape, dtype=torch.float32, device=device)
        prefix_lse, prefix_top = torch.empty(2, *lse.shape, dtype=torch.float32, device=device)
        prefix = (prefix_out, prefix_lse, prefix_top, shared.keys)
        _launch(
            q, k_cache, v_cache, prefix_out, prefix_lse, block_table, query_start_loc,
            shared.tile_keys, tokens=max_query_len, members=shared.members, prefix=prefix,
            **common,
        )  # fmt: skip
    _launch(
        q, k_cache, v_cache, out, lse, block_table, query_start_loc, seq_lens,
        tokens=max_query_len, window=window, sinks=sinks, prefix=prefix, **common,
    )  # fmt: skip
    return out, lse


def _launch(
    q, k_cache, v_cache, out, lse, block_table, query_start_loc, seq_lens, *, tokens, scale,
    softmax, phi, flagged, scales, workspace, window=None, sinks=None, prefix=None, members=None,
) -> None:  # fmt: skip
    """`seq_lens` are those of the sequences, or of tiles, whose `members` are [Z, M]."""
    heads, head_size = q.shape[1:]
    kv_heads, page = k_cache.shape[1:3]
    seqs, device = seq_lens.numel(), q.device
    target = launch.target_of(device)
    mode = softmax_modes.MODES.index(softmax)
    made = split_decode.constants(
        target, q.dtype, head_size, group=heads // kv_heads, page=page, tokens=tokens, splits=1,
        seqs=seqs, mode=mode, members=0 if members is None else members.shape[1],
        sinks=sinks is not None, prefix=prefix is not None and members is None,
    )  # fmt: skip
    each = kv_heads * made["ROW_TILES"]
    warps, stages = split_decode.warps_and_stages(target, made["ROWS"], mode)
    slots = _slots(device, warps)
    tiles = cdiv(block_table.shape[1] * page, made["KEYS"])
    # Of tiles, few of which are there: room for two waves, as every place costs an idle program.
    waves = 4 if members is None else 2
    splits = made["SPLITS"] = most_splits(made["SEQS"], tiles, each, slots, waves)
    slices = seqs * each * splits * made["ROWS"] if splits > 1 else 0  # one writes its result
    floats, arrivals = workspace.take(slices * (made["D_PADDED"] + 2), seqs * each, device)
    prefix = prefix or (lse, lse, lse, seq_lens)  # not read without
    split_decode._split_decode[(each, seqs, splits)](
        q, k_cache, v_cache, out, lse,
        lse if sinks is None else sinks, lse if phi is None else phi,
        lse if flagged is None else flagged, *prefix,
        seq_lens if members is None else members, block_table, query_start_loc, seq_lens,
        floats, floats[slices * made["D_PADDED"] :], arrivals,
        *scales, scale, EVERY_KEY if window is None else window, slots, seqs,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], out.stride(0), out.stride(1),
        block_table.stride(0), heads,
        **made, **launch.options(warps, stages),
    )  # fmt: skip
