"""The stores' counters on their way to vLLM's log and /metrics."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)


@dataclass
class OffloadStats(KVConnectorStats):
    """What came since the last report (counters), and how things stand (gauges)."""


class OffloadPromMetrics(KVConnectorPromMetrics):
    def observe(self, transfer_stats_data, engine_idx: int = 0) -> None:
        pass
