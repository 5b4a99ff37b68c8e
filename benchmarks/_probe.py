"""What a benchmark asks of a running engine's worker, in the worker's own process."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Any


class WorkerProbe:
    """Methods for `LLM(worker_extension_cls=...)` and `collective_rpc`."""

    def probe(self) -> dict[str, Any]:
        """CPU seconds of this process so far, and what the sparse backend counted in it."""
        import torch

        from vllm_sparse.stats import STATS

        return {
            "pid": os.getpid(),
            "cpu_s": time.process_time(),
            "threads": torch.get_num_threads(),
            "stats": asdict(STATS),
        }

    def pool(self) -> dict[str, float]:
        """What the host store's pool counted since the start; nothing without one."""
        from vllm.distributed.kv_transfer import has_kv_transfer_group

        if not has_kv_transfer_group():
            return {}
        from vllm_sparse.cpu_offload import connector

        return connector.host().totals()[0]
