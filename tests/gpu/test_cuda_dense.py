"""Dense chunks on a GPU: when vLLM's FlashAttention takes them. Stand-ins compute what it would."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import make_case
from gpu_cases import HAS_GPU
from vllm.platforms.interface import DeviceCapability

from vllm_sparse import compat, cuda_dense
from vllm_sparse.cuda_dense import Flash, flash_for
from vllm_sparse.kernels import reference
from vllm_sparse.stats import STATS

pytestmark = pytest.mark.skipif(HAS_GPU, reason="stands in for a GPU; here is one")

CPU = torch.device("cpu")


def flash_attn(
    *, q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
    window_size, block_table, fa_version, s_aux=None,
):  # fmt: skip
    """What FlashAttention of a version would write; refuses what it would."""
    assert causal and fa_version in (2, 3)
    if s_aux is not None:
        assert fa_version == 3 and s_aux.dtype == torch.bfloat16
        s_aux = s_aux.float()
    assert max_seqlen_q >= int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max())
    assert max_seqlen_k >= int(seqused_k.max())
    left, right = window_size
    assert (left, right) == (-1, -1) or right == 0
    for x in (k, v):
        assert all(s % 8 == 0 for s in x.stride()[:-1]) and x.stride(-1) == 1
    caches = (k.transpose(1, 2), v.transpose(1, 2))
    where = (q, *caches, block_table, cu_seqlens_q, seqused_k, None)
    got = reference.sparse_prefill(*where, scale=softmax_scale, sinks=s_aux)[0]
    if left >= 0:
        got = windowed(where, softmax_scale, left)
    out.copy_(got)


def windowed(where, scale: float, left: int) -> torch.Tensor:
    q, k_cache, v_cache, table, starts, lens, _ = where
    rows = []
    for s in range(len(lens)):
        n = int(lens[s])
        keys, values = (
            torch.cat([c[p] for p in table[s].tolist()], 1)[:, :n] for c in (k_cache, v_cache)
        )
        mine = q[int(starts[s]) : int(starts[s + 1])]
        position = n - len(mine) + torch.arange(len(mine))
        apart = position[:, None] - torch.arange(n)
        group = q.shape[1] // keys.shape[0]
        logits = torch.einsum("thd,hnd->htn", mine, keys.repeat_interleave(group, 0)) * scale
        logits = logits.masked_fill((apart < 0) | (apart > left), -torch.inf)
        each = values.repeat_interleave(group, 0)
        rows.append(torch.einsum("htn,hnd->thd", logits.softmax(-1), each))
    return torch.cat(rows)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("window", [None, 50])
def test_it_attends_as_the_reference_does(kv_heads, window):
    case = make_case([5, 70], [90, 200], heads=4, kv_heads=kv_heads, dtype=torch.float32)
    out = torch.full_like(case.q, torch.nan)
    Flash(flash_attn, 3).attend(
        case.q, case.k_cache, case.v_cache, case.block_table, case.query_start_loc, case.seq_lens,
        scale=case.scale, longest_query=70, longest=200, window=window, out=out,
    )  # fmt: skip
    where = (case.q, case.k_cache, case.v_cache, case.block_table, case.query_start_loc)
    if window is None:
        want = reference.sparse_prefill(*where, case.seq_lens, None, scale=case.scale)[0]
    else:
        want = windowed((*where, case.seq_lens, None), case.scale, window - 1)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


@pytest.fixture
def ask(monkeypatch):
    """flash_for where FlashAttention is the stand-in, and Triton's kernel the reference."""

    def run(function=flash_attn, version=3, **changes):
        flash_for.cache_clear()
        monkeypatch.setattr(compat, "flash_attention", lambda size, has_sinks: (function, version))
        monkeypatch.setattr(
            cuda_dense, "triton_dense",
            lambda *a, sinks, **k: reference.sparse_prefill(
                *a, sinks=None if sinks is None else sinks.float(), **k
            )[0],
        )  # fmt: skip
        given = dict(
            head_size=64, heads=4, kv_heads=2, page=16, dtype=torch.float32,
            cache_dtype=torch.float32, sinks=None, device=CPU,
        )  # fmt: skip
        return flash_for(**(given | changes))

    yield run
    flash_for.cache_clear()


def test_it_is_taken_where_it_agrees_with_triton(ask):
    assert ask() == Flash(flash_attn, 3)
    assert ask().__name__ == "FlashAttention 3"


def test_sinks_are_given_as_vllm_has_them(ask):
    assert ask(sinks=torch.bfloat16) == Flash(flash_attn, 3)
    before = STATS.fallbacks.get("flash_attention", 0)
    assert ask(sinks=torch.float32) is None  # the kernel's own check
    assert STATS.fallbacks["flash_attention"] == before + 1


def test_sinks_count_beside_the_keys():
    case = make_case([5, 70], [90, 200], heads=4, kv_heads=2, dtype=torch.float32)
    sinks = torch.tensor([3.0, -2.0, 0.5, 1.0], dtype=torch.bfloat16)
    out = torch.full_like(case.q, torch.nan)
    where = (case.q, case.k_cache, case.v_cache, case.block_table, case.query_start_loc)
    Flash(flash_attn, 3).attend(
        *where, case.seq_lens, scale=case.scale, longest_query=70, longest=200, window=None,
        out=out, sinks=sinks,
    )  # fmt: skip
    given = dict(scale=case.scale, sinks=sinks.float())
    want = reference.sparse_prefill(*where, case.seq_lens, None, **given)[0]
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version, counted", [(3, 1), (2, 0)])
def test_fp8_stays_with_triton_and_is_told_where_vllm_has_better(ask, version, counted):
    before = STATS.fallbacks.get("fp8_dense", 0)
    assert ask(version=version, cache_dtype=torch.float8_e4m3fn) is None
    assert STATS.fallbacks.get("fp8_dense", 0) == before + counted


def wrong(**given) -> None:
    flash_attn(**given)
    given["out"][3] += 0.1


def broken(**given) -> None:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize("function", [wrong, broken])
def test_one_that_does_not_agree_is_told_and_counted(ask, function, caplog):
    before = STATS.fallbacks.get("flash_attention", 0)
    assert ask(function) is None
    assert STATS.fallbacks["flash_attention"] == before + 1


def test_vllms_choice_is_asked(monkeypatch):
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import fa_utils

    assert compat.flash_attention(128) is None  # no GPU
    kind = type(current_platform)
    monkeypatch.setattr(kind, "is_cuda", lambda self: True)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attn, raising=False)
    for capability, version, want in (
        ((9, 0), 3, (flash_attn, 3)),
        ((8, 0), 2, (flash_attn, 2)),
        ((10, 0), 4, None),
        ((9, 0), 4, None),
        ((9, 0), None, None),
    ):
        monkeypatch.setattr(
            kind, "get_device_capability",
            classmethod(lambda cls, device_id=0, at=capability: DeviceCapability(*at)),
        )  # fmt: skip
        monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size, v=version: v)
        assert compat.flash_attention(128) == want
        # With sinks vLLM takes version 3 alone.
        monkeypatch.setattr(
            fa_utils, "get_flash_attn_version", lambda head_size, has_sinks, v=version: v
        )
        assert compat.flash_attention(128, has_sinks=True) == (want if version == 3 else None)


def test_a_flash_is_hashable():
    assert len({Flash(flash_attn, 3), dataclasses.replace(Flash(flash_attn, 2), version=3)}) == 1
