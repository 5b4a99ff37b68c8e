"""Prefill attention alone, index included, against vLLM's own on the same queries and keys.

The lean retrieval model's Q, K and V of every layer, prompts cut into chunks of 4096 as in
serving, one thread, CPU seconds of this process. Checks before it times: everything selected
equals vLLM's output, and the selection covers the mass it was asked for.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks._form import ROOT, Row, arguments, publish, require_editable

CHUNK = 4096
PAGE = 128
PEER = "vLLM CPU attention"
# A selection of this coverage may cover so much less on average: it was estimated from samples.
COVERAGE_SLACK = 0.01


@dataclass
class Totals:
    """Sums over the layers and chunks of one prompt."""

    index_s: float = 0.0
    sparse_s: float = 0.0
    dense_s: float = 0.0
    peer_s: float = 0.0
    read: int = 0
    causal: int = 0
    dense_error: float = 0.0  # largest difference, everything selected
    squared_error: float = 0.0  # of the sparse output
    squared_norm: float = 0.0
    # of each head: covered mass summed over rows, rows, keys read, causal keys
    heads: dict[tuple[int, int], list[float]] = field(
        default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    )

    @property
    def density(self) -> float:
        return self.read / self.causal

    @property
    def coverage(self) -> float:
        shares = [head[0] / head[1] for head in self.heads.values()]
        return sum(shares) / len(shares)

    @property
    def error(self) -> float:
        return (self.squared_error / self.squared_norm) ** 0.5


def cpu_seconds(work: Callable, repeats: int) -> tuple[float, object]:
    """Least CPU seconds of `work` in a few runs, and its last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        begin = time.process_time()
        result = work()
        best = min(best, time.process_time() - begin)
    return best, result


def measure(length: int, dtype_name: str, coverage: float, repeats: int) -> Totals:
    import torch
    from retrieval.density import read_kinds
    from retrieval.forward import load_model, run_layers
    from retrieval.prompts import needle_prompt

    dtype = getattr(torch, dtype_name)
    folder = ROOT / "checkpoints" / "lean"
    totals = Totals()
    kinds = read_kinds(folder)
    prompt = needle_prompt(length).token_ids
    for layer, (inputs, _) in enumerate(run_layers(load_model(folder), prompt)):
        q, k, v = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v))
        for end in range(CHUNK, len(prompt) + CHUNK, CHUNK):
            chunk = slice(end - CHUNK, min(end, len(prompt)))
            measure_chunk(totals, layer, q[chunk], k, v, chunk.stop, coverage, repeats)
    by_kind: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for (layer, head), sums in totals.heads.items():
        kind = by_kind[kinds[layer][head]]
        by_kind[kinds[layer][head]] = [a + b for a, b in zip(kind, sums, strict=True)]
    print(f"{length} tokens, {dtype_name}: index {totals.index_s:.3f} s, "
          f"sparse {totals.sparse_s:.3f} s, dense {totals.dense_s:.3f} s, "
          f"{PEER} {totals.peer_s:.3f} s")  # fmt: skip
    for kind, (covered, rows, read, causal) in sorted(by_kind.items()):
        print(f"  {kind:12} density {read / causal:6.1%}  covered {covered / rows:6.2%}")
    return totals


def measure_chunk(totals, layer, q, k, v, seq_len, coverage, repeats) -> None:
    import torch

    from benchmarks._vllm_cpu import VllmCpuAttention
    from vllm_sparse.kernels import sparse_prefill, write_kv
    from vllm_sparse.patterns import HeadPattern
    from vllm_sparse.planner import plan_prefill

    rows, heads, head_size = q.shape
    scale = head_size**-0.5
    pages = -(-seq_len // PAGE)
    cache = torch.zeros(pages, k.shape[1], PAGE, 2 * head_size, dtype=q.dtype)
    k_cache, v_cache = cache[..., :head_size], cache[..., head_size:]
    write_kv(k[:seq_len], v[:seq_len], k_cache, v_cache, torch.arange(seq_len))
    where = (
        torch.arange(pages, dtype=torch.int32)[None],
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([seq_len], dtype=torch.int32),
    )
    peer = VllmCpuAttention(k[:seq_len], v[:seq_len], PAGE)
    truth = torch.empty_like(q)
    seconds, _ = cpu_seconds(lambda: peer.attend(q, seq_len, truth), repeats)
    totals.peer_s += seconds
    seconds, (out, dense_lse) = cpu_seconds(
        lambda: sparse_prefill(q, k_cache, v_cache, *where, None, scale=scale), repeats
    )
    totals.dense_s += seconds
    error = (out.float() - truth.float()).abs().max() / truth.float().abs().max()
    totals.dense_error = max(totals.dense_error, float(error))
    patterns = [HeadPattern()] * heads
    seconds, indices = cpu_seconds(
        lambda: plan_prefill(q, k_cache, *where, patterns, scale=scale, coverage=coverage), repeats
    )
    totals.index_s += seconds
    seconds, (out, lse) = cpu_seconds(
        lambda: sparse_prefill(q, k_cache, v_cache, *where, indices, scale=scale), repeats
    )
    totals.sparse_s += seconds
    read, causal = indices.selected_keys([rows], [seq_len])
    totals.read += read
    totals.causal += causal
    totals.squared_error += float((out.float() - truth.float()).square().sum())
    totals.squared_norm += float(truth.float().square().sum())
    covered = (lse - dense_lse).exp().sum(0)
    blocks = (indices.block_offsets[1:] - indices.block_offsets[:-1]).view(-1, heads).sum(0)
    columns = (indices.column_offsets[1:] - indices.column_offsets[:-1]).view(-1, heads).sum(0)
    for head in range(heads):
        sums = totals.heads[layer, head]
        more = (covered[head], rows, 64 * blocks[head] + columns[head], causal / heads)
        totals.heads[layer, head] = [a + float(b) for a, b in zip(sums, more, strict=True)]


def rows_of(name: str, length: int, dtype: str, coverage: float, t: Totals) -> list[Row]:
    case = {
        "tokens": length, "dtype": dtype, "coverage": coverage, "density": round(t.density, 4),
        "covered": round(t.coverage, 4), "index_share": round(t.index_s / t.peer_s, 4),
    }  # fmt: skip
    why = None
    limit = 1e-4 if dtype == "float32" else 3e-2
    if t.dense_error > limit:
        why = f"everything selected differs from vLLM's output by {t.dense_error:.2g}"
    elif t.coverage < coverage - COVERAGE_SLACK:
        why = f"covered {t.coverage:.3f} of the mass, asked for {coverage}"
    suffix = name if dtype == "float32" else f"{name}_{dtype}"
    ours = t.index_s + t.sparse_s
    allowed = t.density / 0.85 + 0.05
    found = [
        Row.time(f"attention_lean_{suffix}", case, ours, PEER, t.peer_s, error=t.error, failed=why),
        Row.time(f"attention_dense_{suffix}", {"tokens": length, "dtype": dtype}, t.dense_s, PEER,
                 t.peer_s, error=t.dense_error, failed=why),
    ]  # fmt: skip
    if why is None:
        found.append(
            Row(f"attention_allowance_{suffix}", {**case, "allowed": "density / 0.85 + 0.05"},
                ours / t.peer_s, PEER, allowed, "share of peer", allowed * t.peer_s / ours, t.error)
        )  # fmt: skip
    return found


def main() -> None:
    parser = arguments(__doc__)
    lengths = ["1k", "2k", "4k", "8k", "16k", "32k"]
    parser.add_argument("--lengths", nargs="+", choices=lengths, default=["4k", "16k", "32k"])
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes[:2])
    parser.add_argument("--coverage", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    require_editable()
    sys.path.insert(0, str(ROOT / "examples"))
    subprocess.run([sys.executable, str(ROOT / "tools" / "checkpoint.py"), "lean"], check=True)
    import torch

    torch.set_num_threads(1)
    rows = []
    for dtype in options.dtypes:
        for name in options.lengths:
            length = int(name.removesuffix("k")) * 1024
            totals = measure(length, dtype, options.coverage, options.repeats)
            rows += rows_of(name, length, dtype, options.coverage, totals)
    publish(rows, options.json)


if __name__ == "__main__":
    main()
