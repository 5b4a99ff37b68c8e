"""What planning takes of memory for a while, against what vLLM is shown of it."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import HAS_GPU
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_sparse.cuda_runtime import workspace_bytes
from vllm_sparse.kernels.gpu import index_lists, launch
from vllm_sparse.kernels.gpu.block_sums import _block_sums
from vllm_sparse.kernels.gpu.sparse_prefill import sparse_prefill
from vllm_sparse.patterns import ADAPTIVE, HeadPattern
from vllm_sparse.planner import device

pytestmark = pytest.mark.skipif(HAS_GPU, reason="kernels are launched on torch's meta device")

META = torch.device("meta")
PAGE = 16
MIB = 1 << 20


class Memory(TorchDispatchMode):
    """The most bytes that are alive on the meta device at once, but for what was there before."""

    def __init__(self, *before: torch.Tensor) -> None:
        super().__init__()
        self.before = {x.untyped_storage()._cdata for x in before}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        for x in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(x, torch.Tensor) and x.device == META:
                storage = x.untyped_storage()
                if storage._cdata not in self.before:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


FIXED = {
    "vertical_slash": HeadPattern(kind="vertical_slash", vertical=4000, slash=4096),
    "block_sparse": HeadPattern(kind="block_sparse", blocks=100),
}


@pytest.mark.parametrize(
    "chunk, length, seqs, heads, size, kind",
    [
        (8192, 8192, 1, 32, 128, None),
        (8192, 131072, 1, 32, 128, None),
        (2048, 131072, 1, 32, 128, None),
        (8192, 131072, 4, 32, 128, None),
        (8192, 32768, 30, 32, 128, None),
        (16384, 131072, 1, 8, 256, None),
        (8192, 131072, 1, 32, 128, "vertical_slash"),
        (8192, 131072, 1, 32, 128, "block_sparse"),
    ],
)
def test_vllm_is_shown_what_a_step_takes(chunk, length, seqs, heads, size, kind, monkeypatch):
    monkeypatch.setattr(type(_block_sums), "run", lambda *a, **k: None)
    monkeypatch.setattr(launch, "target_of", lambda on: launch.TARGETS["sm_90"])
    for module in (device, index_lists):
        monkeypatch.setattr(module, "upload", lambda x, on: x.to(on))
    pattern = FIXED.get(kind, ADAPTIVE)
    rows, pages = chunk // seqs, length // PAGE
    q = torch.empty(rows * seqs, heads, size, dtype=torch.bfloat16, device=META)
    cache = torch.empty(pages, heads // 4, PAGE, 2 * size, dtype=torch.bfloat16, device=META)
    k_cache, v_cache = cache.chunk(2, -1)
    table, starts, lens = (
        torch.zeros(shape, dtype=torch.int32, device=META)
        for shape in ((seqs, pages), (seqs + 1,), (seqs,))
    )
    device.forget()
    with Memory(q, cache, table) as memory:
        indices = device.plan_on_device(
            q, k_cache, table, [rows] * seqs, [length] * seqs, (pattern,) * heads, scale=0.1,
            coverage=0.95,
        )  # fmt: skip
        where = (q, k_cache, v_cache, table, starts, lens, indices)
        sparse_prefill(*where, scale=0.1, out=q)
    device.forget()
    shown = workspace_bytes(chunk, length, heads, size, pattern.vertical or 0)
    assert 10 * MIB < memory.most < shown < 5 * memory.most, (memory.most, shown)
