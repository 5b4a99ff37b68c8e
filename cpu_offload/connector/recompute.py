"""What follows when a worker's host store is lost: vLLM preempts and recomputes its requests.

vLLM's own answer to keys and values that did not load, `get_block_ids_with_load_errors` with
`kv_load_failure_policy="recompute"`, does not serve here: its scheduler refuses it where there is
more than one KV cache group, as resident layers make it, and it lets a request keep its device
blocks, of which those between sink and window are gone. What serves is what vLLM does when weights
change under running requests: `Scheduler.reset_prefix_cache(reset_running_requests=True)` preempts
all of them, throws away what the step that is under way gives, and computes them again. No hook of
a connector comes before that output is handed out, so the scheduler's method is wrapped. vLLM
raises RuntimeError, which ends the engine, where a request that does not run holds device blocks.
"""

from __future__ import annotations

import functools

from vllm.v1.core.sched.scheduler import Scheduler

from .messages import Acknowledged


@functools.cache
def install() -> None:
    """Let schedulers look whether a store is lost before they take a step's output."""
    take = Scheduler.update_from_output

    @functools.wraps(take)
    def update_from_output(self, scheduler_output, model_runner_output):
        output = model_runner_output.kv_connector_output
        said = output.kv_connector_worker_meta if output is not None else None
        if isinstance(said, Acknowledged) and said.lost:
            self.connector.scheduler.lose()
            self.reset_prefix_cache(reset_running_requests=True)
        return take(self, scheduler_output, model_runner_output)

    Scheduler.update_from_output = update_from_output
