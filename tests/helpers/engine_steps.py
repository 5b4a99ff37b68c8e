"""Drives a vLLM engine step by step in a process of its own: requests come and are cancelled at
given steps, and the scheduler's own counters are read after each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 300


@dataclass(frozen=True)
class Steps:
    """What came of it."""

    tokens: list[list[int]]  # by request, as far as it came
    cached: list[int]  # prompt tokens that were not computed, by request
    preemptions: int
    running: list[int]  # requests that run, after each step
    used: list[int]  # device blocks in use, after each step
    blocks: int  # device blocks that can be used
    held: list[int]  # requests in the host stores, after each step
    stats: dict[str, float]  # counters of the stores
    log: str


def run_steps(
    model: str,
    requests: list[dict],
    *,
    env: dict[str, str] | None = None,
    **engine,
) -> Steps:
    """Serve requests {"prompt": token ids, "max_tokens", "at": step, "cancel": step or None}.

    Steps are counted from 0; the engine steps on until every request has ended.
    """
    arguments = {
        "model": model,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_num_batched_tokens": 512,
        "max_model_len": 4096,
        "kv_cache_memory_bytes": 64 << 20,
        "disable_log_stats": False,
        **engine,
    }
    job = json.dumps({"engine": arguments, "requests": requests})
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(env or {})},
        cwd=Path(model),
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(job, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        raise AssertionError(f"the engine took over {TIMEOUT_S} s:\n{log[-8000:]}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"the engine failed:\n{log[-12000:]}"
    result = next(x for x in log.splitlines() if x.startswith("RESULT "))
    return Steps(**json.loads(result.removeprefix("RESULT ")), log=log)


def _serve(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    requests = job["requests"]
    numbers: dict[str, int] = {}
    result = {
        "tokens": [[] for _ in requests],
        "cached": [0] * len(requests),
        "running": [],
        "used": [],
        "held": [],
        "blocks": pool.num_gpu_blocks - 1,
    }
    step = 0
    waiting = set(range(len(requests)))
    while waiting or engine.has_unfinished_requests():
        for i in sorted(waiting):
            if requests[i]["at"] <= step:
                waiting.discard(i)
                sampling = SamplingParams(
                    temperature=0,
                    max_tokens=requests[i]["max_tokens"],
                    detokenize=False,
                    ignore_eos=True,
                )
                numbers[f"r{i}"] = i
                prompt = {"prompt_token_ids": requests[i]["prompt"]}
                engine.add_request(f"r{i}", prompt, sampling)
        for i, request in enumerate(requests):
            if request.get("cancel") == step:
                engine.abort_request([f"r{i}"])
        for output in engine.step():
            i = numbers[output.request_id]
            result["tokens"][i] = list(output.outputs[0].token_ids)
            result["cached"][i] = output.num_cached_tokens
        result["running"].append(len(scheduler.running))
        result["used"].append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        side = getattr(scheduler.connector, "scheduler", None)
        result["held"].append(len(side.ledger.held) if side else 0)
        step += 1
    metrics = {m.name: m for m in llm.get_metrics()}
    result["preemptions"] = int(metrics["vllm:num_preemptions"].value)
    result["stats"] = {
        name.removeprefix("vllm:sparse_offload_"): metric.value
        for name, metric in metrics.items()
        if name.startswith("vllm:sparse_offload_")
    }
    return result


if __name__ == "__main__":
    print("RESULT " + json.dumps(_serve(json.load(sys.stdin))), flush=True)
