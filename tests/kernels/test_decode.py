"""Decode, cache writes and merging against their meaning."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, make_case
from isas import implementations
from test_prefill import DTYPES

from vllm_sparse.kernels import cpu, merge, reference, write_kv

decode = implementations(reference.paged_decode, cpu.paged_decode)


def run(decode, case):
    out = torch.full_like(case.q, torch.nan)
    return decode(
        case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens,
        scale=case.scale, out=out,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page"),
    [
        pytest.param(*t, id="H{}-KV{}-D{}-page{}".format(*t))
        for t in [(4, 4, 64, 16), (8, 2, 128, 128), (6, 1, 96, 32), (5, 1, 80, 48), (7, 7, 256, 64)]
    ],
)
def test_decode(decode, heads, kv_heads, head_size, page, dtype):
    lens = [1, 63, 64, 65, 111, 700]
    case = make_case(
        [1] * len(lens), lens, heads=heads, kv_heads=kv_heads, head_size=head_size, page=page,
        dtype=dtype,
    )  # fmt: skip
    assert_close(case, None, run(decode, case))


def test_a_sequence_without_keys(decode):
    case = make_case([1, 1], [5, 40])
    case.seq_lens[0] = 0
    out, lse = run(decode, case)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


def test_splits_over_threads_agree():
    case = make_case([1, 1], [9000, 30], heads=8, kv_heads=2)
    one = run(cpu.paged_decode, case)
    try:
        cpu.set_threads(3)
        many = run(cpu.paged_decode, case)
    finally:
        cpu.set_threads(1)
    torch.testing.assert_close(one, many, rtol=0, atol=2e-6)
    assert_close(case, None, many)


@pytest.mark.parametrize("layout", ["head-major", "token-major"])
def test_write_then_gather(layout):
    case = make_case([0], [100], page=32, layout=layout)
    key, value = torch.randn(7, 2, 64), torch.randn(7, 2, 64)
    table = case.block_table[0].long()
    slots = torch.tensor([int(table[p // 32]) * 32 + p % 32 for p in (0, 31, 32, 70, 99)])
    slots = torch.cat([slots, torch.tensor([-1])])  # one row is not stored, one is padding
    write_kv(key, value, case.k_cache, case.v_cache, slots)
    k = reference.gather_keys(case.k_cache, case.block_table[0], 100)
    v = reference.gather_keys(case.v_cache, case.block_table[0], 100)
    for row, position in enumerate((0, 31, 32, 70, 99)):
        assert torch.equal(k[:, position], key[row])
        assert torch.equal(v[:, position], value[row])
    assert k.shape == (2, 100, 64)
    assert not k.isnan().any()


def test_merge_of_disjoint_keys_is_exact():
    q, k, v = torch.randn(9, 64), torch.randn(50, 64), torch.randn(50, 64)
    whole, whole_lse = reference.attend(q, k, v, None, 0.125)
    parts = [reference.attend(q, k[s], v[s], None, 0.125) for s in (slice(0, 13), slice(13, 50))]
    out, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)


def test_merge_with_nothing():
    out, lse = torch.randn(3, 64), torch.tensor([0.5, -torch.inf, 7.0])
    out[1] = 0
    empty = torch.zeros(3, 64), torch.full((3,), -torch.inf)
    for a, b in (((out, lse), empty), (empty, (out, lse))):
        merged, merged_lse = merge(*a, *b)
        assert torch.equal(merged, out)
        assert torch.equal(merged_lse, lse)
