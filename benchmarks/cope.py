"""Attention with contextual positions (CoPE): written out in torch, and plain attention beside it.

One sequence of one layer, on a CPU or on a GPU. Written out, every position of every query is a
number in memory: what a model without a kernel of its own does. Plain attention is our own dense
kernel over the same keys: what contextual positions cost. Two kinds of keys: "half" has gates of
about a half, so that the last position is near; "seldom" has gates so small that it is never
reached, the worst case. Before anything is timed, the last rows are compared with float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks._form import Results, Row, addable, arguments, require_editable, use_threads

HEADS, KV_HEADS, SIZE, POSITIONS = 8, 2, 128, 64
WRITTEN_OUT, PLAIN = "written out in torch", "plain attention, our kernel"
KINDS = ("half", "seldom")


class Problem:
    """The last `rows` tokens of a sequence of `length`, in pages as vLLM has them there."""

    def __init__(self, length: int, rows: int, dtype, kind: str, device: str) -> None:
        import torch

        generator = torch.Generator().manual_seed(length)
        page = 128 if device == "cpu" else 16
        pages = length // page
        cache = torch.randn(pages, KV_HEADS, page, 2 * SIZE, generator=generator)
        q = torch.randn(rows, HEADS, SIZE, generator=generator)
        if kind == "seldom":
            # A common part of queries and keys whose product is a logit of -15: gates of 3e-7.
            common = (15 * SIZE**-0.5) ** 0.5
            q, cache[..., :SIZE] = q + common, cache[..., :SIZE] - common
        self.q = q.to(device, dtype)
        self.caches = cache.to(device, dtype).split(SIZE, -1)
        self.table = torch.randperm(pages, generator=generator).int()[None].to(device)
        self.starts = torch.tensor([0, rows], dtype=torch.int32, device=device)
        self.lens = torch.tensor([length], dtype=torch.int32, device=device)
        self.pos_emb = torch.randn(POSITIONS, SIZE, generator=generator).to(device, dtype)
        self.length, self.scale = length, SIZE**-0.5

    def _args(self):
        return self.q, *self.caches, self.table, self.starts, self.lens

    def ours(self):
        from vllm_sparse.kernels import cope_attention

        return cope_attention(
            *self._args(), self.pos_emb, scale=self.scale, max_query_len=len(self.q)
        )[0]

    def plain(self):
        from vllm_sparse.kernels import paged_decode, sparse_prefill

        if len(self.q) > 1:
            return sparse_prefill(*self._args(), None, scale=self.scale)[0]
        q, k, v, table, _, lens = self._args()
        return paged_decode(q, k, v, table, lens, scale=self.scale)[0]

    def written_out(self, last: int | None = None, dtype=None):
        """As the paper's listing does it, a head at a time: [rows, length] several times over.

        last: so many rows only; dtype: of the products, that of positions is fp32 at the least.
        """
        import torch

        from vllm_sparse.kernels import gather_keys

        queries = self.q if last is None else self.q[-last:]
        rows, length = len(queries), self.length
        keys, values = (gather_keys(x, self.table[0], length) for x in self.caches)
        seen = torch.ones(rows, length, dtype=torch.bool, device=self.q.device)
        seen.tril_(length - rows)
        out = torch.empty_like(queries, dtype=dtype or self.q.dtype)
        sums = torch.promote_types(out.dtype, torch.float32)
        table = self.pos_emb.to(out.dtype)
        for head in range(HEADS):
            q = queries[:, head].to(out.dtype)
            k, v = (x[head // (HEADS // KV_HEADS)].to(out.dtype) for x in (keys, values))
            logits = (q @ k.T).to(sums) * self.scale
            gates = torch.sigmoid(logits).masked_fill_(~seen, 0.0)
            position = gates.flip(-1).cumsum(-1).flip(-1).clamp_(max=POSITIONS - 1)
            low, high = position.floor().long(), position.ceil().long()
            z = (q @ table.T).to(sums) * self.scale
            logits += torch.lerp(z.gather(1, low), z.gather(1, high), position - low)
            p = torch.softmax(logits.masked_fill_(~seen, -torch.inf), -1)
            out[:, head] = p.to(out.dtype) @ v
        return out


def peak_mib(work: Callable) -> float | None:
    """MiB that this process took more at the most while `work` ran; None where no one counts."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not to serve it
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        work()
        return max(_status("VmHWM") - before, 0) / 1024
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def check(problem: Problem) -> tuple[float, str | None]:
    """The largest error of the last rows, of the largest output, and why it is too large."""
    import torch

    from benchmarks.decode import rounding

    last = min(len(problem.q), 256)
    truth = problem.written_out(last, torch.float64)
    largest = truth.abs().max()
    ours, theirs = (
        float((out.double() - truth).abs().max() / largest)
        for out in (problem.ours()[-last:], problem.written_out(last))
    )
    cancel = float(problem.caches[1].float().abs().mean() / largest)
    if ours <= 2 * theirs + rounding(problem.q.dtype, cancel):
        return ours, None
    return ours, f"off by {ours:.2g}, {WRITTEN_OUT} by {theirs:.2g}"


def on_gpu(works: dict[str, Callable], rounds: int) -> dict[str, float]:
    from benchmarks._gpu_clock import AHEAD, measured

    return {name: taken.seconds for name, taken in measured(works, rounds, ahead=AHEAD).items()}


def rows_of(name: str, problem: Problem, case: dict, options) -> Iterator[Row]:
    from benchmarks.decode import turns

    clock = turns if case["device"] == "cpu" else on_gpu
    error, failed = check(problem)
    if failed:
        yield Row.failed(name, case, failed, peer=WRITTEN_OUT, unit="ms", error=error)
        return
    # Each peer takes turns with ours alone: of three, one would always find the caches as that one
    # leaves them which writes gigabytes.
    for figure, peer, work in (
        (f"{name}_plain", PLAIN, problem.plain),
        (name, WRITTEN_OUT, problem.written_out),
    ):
        if peer == WRITTEN_OUT and case["rows"] * case["keys"] > options.written**2:
            return
        ms = {k: 1e3 * s for k, s in clock({"": problem.ours, peer: work}, options.rounds).items()}
        yield Row.time(figure, case, ms[""], peer, ms[peer], unit="ms", error=error)
    if case["rows"] > 1 and case["device"] == "cpu":
        ours, theirs = peak_mib(problem.ours), peak_mib(problem.written_out)
        if ours and theirs:
            yield Row.time(f"{name}_memory", case, ours, WRITTEN_OUT, theirs, unit="MiB")


def all_rows(options) -> Iterator[Row]:
    import torch

    for dtype_name in options.dtypes:
        dtype = getattr(torch, dtype_name)
        for kind in KINDS:
            for length in options.lengths:
                for part, rows in (("prefill", min(length, options.chunk)), ("decode", 1)):
                    case = {
                        "device": options.device, "keys": length, "rows": rows, "gates": kind,
                        "dtype": dtype_name, "heads": f"{HEADS}/{KV_HEADS}x{SIZE}",
                        "positions": POSITIONS,
                    }  # fmt: skip
                    problem = Problem(length, rows, dtype, kind, options.device)
                    name = f"cope_{options.device}_{part}_{length}_{kind}_{dtype_name}"
                    yield from rows_of(name, problem, case, options)


def main() -> int:
    parser = addable(arguments(__doc__))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--chunk", type=int, default=8192, help="the most rows of a prefill")
    parser.add_argument(
        "--written", type=int, default=8192,
        help="up to so many keys and rows it is also written out; 8192 take some GiB",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"],
        help="default: both on a CPU, bfloat16 on a GPU",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="the fewest that a median is of")
    options = parser.parse_args()
    if bad := [n for n in (*options.lengths, options.chunk) if n < 128 or n % 128]:
        parser.error(f"--lengths, --chunk: got {bad}; give multiples of 128")
    require_editable()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave it out")
    if options.dtypes is None:
        options.dtypes = ["float32", "bfloat16"] if options.device == "cpu" else ["bfloat16"]
    use_threads(options.threads)
    results = Results(options.json, add=options.add)
    results.add(all_rows(options))
    results.show()
    return 1 if results.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
