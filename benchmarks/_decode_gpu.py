"""The GPU part of `benchmarks.decode`: the Triton kernel and its peers, as graphs, with a cold L2.

Written without a GPU at hand, and not run on one yet. A peer that does not run is named with the
reason, and has no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks._form import Row
from benchmarks._gpu_clock import seconds

PAGE, HEAD_SIZE = 16, 128
HEADS = {"32/8": (32, 8), "32/4": (32, 4)}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = tuple(1024 << i for i in range(9))  # 1K to 256K
MOST_TOKENS = 1 << 21
TRITON, STREAM = "vLLM Triton attention", "read STREAM"


class Problem:
    """A batch of equal contexts over one paged cache, its pages in random order."""

    def __init__(self, heads: str, batch: int, context: int) -> None:
        import torch

        self.num_heads, self.kv_heads = HEADS[heads]
        self.batch, self.context, self.scale = batch, context, HEAD_SIZE**-0.5
        options = {"device": "cuda", "dtype": torch.bfloat16}
        pages = batch * context // PAGE
        self.cache = torch.randn(pages, self.kv_heads, PAGE, 2 * HEAD_SIZE, **options)
        self.k_cache, self.v_cache = self.cache.chunk(2, -1)
        self.q = torch.randn(batch, self.num_heads, HEAD_SIZE, **options)
        self.table = torch.randperm(pages, device="cuda").int().view(batch, -1)
        self.lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")

    def rows(self, sequence: int):
        """The keys and values of a sequence, [Hkv, n, D] each."""
        both = self.cache[self.table[sequence].long()].transpose(0, 1).flatten(1, 2)
        return both.chunk(2, -1)

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


def ours(p: Problem, softmax: str, phi=None) -> Callable:
    import torch

    from vllm_sparse.kernels.gpu.paged_decode import Workspace, paged_decode

    workspace, out = Workspace(), torch.empty_like(p.q)
    return lambda: paged_decode(
        p.q, p.k_cache, p.v_cache, p.table, p.lens, scale=p.scale, out=out, softmax=softmax,
        phi=phi, query_start_loc=p.starts, workspace=workspace,
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
    floats = {"dtype": torch.float32, "device": "cuda"}
    buffers = {
        "softmax_segm_output": torch.empty(*shape, HEAD_SIZE, **floats),
        "softmax_segm_max": torch.empty(shape, **floats),
        "softmax_segm_expsum": torch.empty(shape, **floats),
    }

    def run():
        unified_attention(
            q=p.q, k=p.k_cache.transpose(1, 2), v=p.v_cache.transpose(1, 2), out=out,
            cu_seqlens_q=p.starts, max_seqlen_q=1, seqused_k=p.lens, max_seqlen_k=p.context,
            softmax_scale=p.scale, causal=True, window_size=(-1, -1), block_table=p.table,
            softcap=0, q_descale=None, k_descale=None, v_descale=None,
            seq_threshold_3D=threshold, num_par_softmax_segments=segments, **buffers,
        )  # fmt: skip
        return out

    return run


def flash_attention(p: Problem) -> Callable:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    k, v = (x.transpose(1, 2).contiguous() for x in (p.k_cache, p.v_cache))
    return lambda: flash_attn_varlen_func(
        q=p.q, k=k, v=v, max_seqlen_q=1, cu_seqlens_q=p.starts, max_seqlen_k=p.context,
        seqused_k=p.lens, softmax_scale=p.scale, causal=True, block_table=p.table, fa_version=3,
    )  # fmt: skip


def flashinfer(p: Problem) -> Callable:
    import flashinfer
    import torch

    k, v = (x.transpose(1, 2).contiguous() for x in (p.k_cache, p.v_cache))
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    pages = p.table.shape[1]
    wrapper.plan(
        p.starts * pages, p.table.flatten(), torch.full_like(p.lens, PAGE), p.num_heads,
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
    TRITON: vllm_triton, "FlashAttention 3": flash_attention, "FlashInfer": flashinfer,
    "SDPA": sdpa,
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


def gpu_rows(options) -> Iterator[Row]:
    import torch

    names = [name for name in options.heads if name in HEADS]
    for heads in names:
        for batch in BATCHES:
            for context in CONTEXTS:
                if batch * context <= MOST_TOKENS:
                    yield from rows_of(Problem(heads, batch, context), heads, options.rounds)
                    torch.cuda.empty_cache()


def rows_of(p: Problem, heads: str, rounds: int) -> Iterator[Row]:
    import torch

    truth = p.truth()
    k, _ = p.rows(0)
    logits = p.q[0].float().view(p.kv_heads, -1, HEAD_SIZE) @ k.float().transpose(1, 2) * p.scale
    phi = logits.logsumexp(-1).flatten()
    made = {mode: ours(p, mode) for mode in ("online", "lazy")} | {
        "unified": ours(p, "unified", phi)
    }
    works, errors = {}, {}
    for name, make in {**{m: (lambda p, run=run: run) for m, run in made.items()}, **PEERS}.items():
        try:
            works[name], out = graphed(make(p))
            works[name]()
            errors[name] = p.error(out, truth)
        except Exception as error:  # whatever keeps a library from running here is the reason
            why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            print(f"{name} at {p.batch} x {p.context}: {why}")
            if name in made:
                raise
    total = torch.empty((), dtype=torch.int64, device="cuda")
    as_words = p.cache.view(torch.int64)
    works[STREAM] = lambda: torch.sum(as_words, dim=None, out=total)
    times = seconds(works, rounds)
    limit = 4 * torch.finfo(torch.bfloat16).eps
    case = {
        "batch": p.batch, "tokens": p.context, "heads": heads, "dtype": "bfloat16",
        "gpu": torch.cuda.get_device_name(),
    }  # fmt: skip
    suffix = f"gpu_{heads.replace('/', '_')}_b{p.batch}_{p.context >> 10}k"
    for mode in made:
        for peer in (*PEERS, "online", STREAM):
            if peer not in times or peer == mode or errors.get(peer, 0.0) > limit:
                continue
            known = "".join(c if c.isalnum() else "_" for c in peer.lower())
            failed = None if errors[mode] <= limit else f"the error is {errors[mode]:.2g}"
            yield Row.time(
                f"decode_{mode}_vs_{known}_{suffix}", case, 1e6 * times[mode], peer,
                1e6 * times[peer], unit="us", error=errors[mode], failed=failed,
            )  # fmt: skip
