"""Decode of sequences that begin with the same pages: read once for them, against once for each.

Both by our own kernel, taking turns, one layer at a time: on the CPU, and on a GPU where there is
one, as graphs with a cold L2. Beside it what it costs where nothing is shared, and to find out. The
two outputs are compared before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks._form import Results, Row, addable, arguments, require_editable, use_threads

HEADS, KV_HEADS, SIZE = 32, 8, 128
APART = "each sequence apart"


class Batch:
    """Sequences of `prefix` keys in the same pages (or not) and `own` keys each, on a device."""

    def __init__(self, sequences, prefix, own, dtype, device, *, shares=True) -> None:
        import torch

        page = 128 if device == "cpu" else 16
        generator = torch.Generator().manual_seed(sequences + prefix)
        common, rest = prefix // page, own // page
        apart = 1 if shares else sequences
        pages = apart * common + sequences * rest
        numbers = torch.randperm(pages, generator=generator).int()
        first = numbers[: apart * common].view(apart, common).expand(sequences, common)
        last = numbers[apart * common :].view(sequences, rest)
        cache = torch.randn(pages, KV_HEADS, page, 2 * SIZE, generator=generator)
        q = torch.randn(sequences, HEADS, SIZE, generator=generator)
        self.caches = cache.to(device, dtype).chunk(2, -1)
        self.q = q.to(device, dtype)
        self.table = torch.cat([first, last], 1).contiguous().to(device)
        self.starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        lens = torch.full((sequences,), prefix + own, dtype=torch.int32)
        self.lens, self.page = lens.to(device), page

    def truth(self):
        """Attention of the first and the last sequence in fp32, [2, H, D]."""
        from vllm_sparse.kernels import reference

        ends = [0, -1]
        q, table, lens = self.q[ends].float(), self.table[ends], self.lens[ends]
        caches = (x.float() for x in self.caches)
        return reference.paged_decode(q, *caches, table, lens, scale=SIZE**-0.5)[0]

    def find(self):
        from vllm_sparse.kernels import shared_prefixes

        more = {}
        if not self.lens.is_cpu:
            from vllm_sparse.kernels.gpu.paged_decode import members_of

            more["members"] = members_of(HEADS // KV_HEADS, SIZE)
        return shared_prefixes(self.table, self.starts, self.lens, page=self.page, **more)

    def decoder(self, shared) -> Callable:
        import torch

        from vllm_sparse.kernels import paged_decode

        more, out = {}, torch.empty_like(self.q)
        if not self.lens.is_cpu:
            from vllm_sparse.kernels.gpu.paged_decode import Workspace

            more = {"workspace": Workspace(), "query_start_loc": self.starts}
        return lambda: paged_decode(
            self.q, *self.caches, self.table, self.lens, scale=SIZE**-0.5, out=out, shared=shared,
            **more,
        )[0]  # fmt: skip


def rows_of(batch: Batch, figure: str, case: dict, time: Callable) -> list[Row]:
    """A layer's decode, and the search, which a step makes once for all layers.

    `time`: works by name -> seconds by name; works are prepared by it.
    """
    shared = batch.find()
    works = {APART: batch.decoder(None), "together": batch.decoder(shared)}
    truth = batch.truth()
    ends = [0, -1]
    apart, error = (
        float((work()[ends].float() - truth).abs().max() / truth.abs().max())
        for work in works.values()
    )
    case = case | {"shared_keys": int(shared.keys.sum())}
    failed = None
    if not error <= 2 * apart:
        failed = f"off by {error:.2g}, {APART} by {apart:.2g}"
    if failed:
        return [Row.failed(figure, case, failed, peer=APART, unit="us", error=error)]
    seconds = time(works | {"find": batch.find})
    us = {name: 1e6 * each for name, each in seconds.items()}
    return [
        Row.time(figure, case, us["together"], APART, us[APART], unit="us", error=error),
        Row.time(f"{figure}_find", case, us["find"], f"a layer, {APART}", us[APART], unit="us"),
    ]


def on_cpu(works: dict[str, Callable], rounds: int) -> dict[str, float]:
    from benchmarks.decode import turns

    return turns(works, rounds)


def on_gpu(works: dict[str, Callable], rounds: int) -> dict[str, float]:
    from benchmarks._decode_gpu import graphed
    from benchmarks._gpu_clock import seconds

    return seconds({name: graphed(work)[0] for name, work in works.items()}, rounds)


def device_rows(device: str, options) -> Iterator[Row]:
    import torch

    clock = on_cpu if device == "cpu" else on_gpu

    def time(works):
        return clock(works, options.rounds)

    for dtype_name in options.dtypes if device == "cpu" else ["bfloat16"]:
        for prefix in options.prefixes:
            for sequences in options.batches:
                case = {
                    "device": device, "sequences": sequences, "prefix": prefix,
                    "own": options.own, "dtype": dtype_name,
                    "heads": f"{HEADS}/{KV_HEADS}x{SIZE}",
                }  # fmt: skip
                given = (sequences, prefix, options.own, getattr(torch, dtype_name), device)
                suffix = f"{device}_b{sequences}_{prefix}_{dtype_name}"
                batch = Batch(*given)
                yield from rows_of(batch, f"shared_prefix_{suffix}", case, time)
                if sequences * prefix <= options.tokens:
                    batch = Batch(*given, shares=False)
                    yield from rows_of(batch, f"shared_prefix_none_{suffix}", case, time)


def main() -> int:
    parser = addable(arguments(__doc__))
    parser.add_argument("--parts", nargs="+", choices=["cpu", "gpu"], help="default: what is here")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--own", type=int, default=256, help="keys of each sequence alone")
    parser.add_argument("--tokens", type=int, default=131072, help="most, where none is shared")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"],
        help="on the CPU",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--rounds", type=int, default=9, help="the fewest that a median is of")
    options = parser.parse_args()
    if bad := [n for n in (*options.prefixes, options.own) if n < 128 or n % 128]:
        parser.error(f"--prefixes, --own: got {bad}; give multiples of 128")
    require_editable()
    import torch

    has_gpu = torch.cuda.is_available()
    parts = options.parts or ["cpu", *["gpu"] * has_gpu]
    if "gpu" in parts and not has_gpu:
        parser.error("--parts gpu: torch finds no GPU here; leave it out")
    results = Results(options.json, add=options.add)
    if "cpu" in parts:
        use_threads(options.threads)
        results.add(device_rows("cpu", options))
    if "gpu" in parts:
        results.add(device_rows("cuda", options))
    results.show()
    return 1 if results.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
