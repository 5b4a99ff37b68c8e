"""The connector in a vLLM worker: owns the host stores, and gives them to the attention layers."""

from __future__ import annotations

from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from vllm_sparse import log
from vllm_sparse.config import SparseConfig
from vllm_sparse.layer_names import layer_index

from ..kv_spec import OffloadWindowSpec
from ..mirror import HostKV
from ..pool import PAGE_ROWS, Pool
from ..step import Step
from .metrics import OffloadStats
from .sizing import GIB, store_bytes

logger = log.get_logger(__name__)

_WORKER: WorkerSide | None = None


def host() -> HostKV:
    """The host stores of this process."""
    assert _WORKER is not None, "the connector is made before the model runs"
    return _WORKER.host


def kv_cache_group(layer_name: str) -> int:
    """The number of the KV cache group that a layer belongs to."""
    assert _WORKER is not None
    return _WORKER.groups[layer_name]


class WorkerSide:
    def __init__(self, vllm_config, kv_cache_config) -> None:
        global _WORKER
        config = SparseConfig.from_additional_config(vllm_config.additional_config)
        self.groups: dict[str, int] = {}
        self.layers: dict[int, str] = {}  # layer numbers of the model -> names
        offloaded, resident = [], []
        for i, group in enumerate(kv_cache_config.kv_cache_groups):
            for name in group.layer_names:
                self.groups[name] = i
                number = layer_index(name)
                self.layers[number] = name
                windowed = isinstance(group.kv_cache_spec, OffloadWindowSpec)
                (offloaded if windowed else resident).append(number)
        spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self.block_size = spec.block_size
        self.rank = get_tensor_model_parallel_rank()
        ranks = get_tensor_model_parallel_world_size()
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        row_bytes = 2 * spec.num_kv_heads * spec.head_size * spec.dtype.itemsize
        size = store_bytes(
            config.host_gib,
            layers=len(self.layers),
            row_bytes=row_bytes,
            page_rows=PAGE_ROWS,
            max_tokens=model.max_model_len,
            max_requests=scheduler.max_num_seqs,
            ranks=ranks,
        )
        shape = {
            "heads": model.get_num_attention_heads(vllm_config.parallel_config),
            "kv_heads": spec.num_kv_heads,
            "head_size": spec.head_size,
            "dtype": spec.dtype,
            # Preempted requests keep their slot while others run.
            "max_requests": 2 * scheduler.max_num_seqs,
            "max_tokens": model.max_model_len,
        }
        part = size // len(self.layers)
        pool = Pool(
            layers=len(offloaded), host_bytes=part * len(offloaded), sampler=config.decode,
            **shape,
        )  # fmt: skip
        mirror = None
        if resident:
            mirror = Pool(layers=len(resident), host_bytes=part * len(resident), **shape)
        self.host = HostKV(sorted(offloaded), sorted(resident), pool, mirror)
        capacity = pool.capacity()
        logger.info(
            "Host store: %.2f GiB for the keys and values of %d tokens in %d layers, decode %s; "
            "the device keeps a sink of %d tokens, a window of %d%s",
            capacity.pages * capacity.page_rows * row_bytes * len(self.layers) / GIB,
            capacity.pages * capacity.page_rows,
            len(self.layers),
            config.decode,
            config.sink,
            config.window,
            f", and all of layers {sorted(resident)}" if resident else "",
        )
        self.kv_caches: dict = {}
        self.reported: dict[str, float] = {}
        _WORKER = self

    def register_kv_caches(self, kv_caches) -> None:
        self.kv_caches = kv_caches

    def begin(self, step: Step) -> None:
        self.host.begin(step)
        for start in step.started:
            if not start.rows:
                continue
            for number, name in self.layers.items():
                self.host.load(
                    start, number, self.groups[name], self.block_size, self.kv_caches[name]
                )

    def end(self) -> None:
        self.host.check()

    def take_acknowledged(self) -> dict[str, int]:
        return self.host.end()

    def stats(self) -> OffloadStats:
        """What came since the last call."""
        counters, gauges = self.host.totals()
        added = {name: value - self.reported.get(name, 0) for name, value in counters.items()}
        self.reported = counters
        return OffloadStats.of(added, self.rank, gauges)

    def shutdown(self) -> None:
        self.host.shutdown()
