"""SparseOffloadConnector: vLLM's interface, over a scheduler's side and a worker's side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from .messages import Acknowledged, StepMetadata, StoreSize
from .metrics import OffloadPromMetrics, OffloadStats
from .scheduler import SchedulerSide
from .worker import WorkerSide


class SparseOffloadConnector(KVConnectorBase_V1, SupportsHMA):
    """Mirrors every row to the host, and brings back what a resumed request needs.

    The attention layers themselves copy rows and read them, as they have them at hand; what goes
    through here is whose they are.
    """

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerSide(vllm_config, kv_cache_config)
        else:
            self.worker = WorkerSide(vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # nobody waits for these rows but this engine

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return True  # attention runs Python: it looks requests up

    # The workers' side

    def register_kv_caches(self, kv_caches) -> None:
        self.worker.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> StoreSize:
        capacity = self.worker.host.pool.capacity()
        return StoreSize(capacity.pages, capacity.page_rows, capacity.max_requests)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        self.worker.begin(connector_metadata.step)

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        """Nothing is left to load: `bind_connector_metadata` did, as the model needs it now."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are done before the model runs."""

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: Any) -> None:
        """The layers mirror their rows themselves, before they attend."""

    def wait_for_save(self) -> None:
        self.worker.end()

    def build_connector_worker_meta(self) -> Acknowledged | None:
        rows, lost = self.worker.take_acknowledged()
        step = self.worker.host.step
        return Acknowledged(rows, lost, step.number) if rows or lost else None

    def get_kv_connector_stats(self) -> OffloadStats | None:
        return self.worker.stats() if self.worker is not None else self.scheduler.stats()

    def shutdown(self) -> None:
        if self.worker is not None:
            self.worker.shutdown()

    # The scheduler's side

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]):
        self.scheduler.set_stores([(m.pages, m.page_rows, m.requests) for m in metadata.values()])

    def bind_kv_cache_manager(self, kv_cache_manager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.bind(kv_cache_manager)

    def get_num_new_matched_tokens(
        self, request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.scheduler.matched(request, num_computed_tokens), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        self.scheduler.allocated(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output) -> StepMetadata:
        return StepMetadata(self.scheduler.step(scheduler_output))

    def update_connector_output(self, connector_output) -> None:
        acknowledged = connector_output.kv_connector_worker_meta
        if acknowledged is not None:
            self.scheduler.acknowledge(acknowledged.number, acknowledged.rows)

    def request_finished(self, request, block_ids) -> tuple[bool, dict | None]:
        self.scheduler.finished(request.request_id)
        return False, None

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, dict | None]:
        return self.request_finished(request, block_ids)

    def take_events(self) -> Iterable:
        return ()

    def reset_cache(self) -> bool:
        return self.scheduler.reset_cache()

    # For the process that has the metrics

    @classmethod
    def build_kv_connector_stats(cls, data: dict | None = None) -> OffloadStats:
        return OffloadStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls, vllm_config, metric_types, labelnames, per_engine_labelvalues
    ) -> OffloadPromMetrics:
        return OffloadPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
