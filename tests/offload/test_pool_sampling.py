"""What the pool's samplers read: estimates are right on average, and the bound holds."""

from __future__ import annotations

import pytest
import torch
from isas import available
from pools import ask, exact, fill, make_pool, queries, some

from vllm_sparse.cpu_offload import native
from vllm_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.native_error() is not None, reason="needs the native kernels")

ROWS = 3000
FIRST, LAST = 5, 2987


def relative(out: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    return (out.double() - want).norm(dim=-1) / want.norm(dim=-1)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_samples_are_right_on_average(kv_dtype):
    # Every layer draws its own sample of the same rows.
    pool = make_pool(
        layers=64, sampler="vattention", rows=100, kv_dtype=kv_dtype, host_bytes=512 << 20
    )
    slot = fill(pool, "a", ROWS)
    q = queries(1)
    k, v = pool.read(slot, 0, FIRST, LAST)
    want, want_lse = exact(q[0], k, v, pool.scale)
    numerator, denominator = [], []
    for layer in range(64):
        out, lse = ask(pool, layer, q, [slot], [FIRST], [LAST])
        weight = (lse[0].double() - want_lse).exp()
        numerator.append(out[0].double() * weight[:, None])
        denominator.append(weight)
    read = pool.stats()["rows_read"] / pool.stats()["tickets"] / 2
    assert 98 <= read <= 101
    deviation = torch.stack(denominator).std(0) / 8  # of the mean of 64
    assert ((torch.stack(denominator).mean(0) - 1).abs() < 4 * deviation + 1e-6).all()
    single = torch.stack(
        [relative(n / d[:, None], want) for n, d in zip(numerator, denominator, strict=True)]
    )
    assert relative(torch.stack(numerator).mean(0), want).mean() < 0.3 * single.mean()
    pool.shutdown()


def test_hashed_samples_are_right_on_average_over_hashes():
    k, v = some(ROWS)
    q = queries(1)
    weights, read = [], 0
    for seed in range(40):
        pool = make_pool(layers=1, sampler="lsh", rows=250, sampler_options={"seed": seed})
        slot = fill(pool, "a", ROWS)
        last = LAST - seed  # what is drawn depends on it
        _, want_lse = exact(q[0], k[FIRST:last], v[FIRST:last], 64**-0.5)
        _, lse = ask(pool, 0, q, [slot], [FIRST], [last])
        weights.append((lse[0].double() - want_lse).exp())
        read += pool.stats()["rows_read"] / 80
        pool.shutdown()
    weights = torch.stack(weights)
    deviation = weights.std(0) / 40**0.5
    assert 125 < read <= 251
    assert ((weights.mean(0) - 1).abs() < 4 * deviation).all()
    assert (weights.mean(0) - 1).abs().mean() < 0.05


def test_the_bound_holds():
    options = {"epsilon": 0.1, "delta": 0.05, "least": 64, "share": 0.0}
    pool = make_pool(layers=16, sampler="vattention", host_bytes=256 << 20, sampler_options=options)
    slot = pool.open("a")
    k, v = some(8000)
    v += 1
    for layer in range(16):
        pool.append(slot, layer, k, v)
    errors = []
    for layer in range(16):
        q = queries(1, seed=layer)
        want, _ = exact(q[0], k, v, pool.scale)
        out, _ = ask(pool, layer, q, [slot], [0], [8000])
        logits = q[0].view(2, 4, 64) @ k.permute(1, 2, 0) * pool.scale
        squares = logits.softmax(-1) @ v.square().sum(-1).T[..., None]  # [2, 4, 1]
        errors.append((out[0].double() - want).norm(dim=-1) / squares.flatten().double().sqrt())
    failed = (torch.cat(errors) > 0.1).double().mean()
    assert failed <= 0.1  # 0.05, of 128 correlated heads
    assert pool.stats()["rows_read"] < pool.stats()["rows_there"] / 2
    pool.shutdown()


def test_needles_are_found_by_all_samplers():
    for sampler in ("topk", "vattention", "lsh"):
        pool = make_pool(layers=1, sampler=sampler, rows=128)
        k, v = some(ROWS)
        q = queries(1)
        for head in range(8):
            k[100 + 200 * head, head // 4] = 6 * q[0, head] / q[0, head].norm() * 2
        slot = pool.open("a")
        pool.append(slot, 0, k, v)
        out, _ = ask(pool, 0, q, [slot], [0], [ROWS])
        want, _ = exact(q[0], k, v, pool.scale)
        assert relative(out[0], want).max() < 0.05, sampler
        pool.shutdown()


def test_topk_reads_the_heaviest_and_nothing_else():
    pool = make_pool(layers=1, sampler="topk", rows=50)
    slot = fill(pool, "a", ROWS)
    q = queries(1)
    _, lse = ask(pool, 0, q, [slot], [0], [ROWS])
    k, v = some(ROWS)
    _, every = exact(q[0], k, v, pool.scale)
    assert (lse[0].double() < every).all()
    assert pool.stats()["rows_read"] == 100
    group = q[0].view(2, 4, 64)
    for h in range(2):
        share = (group[h] @ k[:, h].T * pool.scale).softmax(-1).mean(0)
        best = share.topk(50).values.sum() * 4
        got = (lse[0].view(2, 4)[h].double() - every.view(2, 4)[h]).exp().sum()
        assert got > 0.8 * best
    pool.shutdown()


@pytest.mark.parametrize("sampler", ["topk", "vattention", "lsh"])
@pytest.mark.parametrize("size, heads", [(64, 8), (80, 2), (256, 6)])
def test_all_instruction_sets_sample_the_same(sampler, size, heads):
    answers = []
    for isa in available(native):
        native.set_isa(isa)
        pool = make_pool(
            layers=1, sampler=sampler, rows=200, heads=heads, head_size=size, page_rows=16
        )
        slot = fill(pool, "a", 1000)
        q = queries(1, heads=heads, size=size)
        answers.append((*ask(pool, 0, q, [slot], [3], [990]), pool.stats()["rows_read"]))
        pool.shutdown()
    native.set_isa("")
    for out, lse, read in answers[1:]:
        torch.testing.assert_close(out, answers[0][0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(lse, answers[0][1], rtol=1e-3, atol=1e-3)
        assert read == answers[0][2]


def test_rows_that_come_while_decoding_are_sampled_like_others():
    whole, grown = (make_pool(layers=1, sampler="lsh", rows=200) for _ in range(2))
    k, v = some(1500)
    slots = whole.open("a"), grown.open("a")
    whole.append(slots[0], 0, k, v)
    grown.append(slots[1], 0, k[:700], v[:700])
    for n in range(700, 1500):
        grown.append(slots[1], 0, k[n : n + 1], v[n : n + 1])
    q = queries(1)
    want, _ = exact(q[0], k, v, whole.scale)
    errors = [
        relative(ask(p, 0, q, [s], [0], [1500])[0][0], want).mean()
        for p, s in ((whole, slots[0]), (grown, slots[1]))
    ]
    assert errors[1] < 1.5 * errors[0] + 0.05
    for pool in (whole, grown):
        pool.shutdown()


def test_samples_depend_on_neither_batch_nor_slot():
    pool = make_pool(layers=1, sampler="vattention", rows=100)
    slots = [fill(pool, str(i), ROWS, seed=1) for i in range(3)]
    q = queries(1).expand(3, -1, -1)
    out, lse = ask(pool, 0, q, slots, [0] * 3, [ROWS] * 3)
    alone, _ = ask(pool, 0, q[:1], slots[2:], [0], [ROWS])
    assert torch.equal(out[0], out[1]) and torch.equal(alone[0], out[2])
    assert torch.equal(lse[0], lse[2])
    pool.shutdown()


@pytest.mark.parametrize("sampler", ["topk", "vattention", "lsh"])
@pytest.mark.parametrize("kept", [1024, 1000])  # between shared pages, and within one
def test_what_samplers_know_follows_shared_and_truncated_pages(sampler, kept):
    pool = make_pool(sampler=sampler, rows=128)
    q = queries(1)
    fill(pool, "a", 2000, keys=[str(n) for n in range(31)])
    slot = pool.open("b")
    assert pool.share(slot, [str(n) for n in range(16)]) == 1024
    # Rows that weigh nearly everything, and are cut off again.
    loud = 4 * some(500, seed=3)
    for layer in range(2):
        pool.append(slot, layer, *loud)
    pool.truncate(slot, kept)
    k, v = some(1976 - kept, seed=4)
    for head in range(8):
        k[100 * head, head // 4] = 12 * q[0, head] / q[0, head].norm()
    for layer in range(2):
        pool.append(slot, layer, k[:700], v[:700])
        for n in range(700, len(k)):  # decoded
            pool.append(slot, layer, k[n : n + 1], v[n : n + 1])
    before_k, before_v = some(2000)
    want, _ = exact(
        q[0], torch.cat([before_k[:kept], k]), torch.cat([before_v[:kept], v]), pool.scale
    )
    for layer in range(2):
        out, _ = ask(pool, layer, q, [slot], [0], [1976])
        assert relative(out[0], want).max() < 0.05
    assert pool.stats()["rows_read"] < 0.1 * pool.stats()["rows_there"]
    pool.shutdown()


@pytest.mark.parametrize(
    "sampler, options, says",
    [
        ("lsh", {"bits": 7.5}, "bits: got 7.5; give a whole number"),
        ("topk", {"even": 0.1}, "'topk' has no option 'even'; it has share, least"),
        ("vattention", {"epsilon": 2}, "epsilon: got 2; give a number from 0 to 1"),
    ],
)
def test_bad_options_are_named(sampler, options, says):
    with pytest.raises(ValueError, match=says):
        make_pool(sampler=sampler, sampler_options=options)
