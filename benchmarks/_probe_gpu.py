"""What a benchmark asks of a running GPU engine's worker, in the worker's own process."""

from __future__ import annotations

from typing import Any

from benchmarks._probe import WorkerProbe


class GpuProbe(WorkerProbe):
    """As WorkerProbe, with what the device counted, and what the layers are."""

    def probe(self) -> dict[str, Any]:
        impls = [layer.impl for layer in self._layers() if hasattr(layer, "impl")]
        for counters in {id(c): c for i in impls if (c := getattr(i, "counters", None))}.values():
            counters.settle()
        found = super().probe()
        settled = next((i.break_even for i in impls if hasattr(i, "break_even")), None)
        return found | {
            "impls": sorted({type(impl).__name__ for impl in impls}),
            # On a GPU by the rows of a chunk.
            "break_even": settled.line() if hasattr(settled, "line") else settled,
        }

    def _layers(self) -> list[Any]:
        return list(self.vllm_config.compilation_config.static_forward_context.values())
