"""Every Triton kernel over FP8 caches with scales, against fp64 attention over what is meant."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_close, in_fp8, left_out_oracle, make_case, random_indices
from gpu_cases import ANY_DTYPE, BFLOAT16, FLOAT16, FLOAT32, HAS_GPU, to_device
from known_heads import SCALE, noisy_prompt
from regimes import count_outside
from test_decode_gpu import run as decode
from test_planning_gpu import FIXED, NoLook, same_lists
from test_prefill_gpu import close
from test_prefill_gpu import run as prefill

from vllm_sparse import cuda_dense
from vllm_sparse.kernels import reference
from vllm_sparse.kernels.gpu import launch
from vllm_sparse.kernels.gpu import paged_decode as decode_module
from vllm_sparse.kernels.gpu.block_means import PageSums, block_means
from vllm_sparse.kernels.gpu.paged_decode import members_of
from vllm_sparse.kernels.gpu.row_scores import row_scores
from vllm_sparse.kernels.gpu.shared_prefix import shared_prefixes
from vllm_sparse.kernels.gpu.sparse_prefill import sparse_prefill
from vllm_sparse.kernels.gpu.write_kv import write_kv
from vllm_sparse.patterns import ADAPTIVE
from vllm_sparse.planner import device_break_even, plan_prefill
from vllm_sparse.planner.device import plan_on_device

DTYPES = [FLOAT32, FLOAT16, BFLOAT16]
K_SCALE, V_SCALE = 0.037, 1.7
# As vLLM's layers have them: no dimension, or one.
SCALES = {"k_scale": torch.tensor(K_SCALE), "v_scale": torch.tensor([V_SCALE])}


def fp8_case(*args, **kwargs) -> tuple[Case, Case]:
    return in_fp8(make_case(*args, **kwargs), K_SCALE, V_SCALE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page"),
    [(4, 2, 64, 16), (3, 1, 96, 32), (2, 1, 128, 64), (2, 2, 256, 16)],
)
def test_prefill(heads, kv_heads, head_size, page, dtype):
    stored, meant = fp8_case(
        [70, 66], [70, 390], heads=heads, kv_heads=kv_heads, head_size=head_size, page=page,
        dtype=dtype,
    )  # fmt: skip
    for indices in (None, random_indices(stored, 0.4)):
        assert_close(meant, indices, prefill(stored, indices, **SCALES))


def test_prefill_without_scales_and_with_one():
    stored, _ = fp8_case([70], [300], dtype=ANY_DTYPE)
    indices = random_indices(stored, 0.4)
    for given in ({}, {"k_scale": SCALES["k_scale"]}, {"v_scale": SCALES["v_scale"]}):
        got = prefill(stored, indices, **given)
        want = reference.sparse_prefill(*stored.args, indices, scale=stored.scale, **given)
        # Keys are up to 27 times as large without their scale.
        torch.testing.assert_close(got[0].float(), want[0].float(), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_prefill_with_a_window_and_sinks():
    stored, meant = fp8_case([130], [300], dtype=ANY_DTYPE)
    sinks = torch.tensor([-torch.inf, 0.0, 2.5, 40.0])
    for more in ({"sinks": sinks}, {"window": 100}):
        got = prefill(stored, None, **SCALES, **more)
        close(meant, got, reference.sparse_prefill(*meant.args, None, scale=meant.scale, **more))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_correction(dtype):
    stored, meant = fp8_case([70, 66], [70, 450], dtype=dtype)
    indices = random_indices(stored, 0.2)
    got = prefill(stored, indices, mean_correction=True, **SCALES)
    assert_close(meant, indices, got, meaning=left_out_oracle)


@pytest.mark.parametrize("slots", [1, 1000])
@pytest.mark.parametrize("softmax", ["online", "lazy", "unified"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype, softmax, slots, monkeypatch):
    monkeypatch.setattr(decode_module, "_slots", lambda *args: slots)
    stored, meant = fp8_case([1, 3], [400, 65], dtype=dtype)
    got, flagged = decode(stored, softmax, **SCALES)
    assert_close(meant, None, got)
    assert flagged == 0


@pytest.mark.parametrize("head_size", [96, 128, 256])
def test_decode_of_other_heads(head_size):
    stored, meant = fp8_case([1], [200], heads=4, kv_heads=1, head_size=head_size, dtype=ANY_DTYPE)
    assert_close(meant, None, decode(stored, **SCALES)[0])


@pytest.mark.parametrize("slots", [1, 10000])
def test_phi_is_of_logits_with_the_keys_scale(slots, monkeypatch):
    monkeypatch.setattr(decode_module, "_slots", lambda *args: slots)
    stored, meant = fp8_case([1] * 3, [1, 80, 700], heads=8, kv_heads=2, seed=3, dtype=ANY_DTYPE)
    stored.q.mul_(12.0)  # both cases' own
    phi = torch.linspace(-80, 90, 8)
    expected = count_outside(meant, phi)
    assert 0 < expected < 24 and expected != count_outside(stored, phi)
    got, flagged = decode(stored, "unified", phi, **SCALES)
    assert_close(meant, None, got, 96.0)
    assert flagged == expected


@pytest.mark.parametrize("softmax", ["online", "unified"])
def test_a_shared_prefix_and_sinks(softmax, monkeypatch):
    monkeypatch.setattr(decode_module, "_slots", lambda *args: 100)
    stored, meant = fp8_case([1, 2, 1], [300, 290, 217], dtype=ANY_DTYPE)
    stored.block_table[1:, :13] = stored.block_table[0, :13]  # both cases' own
    where = map(to_device, (stored.block_table, stored.query_start_loc, stored.seq_lens))
    shared = shared_prefixes(*where, page=16, members=members_of(2, 64, 2), fewest=64)
    assert shared.keys.tolist() == [192] * 3
    sinks = torch.tensor([0.0, 3.0, -50.0, 9.0])
    got, _ = decode(stored, softmax, shared=shared, sinks=sinks, **SCALES)
    want = reference.paged_decode(
        meant.q, meant.k_cache, meant.v_cache, meant.block_table, meant.seq_lens,
        scale=meant.scale, query_start_loc=meant.query_start_loc, sinks=sinks,
    )  # fmt: skip
    tolerance = 4 * torch.finfo(ANY_DTYPE).eps
    torch.testing.assert_close(got[0], want[0], atol=4 * tolerance, rtol=0)
    torch.testing.assert_close(got[1], want[1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
def test_row_scores(dtype):
    n = 300
    stored, meant = fp8_case([10], [n], dtype=dtype)
    positions, heads = torch.linspace(0, n - 1, 10).long(), torch.tensor([1, 3])
    wanted = dict(scale=stored.scale, squares=True, columns=n, base_from=None)
    where = (stored.block_table[0], positions, heads)
    want = reference.row_scores(meant.q, meant.k_cache, *where, n, **wanted)
    on = map(to_device, (stored.q, stored.k_cache, *where))
    got = row_scores(*on, n, k_scale=to_device(SCALES["k_scale"]), **wanted)
    for name in ("blocks", "squares"):
        torch.testing.assert_close(
            getattr(got, name).cpu(), getattr(want, name), rtol=1e-4, atol=2e-6
        )
    # Of every key, by its position.
    masses = [
        x.column_mass.cpu().gather(2, x.columns.cpu().argsort(-1)[:, None].expand(-1, 10, -1))
        for x in (got, want)
    ]
    torch.testing.assert_close(*masses, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("page", [16, 128])
def test_block_means_from_keys_and_from_kept_sums(page):
    n = 200
    stored, meant = fp8_case([n], [n], heads=2, kv_heads=2, page=page, dtype=ANY_DTYPE)
    where = (stored.block_table[0], n, torch.tensor([1, 0]))
    want = reference.block_means(meant.k_cache, *where)
    on = [to_device(x) if isinstance(x, torch.Tensor) else x for x in where]
    cache, scale = to_device(stored.k_cache), to_device(SCALES["k_scale"])
    got = block_means(cache, *on, scale)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    position = torch.arange(n)
    slots = where[0][position // page].long() * page + position % page
    # In 16 bits a sum of 16 to 64 keys that are up to 3 has an error of up to 0.1.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):
        sums = PageSums(cache, dtype)
        sums.update(cache, to_device(slots))
        torch.testing.assert_close(
            sums.means(*on, scale).cpu(), want, rtol=tolerance, atol=tolerance
        )
    with pytest.raises(ValueError, match="float8_e4m3fn for sums"):
        PageSums(cache)


@pytest.mark.skipif(HAS_GPU, reason="a GPU's float16 scores may order near ties otherwise")
@pytest.mark.parametrize(
    "patterns, keeps_sums",
    [([ADAPTIVE] * 6, True), (FIXED, True), (FIXED, False)],
    ids=["adaptive", "fixed", "fixed-from-keys"],
)
def test_plans_equal_those_of_the_keys_that_are_meant(patterns, keeps_sums):
    n, rows, k_scale = 700, 200, 0.25
    queries, cache, table = noisy_prompt(n, rows)
    cache = (cache / k_scale).to(torch.float8_e4m3fn)
    where = dict(scale=SCALE, coverage=0.95)
    starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, rows], [n]))
    meant = cache.float() * k_scale
    want = plan_prefill(queries, meant, table, starts, lens, patterns, **where)
    sums = PageSums(cache, torch.float32)
    position = torch.arange(n)
    sums.update(cache, table[0, position // 16].long() * 16 + position % 16)
    got = plan_on_device(
        queries, cache, table, [rows], [n], patterns, means=sums.means if keeps_sums else None,
        k_scale=torch.tensor(k_scale), **where,
    )  # fmt: skip
    same_lists(got, want)


def test_the_host_does_not_look_at_scales():
    stored, _ = fp8_case([150], [700], heads=2, kv_heads=1, dtype=ANY_DTYPE)
    on = to_device(stored)
    scales = {name: to_device(x) for name, x in SCALES.items()}

    def step():
        indices = plan_on_device(
            on.q, on.k_cache, on.block_table, [150], [700], [ADAPTIVE] * 2, scale=on.scale,
            coverage=0.95, k_scale=scales["k_scale"],
        )  # fmt: skip
        return sparse_prefill(*on.args, indices, scale=on.scale, **scales)

    step()  # what is made once
    with NoLook():
        step()


def test_write_kv():
    key, value = torch.randn(2, 6, 2, 64)
    # The interpreter forgets the carry when it rounds to FP8: numbers that need none.
    key, value = ((x * 0.5).to(torch.float8_e4m3fn).float() for x in (key, value))
    key[0, 0, :3] = torch.tensor([1e5, -1e5, 448.0])
    scales = {"k_scale": torch.tensor(0.25), "v_scale": torch.tensor([0.5])}
    slots = torch.tensor([3, -1, 40, 17])
    caches = [torch.zeros(4, 2, 16, 64).to(torch.float8_e4m3fn) for _ in range(4)]
    reference.write_kv(key, value, *caches[:2], slots, **scales)
    got = [to_device(x) for x in caches[2:]]
    moved = {name: to_device(x) for name, x in scales.items()}
    new = (to_device(x.to(ANY_DTYPE)) for x in (key, value))
    write_kv(*new, *got, to_device(slots), **moved)
    for a, b in zip(got, caches[:2], strict=True):
        assert torch.equal(a.cpu().float(), b.float())
    assert caches[0][0, 0, 3, :3].tolist() == [448.0, -448.0, 448.0]
    assert float(caches[0][2, 0, 8, 5]) == float(key[2, 0, 5]) * 4


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"v_cache": torch.float32},
            "v_cache torch.float32; give one of .* torch.float8_e4m3fn",
        ),
        ({"k_scale": torch.ones(2)}, "k_scale: got 2 entries of torch.float32"),
        ({"v_scale": torch.ones(1).double()}, "v_scale: got 1 entries of torch.float64"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    stored, _ = fp8_case([20], [50], dtype=ANY_DTYPE)
    if "v_cache" in change:
        stored.v_cache = stored.v_cache.to(change.pop("v_cache"))
    on = to_device(stored)
    change = {name: to_device(x) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        sparse_prefill(*on.args, None, scale=on.scale, **change)


def test_devices_without_the_format_are_refused(monkeypatch):
    cuda = torch.device("cuda", 0)
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a, c=capability: c)
        launch.check_fp8(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (8, 6))
    with pytest.raises(ValueError, match=r"from compute capability 8.9 on, got .* 8.6; use"):
        launch.check_fp8(cuda)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="AMD GPU, whose FP8 formats are others"):
        launch.check_fp8(cuda)


def test_targets_without_the_format_have_no_configuration_for_it():
    has = {
        name
        for name, target in launch.TARGETS.items()
        for kernel in launch.kernels().values()
        for config in kernel.configs(target)
        if "*fp8e4nv" in config.signature.values()
    }
    assert has == {"sm_90", "sm_100"}


@pytest.mark.skipif(HAS_GPU, reason="stands in for vLLM's kernel on the CPU")
def test_both_paths_of_the_break_even_read_an_fp8_cache(monkeypatch):
    given = {}
    monkeypatch.setattr(cuda_dense, "unified_attention", lambda **k: given.update(k))
    sparse, dense = device_break_even.paths(
        torch.float16, 64, 4, 2, 700, 70, 16, torch.device("cpu"), cuda_dense.triton_dense,
        cache_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    out, _ = sparse()
    assert out.shape == (70, 4, 64) and out.isfinite().all()
    dense()
    assert given["k"].dtype == given["v"].dtype == torch.float8_e4m3fn
    assert given["q"].dtype == torch.float16 and given["q_descale"] is None
    assert float(given["k_descale"]) == float(given["v_descale"]) == 1.0
    assert given["kv_quant_mode"].name == "FP8_PER_TENSOR"
