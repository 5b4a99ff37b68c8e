"""A pattern file against the adaptive default: prefill attention alone, and time to first token.

The lean retrieval model. Attention alone is that of every layer on prompts with questions of three
kinds, in chunks of 4096, CPU seconds of one thread, planning included, both taking turns. The first
token is that of two engines that are alike but for the file, both alive at once and taking turns;
answers have to be right.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._engines import checkpoint, import_examples
from benchmarks._form import ROOT, Row, arguments, publish, require_editable

PEER = "adaptive default"
CHECKPOINT = ROOT / "checkpoints" / "lean"


@dataclass
class Totals:
    """Sums over the layers of one prompt."""

    seconds: float = 0.0
    wrong: float = 0.0  # squared differences from exact outputs
    norm: float = 0.0
    read: float = 0.0  # blocks
    last_wrong: float = 0.0  # the same of the last 64 rows, where the question stands
    last_norm: float = 0.0

    @property
    def error(self) -> float:
        return (self.wrong / self.norm) ** 0.5

    @property
    def last_error(self) -> float:
        return (self.last_wrong / self.last_norm) ** 0.5


def attention_rows(file: Path, length: int, repeats: int) -> list[Row]:
    """Time and error of all heads of all layers, a row for each kind of prompt."""
    import torch
    from retrieval.prompts import averaging_prompt, needle_prompt, two_hop_prompt

    from vllm_sparse.kernels import cpu
    from vllm_sparse.patterns import PatternFile
    from vllm_sparse.search.capture import capture, load_model

    torch.set_num_threads(1)
    cpu.set_threads(1)
    patterns, model = PatternFile.load(file), load_model(str(CHECKPOINT))
    # Seeds that no search has seen.
    questions = {
        "needle": needle_prompt(length, 0.7, 100, distractors=3),
        "two_hop": two_hop_prompt(length, seed=101, distractors=2),
        "averaging": averaging_prompt(length, 102, late_minority=True),
    }
    rows = []
    for name, question in questions.items():
        totals = {"file": Totals(), "adaptive": Totals()}
        capture(model, question.token_ids, partial(compare, totals, patterns, repeats))
        file_, adaptive = totals["file"], totals["adaptive"]
        case = {
            "tokens": length, "prompt": name, "dtype": "float32", "repeats": repeats,
            "read": round(file_.read / adaptive.read, 3), "error_adaptive": adaptive.error,
            "last_error": file_.last_error, "last_error_adaptive": adaptive.last_error,
        }  # fmt: skip
        rows.append(
            Row.time(
                f"patterns_attention_{name}", case, file_.seconds, PEER, adaptive.seconds,
                error=file_.error,
            )
        )  # fmt: skip
    return rows


def compare(totals: dict[str, Totals], patterns: Any, repeats: int, inputs: Any) -> None:
    """Adds one layer to both totals; the shortest of a few times, in turns."""
    import torch

    from vllm_sparse.kernels.block_indices import TILE
    from vllm_sparse.search.candidates import DEFAULT
    from vllm_sparse.search.evaluate import Layer

    layer = Layer(inputs)
    given = {
        "file": patterns.for_layer(inputs.layer),
        "adaptive": [DEFAULT] * layer.heads,
    }
    times: dict[str, list[float]] = {key: [] for key in given}
    for turn in range(repeats):
        for key in sorted(given, reverse=bool(turn % 2)):
            begin = time.process_time()
            out, blocks, columns = layer.attend(given[key])
            times[key].append(time.process_time() - begin)
            if turn == 0:
                total, difference = totals[key], out.float() - layer.truth.float()
                total.wrong += float(difference.square().sum(dtype=torch.float64))
                total.norm += float(layer.norm.sum())
                total.read += float(blocks.sum() + columns.sum() / 64)
                total.last_wrong += float(difference[-TILE:].square().sum(dtype=torch.float64))
                total.last_norm += float(layer.truth[-TILE:].square().sum(dtype=torch.float64))
    for key, measured in times.items():
        totals[key].seconds += min(measured)


def engine_rows(file: Path, length: int, repeats: int, rounds: int) -> list[Row]:
    """Time to first token, and the part of it that attention takes."""
    from benchmarks.ttft import Series, prompt

    series = {"file": Series(), "adaptive": Series()}
    attention: dict[str, list[float]] = {"file": [], "adaptive": []}
    for turn in range(rounds):
        with _engines(file, length) as engines:
            for engine in engines.values():
                engine.measure(*prompt("lean", length, 1000), None)
            for seed in range(turn, repeats, rounds):
                names = list(engines) if seed % 2 == 0 else list(engines)[::-1]
                for name in names:
                    before = _busy(engines[name])
                    engines[name].measure(*prompt("lean", length, seed), series[name])
                    attention[name].append(_busy(engines[name]) - before)
    failed = None
    for name, found in series.items():
        if not all(found.right):
            failed = f"{found.right.count(False)} of {repeats} answers of {name} are wrong"
    median: Callable[[list[float]], float] = statistics.median
    case = {
        "tokens": length, "repeats": repeats, "rounds": rounds, "dtype": "float32",
        "right": f"{sum(series['file'].right)} of {repeats}",
        "ours_cpu_s": median(series["file"].cpu_s),
        "theirs_cpu_s": median(series["adaptive"].cpu_s),
    }  # fmt: skip
    return [
        Row.time(
            "patterns_ttft", case, median(series["file"].wall_s), PEER,
            median(series["adaptive"].wall_s), failed=failed,
        ),
        Row.time(
            "patterns_ttft_attention", case, median(attention["file"]), PEER,
            median(attention["adaptive"]), failed=failed,
        ),
    ]  # fmt: skip


@contextmanager
def _engines(file: Path, length: int) -> Iterator[dict[str, Any]]:
    """Two sparse engines by name; nothing of them remains afterwards."""
    from benchmarks.ttft import Engine

    started: dict[str, Any] = {}
    try:
        for name, config in (("file", {"patterns": str(file)}), ("adaptive", {})):
            started[name] = Engine(
                CHECKPOINT, length, "float32", attention_backend="sparse",
                additional_config={"sparse": config},
            )  # fmt: skip
        yield started
    finally:
        for engine in started.values():
            engine.llm.llm_engine.engine_core.shutdown(timeout=30)


def _busy(engine) -> float:
    stats = engine.probe()["stats"]
    return stats["index_seconds"] + stats["attention_seconds"]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("patterns", type=Path, help="the pattern file, of the lean model")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="pairs of engines")
    parser.add_argument("--parts", nargs="+", choices=["attention", "ttft"],
                        default=["attention", "ttft"])  # fmt: skip
    options = parser.parse_args()
    require_editable()
    import_examples()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    checkpoint("lean")
    rows = []
    if "ttft" in options.parts:
        rows += engine_rows(options.patterns, options.length, options.repeats, options.rounds)
    if "attention" in options.parts:
        rows += attention_rows(options.patterns, options.length, options.repeats)
    publish(rows, options.json)
    return 1 if any(row.ours is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
