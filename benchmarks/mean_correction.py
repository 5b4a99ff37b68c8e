"""Mean correction of sparse prefill: its error at the same selections, and what it costs.

What is left out is the same with and without, so every pair of figures is at one density. Queries,
keys and values are those of every layer of the lean retrieval model on two prompts, and made ones
whose attention is spread. Prompts are read in chunks of 2048; seconds are CPU seconds of one thread
for attention alone, the shortest of a few, in turns.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks._engines import checkpoint, import_examples
from benchmarks._form import Row, arguments, publish, require_editable

PEER = "the same selection, without"
CHUNK = 2048
SEGMENT = 512  # tokens of the made input that share a topic


@dataclass
class Totals:
    """Sums over layers, of one pattern; pairs are without and with mean correction."""

    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    plan_seconds: float = 0.0
    wrong: list[float] = field(default_factory=lambda: [0.0, 0.0])
    last_wrong: list[float] = field(default_factory=lambda: [0.0, 0.0])
    worst: list[float] = field(default_factory=lambda: [0.0, 0.0])
    norm: float = 0.0
    last_norm: float = 0.0
    read: int = 0
    causal: int = 0


def patterns() -> dict[str, Any]:
    from vllm_sparse.patterns import HeadPattern

    return {
        "a_shape": HeadPattern(kind="a_shape", sink=64, window=512),
        "vertical_slash": HeadPattern(kind="vertical_slash", vertical=64, slash=256),
        "block_sparse": HeadPattern(kind="block_sparse", blocks=16),
        "adaptive_97": HeadPattern(coverage=0.97),
        "adaptive_95": HeadPattern(coverage=0.95),
        "adaptive_80": HeadPattern(coverage=0.8),
    }


def inputs(model: Any, lengths: list[int]) -> Iterator[tuple[str, int, list[Any]]]:
    """(name, tokens, the LayerInputs of every layer) of every input."""
    from retrieval.prompts import averaging_prompt, needle_prompt

    from vllm_sparse.search.capture import capture

    for length in lengths:
        yield "spread", length, [spread(length)]
        for name, question in (
            ("needle", needle_prompt(length, 0.7, 100, distractors=3)),
            ("averaging", averaging_prompt(length, 102, late_minority=True)),
        ):
            layers: list[Any] = []
            capture(model, question.token_ids, layers.append)
            yield name, length, layers


def spread(length: int, heads: int = 8, kv_heads: int = 2, size: int = 128) -> Any:
    """Attention that no few keys carry: logits have a deviation of 1.4, half of its square from the
    topic of a stretch of 512 tokens, half from the token itself, and values are made alike."""
    import torch

    from vllm_sparse.search.capture import LayerInputs, dense_attention

    generator = torch.Generator().manual_seed(7)

    def rows(topics: bool, count: int) -> torch.Tensor:
        own = torch.randn(length, count, size, generator=generator)
        if not topics:
            return own
        topic = torch.randn(-(-length // SEGMENT), count, size, generator=generator)
        return own + topic.repeat_interleave(SEGMENT, 0)[:length]

    q, k, v = rows(False, heads), rows(True, kv_heads), rows(True, kv_heads)
    scale = size**-0.5
    batched = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = dense_attention(*batched, scale)[0].transpose(0, 1)
    return LayerInputs(0, q, k, v, scale, out)


def compare(totals: Totals, pattern: Any, repeats: int, inputs: Any) -> None:
    """Adds one layer."""
    import torch

    from vllm_sparse.kernels import sparse_prefill
    from vllm_sparse.kernels.block_indices import TILE
    from vllm_sparse.planner import plan_prefill
    from vllm_sparse.search.evaluate import Layer

    layer = Layer(inputs)
    outs = [torch.empty_like(layer.q) for _ in range(2)]
    for begin in range(0, layer.length, CHUNK):
        end = min(begin + CHUNK, layer.length)
        where = (
            layer.table, torch.tensor([0, end - begin], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
        )  # fmt: skip
        q = layer.q[begin:end]
        started = time.process_time()
        indices = plan_prefill(
            q, layer.k_cache, *where, [pattern] * layer.heads, scale=layer.scale, coverage=0.95
        )
        totals.plan_seconds += time.process_time() - started
        read, causal = indices.selected_keys([end - begin], [end])
        totals.read, totals.causal = totals.read + read, totals.causal + causal
        times: list[list[float]] = [[], []]
        for turn in range(repeats):
            for corrected in (False, True) if turn % 2 == 0 else (True, False):
                started = time.process_time()
                sparse_prefill(
                    q, layer.k_cache, layer.v_cache, *where, indices, scale=layer.scale,
                    mean_correction=corrected, out=outs[corrected][begin:end],
                )  # fmt: skip
                times[corrected].append(time.process_time() - started)
        for corrected in range(2):
            totals.seconds[corrected] += min(times[corrected])
    totals.norm += float(layer.norm.sum())
    totals.last_norm += float(layer.truth[-TILE:].square().sum(dtype=torch.float64))
    for corrected, out in enumerate(outs):
        difference = (out - layer.truth).square()
        totals.wrong[corrected] += float(difference.sum(dtype=torch.float64))
        totals.last_wrong[corrected] += float(difference[-TILE:].sum(dtype=torch.float64))
        worst = float(layer.errors(out)[1].max())
        totals.worst[corrected] = max(totals.worst[corrected], worst)


def rows_of(name: str, length: int, layers: list[Any], repeats: int) -> Iterator[Row]:
    for kind, pattern in patterns().items():
        totals = Totals()
        for layer in layers:
            compare(totals, pattern, repeats, layer)
        error = [(x / totals.norm) ** 0.5 for x in totals.wrong]
        last = [(x / totals.last_norm) ** 0.5 for x in totals.last_wrong]
        case = {
            "tokens": length, "input": name, "pattern": kind,
            "density": round(totals.read / totals.causal, 4),
        }  # fmt: skip
        errors = {
            "last_rows": last[1], "last_rows_without": last[0],
            "worst_tile": totals.worst[1], "worst_tile_without": totals.worst[0],
        }  # fmt: skip
        figure = f"{name}_{length}_{kind}"
        yield Row.time(
            f"mean_correction_error_{figure}", {**case, **errors}, error[1], PEER, error[0],
            unit="relative error", error=error[1],
        )  # fmt: skip
        yield Row.time(
            f"mean_correction_time_{figure}",
            {**case, "repeats": repeats, "plan_s": round(totals.plan_seconds, 4)},
            totals.seconds[1], PEER, totals.seconds[0], error=error[1],
        )  # fmt: skip


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    require_editable()
    import_examples()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    lean = checkpoint("lean")
    import torch

    from vllm_sparse.kernels import cpu
    from vllm_sparse.search.capture import load_model

    torch.set_num_threads(1)
    cpu.set_threads(1)
    if reason := cpu.native_error():
        raise SystemExit(f"the native kernels are not here, and nothing is worth timing: {reason}")
    made = partial(rows_of, repeats=options.repeats)
    publish(
        [row for found in inputs(load_model(str(lean)), options.lengths) for row in made(*found)],
        options.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
