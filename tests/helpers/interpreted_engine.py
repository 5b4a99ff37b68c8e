"""An engine whose layers have the CUDA backend, on a CPU: Triton interprets the kernels.

What runs is vLLM's own runner, scheduler and cache on one side, and our builder, layers, planning
and kernels for GPUs on the other. Stand-ins: plain torch for vLLM's kernels (writing the cache,
dense attention), which Triton's interpreter does not run, and nothing for the warm-up. Copies to
the host come as late as a GPU's may: what is used before it was waited for is not there yet.
"""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace

import engine_run
import quick_interpreter

FEWEST_SHARED = 64  # keys; the prompts that an interpreter reads are short
ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# The runner that vLLM takes on GPUs, whose own kernels are Triton's.
SECOND_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1", "CUDA_VISIBLE_DEVICES": ""}


class LateTransfers:
    """`Transfers` whose copies are made when they are waited for."""

    def __init__(self, device) -> None:
        from vllm_sparse.transfers import Transfers

        self.device, self._real = device, Transfers(device)
        self.buffer, self.send = self._real.buffer, self._real.send
        self._begun, self._launched = [], []

    def fetch(self, name: str, x):
        on_host = self._real.buffer(name, x.shape, x.dtype).fill_(float("nan"))
        self._begun.append((on_host, x))
        return on_host

    def launched(self) -> None:
        self._launched, self._begun = self._begun, []

    def wait(self) -> None:
        for on_host, x in self._launched:
            on_host.copy_(x)
        self._launched = []


def claim_triton() -> None:
    """Have vLLM's CPU build take Triton for usable; to be called before vLLM is loaded."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))


def stand_in() -> None:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    from vllm_sparse import cpu_platform, cuda_metadata, cuda_offload, cuda_runtime, plugin
    from vllm_sparse.kernels import reference
    from vllm_sparse.kernels.paged_cache import halves

    def write(impl, layer, key, value, cache, slot_mapping):
        reference.write_kv(key, value, *halves(cache, impl.head_size), slot_mapping)

    def attend(impl, layer, query, key, value, cache, metadata, output, *scales):
        tokens = metadata.num_actual_tokens
        reference.sparse_prefill(
            query[:tokens], *halves(cache, impl.head_size), metadata.block_table,
            metadata.query_start_loc, metadata.seq_lens, None, scale=impl.scale,
            out=output[:tokens].view_as(query[:tokens]),
        )  # fmt: skip
        return output

    TritonAttentionImpl.do_kv_cache_update = write
    TritonAttentionImpl.forward = attend
    cuda_offload.shared_transfers = functools.cache(LateTransfers)
    cpu_platform.BACKEND_PATH = plugin.CUDA_BACKEND_PATH
    cuda_runtime.device_break_even.warm_up = lambda *args, **more: None
    cuda_metadata.shared_prefixes = functools.partial(
        cuda_metadata.shared_prefixes, fewest=FEWEST_SHARED
    )


def generate(job: dict) -> dict:
    """What `engine_run.generate` gives, of such an engine."""
    if SECOND_RUNNER.items() <= os.environ.items():
        claim_triton()
    stand_in()
    quick_interpreter.install()
    return engine_run.generate(job)
