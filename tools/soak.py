"""Random load on a server that decodes over host memory: does anything stay behind or grow?

    python tools/soak.py --minutes 30 --decode vattention

Requests of the lean retrieval model come at random, some of their clients leave before the answer,
and the pool's actor is killed now and then. At the end every answer that was waited for has to be
right, and nothing may remain: no process, no shared memory, no more memory than after the first
third of the time. Prints what happened, and exits with 1 if anything is amiss.

The server is started with a small ONEDNN_PRIMITIVE_CACHE_CAPACITY, unless that is set: oneDNN keeps
0.28 MiB for each number of rows that a linear layer of vLLM has met, 1024 times, and a worker goes
on growing for thousands of requests until those are full, with this plugin or without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from retrieval.prompts import Question, needle_prompt  # noqa: E402
from server import Server, ends_on_signals, runs  # noqa: E402

LONGEST = 4096
AT_ONCE = 12  # requests of clients that wait
READY_S, ANSWER_S = 300, 240
LEAVES = 0.2  # share of the clients
KILL_EVERY_S = (15.0, 45.0)
SAMPLE_EVERY_S = 5.0
GROWTH = 1.05  # of the processes' own memory
ONEDNN_CACHE = "32"
ACTOR = "vllm_sparse.cpu_offload.worker"


@dataclass
class Record:
    """What happened."""

    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)  # MiB, by process
    seen: set[psutil.Process] = field(default_factory=set)


def question(rng: random.Random) -> Question:
    """Short ones and long ones; a few texts come again, so that prefixes are found."""
    seed = rng.randrange(1 << 30) if rng.random() < 0.7 else rng.randrange(8)
    length = random.Random(seed).randrange(256, LONGEST - 16)
    return needle_prompt(length, seed % 10 / 10, seed, distractors=2, words=3)


async def client(
    api: openai.AsyncOpenAI, asked: Question, leaves_after: float | None, record: Record
) -> None:
    """One request, which is left alone after so many seconds if that is given."""
    call = api.completions.create(
        model="lean", prompt=asked.prompt, max_tokens=len(asked.answer_ids) + 1, temperature=0
    )
    record.counts["asked"] += 1
    try:
        answer = await asyncio.wait_for(call, leaves_after or ANSWER_S)
    except asyncio.TimeoutError:
        record.counts["left" if leaves_after else "not answered in time"] += 1
    except openai.OpenAIError as error:
        record.counts["failed"] += 1
        record.wrong.append(f"{type(error).__name__}: {error}")
    else:
        text = answer.choices[0].text
        record.counts["right" if asked.is_right(text) else "wrong"] += 1
        if not asked.is_right(text):
            record.wrong.append(f"{text!r} instead of {asked.answer!r}")


async def arrivals(server: Server, until: float, rng: random.Random, record: Record) -> None:
    """Clients, until the time is over; waits for those that are still there."""
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S
    ) as api:
        places = asyncio.Semaphore(AT_ONCE)
        tasks: set[asyncio.Task] = set()

        async def visit(asked: Question, leaves_after: float | None) -> None:
            async with places:
                await client(api, asked, leaves_after, record)

        while time.monotonic() < until:
            leaves = rng.uniform(0.05, 3.0) if rng.random() < LEAVES else None
            task = asyncio.create_task(visit(question(rng), leaves))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            # In bursts, with pauses in which everything is answered.
            await asyncio.sleep(rng.choice((0.0, 0.1, rng.expovariate(0.5))))
            while len(tasks) > 2 * AT_ONCE:
                await asyncio.sleep(0.1)
        await asyncio.gather(*tasks)


async def kills(server: psutil.Process, rng: random.Random, record: Record) -> None:
    while True:
        await asyncio.sleep(rng.uniform(*KILL_EVERY_S))
        actors = [p for p in server.children(recursive=True) if is_actor(p)]
        if actors:
            rng.choice(actors).send_signal(signal.SIGKILL)
            record.counts["kills"] += 1


async def samples(server: psutil.Process, record: Record) -> None:
    """The server's processes, and their memory without what files and shared memory hold: the
    store is mapped as it is used, up to its size."""
    while True:
        await asyncio.sleep(SAMPLE_EVERY_S)
        memory: Counter[str] = Counter()
        for process in [server, *server.children(recursive=True)]:
            record.seen.add(process)
            # An actor that has just started is not what it was before it was killed.
            if not is_actor(process):
                memory[name_of(process)] += anonymous_bytes(process) / 2**20
        record.memory.append(memory)


def anonymous_bytes(process: psutil.Process) -> int:
    """0 for a process that has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.M)
    return int(found[1]) << 10 if found else 0


def name_of(process: psutil.Process) -> str:
    """`VLLM::Worker` and its like; what has no title of its own is the server."""
    try:
        title = process.cmdline()[0].strip()
    except (psutil.Error, IndexError):
        return "ended"
    return title if "::" in title else "server"


def tenths(memory: list[dict[str, float]], name: str) -> list[int]:
    """Medians of a process's memory, of each tenth of the time."""
    values = [sample.get(name, 0.0) for sample in memory]
    size = max(len(values) // 10, 1)
    return [round(statistics.median(values[i : i + size])) for i in range(0, len(values), size)][
        :10
    ]


def is_actor(process: psutil.Process) -> bool:
    try:
        return ACTOR in " ".join(process.cmdline())
    except psutil.Error:
        return False


def shared_memory() -> set[str]:
    return {str(path) for path in Path("/dev/shm").rglob("*")}


async def load(server: Server, minutes: float, seed: int, record: Record) -> None:
    rng = random.Random(seed)
    process = psutil.Process(server.process.pid)
    beside = [
        asyncio.create_task(kills(process, rng, record)),
        asyncio.create_task(samples(process, record)),
    ]
    try:
        await arrivals(server, time.monotonic() + 60 * minutes, rng, record)
    finally:
        for task in beside:
            task.cancel()


def faults(record: Record, left: set[str], metrics: dict[str, float]) -> list[str]:
    """What is amiss."""
    found = [f"{len(record.wrong)} answers: {'; '.join(record.wrong[:5])}"] if record.wrong else []
    if late := record.counts["not answered in time"]:
        found.append(f"{late} requests were not answered within {ANSWER_S} s")
    if alive := [p.pid for p in record.seen if runs(p)]:
        found.append(f"processes {alive} still run")
    if left:
        found.append(f"in /dev/shm there are still {sorted(left)}")
    third = len(record.memory) // 3
    if third < 6:
        found.append(f"{len(record.memory)} samples of memory are too few: take more minutes")
    else:
        totals = [sum(sample.values()) for sample in record.memory]
        before, after = (statistics.median(totals[-k * third :][:third]) for k in (2, 1))
        if after > GROWTH * before:
            found.append(f"memory grew from {before:.0f} to {after:.0f} MiB")
    if metrics.get("host_bytes_used", 0) > 0:
        found.append(f"requests that are over hold {metrics['host_bytes_used']:.0f} host bytes")
    if not record.counts["kills"] or metrics.get("restarts_total", 0) < 1:
        found.append("no actor was killed and started again")
    return found


def offload_metrics(server: Server) -> dict[str, float]:
    text = server._get("/metrics") or ""
    pattern = r"^vllm:sparse_offload_(\w+)\{.*\} (\S+)$"
    return {name: float(value) for name, value in re.findall(pattern, text, re.M)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--decode", default="vattention")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    subprocess.run([sys.executable, str(ROOT / "tools" / "checkpoint.py"), "lean"], check=True)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_CACHE)
    settings = {"decode": options.decode, "actors": options.actors, "window": 256, "host_gib": 1}
    arguments = [
        "--served-model-name", "lean", "--dtype", "float32", "--max-model-len", str(LONGEST),
        "--max-num-batched-tokens", "1024", "--max-num-seqs", str(AT_ONCE),
        # So little device memory that requests are preempted.
        "--kv-cache-memory-bytes", str(48 << 20), "--enforce-eager",
        "--attention-backend", "sparse", "--additional-config", json.dumps({"sparse": settings}),
    ]  # fmt: skip
    before, record, begin = shared_memory(), Record(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with ends_on_signals(), Server(ROOT / "checkpoints" / "lean", log, *arguments) as server:
            for _ in server.wait_until_ready(READY_S):
                pass
            asyncio.run(load(server, options.minutes, options.seed, record))
            time.sleep(3)
            metrics = offload_metrics(server)
        amiss = faults(record, shared_memory() - before, metrics)
        if amiss:
            print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
    print(f"{(time.monotonic() - begin) / 60:.1f} minutes, {options.decode}:", dict(record.counts))
    for name in sorted({name for sample in record.memory for name in sample}):
        print(f"memory of {name} in MiB, each tenth of the time:", tenths(record.memory, name))
    print("metrics:", {k: v for k, v in metrics.items() if not k.endswith("created")})
    for fault in amiss:
        print("AMISS:", fault)
    print("PASSED" if not amiss else "FAILED")
    return bool(amiss)


if __name__ == "__main__":
    sys.exit(main())
