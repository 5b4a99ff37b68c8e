"""What the connector's two sides say to each other, in vLLM's terms."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from ..step import Step


@dataclass
class StepMetadata(KVConnectorMetadata):
    step: Step


@dataclass
class StoreSize(KVConnectorHandshakeMetadata):
    """What a worker's host stores hold."""

    pages: int
    page_rows: int
    requests: int


@dataclass
class Acknowledged(KVConnectorWorkerMetadata):
    """Rows of each request that the host has for certain."""

    rows: dict[str, int] = field(default_factory=dict)
    lost: bool = False  # a worker's host store is lost, and what the step gave is wrong
    number: int = 0  # of the step

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Acknowledged:
        assert isinstance(other, Acknowledged)
        both = self.rows.keys() & other.rows.keys()
        rows = {r: min(self.rows[r], other.rows[r]) for r in both}
        return Acknowledged(rows, self.lost or other.lost, min(self.number, other.number))
