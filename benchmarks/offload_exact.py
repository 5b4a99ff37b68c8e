"""Decode over host memory, every row read (`exact`): is it full KV, in less device memory?

A check more than a timing, in float32, greedy, of a small random model. `tokens`: chunked prefill,
a prefix hit and preemption; `device`: how many requests decode at once; `longer`: one request that
is longer than the device; `faults`: an actor is killed; `tp`: two ranks. The peer is vLLM's own
CPU backend each time, with enough device memory where tokens are compared. A row whose check
failed has no value, and says what differed.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._engines import import_test_helpers
from benchmarks._form import Row, arguments, publish, require_editable

if TYPE_CHECKING:
    from engine_steps import Phase, Steps

PEER = "vLLM's CPU backend, full KV"
CHUNK = 2048  # tokens of a step
NEW = 256  # tokens that each request generates
LENGTHS = (2048, 2905, 3762, 4619, 5476, 6333, 7190, 8192)  # of the eight requests
DEVICE_LENGTH, LONG_LENGTH = 16384, 32768
BLOCK = 128  # tokens of a KV block of vLLM's on CPUs
BLOCK_BYTES = BLOCK * 4 * 2 * 2 * 64 * 4  # layers, KV heads, K and V, size, bytes
AMPLE = 1024  # blocks: all requests of any part
TIGHT = 95  # blocks: one less than the eight requests come to hold with nothing preempted
BUDGET = 1.2  # requests of DEVICE_LENGTH
ACTOR = "cpu_offload.worker"
KILL_STEPS = (100, 140, 180, 220)  # the prompts are read by step 25
RESUMED_S = 2.0
REFUSAL = re.compile(r"ValueError: (To serve .+? or decreasing `max_model_len`[^\n]*)")


@dataclass
class Model:
    """A random llama in a folder, and what engines gave on it."""

    folder: str

    def serve(self, name: str, phases: list[list[dict]], blocks: int, **engine: Any) -> Steps:
        """An engine with so many device blocks for requests; vLLM keeps one more for itself."""
        from engine_steps import run_steps

        begin = time.monotonic()
        longest = max(len(x["prompt"]) + x["max_tokens"] for phase in phases for x in phase)
        ranks = engine.get("tensor_parallel_size", 1)
        served = run_steps(
            self.folder, phases, logprobs=True, max_model_len=longest,
            max_num_batched_tokens=CHUNK, max_num_seqs=len(LENGTHS),
            kv_cache_memory_bytes=(blocks + 1) * BLOCK_BYTES // ranks, **engine,
        )  # fmt: skip
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        return served

    def peer(self, name: str, phases: list[list[dict]], blocks: int) -> Steps:
        """vLLM's own, on all cores: it would leave one to others."""
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        env = {"VLLM_CPU_OMP_THREADS_BIND": cores}
        return self.serve(f"full KV, {name}", phases, blocks, env=env)

    @cached_property
    def full(self) -> Steps:
        """The eight requests twice, the second time with a prefix hit."""
        return self.peer("eight requests", [crowd(), crowd()], AMPLE)


def exact(**more: Any) -> dict[str, Any]:
    """Settings of ours: prefill reads everything as well."""
    settings = {"coverage": 1.0, "decode": "exact", "resident_layers": [], **more}
    return {"attention_backend": "sparse", "additional_config": {"sparse": settings}}


def asked(length: int, seed: int) -> dict[str, Any]:
    from engine_run import prompt

    return {"prompt": prompt(length, seed), "max_tokens": NEW, "at": 0, "cancel": None}


def crowd() -> list[dict[str, Any]]:
    return [asked(length, length) for length in LENGTHS]


def compared(ours: Phase, theirs: Phase) -> tuple[int, float, list[str]]:
    """(requests of equal tokens, largest difference of a chosen token's log-probability, what
    differs). Where tokens differ, what follows is not compared."""
    equal, error, differs = 0, 0.0, []
    for i, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        same = next((n for n in range(len(b)) if a[n : n + 1] != b[n : n + 1]), len(b))
        pairs = zip(ours.logprobs[i][:same], theirs.logprobs[i][:same], strict=True)
        error = max([error, *(abs(p[0] - q[0]) for p, q in pairs)])
        if same == len(b) == len(a):
            equal += 1
        else:
            first, second = theirs.logprobs[i][same] if same < len(b) else (0.0, 0.0)
            differs.append(
                f"request {i} from token {same} on, where the peer's first two choices are "
                f"{first - second:.1e} apart"
            )
    return equal, error, differs


def tokens_row(figure: str, ours: Phase, theirs: Phase, untrue: str | None, **case: Any) -> Row:
    """How many requests have the peer's tokens; `untrue` is what of the case did not come about."""
    equal, error, differs = compared(ours, theirs)
    short = [len(x) for x in theirs.tokens if len(x) != NEW]
    if short:
        differs.append(f"the peer generated {short} tokens instead of {NEW}")
    if untrue:
        differs.append(untrue)
    case = {
        "generated": NEW,
        "preemptions": ours.preemptions,
        "running": max(ours.running),
        "used_blocks": max(ours.used),
        "distinct_tokens": min(len(set(x)) for x in theirs.tokens),
        "least_margin": min(a - b for x in theirs.logprobs for a, b in x),
        **case,
    }
    return Row.rate(
        f"tokens_{figure}", case, equal, PEER, len(theirs.tokens), unit="requests of equal tokens",
        error=error, failed="; ".join(differs) or None,
    )  # fmt: skip


def lengths_case(**more: Any) -> dict[str, Any]:
    tokens = f"{LENGTHS[0]} to {LENGTHS[-1]}"
    return {"requests": len(LENGTHS), "tokens": tokens, "chunk": CHUNK, **more}


def twice_rows(
    name: str, served: Steps, full: Steps, *, preempted: bool, **case: Any
) -> list[Row]:  # fmt: skip
    """Rows of the eight requests that were served, and served again."""
    first, again = served.phases
    case = lengths_case(blocks=served.blocks, **case)
    untrue = "nothing was preempted" if preempted and not first.preemptions else None
    missed = None if min(again.cached) > 0 else f"prefix hits of {again.cached} tokens"
    return [
        tokens_row(name, first, full.phases[0], untrue, **case),
        tokens_row(f"{name}_prefix_hit", again, full.phases[1], missed, **case,
                   cached=f"{min(again.cached)} to {max(again.cached)}"),
    ]  # fmt: skip


def tokens_part(model: Model) -> list[Row]:
    full, phases = model.full, [crowd(), crowd()]
    ample = model.serve("exact, resident_layers [0]", phases, AMPLE, **exact(resident_layers=[0]))
    tight = model.serve("exact, preempted", phases, TIGHT, **exact())
    few = exact(decode="topk", rows=16)
    control = model.serve("control: 16 rows", phases[:1], AMPLE, **few)
    rows = twice_rows("chunked", ample, full, preempted=False, resident_layers="[0]")
    rows += twice_rows("preempted", tight, full, preempted=True, resident_layers="[]")
    # Were tokens equal whatever is read of the host, equal tokens would say nothing.
    equal, error, _ = compared(control.phases[0], full.phases[0])
    case = lengths_case(generated=NEW, decode="topk", rows=16)
    failed = "16 rows give the same tokens" if equal == len(LENGTHS) else None
    if failed:
        return [*rows, Row.failed("control", case, failed, peer=PEER, unit="requests")]
    return [*rows, Row("control", case, equal, PEER, len(LENGTHS), "requests of equal tokens",
                       equal / len(LENGTHS), error)]  # fmt: skip


def decode_at_once(phase: Phase) -> int:
    """The most requests that had their first token and not their last one at the same time."""
    spans = [(x[0], x[-1]) for x in phase.times]
    return max(sum(begin <= at < end for begin, end in spans) for at, _ in spans)


def device_part(model: Model) -> list[Row]:
    needed = -(-(DEVICE_LENGTH + NEW) // BLOCK)
    blocks = int(BUDGET * needed)
    requests = [asked(DEVICE_LENGTH, i) for i in range(len(LENGTHS))]
    theirs = model.peer("16K, device memory for 1.2", [requests], blocks)
    ours = model.serve(
        "exact, 16K, device memory for 1.2", [requests], blocks, **exact(window=1024)
    )
    mine, other = ours.phases[0], theirs.phases[0]
    at_once = decode_at_once(mine), decode_at_once(other)
    case = {
        "requests": len(requests), "tokens": DEVICE_LENGTH, "window": 1024, "resident_layers": "[]",
    }  # fmt: skip
    budget = {
        "device_mib": (blocks + 1) * BLOCK_BYTES >> 20,
        "blocks": ours.blocks,
        "their_blocks": theirs.blocks,
        "blocks_of_a_request": needed,
        "least_free": ours.blocks - max(mine.used),
        "their_least_free": theirs.blocks - max(other.used),
        "running": max(mine.running),
        "their_running": max(other.running),
    }
    failed = None
    if at_once != (len(requests), 1) or ours.blocks != theirs.blocks:
        failed = f"{at_once[0]} and the peer's {at_once[1]} decode at once"
    return [
        Row.rate("decode_at_once", {**case, **budget}, at_once[0],
                 "vLLM's CPU backend, the same device memory", at_once[1], unit="requests",
                 failed=failed),
        tokens_row("16k", mine, other, None, **case, blocks=ours.blocks),
    ]  # fmt: skip


def longer_part(model: Model) -> list[Row]:
    from engine_run import run

    longest = LONG_LENGTH + NEW
    blocks = longest // 2 // BLOCK
    device_bytes = (blocks + 1) * BLOCK_BYTES
    requests = [asked(LONG_LENGTH, 0)]
    full = model.peer("32K", [requests], AMPLE)
    ours = model.serve("exact, 32K, half of it on the device", [requests], blocks, **exact())
    log = run(
        model.folder, [[[1]]], expect_failure=True, max_model_len=longest,
        max_num_batched_tokens=CHUNK, kv_cache_memory_bytes=device_bytes,
    )  # fmt: skip
    case = {"requests": 1, "tokens": LONG_LENGTH, "resident_layers": "[]"}
    refusal = REFUSAL.search(log)
    said = refusal[1] if refusal else ""
    most = re.search(r"estimated maximum model length is (\d+)", said)
    return [
        tokens_row("32k", ours.phases[0], full.phases[0], None, **case, blocks=ours.blocks,
                   their_blocks=full.blocks),
        Row.rate(
            "longest_request",
            {"device_mib": round(device_bytes / 2**20, 1), "refusal": said},
            longest, "vLLM's CPU backend, the most that it says it could take",
            float(most[1]) if most else 0.0, unit="tokens",
            failed=None if most else f"the peer refused for another reason: {log[-400:]}",
        ),
    ]  # fmt: skip


def faults_part(model: Model) -> list[Row]:
    cores = sorted(os.sched_getaffinity(0))
    served = model.serve(
        "exact, an actor is killed", [crowd()], AMPLE,
        kill_at=dict.fromkeys(KILL_STEPS, ACTOR),
        # A core of its own for the actor, so that it answers most of what is asked.
        env={"VLLM_CPU_OMP_THREADS_BIND": str(cores[0])}, **exact(actors=1),
    )  # fmt: skip
    phase = served.phases[0]
    kills = sorted(phase.killed.values())
    case = lengths_case(actors=1, kills=len(kills), restarts=served.stats.get("restarts", 0))
    untrue = None
    if not kills or not all(x[0] < kills[0] and kills[-1] < x[-1] for x in phase.times):
        untrue = f"{len(kills)} actors were killed while all requests decoded"
    elif not served.stats["restarts"]:
        untrue = "no actor was started again"
    rows = [tokens_row("killed", phase, model.full.phases[0], untrue, **case)]
    before = longest_gap(phase, 0.0, kills[0]) if kills else 0.0
    gap = longest_gap(phase, kills[0], float("inf")) if kills else float("inf")
    if untrue or gap > RESUMED_S:
        failed = untrue or f"{gap:.2f} s without a token after a kill, {RESUMED_S} are allowed"
        return [*rows, Row.failed("gap_after_kill", case, failed, peer=None, unit="s")]
    case |= {"gap_before_s": before}
    return [*rows, Row("gap_after_kill", case, gap, None, None, "s", None, None)]


def longest_gap(phase: Phase, begin: float, end: float) -> float:
    """Seconds between two tokens of a request, of which the later came from `begin` to `end`,
    from when all requests decode."""
    begin = max(begin, *(x[0] for x in phase.times))
    return max(
        (b - a for x in phase.times for a, b in itertools.pairwise(x) if begin <= b < end),
        default=0.0,
    )


def tp_part(model: Model) -> list[Row]:
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    bind = "|".join(",".join(map(str, x)) for x in (cores[:half], cores[half:]) if x)
    served = model.serve(
        "exact, two ranks", [crowd(), crowd()], TIGHT, tensor_parallel_size=2,
        env={"VLLM_CPU_OMP_THREADS_BIND": bind}, **exact(),
    )  # fmt: skip
    return twice_rows("tp", served, model.full, preempted=True, ranks=2)


PARTS = {
    "tokens": tokens_part,
    "device": device_part,
    "longer": longer_part,
    "faults": faults_part,
    "tp": tp_part,
}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    require_editable()
    if "tp" in options.parts and len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("The part tp needs two cores; name the others with --parts.")
    # A SIGTERM that ends this process at once would leave an engine running.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    import_test_helpers()
    from tiny_models import save_llama

    with tempfile.TemporaryDirectory() as folder:
        model = Model(save_llama(Path(folder), max_position_embeddings=2 * LONG_LENGTH))
        rows = [row for part in options.parts for row in PARTS[part](model)]
    publish(rows, options.json)
    return 1 if any(row.ours is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
