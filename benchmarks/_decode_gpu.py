"""The GPU part of `benchmarks.decode`: the Triton kernel and its peers, as graphs, with a cold L2.

Written without a GPU at hand, and not run on one yet. A peer that does not run is named with the
reason, and has no row. With an FP8 cache vLLM's Triton kernel reads the same bytes as ours; the
other peers have the same numbers in 16 bits.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator

from benchmarks._form import Row
from benchmarks._gpu_clock import seconds

DEVICE, DTYPE = "cuda", "bfloat16"
PAGE, HEAD_SIZE = 16, 128
FP8_SCALE = 2.0**-6  # a power of two: what FP8 stands for is exact in 16 bits
HEADS = {"32/8": (32, 8), "32/4": (32, 4)}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = tuple(1024 << i for i in range(9))  # 1K to 256K
MOST_TOKENS = 1 << 21
TRITON, STREAM = "vLLM Triton attention", "read STREAM"
FLASH_3, FLASHINFER = "FlashAttention 3", "FlashInfer"
MODES = ("online", "lazy", "unified")


class Problem:
    """A batch of equal contexts over one paged cache, its pages in random order."""

    def __init__(self, heads: str, batch: int, context: int, cache: str = "auto") -> None:
        import torch

        self.num_heads, self.kv_heads = HEADS[heads]
        self.batch, self.context, self.scale = batch, context, HEAD_SIZE**-0.5
        options = {"device": DEVICE, "dtype": getattr(torch, DTYPE)}
        pages = -(-context // PAGE) * batch
        # What the cache stands for, in 16 bits; the cache itself where that is not FP8.
        self.meant = torch.randn(pages, self.kv_heads, PAGE, 2 * HEAD_SIZE, **options)
        self.cache, self.scales = self.meant, {}
        if cache == "fp8":
            self.cache = (self.meant.float() / FP8_SCALE).to(torch.float8_e4m3fn)
            self.meant = (self.cache.float() * FP8_SCALE).to(self.meant.dtype)
            one = torch.full((1,), FP8_SCALE, device=DEVICE)
            self.scales = {"k_scale": one, "v_scale": one}
        self.k_cache, self.v_cache = self.cache.chunk(2, -1)
        self.q = torch.randn(batch, self.num_heads, HEAD_SIZE, **options)
        self.table = torch.randperm(pages, device=DEVICE).int().view(batch, -1)
        self.lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)

    def rows(self, sequence: int):
        """The keys and values of a sequence, [Hkv, n, D] each."""
        both = self.meant[self.table[sequence].long()].transpose(0, 1).flatten(1, 2)
        return both[:, : self.context].chunk(2, -1)

    def token_major(self):
        """Keys and values in 16 bits, [pages, PAGE, Hkv, D] each."""
        return (x.transpose(1, 2).contiguous() for x in self.meant.chunk(2, -1))

    def truth(self):
        """float32 attention of the first and the last sequence."""
        import torch

        found = {}
        for s in {0, self.batch - 1}:
            k, v = (x.float() for x in self.rows(s))
            q = self.q[s].float().view(self.kv_heads, -1, HEAD_SIZE)
            found[s] = torch.softmax(q @ k.transpose(1, 2) * self.scale, -1) @ v
        return found

    def error(self, out, truth) -> float:
        worst = 0.0
        for s, want in truth.items():
            got = out.view(self.batch, self.num_heads, HEAD_SIZE)[s].float().view_as(want)
            worst = max(worst, float((got - want).abs().max() / want.abs().max()))
        return worst


def ours(p: Problem, softmax: str, phi=None, flagged=None) -> Callable:
    import torch

    from vllm_sparse.kernels.gpu.paged_decode import Workspace, paged_decode

    workspace, out = Workspace(), torch.empty_like(p.q)
    return lambda: paged_decode(
        p.q, p.k_cache, p.v_cache, p.table, p.lens, scale=p.scale, out=out, softmax=softmax,
        phi=phi, flagged=flagged, query_start_loc=p.starts, workspace=workspace, **p.scales,
    )[0]  # fmt: skip


def vllm_triton(p: Problem) -> Callable:
    import torch
    from vllm.v1.attention.backends.triton_attn import (
        MIN_LAUNCH_GRID_SIZE_2D,
        NUM_PAR_SOFTMAX_SEGMENTS,
    )
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.empty_like(p.q)
    # As its metadata builder has them: 16 segments, up to so many sequences.
    threshold, segments = MIN_LAUNCH_GRID_SIZE_2D // p.kv_heads, NUM_PAR_SOFTMAX_SEGMENTS
    shape = (max(threshold, p.batch), p.num_heads, segments)
    floats = {"dtype": torch.float32, "device": DEVICE}
    buffers = {
        "softmax_segm_output": torch.empty(*shape, HEAD_SIZE, **floats),
        "softmax_segm_max": torch.empty(shape, **floats),
        "softmax_segm_expsum": torch.empty(shape, **floats),
    }
    if p.scales:
        from vllm.v1.kv_cache_interface import KVQuantMode

        buffers["kv_quant_mode"] = KVQuantMode.FP8_PER_TENSOR

    def run():
        unified_attention(
            q=p.q, k=p.k_cache.transpose(1, 2), v=p.v_cache.transpose(1, 2), out=out,
            cu_seqlens_q=p.starts, max_seqlen_q=1, seqused_k=p.lens, max_seqlen_k=p.context,
            softmax_scale=p.scale, causal=True, window_size=(-1, -1), block_table=p.table,
            softcap=0, q_descale=None, k_descale=p.scales.get("k_scale"),
            v_descale=p.scales.get("v_scale"),
            seq_threshold_3D=threshold, num_par_softmax_segments=segments, **buffers,
        )  # fmt: skip
        return out

    return run


def flash_attention(p: Problem) -> Callable:
    from benchmarks._prefill_peers import flash_attention_3

    attend = flash_attention_3(p.q.device)
    k, v = p.token_major()
    return lambda: attend(
        q=p.q, k=k, v=v, max_seqlen_q=1, cu_seqlens_q=p.starts, max_seqlen_k=p.context,
        seqused_k=p.lens, softmax_scale=p.scale, causal=True, block_table=p.table, fa_version=3,
    )  # fmt: skip


def flashinfer(p: Problem) -> Callable:
    import flashinfer
    import torch

    k, v = p.token_major()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device=DEVICE), "NHD", use_tensor_cores=True
    )
    pages = p.table.shape[1]
    wrapper.plan(
        p.starts * pages, p.table.flatten(), (p.lens - 1) % PAGE + 1, p.num_heads,
        p.kv_heads, HEAD_SIZE, PAGE, q_data_type=p.q.dtype, kv_data_type=p.q.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(p.q, (k, v))


def sdpa(p: Problem) -> Callable:
    import torch

    k, v = (torch.stack(x) for x in zip(*(p.rows(s) for s in range(p.batch)), strict=True))
    q = p.q[:, :, None]
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, scale=p.scale, enable_gqa=True
    )[:, :, 0]


PEERS = {
    TRITON: vllm_triton, FLASH_3: flash_attention, FLASHINFER: flashinfer, "SDPA": sdpa,
}  # fmt: skip


def graphed(run: Callable) -> tuple[Callable, object]:
    """A captured graph's replay, and what it writes to."""
    import torch

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


def gpu_rows(options: Namespace) -> Iterator[Row]:
    """The rows of every cell asked for, as they are measured; then those of cells together.

    options: heads, batches, contexts (None: all), tokens (the most of a batch; None: MOST_TOKENS),
    cache ("auto" or "fp8"), rounds.
    """
    import torch

    most = options.tokens or MOST_TOKENS
    for heads in (name for name in options.heads if name in HEADS):
        for batch in options.batches or BATCHES:
            rows: list[Row] = []
            for context in options.contexts or CONTEXTS:
                if batch * context > most:
                    continue
                for row in cell(heads, batch, context, options):
                    yield row
                    rows.append(row)
                torch.cuda.empty_cache()
            yield from together(rows)


def cell(heads: str, batch: int, context: int, options: Namespace) -> Iterator[Row]:
    """The rows of one cell; one without a time where something fails."""
    suffix = f"gpu_{heads.replace('/', '_')}_b{batch}_{context >> 10}k"
    suffix += f"_{options.cache}" if options.cache != "auto" else ""
    case = {"batch": batch, "tokens": context, "heads": heads, "dtype": DTYPE,
            "cache": options.cache}  # fmt: skip
    try:
        p = Problem(heads, batch, context, options.cache)
        yield from rows_of(p, case, suffix, options.rounds)
    except Exception as error:  # no memory for one cell must not cost the others
        print(f"{suffix}: {reason(error)}", flush=True)
        yield Row.failed(f"decode_{suffix}", case, reason(error), peer=None, unit="us")


def reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def rows_of(p: Problem, case: dict, suffix: str, rounds: int) -> Iterator[Row]:
    import torch

    truth = p.truth()
    k, _ = p.rows(0)
    logits = p.q[0].float().view(p.kv_heads, -1, HEAD_SIZE) @ k.float().transpose(1, 2) * p.scale
    phi = logits.logsumexp(-1).flatten()
    flagged = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    makers = {
        "online": lambda p: ours(p, "online"), "lazy": lambda p: ours(p, "lazy"),
        "unified": lambda p: ours(p, "unified", phi, flagged), **PEERS,
    }  # fmt: skip
    works, errors, failed = {}, {}, {}
    limit = 4 * torch.finfo(p.q.dtype).eps
    for name, make in makers.items():
        try:
            run, out = graphed(make(p))
            run()
            errors[name] = p.error(out, truth)
        except Exception as error:  # whatever keeps a library from running here is the reason
            failed[name] = reason(error)
        else:
            works[name] = run
            if not errors[name] <= limit:  # NaN fails as well
                failed[name] = f"the error is {errors[name]:.2g}"
        if name in failed:
            print(f"{name} at {p.batch} x {p.context}: {failed[name]}", flush=True)
            if name in PEERS:
                works.pop(name, None)
    if int(flagged):
        failed["unified"] = f"{int(flagged)} rows left the window of phi"
    total = torch.empty((), dtype=torch.int64, device=DEVICE)
    as_words = p.cache.view(torch.int64)
    works[STREAM] = lambda: torch.sum(as_words, dim=None, out=total)
    times = seconds(works, rounds)
    for mode in MODES:
        for peer in (*PEERS, "online", STREAM):
            if peer not in times or peer in failed or peer == mode:
                continue
            known = "".join(c if c.isalnum() else "_" for c in peer.lower())
            bits = " (16 bits)" if p.scales and peer in PEERS and peer != TRITON else ""
            yield Row.time(
                f"decode_{mode}_vs_{known}_{suffix}", case, 1e6 * times.get(mode, 1.0),
                peer + bits, 1e6 * times[peer], unit="us", error=errors.get(mode),
                failed=failed.get(mode),
            )  # fmt: skip
        if mode in failed and not set(times) & set(PEERS):
            yield Row.failed(f"decode_{mode}_{suffix}", case, failed[mode], peer=None, unit="us")
    rate = p.cache.numel() * p.cache.element_size() / 1e9
    if "online" not in failed:
        yield Row.rate(
            f"decode_stream_{suffix}", case, rate / times["online"], STREAM, rate / times[STREAM],
            unit="GB/s", error=errors["online"],
        )  # fmt: skip


def together(rows: list[Row]) -> Iterator[Row]:
    """Of the contexts of one batch: each mode against vLLM's Triton kernel, and against the better
    of FlashAttention 3 and FlashInfer, as geometric means; the case has the least ratio."""
    groups = {"triton": (TRITON,), "best": (FLASH_3, FLASHINFER)}
    for mode in MODES:
        for group, peers in groups.items():
            least: dict[int, Row] = {}
            for row in rows:
                of_mode = row.figure.startswith(f"decode_{mode}_vs_")
                if not of_mode or row.ratio is None or row.peer.split(" (")[0] not in peers:
                    continue
                known = least.get(row.case["tokens"])
                if known is None or row.ratio < known.ratio:
                    least[row.case["tokens"]] = row
            if len(least) < 2:
                continue
            ratios = {tokens: row.ratio for tokens, row in least.items()}
            case = next(iter(least.values())).case
            worst = min(ratios, key=ratios.get)
            heads = case["heads"].replace("/", "_")
            cache = "" if case["cache"] == "auto" else f"_{case['cache']}"
            yield Row.share(
                f"decode_{mode}_vs_{group}_gpu_{heads}_b{case['batch']}_all{cache}",
                {
                    **{key: case[key] for key in ("batch", "heads", "dtype", "cache")},
                    "peers": ", ".join(sorted({row.peer for row in least.values()})),
                    "contexts": ", ".join(f"{tokens >> 10}k" for tokens in ratios),
                    "least": round(ratios[worst], 3), "least_at": worst,
                },
                math.exp(sum(map(math.log, ratios.values())) / len(ratios)),
                unit="geometric mean of ratios",
            )  # fmt: skip
