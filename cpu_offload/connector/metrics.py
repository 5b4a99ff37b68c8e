"""The stores' counters on their way to vLLM's log and /metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

# name in /metrics (a counter gets `_total`) -> what it says
COUNTERS = {
    "rows_read": "Rows, of a KV head each, that decode read in host memory",
    "rows_there": "Rows, of a KV head each, that decode would have read there without sampling",
    "decode_rows": "Queries, of a layer each, that were answered from host memory in part",
    "pool_seconds": "Seconds that workers spent on asking the pool and waiting for it",
    "mirrored_bytes": "Bytes of keys and values copied to host memory",
    "loaded_bytes": "Bytes of keys and values copied from host memory to the device",
    "restarts": "Actors that were started again",
    "regions_lost": "Host stores that were lost, and whose requests were computed again",
    "queued": "Requests that had to wait for host memory",
}
GAUGES = {
    "host_bytes": "Bytes of host memory for keys and values",
    "host_bytes_used": "Bytes of it that requests hold",
}
PREFIX = "vllm:sparse_offload_"


@dataclass
class OffloadStats(KVConnectorStats):
    """Counters since the last report, {name: number}, and gauges under the rank they are of."""

    @classmethod
    def of(cls, counters: dict[str, float], rank: int, gauges: dict[str, float]) -> OffloadStats:
        return cls(data={"counters": counters, "gauges": {rank: gauges} if gauges else {}})

    @property
    def counters(self) -> dict[str, float]:
        return self.data.setdefault("counters", {})

    @property
    def gauges(self) -> dict[Any, dict[str, float]]:
        return self.data.setdefault("gauges", {})

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> OffloadStats:
        """Counters of ranks and of reports add up; of gauges, each rank's last counts."""
        assert isinstance(other, OffloadStats)
        for name, value in other.counters.items():
            self.counters[name] = self.counters.get(name, 0) + value
        self.gauges.update(other.gauges)
        return self

    def gauge(self, name: str) -> float:
        return sum(values.get(name, 0) for values in self.gauges.values())

    def is_empty(self) -> bool:
        return not any(self.counters.values())

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's log line says of the interval."""
        there = self.counters.get("rows_there", 0)
        shown: dict[str, int | float] = {
            "Rows read in host memory": int(self.counters.get("rows_read", 0)),
            "Density": round(self.counters.get("rows_read", 0) / there, 4) if there else 0.0,
            "Pool seconds": round(self.counters.get("pool_seconds", 0.0), 3),
            "MB mirrored": round(self.counters.get("mirrored_bytes", 0) / 1e6, 1),
            "MB loaded": round(self.counters.get("loaded_bytes", 0) / 1e6, 1),
            "Requests queued for host memory": int(self.counters.get("queued", 0)),
            "Host stores lost": int(self.counters.get("regions_lost", 0)),
            "Actor restarts": int(self.counters.get("restarts", 0)),
        }
        if self.gauges:
            shown["Host GB used"] = round(self.gauge("host_bytes_used") / 1e9, 3)
            shown["Host GB"] = round(self.gauge("host_bytes") / 1e9, 3)
        return shown


class OffloadPromMetrics(KVConnectorPromMetrics):
    """The same as Prometheus metrics, beside vLLM's own."""

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def made(kind, names: dict[str, str]) -> dict[str, dict[int, Any]]:
            metrics = {
                name: metric_types[kind](
                    name=PREFIX + name, documentation=text + ".", labelnames=labelnames
                )
                for name, text in names.items()
            }
            return {
                name: {i: metric.labels(*x) for i, x in per_engine_labelvalues.items()}
                for name, metric in metrics.items()
            }

        self.counters, self.gauges = made(Counter, COUNTERS), made(Gauge, GAUGES)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        stats = OffloadStats(data=transfer_stats_data)
        for name, value in stats.counters.items():
            if value:
                self.counters[name][engine_idx].inc(value)
        if stats.gauges:
            for name, metric in self.gauges.items():
                metric[engine_idx].set(stats.gauge(name))
