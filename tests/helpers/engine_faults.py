"""Faults of a host store, put into a running engine's workers."""

from __future__ import annotations


class Faults:
    """Methods of every worker: `worker_extension_cls="engine_faults.Faults"`."""

    def lose_store(self, how: str, rank: int = 0) -> str:
        """Spoil the host store of one rank, and return how its memory is kept.

        `how`: "head": now, from outside where another process could; "pages": the page lists, while
        the next step is under way, with numbers that exist; "append", "collect": what the native
        kernels do without memory for their scratch buffers.
        """
        import torch

        from vllm_sparse.cpu_offload.connector import host
        from vllm_sparse.cpu_offload.host import StoreLost

        pool = host().pool
        store = pool.store
        kind = type(store.region).__name__
        if self.rank != rank:
            return kind

        def no_memory(*args):
            raise StoreLost("out of memory")

        def append(layer, *args):
            if layer == 2:
                if how == "append":
                    no_memory()
                store._table[:] = store._table.max() - store._table
            return write(layer, *args)

        if how == "head" and kind == "Region":
            with open(store.region.path, "r+b", buffering=0) as file:
                file.write(bytes(16))
        elif how == "head":
            store._memory[:16] = torch.zeros(16, dtype=torch.uint8)
        elif how == "collect":
            pool._ring.collect = no_memory
        else:
            write, store.append = store.append, append
        return kind
