"""What the start compiles, and what serving would compile after it; runs in a process of its own.

Triton binds each launch as on an H200, with the constants, numbers and alignments that decide
which code it is, on tensors that have no memory. Nothing is compiled or run. Prints a JSON object:
of each case how many forms the start made, and the launches that asked for others.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

from vllm_sparse.kernels.gpu import index_lists, launch, paged_decode, shared_prefix
from vllm_sparse.kernels.gpu.block_means import PageSums
from vllm_sparse.kernels.gpu.sparse_prefill import sparse_prefill
from vllm_sparse.kernels.paged_cache import FP8
from vllm_sparse.patterns import ADAPTIVE, HeadPattern
from vllm_sparse.planner import device, device_break_even

META = torch.device("meta")
PAGE, LONGEST, DTYPE = 16, 131072, torch.bfloat16
FIXED = HeadPattern(kind="vertical_slash", vertical=100, slash=100)
# (query heads, KV heads, head size, cache dtype)
SHAPES = {
    "32-8-128": (32, 8, 128, DTYPE),
    "64-8-64": (64, 8, 64, DTYPE),
    "7-1-128": (7, 1, 128, DTYPE),
    "16-8-256": (16, 8, 256, DTYPE),
    "32-8-128-fp8": (32, 8, 128, FP8),
}
# (new tokens, all tokens) of the sequences of a step
PREFILLS = (
    [(8192, 8192)], [(8192, 20000)], [(8192, 32768)], [(300, 5000), (513, 30000), (257, 9000)],
    [(8192, 40000)], [(1000, 130000)], [(8192, 131072)], [(70, 70000)], [(64, 40000)],
    [(30, 40001)],
)  # fmt: skip
SEQUENCES = (1, 2, 3, 5, 8, 17, 33, 64)

asked: list[str] = []


class Driver:
    """Of an H200 that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, number: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_nothing(self: Any, key: Any, signature: Any, number: int, *rest: Any) -> Any:
    asked.append(self.fn.__name__)
    kernel = SimpleNamespace(
        function=None, packed_metadata=None, run=lambda *a: None, launch_metadata=lambda *a: None
    )
    self.device_caches[number][0][key] = kernel
    return kernel


def fresh() -> None:
    asked.clear()
    for kernel in launch.kernels().values():
        kernel.function.device_caches.clear()
    paged_decode.warm_up.cache_clear()
    paged_decode.shared_workspace.cache_clear()


def caches(kv_heads: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages as vLLM lays them out, tokens before heads."""
    kv = torch.empty(20000, PAGE, kv_heads, 2 * size, dtype=dtype, device=META).transpose(1, 2)
    return kv.chunk(2, -1)


def part(shape: tuple[int, ...], dtype: torch.dtype, begin: int = 1) -> torch.Tensor:
    """A part of a step's tensor, which begins anywhere."""
    whole = torch.empty(begin + shape[0], *shape[1:], dtype=dtype, device=META)
    return whole[begin:]


def prefill(heads: int, kv_heads: int, size: int, cache: torch.dtype, patterns: tuple) -> dict:
    fresh()
    shape = (DTYPE, size, heads, kv_heads)
    device_break_even.warm_up(*shape, page=PAGE, device=META, cache_dtype=cache)
    k, v = caches(kv_heads, size, cache)
    one = torch.ones((), device=META) if cache == FP8 else None
    sums = PageSums(k, DTYPE)
    sums.update(k, torch.zeros(2, dtype=torch.int64, device=META))
    first = torch.zeros(1, dtype=torch.int32, device=META)
    sums.means(first, 1, torch.arange(kv_heads, device=META), one)
    made = len(asked)
    for step in PREFILLS:
        rows, lengths = ([pair[i] for pair in step] for i in (0, 1))
        q = part((sum(rows), (heads + 2 * kv_heads) * size), DTYPE, begin=3)
        q = q[:, : heads * size].unflatten(1, (heads, size))
        table = part((len(step), LONGEST // PAGE), torch.int32)
        starts = torch.empty(len(step) + 1, dtype=torch.int32, device=META)
        indices = device.plan_on_device(
            q, k, table, rows, lengths, patterns, scale=0.1, coverage=0.95, means=sums.means,
            k_scale=one,
        )  # fmt: skip
        sparse_prefill(
            q, k, v, table, starts, part((len(step),), torch.int32), indices, scale=0.1,
            out=torch.empty_like(q), k_scale=one, v_scale=one,
        )  # fmt: skip
    return {"made": made, "added": asked[made:]}


def decode(
    heads: int, kv_heads: int, size: int, cache: torch.dtype, rows: int, shares: bool, softmax: str
) -> dict:
    fresh()
    most = max(SEQUENCES)
    paged_decode.warm_up(
        META, DTYPE, cache, heads, kv_heads, size, PAGE, LONGEST, most, softmax, None, False, rows,
        shares,
    )  # fmt: skip
    made = len(asked)
    k, v = caches(kv_heads, size, cache)
    one = torch.ones((), device=META) if cache == FP8 else None
    unified = softmax == "unified"
    phi = torch.zeros(heads, device=META) if unified else None
    flagged = torch.zeros(1, dtype=torch.int64, device=META) if unified else None
    workspace = paged_decode.Workspace()
    members = paged_decode.members_of(heads // kv_heads, size, rows)
    room = shared_prefix.Room(most, members, META) if shares and members > 1 else None
    for seqs in SEQUENCES:
        for tokens in range(1, rows + 1):
            q = part((seqs * tokens, (heads + 2 * kv_heads) * size), DTYPE, begin=3)
            q = q[:, : heads * size].unflatten(1, (heads, size))
            table, lens = part((seqs, LONGEST // PAGE), torch.int32), part((seqs,), torch.int32)
            starts = part((seqs + 1,), torch.int32)
            shared = None
            if room is not None and seqs > 1:
                shared = shared_prefix.shared_prefixes(
                    table, starts, lens, page=PAGE, members=members, into=room
                )
            paged_decode.paged_decode(
                q, k, v, table, lens, scale=0.1, out=torch.empty_like(q), softmax=softmax, phi=phi,
                flagged=flagged, query_start_loc=starts, max_query_len=tokens, shared=shared,
                workspace=workspace, k_scale=one, v_scale=one,
            )  # fmt: skip
    return {"made": made, "added": asked[made:]}


def main() -> None:
    driver.set_active(Driver())
    jit.JITFunction._do_compile = compile_nothing
    launch.target_of = lambda given: launch.TARGETS["sm_90"]
    launch.sms_of = lambda given: 132
    launch.check_fp8 = lambda given: None
    index_lists.upload = device.upload = lambda x, given: x.to(given)
    found = {}
    for name, shape in SHAPES.items():
        found[f"prefill-{name}"] = prefill(*shape, (ADAPTIVE,) * shape[0])
        found[f"decode-{name}"] = decode(*shape, 1, False, "online")
    mixed = tuple(FIXED if i % 2 else ADAPTIVE for i in range(32))
    found["prefill-mixed"] = prefill(*SHAPES["32-8-128"], mixed)
    found["decode-unified"] = decode(*SHAPES["32-8-128"], 1, False, "unified")
    for name in ("32-8-128", "7-1-128"):
        for rows in (1, 3, 4):
            found[f"decode-{name}-{rows}-shared"] = decode(*SHAPES[name], rows, True, "online")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
