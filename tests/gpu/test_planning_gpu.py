"""The Triton kernels that planning asks, and the plans made with them, against the CPU's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cases import make_case
from gpu_cases import ANY_DTYPE, FLOAT16, FLOAT32, HAS_GPU, caches_to_device, to_device
from known_heads import SCALE, Heads, noisy_prompt, paged
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_sparse.kernels import BlockIndices, reference
from vllm_sparse.kernels.gpu import index_lists as index_lists_kernels
from vllm_sparse.kernels.gpu import key_worth, launch
from vllm_sparse.kernels.gpu.block_means import PageSums, block_means
from vllm_sparse.kernels.gpu.index_lists import index_lists, index_lists_of
from vllm_sparse.kernels.gpu.row_scores import row_scores
from vllm_sparse.kernels.gpu.sparse_prefill import sparse_prefill
from vllm_sparse.kernels.gpu.write_kv import write_kv
from vllm_sparse.patterns import ADAPTIVE, HeadPattern
from vllm_sparse.planner import device, device_break_even, plan_prefill
from vllm_sparse.planner.device import plan_on_device


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
@pytest.mark.parametrize(
    "n, by_heaviest, base", [
        (1, False, False), (65, True, True), (300, False, True),
        (1500, True, True),  # more blocks than columns: only the heaviest blocks are looked at
    ],
)  # fmt: skip
def test_row_scores(dtype, n, by_heaviest, base):
    case = make_case([min(n, 10)], [n], heads=4, kv_heads=2, dtype=dtype)
    rows = case.q.shape[0]
    positions = torch.linspace(0, n - 1, rows).long()
    if rows > 2:
        positions[1] = -1  # sees nothing
    heads = torch.tensor([1, 3])
    base_from = positions // 64 if base else None
    wanted = dict(scale=case.scale, squares=True, columns=min(n, 20), by_heaviest=by_heaviest)
    where = (case.q, case.k_cache, case.block_table[0], positions, heads)
    want = reference.row_scores(*where, n, base_from=base_from, **wanted)
    got = row_scores(*map(to_device, where), n, base_from=to_device(base_from), **wanted)
    for name in ("blocks", "squares", "column_mass"):
        torch.testing.assert_close(
            getattr(got, name).cpu().sort(-1).values if name == "column_mass" else
            getattr(got, name).cpu(),
            getattr(want, name).sort(-1).values if name == "column_mass" else getattr(want, name),
            rtol=1e-4, atol=2e-6,
        )  # fmt: skip
    full = reference.row_scores(*where, n, base_from=base_from, **{**wanted, "columns": n})
    at = full.columns.argsort(-1).gather(1, got.columns.cpu())
    same = full.column_mass.gather(2, at[:, None].expand(-1, rows, -1))
    torch.testing.assert_close(got.column_mass.cpu(), same, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "group, rows, by_heaviest", [(3, 10, False), (5, 40, False), (9, 20, True)]
)
def test_row_scores_of_some_heads_of_odd_groups(group, rows, by_heaviest):
    """Heads share tiles of rows, of which some are padding and some are heads nobody asked for."""
    n = 200
    case = make_case([rows], [n], heads=2 * group, kv_heads=2, dtype=ANY_DTYPE)
    positions = torch.linspace(3, n - 1, rows).long()
    heads = torch.tensor([0, 2, *range(group + 1, 2 * group)])
    wanted = dict(scale=case.scale, columns=n, by_heaviest=by_heaviest, base_from=positions // 64)
    where = (case.q, case.k_cache, case.block_table[0], positions, heads)
    want = reference.row_scores(*where, n, **wanted)
    wanted["base_from"] = to_device(wanted["base_from"])
    got = row_scores(*map(to_device, where), n, **wanted)
    torch.testing.assert_close(got.blocks.cpu(), want.blocks, rtol=1e-4, atol=2e-6)
    masses = []
    for x in (got, want):
        order = x.columns.cpu().argsort(-1)
        masses.append(x.column_mass.cpu().gather(2, order[:, None].expand(-1, rows, -1)))
        mass = x.column_mass.cpu()
        worth = mass.amax(1) if by_heaviest else mass.sum(1) - mass.amax(1)
        assert (worth[:, 1:] <= worth[:, :-1] * 1.001 + 1e-6).all()  # the most worth first
    torch.testing.assert_close(*masses, rtol=1e-4, atol=2e-6)


def test_row_scores_of_a_logit_that_is_not_finite():
    case = make_case([3], [200], heads=2, kv_heads=1, dtype=ANY_DTYPE)
    case.k_cache[case.block_table[0][4], 0, 3, 5] = torch.inf  # key 67
    positions = torch.tensor([50, 100, 199])
    where = (case.q, case.k_cache, case.block_table[0], positions, torch.tensor([0, 1]))
    got = row_scores(*map(to_device, where), 200, scale=case.scale, columns=4)
    assert got.blocks[:, 0].isfinite().all() and got.blocks[:, 1:].isnan().all()
    assert ((got.columns >= 0) & (got.columns < 200)).all()


def test_row_scores_of_no_rows():
    case = make_case([1], [70], heads=2, kv_heads=1, dtype=ANY_DTYPE)
    where = (case.q[:0], case.k_cache, case.block_table[0], torch.zeros(0).long())
    got = row_scores(*map(to_device, where), to_device(torch.arange(2)), 70, scale=1.0, columns=3)
    assert got.blocks.shape == (2, 0, 2) and got.columns.shape == (2, 3)


@pytest.mark.parametrize("page", [16, 64, 128])
@pytest.mark.parametrize("n", [1, 63, 65, 200])
def test_block_means_from_keys_and_from_kept_sums(page, n):
    case = make_case([n], [n], heads=2, kv_heads=2, page=page, dtype=ANY_DTYPE)
    heads = torch.tensor([1, 0])
    where = (case.block_table[0], n, heads)
    want = reference.block_means(case.k_cache, *where)
    on = [to_device(x) if isinstance(x, torch.Tensor) else x for x in where]
    cache = to_device(case.k_cache)
    torch.testing.assert_close(block_means(cache, *on).cpu(), want, rtol=1e-5, atol=1e-5)
    sums = PageSums(cache, torch.float32)
    position = torch.arange(n)
    slots = case.block_table[0][position // page].long() * page + position % page
    # In chunks, with padding, as steps write them.
    for part in slots.split(50):
        sums.update(cache, to_device(torch.cat([part, torch.tensor([-1, -1])])))
    torch.testing.assert_close(sums.means(*on).cpu(), want, rtol=1e-5, atol=1e-5)


def test_sums_forget_what_a_page_held_before():
    case = make_case([40], [40], heads=1, kv_heads=1, page=64, dtype=ANY_DTYPE)
    cache = to_device(case.k_cache)
    sums = PageSums(cache, torch.float32)
    slot = int(case.block_table[0, 0]) * 64
    sums.update(cache, to_device(torch.arange(slot, slot + 40)))
    sums.update(cache, to_device(torch.arange(slot, slot + 3)))
    got = sums.means(to_device(case.block_table[0]), 3, to_device(torch.tensor([0])))
    want = reference.block_means(case.k_cache, case.block_table[0], 3, torch.tensor([0]))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


def test_pages_that_no_block_is_made_of_keep_no_sums():
    with pytest.raises(ValueError, match="pages of 48 keys"):
        PageSums(torch.zeros(1, 1, 48, 64))


def test_write_kv():
    case = make_case([1], [50], dtype=ANY_DTYPE)
    key, value = torch.randn(2, 6, 2, 64).to(ANY_DTYPE)
    slots = torch.tensor([3, -1, 40, 17])
    want = case.k_cache.clone(), case.v_cache.clone()
    reference.write_kv(key, value, *want, slots)
    got = to_device(case.k_cache), to_device(case.v_cache)
    write_kv(to_device(key), to_device(value), *got, to_device(slots))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="key: got"):
        write_kv(to_device(key[:, :1]), to_device(value), *got, to_device(slots))


@pytest.mark.parametrize("width", [None, 0, 40])
@pytest.mark.parametrize("rows, n", [(1, 1), (64, 65), (130, 1000)])
def test_index_lists(rows, n, width):
    mask, columns, last_key = selection(rows, n, width)
    want = reference.index_lists(mask, columns, last_key)
    same_lists(index_lists(*map(to_device, (mask, columns, last_key))), want)


def test_index_lists_of_several_sequences_and_ranges():
    parts = [selection(130, 1000, 40), selection(64, 65, None), selection(70, 300, 3)]
    want = reference.BlockIndices.cat([reference.index_lists(*part) for part in parts])
    a, b, c = ([to_device(x) for x in part] for part in parts)
    cut = [[x[tiles] for x in a] for tiles in (slice(0, 2), slice(2, 3))]
    same_lists(index_lists_of([*cut, b, c], [3, 1, 2]), want)


def selection(rows: int, n: int, width: int | None):
    generator = torch.Generator().manual_seed(n)
    tiles, heads = -(-rows // 64), 3
    mask = torch.rand(tiles, heads, -(-n // 64), generator=generator) < 0.3
    last_key = (n - rows + (torch.arange(tiles) + 1) * 64).clamp(max=n) - 1
    if width is None:
        return mask, None, last_key
    columns = torch.randint(-5, n, (tiles, heads, width), generator=generator)
    return mask, columns.sort(-1).values.to(torch.int32), last_key


def same_lists(got, want) -> None:
    assert got.num_heads == want.num_heads
    for name in ("tile_offsets", "block_offsets", "column_offsets"):
        assert getattr(got, name).tolist() == getattr(want, name).tolist(), name
    for name in ("blocks", "columns"):
        wanted = getattr(want, name).tolist()
        assert getattr(got, name)[: len(wanted)].tolist() == wanted, name


FIXED = [
    HeadPattern(kind="a_shape", sink=4, window=100),
    HeadPattern(kind="vertical_slash", vertical=20, slash=30),
    # Columns of a diagonal are worth the same, but for rounding.
    HeadPattern(kind="vertical_slash", vertical=0, slash=9),
    HeadPattern(kind="block_sparse", blocks=4),
    HeadPattern(kind="dense"),
    HeadPattern(kind="vertical_slash", coverage=0.9),
]


@pytest.mark.skipif(HAS_GPU, reason="a GPU's float16 scores may order near ties otherwise")
@pytest.mark.parametrize(
    "rows, n, patterns, coverage",
    [
        pytest.param(200, 900, [ADAPTIVE] * 6, 0.95, id="adaptive"),
        pytest.param(576, 576, [ADAPTIVE] * 6, 0.8, id="whole-prompt"),
        pytest.param(64, 700, [ADAPTIVE] * 6, 0.95, id="one-tile"),
        pytest.param(150, 700, FIXED, 0.95, id="fixed"),
        pytest.param(150, 700, [ADAPTIVE] * 6, 1.0, id="everything"),
        pytest.param(100, 300, [ADAPTIVE] * 6, 0.95, id="short"),
    ],
)
def test_plans_equal_the_cpus(rows, n, patterns, coverage):
    queries, cache, table = noisy_prompt(n, rows)
    where = dict(scale=SCALE, coverage=coverage)
    starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, rows], [n]))
    want = plan_prefill(queries, cache, table, starts, lens, patterns, **where)
    same_lists(plan_on_device(queries, cache, table, [rows], [n], patterns, **where), want)


class NoLook(TorchDispatchMode):
    """Fails on what makes a host wait for a GPU's numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(x is None or x.dtype != torch.bool for x in args[1]), f"{name} of a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("patterns", [[ADAPTIVE] * 2, FIXED], ids=["adaptive", "fixed"])
def test_the_host_does_not_look_between_queries_and_output(patterns):
    n, rows = 700, 150
    case = make_case([rows], [n], heads=len(patterns), kv_heads=2, dtype=ANY_DTYPE)
    on = caches_to_device(case)
    where = dict(scale=case.scale, coverage=0.95)

    def step():
        indices = plan_on_device(on.q, on.k_cache, on.block_table, [rows], [n], patterns, **where)
        return sparse_prefill(*on.args, indices, scale=case.scale)

    step()  # what is made once
    with NoLook():
        step()
    with pytest.raises(AssertionError, match=r"of a mask|_local_scalar_dense"), NoLook():
        plan_prefill(
            case.q, case.k_cache, case.block_table, case.query_start_loc, case.seq_lens, patterns,
            **where,
        )  # fmt: skip


def on_meta(monkeypatch, run) -> None:
    """Triton's kernels call `run` in place of what they do, and the host's constants are made on
    torch's meta device."""
    monkeypatch.setattr(type(key_worth._key_worth), "run", run)
    for module in (device, index_lists_kernels):
        monkeypatch.setattr(module, "upload", lambda x, where: x.to(where))


class Launches(TorchDispatchMode):
    """What is launched on torch's meta device, where Triton's kernels do nothing: an operand that
    lies elsewhere, a look at a number and a CPU kernel are all errors there."""

    # Make a tensor or another view of one.
    FREE = (
        "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided",
        "expand", "new_empty", "select", "slice", "split", "transpose", "unbind", "unsqueeze",
        "view", "lift_fresh",
    )  # fmt: skip

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.kernels, self.others = Counter(), Counter()

        def run(function, *arguments, **_) -> None:
            self.kernels[function.fn.__name__] += 1
            tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
            assert {x.device.type for x in tensors} == {"meta"}, function.fn.__name__

        on_meta(monkeypatch, run)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in self.FREE and "meta" in str(getattr(result, "device", "meta")):
            self.others[name] += 1
        return result


def planned_on_meta(patterns, rows: int, n: int, monkeypatch) -> tuple[BlockIndices, Launches]:
    """A plan for 6 heads of 64, the second of two, as what lasts is made in the first."""
    meta = torch.device("meta")
    q = torch.empty(rows, 6, 64, dtype=torch.bfloat16, device=meta)
    cache = torch.empty(-(-n // 16), 2, 16, 64, dtype=torch.bfloat16, device=meta)
    table = torch.zeros(1, -(-n // 16), dtype=torch.int32, device=meta)
    where = dict(scale=0.1, coverage=0.95)
    for _ in range(2):
        with Launches(monkeypatch) as launches:
            indices = plan_on_device(q, cache, table, [rows], [n], patterns, **where)
    return indices, launches


@pytest.mark.parametrize("rows", [30, 64, 200])
@pytest.mark.parametrize("patterns", [[ADAPTIVE] * 6, FIXED], ids=["adaptive", "fixed"])
def test_planning_stays_on_its_device(patterns, rows, monkeypatch):
    indices, launches = planned_on_meta(patterns, rows, 1000, monkeypatch)
    tiles = -(-rows // 64)
    assert indices.block_offsets.shape == indices.column_offsets.shape == (tiles * 6 + 1,)
    for name in ("block_offsets", "blocks", "column_offsets", "columns"):
        assert getattr(indices, name).device.type == "meta"
    assert launches.kernels["_index_lists"] == 2 * (1 if rows <= 64 else 3)


# (Triton's, torch's). Launching takes the host some microseconds each time, and an 8K chunk of a
# layer at 128K should take 2 ms; the same steps in plain torch would be 596 launches.
@pytest.mark.parametrize(
    "rows, length, most",
    [
        (8192, 32768, (29, 12)), (8192, 131072, (29, 13)), (200, 32768, (31, 22)),
        (64, 32768, (9, 5)),
    ],
)  # fmt: skip
def test_a_layers_plan_is_few_launches(rows, length, most, monkeypatch):
    _, launches = planned_on_meta([ADAPTIVE] * 6, rows, length, monkeypatch)
    assert launches.kernels.total() <= most[0], launches.kernels
    assert launches.others.total() <= most[1], launches.others


@pytest.mark.parametrize("sinks, corrected", [(False, False), (True, True)])
def test_warm_up_compiles_what_long_prompts_launch(sinks, corrected, monkeypatch):
    """The same constants of each kernel: what else changes compiles no code of its own."""
    meta, forms = torch.device("meta"), set()

    def run(function, *arguments, grid, warmup, **constants) -> None:
        forms.add((function.fn.__name__, tuple(sorted(constants.items()))))

    on_meta(monkeypatch, run)
    monkeypatch.setattr(launch, "target_of", lambda device: launch.TARGETS["sm_90"])
    shape = (torch.bfloat16, 64, 6, 2)
    given = dict(mean_correction=corrected, sinks=sinks)
    device_break_even.warm_up(*shape, page=16, device=meta, **given)
    compiled = forms.copy()
    forms.clear()
    for pattern in (ADAPTIVE, *(p for p in FIXED if p.fixed)):
        for length, rows in ((600, 600), (4000, 300), (16384, 2048), (16384, 40)):
            path, _ = device_break_even.paths(
                *shape, length, rows, 16, meta, None, pattern=pattern, **given
            )
            path()
    assert len(forms) > 25 and forms <= compiled, forms - compiled


@pytest.mark.skipif(HAS_GPU, reason="as above")
def test_plans_of_a_batch_equal_the_cpus_with_kept_means():
    n, rows = [700, 30, 650], [150, 30, 1]
    heads = Heads(700, columns=40)
    generator = torch.Generator().manual_seed(5)
    noise = 0.05 * torch.randn(700, 128, generator=generator)
    cache, row = paged((heads.keys + noise)[None])
    q = torch.stack([heads.same_word(), heads.slash(99)], 1)
    q = q + 0.3 * torch.randn(q.shape, generator=generator)
    queries = torch.cat([q[a - b : a] for a, b in zip(n, rows, strict=True)])
    table = row.expand(3, -1)
    where = dict(scale=SCALE, coverage=0.95)
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    patterns = [ADAPTIVE] * 2
    want = plan_prefill(queries, cache, table, starts, torch.tensor(n).int(), patterns, **where)
    sums = PageSums(cache, torch.float32)
    position = torch.arange(700)
    sums.update(cache, row[0, position // 16].long() * 16 + position % 16)
    got = plan_on_device(queries, cache, table, rows, n, patterns, means=sums.means, **where)
    same_lists(got, want)
