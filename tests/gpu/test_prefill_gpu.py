"""The Triton sparse prefill against fp64 masked softmax."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_close, make_case, random_indices
from gpu_cases import ANY_DTYPE, BFLOAT16, FLOAT16, FLOAT32, caches_to_device, to_device

from vllm_sparse.kernels.block_indices import BlockIndices
from vllm_sparse.kernels.gpu.sparse_prefill import sparse_prefill

DTYPES = [FLOAT32, FLOAT16, BFLOAT16]


def run(case: Case, indices: BlockIndices | None, **more) -> tuple[torch.Tensor, torch.Tensor]:
    on = caches_to_device(case)
    # Poisoned and filled before the truth is known: nothing may be left over or borrowed.
    out = torch.full_like(on.q, torch.nan)
    indices = None if indices is None else to_device(indices)
    more = {k: to_device(v) if isinstance(v, torch.Tensor) else v for k, v in more.items()}
    got = sparse_prefill(*on.args, indices, scale=case.scale, out=out, **more)
    assert got[0].data_ptr() == out.data_ptr()
    return got[0].cpu(), got[1].cpu()


def check(case: Case, indices: BlockIndices | None, logits: float = 0.0) -> None:
    assert_close(case, indices, run(case, indices), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 111, 2000])
def test_lengths(n, dtype):
    case = make_case([min(n, 130)], [n], heads=2, kv_heads=1, dtype=dtype)
    check(case, None)
    check(case, random_indices(case, 0.4))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page"),
    [
        pytest.param(*t, id="H{}-KV{}-D{}-page{}".format(*t))
        for t in [(1, 1, 64, 16), (4, 1, 128, 128), (3, 1, 96, 32), (5, 1, 80, 48), (2, 2, 256, 64)]
    ],
)
def test_shapes(heads, kv_heads, head_size, page):
    case = make_case(
        [70, 1, 129], [70, 200, 330], heads=heads, kv_heads=kv_heads, head_size=head_size,
        page=page, dtype=ANY_DTYPE,
    )  # fmt: skip
    check(case, None)
    check(case, random_indices(case, 0.3))
