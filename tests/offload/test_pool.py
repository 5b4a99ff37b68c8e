"""The pool: rows in, attention over them out, whoever computes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest
import torch
from pools import HEADS, KV_HEADS, SIZE, ask, exact, fill, make_pool, queries, some

from vllm_sparse.cpu_offload import StoreFull
from vllm_sparse.cpu_offload.store import quantise
from vllm_sparse.kernels import cpu

KINDS = ["inline", "thread", "process"]


@pytest.fixture
def pool():
    pool = make_pool()
    yield pool
    pool.shutdown()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["exact", "topk", "vattention", "lsh"])
def test_short_contexts_are_read_whole_by_every_sampler(kind, sampler):
    pool = make_pool(kind=kind, sampler=sampler, layers=1)
    lengths = [1, 63, 64, 65, 300]
    slots = [fill(pool, str(n), n, seed=n) for n in lengths]
    q = queries(len(slots))
    first = [0, 0, 10, 64, 7]
    last = [1, 63, 10, 65, 290]
    for _ in range(3):
        out, lse = ask(pool, 0, q, slots, first, last)
        for b, n in enumerate(lengths):
            k, v = some(n, seed=n)
            o, e = exact(q[b], k[first[b] : last[b]], v[first[b] : last[b]], pool.scale)
            torch.testing.assert_close(out[b].double(), o, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[b].double(), e, rtol=1e-5, atol=1e-5)
    assert lse[2].isneginf().all() and not out[2].any()
    assert pool.stats()["rows_read"] == pool.stats()["rows_there"]
    pool.shutdown()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_rows_and_answers_in_every_dtype(dtype, kv_dtype):
    pool = make_pool(dtype=dtype, kv_dtype=kv_dtype, sampler="vattention")
    slot = pool.open("a")
    k, v = (x.to(dtype) for x in some(200))
    for part in (slice(0, 1), slice(1, 130), slice(130, 130), slice(130, 200)):
        pool.append(slot, 1, k[part], v[part])
    kept_k, kept_v = pool.read(slot, 1, 0, 200)
    for kept, given in ((kept_k, k), (kept_v, v)):
        if kv_dtype == torch.int8:
            half_step = given.float().abs().amax(-1, keepdim=True) / 127 / 2
            assert ((kept - given.float()).abs() <= half_step * 1.001).all()
        else:
            assert torch.equal(kept, given.to(kv_dtype))
    q = queries(1).to(dtype)
    out, lse = ask(pool, 1, q, [slot], [0], [200])
    o, e = exact(q[0], kept_k, kept_v, pool.scale)
    step = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    step = max(step, 1e-4) if kv_dtype == torch.int8 else step  # queries have 16 bits then
    torch.testing.assert_close(out[0].double(), o, rtol=step, atol=step)
    torch.testing.assert_close(lse[0].double(), e, rtol=1e-2, atol=1e-2)
    pool.shutdown()


def test_several_requests_are_appended_to_in_one_call(pool):
    slots = [fill(pool, str(n), n, seed=n) for n in (63, 64, 100)]
    k, v = some(3, seed=5)
    pool.append_each(0, slots, k, v)
    pool.append_each(1, slots, k, v)
    more = some(6, seed=6)
    pool.append_each(0, slots, *more, counts=[0, 5, 1])
    assert [pool.length(s, 0) for s in slots] == [64, 70, 102]
    assert torch.equal(pool.read(slots[0], 0, 63, 64)[0], k[:1])
    assert torch.equal(pool.read(slots[1], 0, 65, 70)[1], more[1][:5])
    assert torch.equal(pool.read(slots[2], 0, 101, 102)[1], more[1][5:])
    assert torch.equal(pool.read(slots[2], 1, 100, 101)[0], k[2:])


def test_prefill_reads_the_store_where_it_lies():
    for page_rows, dtype in ((256, torch.float32), (1024, torch.bfloat16)):
        pool = make_pool(page_rows=page_rows, dtype=dtype, sampler="lsh")
        fill(pool, "before", 100, seed=3)
        slots = [fill(pool, "a", 1500, seed=1), fill(pool, "b", 700, seed=2)]
        q = torch.cat([queries(70, seed=4), queries(33, seed=5)]).to(dtype)
        k_cache, v_cache = pool.prefill_view(1)
        out, lse = cpu.sparse_prefill(
            q, k_cache, v_cache, pool.block_table(slots),
            torch.tensor([0, 70, 103], dtype=torch.int32),
            torch.tensor([1500, 700], dtype=torch.int32), None, scale=pool.scale,
        )  # fmt: skip
        for row, slot, seen in ((0, 0, 1431), (69, 0, 1500), (70, 1, 668), (102, 1, 700)):
            k, v = (x.to(dtype)[:seen] for x in some([1500, 700][slot], seed=slot + 1))
            o, e = exact(q[row], k, v, pool.scale)
            step = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out[row].double(), o, rtol=step, atol=step)
            torch.testing.assert_close(lse[row].double(), e, rtol=step, atol=step)
        pool.shutdown()


def test_prefixes_are_shared_when_all_layers_have_them(pool):
    slot = pool.open("a")
    k, v = some(200)
    pool.append(slot, 0, k, v, keys=["x", "y", "z"])
    assert pool.has(["x"]) == 0  # the other layer is not there yet
    pool.append(slot, 1, k, v)
    assert pool.has(["x", "y", "z", "w"]) == 3 and pool.has(["w", "x"]) == 0
    other = pool.open("b")
    assert pool.share(other, ["x", "y", "other", "z"]) == 128
    assert torch.equal(pool.block_table([other])[0, :2], pool.block_table([slot])[0, :2])
    q = queries(1)
    assert torch.equal(
        ask(pool, 1, q, [slot], [3], [128])[0], ask(pool, 1, q, [other], [3], [128])[0]
    )
    with pytest.raises(ValueError, match="has rows already"):
        pool.share(other, ["x"])


def test_a_shared_page_is_copied_before_rows_are_written_over(pool):
    slot = fill(pool, "a", 128, keys=["x", "y"])
    other = pool.open("b")
    pool.share(other, ["x", "y"])
    pool.truncate(other, 100)
    k, v = some(20, seed=7)
    pool.append(other, 0, k, v)
    assert torch.equal(pool.read(other, 0, 0, 100)[0], some(128)[0][:100])
    assert torch.equal(pool.read(other, 0, 100, 120)[0], k)
    assert torch.equal(pool.read(slot, 0, 0, 128)[0], some(128)[0])


def test_memory_of_a_process_alone_is_taken_at_the_start():
    """Taken as rows come, it could be missing in the middle of requests."""
    before = psutil.Process().memory_info().rss
    pool = make_pool(host_bytes=256 << 20)
    assert psutil.Process().memory_info().rss - before > 250 << 20
    pool.shutdown()


def test_a_full_store_says_so_and_changes_nothing():
    pool = make_pool(host_bytes=4 * 2 * 2 * 64 * 2 * 64 * 4)  # four pages
    assert pool.capacity().pages == 4
    slot = fill(pool, "a", 130)
    with pytest.raises(StoreFull, match="2 pages of host memory are wanted, and 1 of 4"):
        pool.append(slot, 0, *some(160))
    assert pool.length(slot, 0) == 130 and pool.capacity().free_pages == 1
    pool.append(slot, 0, *some(100))
    for i in range(7):
        pool.open(str(i))
    with pytest.raises(StoreFull, match="8 requests are open already"):
        pool.open("one more")
    pool.close_request(slot)
    assert pool.capacity().free_pages == 4
    with pytest.raises(ValueError, match="max_tokens 8192"):
        pool.reserve(1, 9000)
    pool.shutdown()


def test_idle_prefixes_give_way_the_oldest_first():
    pool = make_pool(host_bytes=4 * 2 * 2 * 64 * 2 * 64 * 4)
    for name in ("a", "b"):
        pool.close_request(fill(pool, name, 128, seed=ord(name), keys=[name + "0", name + "1"]))
    assert pool.stats()["host_bytes_used"] == 0 and pool.stats()["host_bytes_idle"] > 0
    slot = fill(pool, "c", 64)
    assert pool.has(["a0", "a1"]) == 1 and pool.has(["b0", "b1"]) == 2
    again = pool.open("a again")
    assert pool.share(again, ["a0", "a1"]) == 64
    assert torch.equal(pool.read(again, 1, 0, 64)[0], some(128, seed=ord("a"))[0][:64])
    assert pool.length(slot) == 64
    pool.shutdown()


def test_what_cannot_be_is_refused(pool):
    slot = fill(pool, "a", 10)
    q = queries(1)
    for call, match in (
        (lambda: pool.submit(0, q, [slot], [0], [11]), "rows 0 to 11 are not among the 10"),
        (lambda: pool.submit(0, q, [5], [0], [1]), "slot: 5 is not open"),
        (lambda: pool.submit(0, q[:, :1], [slot], [0], [1]), "q: got"),
        (lambda: pool.read(slot, 0, 5, 11), "rows 5 to 11"),
        (lambda: pool.append(slot, 7, *some(1)), "layer: got 7"),
        (lambda: pool.append(slot, 0, *some(1, kv_heads=1)), "k, v: got"),
        (lambda: pool.truncate(slot, -1), "rows: got -1"),
        (lambda: make_pool(sampler="best"), "sampler: got 'best'"),
        (lambda: make_pool(sampler="lsh", sampler_options={"epsilon": 0.1}), "no option 'epsilon'"),
        (lambda: make_pool(sampler="lsh", sampler_options={"bits": 9}), "bits: got 9"),
        (lambda: make_pool(kind="fork"), "kind: got 'fork'"),
        (lambda: make_pool(heads=7), "heads: got 7"),
        (lambda: make_pool(host_bytes=1000), "host_bytes: got 1000"),
        (lambda: make_pool(page_rows=100), "page_rows: got 100"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(MemoryError, match="were asked for, and"):
        make_pool(host_bytes=1 << 50)
    with pytest.raises(MemoryError, match="were asked for, and"):
        make_pool(host_bytes=1 << 50, kind="process")


def test_two_tickets_may_be_open(pool):
    slots = [fill(pool, str(n), 100, seed=n) for n in range(2)]
    q = queries(2)
    want = [ask(pool, 0, q[b : b + 1], slots[b : b + 1], [0], [100]) for b in range(2)]
    tickets = [pool.submit(0, q[b : b + 1], slots[b : b + 1], [0], [100]) for b in range(2)]
    with pytest.raises(RuntimeError, match="2 tickets are open"):
        pool.submit(0, q[:1], slots[:1], [0], [1])
    for b in (1, 0):
        out, lse = torch.empty(1, HEADS, SIZE), torch.empty(1, HEADS)
        pool.collect(tickets[b], out, lse)
        assert torch.equal(out, want[b][0]) and torch.equal(lse, want[b][1])


def test_numbers_that_are_not_finite_stay_with_their_request():
    pool = make_pool(sampler="vattention", layers=1, kind="thread")
    good, bad = fill(pool, "good", 4000, seed=1), pool.open("bad")
    k, v = some(4000, seed=2)
    k[7, 0, 3] = torch.nan
    pool.append(bad, 0, k, v)
    q = queries(3)
    q[2, 0, 0] = torch.inf
    alone = ask(pool, 0, q[:1], [good], [0], [4000])
    out, lse = ask(pool, 0, q, [good, bad, good], [0, 0, 0], [4000, 4000, 4000])
    assert torch.equal(out[0], alone[0][0]) and torch.equal(lse[0], alone[1][0])
    assert out[2, 0].isnan().any() and KV_HEADS == 2 and out[2, HEADS // 2 :].isfinite().all()
    pool.shutdown()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_rows_hide_no_number_that_is_not_finite(isa, dtype, monkeypatch):
    if isa == "torch":
        monkeypatch.setattr(cpu, "library_file", lambda: None)
    pool = make_pool(dtype=dtype, kv_dtype=torch.int8, layers=1)
    assert (pool.store.file is None) == (isa == "torch")
    k, v = (x.to(dtype) for x in some(300))
    k[5, 0], k[6, 0], v[7, 1] = 0.0, 1e-40, torch.linspace(-1, 1, SIZE)
    good, q = pool.open("good"), queries(1).to(dtype)
    pool.append(good, 0, k, v)
    page = pool.block_table([good])[0, 0]
    for which, x in enumerate((k, v)):
        numbers, scales = quantise(x[:64].transpose(0, 1))
        assert torch.equal(pool.store.rows(0)[page, :, :, which].float(), numbers)
        assert torch.equal(pool.store.scales(0)[page, :, :, which], scales)
    want = ask(pool, 0, q, [good], [0], [300])
    for n, number in enumerate((torch.nan, torch.inf, -torch.inf)):
        for which in (0, 1):
            bad, both = pool.open("bad"), [k.clone(), v.clone()]
            both[which][10 + n, 1, SIZE - 1 - 20 * n] = number
            pool.append(bad, 0, *both)
            assert not pool.read(bad, 0, 0, 300)[which][10 + n, 1].isfinite().any()
            out, lse = ask(pool, 0, q, [bad], [0], [300])
            assert not out[0, HEADS // 2 :].isfinite().any()
            assert which == 1 or not lse[0, HEADS // 2 :].isfinite().any()
            assert torch.equal(out[0, : HEADS // 2], want[0][0, : HEADS // 2])  # the other KV head
            pool.close_request(bad)
    assert torch.equal(ask(pool, 0, q, [good], [0], [300])[0], want[0])
    pool.shutdown()


@pytest.mark.skipif(cpu.native_error() is not None, reason="needs the native kernels")
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_rows_of_a_kv_head_are_not_split_at_batch_1(kv_heads):
    pool = make_pool(kind="process", actors=2, kv_heads=kv_heads)
    slot = fill(pool, "a", 5000)
    for _ in range(30):
        ask(pool, 0, queries(1), [slot], [0], [5000])
    stats = pool.stats()
    others = [pool._ring.answered(actor) for actor in range(2)]
    assert stats["items"] == 30 * kv_heads
    # Each item has one answerer; the worker answers twice only what nobody else did in time.
    assert stats["items_own"] + stats["items_rescued"] + sum(others) >= 30 * kv_heads
    assert stats["items_own"] + sum(others) <= 30 * kv_heads
    pool.shutdown()


@pytest.mark.skipif(cpu.native_error() is not None, reason="needs the native kernels")
def test_the_library_that_is_tested_answers(tmp_path, monkeypatch):
    """Another build, such as an instrumented one, is what pools hand to all who answer."""
    other = tmp_path / "_cpu.abi3.so"
    shutil.copy(cpu.library_file(), other)
    monkeypatch.setattr(cpu, "LIBRARY_FILE", other)
    pool = make_pool(kind="process", sampler="vattention")
    slot = fill(pool, "a", 300)
    ask(pool, 0, queries(1), [slot], [0], [300])
    assert str(other) in Path("/proc/self/maps").read_text()
    answering = [child.pid for child in psutil.Process().children(recursive=True)]
    assert any(str(other) in Path(f"/proc/{pid}/maps").read_text() for pid in answering)
    pool.shutdown()
