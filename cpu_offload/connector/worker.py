"""The connector in a vLLM worker: owns the host stores, and gives them to the attention layers."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.platforms import current_platform

from vllm_sparse import log
from vllm_sparse.config import SparseConfig
from vllm_sparse.layer_names import layer_index
from vllm_sparse.stats import STATS

from .. import numa
from ..actors import bound, granted
from ..kv_spec import OffloadWindowSpec
from ..layout import Layout
from ..memory import available_memory
from ..mirror import HostKV
from ..pool import PAGE_ROWS, Pool
from ..step import Step
from .install import layout_of
from .metrics import OffloadStats
from .sizing import GIB, store_pages

logger = log.get_logger(__name__)

_WORKER: WorkerSide | None = None


def is_made() -> bool:
    """Whether this process has host stores: vLLM makes its connectors after it has measured what
    memory the model takes."""
    return _WORKER is not None


def host() -> HostKV:
    """The host stores of this process."""
    assert _WORKER is not None, "the connector is made before the model runs"
    return _WORKER.host


def kv_cache_group(layer_name: str) -> int:
    """The number of the KV cache group that a layer belongs to."""
    assert _WORKER is not None
    return _WORKER.groups[layer_name]


def ranks() -> int:
    """How many workers share the machine's cores and memory."""
    return get_tensor_model_parallel_world_size()


def of_all_ranks(mine: Any) -> list[Any]:
    """What each of the workers says, in the order of their ranks; waits for all of them."""
    said = [mine] * ranks()
    if len(said) > 1:
        torch.distributed.all_gather_object(said, mine, group=get_tp_group().cpu_group)
    return said


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
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        rows = spec.num_kv_heads, spec.head_size, spec.dtype
        layouts = [layout_of(config, len(offloaded), *rows)]
        # What the device has whole is not rounded, when a request comes again either.
        layouts += [Layout(len(resident), *rows)] if resident else []
        page_bytes = sum(layout.page_bytes for layout in layouts)
        pages = store_pages(
            config.host_gib,
            page_bytes=page_bytes,
            page_rows=PAGE_ROWS,
            max_tokens=model.max_model_len,
            max_requests=scheduler.max_num_seqs,
            ranks=ranks(),
            # Each would read another number, and the first takes its part of it.
            free=min(of_all_ranks(available_memory())),
            engines=vllm_config.parallel_config.data_parallel_size_local or 1,
        )
        self.shape = {
            "heads": model.get_num_attention_heads(vllm_config.parallel_config),
            "kv_heads": spec.num_kv_heads,
            "head_size": spec.head_size,
            "dtype": spec.dtype,
            # Preempted requests keep their slot while others run.
            "max_requests": 2 * scheduler.max_num_seqs,
            "max_tokens": model.max_model_len,
        }
        self.config, self.pages, self.layouts = config, pages, layouts
        self.cpus = self._cpus_of_actors()
        pool, *others = self.make_pools()
        mirror = others[0] if others else None
        self.host = HostKV(sorted(offloaded), sorted(resident), pool, mirror)
        logger.info(
            "Host store: %.2f GiB for %d tokens of %d layers%s, decode %s by %s; the device keeps "
            "a sink of %d tokens and a window of %d%s",
            pages * page_bytes / GIB,
            pages * PAGE_ROWS,
            len(self.layers),
            " as int8" if layouts[0].dtype == torch.int8 else "",
            config.decode,
            readers(config, len(self.cpus) if self.cpus else config.actors),
            config.sink,
            config.window,
            f", and layers {sorted(resident)} whole" if resident else "",
        )
        self.told = False  # the scheduler, that a store is lost
        self.kv_caches: dict = {}
        self.reported: dict[str, float] = {}
        _WORKER = self

    def _cpus_of_actors(self) -> list[list[int]] | None:
        """The CPUs of each actor, which no rank computes on; None: there are no actors."""
        if not self.config.actors:
            return None
        said = of_all_ranks((granted(), bound()))
        spare = sorted(set.union(*(a for a, _ in said)) - set.union(*(b for _, b in said)))
        mine = spare[self.rank :: len(said)]
        if self.config.actors == "numa":
            return numa.by_node(mine or granted())
        return numa.divide(mine, self.config.actors)

    def make_pools(self) -> list[Pool]:
        """Empty stores: of the offloaded layers, and of the resident ones, if any."""
        offloaded, *resident = self.layouts
        config, cpus = self.config, self.cpus
        pools = [
            Pool(
                layers=offloaded.layers, kv_dtype=offloaded.dtype,
                host_bytes=self.pages * offloaded.page_bytes,
                sampler=config.decode, rows=config.rows,
                sampler_options=dict(config.sampler_options), kind=pool_kind(config),
                actors=len(cpus) if cpus else max(config.actors, 1), cpus=cpus,
                pinned=current_platform.is_cuda(), **self.shape,
            )
        ]  # fmt: skip
        if current_platform.is_cuda() and not pools[0].store.pinned:
            STATS.fell_back("host_memory_not_page_locked")
        for x in resident:
            pools.append(Pool(layers=x.layers, host_bytes=self.pages * x.page_bytes, **self.shape))
        return pools

    def register_kv_caches(self, kv_caches) -> None:
        self.kv_caches = kv_caches

    def begin(self, step: Step) -> None:
        if step.renew:
            self.host.renew(self.make_pools)
            self.told = False
        self.host.begin(step)
        if self.host.lost is not None:
            return
        for start in step.started:
            if not start.rows:
                continue
            for number, name in self.layers.items():
                self.host.load(
                    start, number, self.groups[name], self.block_size, self.kv_caches[name]
                )

    def end(self) -> None:
        self.host.check()

    def take_acknowledged(self) -> tuple[dict[str, int], bool]:
        """Rows that the host has by request, and whether the store was lost since the last call."""
        lost = self.host.lost is not None and not self.told
        self.told |= lost
        return self.host.end(), lost

    def stats(self) -> OffloadStats:
        """What came since the last call."""
        counters, gauges = self.host.totals()
        added = {name: value - self.reported.get(name, 0) for name, value in counters.items()}
        self.reported = counters
        return OffloadStats.of(added, self.rank, gauges)

    def shutdown(self) -> None:
        self.host.shutdown()


def pool_kind(config: SparseConfig) -> str:
    """Who answers beside the worker, as `Pool` calls it."""
    if not config.actors:
        return "inline"
    return "ray" if config.ray else "process"


def readers(config: SparseConfig, actors: int) -> str:
    """The same for people."""
    if not actors:
        return "the worker"
    kind = "Ray actor" if config.ray else "process"
    plural = "" if actors == 1 else "es" if kind == "process" else "s"
    return f"{actors} {kind}{plural} and the worker"
