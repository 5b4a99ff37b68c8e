"""Drives a vLLM engine step by step in a process of its own: requests come and are cancelled at
given steps, and the scheduler's own counters are read after each."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import dataclass

from engine_process import answer


@dataclass(frozen=True)
class Phase:
    """What came of requests that were served together, counters as they were after each step."""

    tokens: list[list[int]]  # by request, as far as it came
    cached: list[int]  # prompt tokens that were not computed, by request
    preemptions: int
    running: list[int]  # requests that run
    used: list[int]  # device blocks in use
    held: list[int]  # requests in the host stores
    seconds: list[float]  # that the step took
    killed: dict[int, float]  # when processes were, by their id
    times: list[list[float]]  # when each token came, by request
    logprobs: list[list[list[float]]]  # of each token and the next likely one, if asked for


@dataclass(frozen=True)
class Steps:
    phases: list[Phase]
    blocks: int  # device blocks that can be used
    stats: dict[str, float]  # the stores' metrics
    log: str


def run_steps(
    model: str, phases: list[list[dict]], *, env: dict[str, str] | None = None,
    kill_at: dict[int, str] | None = None, call_at: dict[int, list] | None = None,
    logprobs: bool = False, **engine,
) -> Steps:  # fmt: skip
    """Serve requests {"prompt": token ids, "max_tokens", "at": step, "cancel": step or None}.

    With "more": [[step, token ids], ...] one is a session, which goes on with further input, each
    of which is answered by max_tokens. With "reset": step the cache is reset there, for all.

    Steps are counted from 0 in each phase, which ends when all of its requests have. In the first
    phase `kill_at` ends processes in the middle of a step, by SIGKILL: those with this text in
    their command, and `call_at` calls a method of the workers before one: [name, arguments]. Times
    are those of one clock, in seconds.
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
    job = {
        "engine": arguments,
        "phases": phases,
        "kill_at": {str(step): text for step, text in (kill_at or {}).items()},
        "call_at": {str(step): call for step, call in (call_at or {}).items()},
        "logprobs": logprobs,
    }
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(env or {})}
    answered = answer("engine_steps:serve", job, model, env)
    found = answered.result()
    return Steps([Phase(**x) for x in found.pop("phases")], **found, log=answered.log)


def serve(job: dict) -> dict:
    """What Steps say but for the log, its phases as dicts."""
    from vllm import LLM

    llm = LLM(**job["engine"])
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    phases = [
        _phase(
            llm,
            scheduler,
            n,
            x,
            job["kill_at"] if n == 0 else {},
            job["call_at"] if n == 0 else {},
            job["logprobs"],
        )
        for n, x in enumerate(job["phases"])
    ]
    stats = {
        metric.name.removeprefix("vllm:sparse_offload_"): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:sparse_offload_")
    }
    blocks = scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    return {"phases": phases, "blocks": blocks, "stats": stats}


def _phase(
    llm, scheduler, number: int, requests: list[dict], kill_at: dict[str, str],
    call_at: dict[str, list], logprobs: bool,
) -> dict:  # fmt: skip
    import psutil
    from vllm import SamplingParams

    engine, pool = llm.llm_engine, scheduler.kv_cache_manager.block_pool
    side = getattr(scheduler.connector, "scheduler", None)
    names = [f"{number}-{i}" for i in range(len(requests))]
    result = {
        "tokens": [[] for _ in requests], "cached": [0] * len(requests),
        "running": [], "used": [], "held": [], "seconds": [], "killed": {},
        "times": [[] for _ in requests], "logprobs": [[] for _ in requests],
    }  # fmt: skip

    def preemptions() -> int:
        return sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")

    def kill(processes: list) -> None:
        for process in processes:
            process.kill()
            result["killed"][process.pid] = time.perf_counter()

    before, step = preemptions(), 0
    while engine.has_unfinished_requests() or step <= max(x["at"] for x in requests):
        for name, request in zip(names, requests, strict=True):
            sampling = SamplingParams(
                temperature=0, max_tokens=request["max_tokens"], detokenize=False,
                ignore_eos=True, logprobs=2 if logprobs else None,
            )  # fmt: skip
            if request.get("more"):
                _feed(engine, name, request, step, sampling)
            elif request["at"] == step:
                engine.add_request(name, {"prompt_token_ids": request["prompt"]}, sampling)
            if request.get("reset") == step:
                llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
            if request["cancel"] == step:
                engine.abort_request([name])
        if str(step) in call_at:
            method, *arguments = call_at[str(step)]
            print(f"CALLED {method}: {llm.collective_rpc(method, args=arguments)}", flush=True)
        killer = None
        if text := kill_at.get(str(step)):
            chosen = [
                process for process in psutil.Process().children(recursive=True)
                if text in " ".join(process.cmdline())
            ]  # fmt: skip
            killer = threading.Timer(result["seconds"][-1] / 2, kill, [chosen])
            killer.start()
        begin = time.perf_counter()
        outputs = engine.step()
        end = time.perf_counter()
        result["seconds"].append(end - begin)
        if killer is not None:
            killer.join()
        for output in outputs:
            i, came = names.index(output.request_id), output.outputs[0]
            said = (
                result["tokens"][i] if requests[i].get("more") else []
            )  # a session says what is new
            # Of a session what is new is said, of others all.
            tokens = said + list(came.token_ids)
            new = len(tokens) - len(result["tokens"][i])
            result["times"][i] += [end] * new
            result["tokens"][i] = tokens
            result["cached"][i] = output.num_cached_tokens
            for step_logprobs in came.logprobs[-new:] if logprobs and new else ():
                found = sorted((x.logprob for x in step_logprobs.values()), reverse=True)
                result["logprobs"][i].append(found[:2])
        result["running"].append(len(scheduler.running))
        result["used"].append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        result["held"].append(len(side.ledger.held) if side else 0)
        step += 1
    return {**result, "preemptions": preemptions() - before}


def _feed(engine, name: str, request: dict, step: int, sampling) -> None:
    """Give a session what comes at a step, and say so behind the last of it."""
    from vllm.sampling_params import RequestOutputKind

    sampling.output_kind = RequestOutputKind.DELTA
    more = [[request["at"], request["prompt"]], *request["more"]]
    inputs = [(prompt, True) for at, prompt in more if at == step]
    if more[-1][0] == step:
        inputs.append(([0], False))  # a token of which nothing is read
    for prompt, resumable in inputs:
        asked = engine.input_processor.process_inputs(
            name, {"prompt_token_ids": prompt}, sampling.clone(),
            supported_tasks=engine.get_supported_tasks(), resumable=resumable,
        )  # fmt: skip
        asked.external_req_id = name
        ours = copy.copy(asked)  # both sides add to the list of tokens, of which each has its own
        ours.prompt_token_ids = list(prompt)
        engine.output_processor.add_request(ours, None, None, 0)
        engine.engine_core.add_request(asked)
