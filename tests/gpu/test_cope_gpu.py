"""The Triton kernels with contextual positions (CoPE) against fp64, and against their reference."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_case
from gpu_cases import (
    ANY_DTYPE,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    HAS_GPU,
    caches_to_device,
    to_device,
)

from vllm_sparse.kernels import cope_reference
from vllm_sparse.kernels.gpu import cope_attention as module
from vllm_sparse.kernels.gpu import cope_split, launch, paged_decode
from vllm_sparse.kernels.gpu.cope_attention import cope_attention

DTYPES = [FLOAT32, FLOAT16, BFLOAT16]
FP8_CACHE = torch.zeros(4, 2, 16, 64).to(torch.float8_e4m3fn)
FAR = 1 << 30  # a page that no cache has


def cope_case(query_lens, seq_lens, *, positions=17, seed=0, **shape) -> tuple[Case, torch.Tensor]:
    """A case whose table has no page beyond those of its keys, and embeddings."""
    shape = {"dtype": ANY_DTYPE, **shape}
    case = make_case(query_lens, seq_lens, seed=seed, **shape)
    page = case.k_cache.shape[2]
    for s, n in enumerate(seq_lens):
        case.block_table[s, -(-n // page) :] = FAR
    generator = torch.Generator().manual_seed(seed + 1)
    pos_emb = torch.randn(positions, case.q.shape[2], generator=generator).to(case.q.dtype)
    return case, pos_emb


def truth(case: Case, pos_emb: torch.Tensor, dtype=torch.float64):
    """(out, lse) from whole matrices, written apart from the reference: in fp64 the truth; in fp32
    it shows the error that plain torch makes, by which tolerances are calibrated."""
    out = torch.zeros(case.q.shape, dtype=dtype)
    lse = torch.full(case.q.shape[:2], -torch.inf, dtype=torch.float64)
    group, page = case.q.shape[1] // case.k_cache.shape[1], case.k_cache.shape[2]
    last = len(pos_emb) - 1
    for s, query_len in enumerate(case.query_lens):
        n, begin = int(case.seq_lens[s]), int(case.query_start_loc[s])
        key = torch.arange(n)
        pages = case.block_table[s][key // page].long()
        k = case.k_cache[pages, :, key % page].to(dtype).transpose(0, 1)
        v = case.v_cache[pages, :, key % page].to(dtype).transpose(0, 1)
        q = case.q[begin : begin + query_len].to(dtype).transpose(0, 1)  # [H, M, D]
        seen = key <= (torch.arange(query_len) + n - query_len)[:, None]
        logit = q @ k.repeat_interleave(group, 0).mT * case.scale
        position = torch.sigmoid(logit) * seen
        position = position.flip(2).cumsum(2).flip(2).clamp(max=last)
        z = q @ pos_emb.to(dtype).T * case.scale
        upper = position.ceil()
        weight = upper - position
        logit += weight * z.gather(2, position.floor().long())
        logit += (1 - weight) * z.gather(2, upper.long())
        logit = logit.masked_fill(~seen, -torch.inf)
        p = torch.softmax(logit, 2).nan_to_num()  # rows without keys
        out[begin : begin + query_len] = (p @ v.repeat_interleave(group, 0)).transpose(0, 1)
        lse[begin : begin + query_len] = torch.logsumexp(logit.double(), 2).T
    return out, lse


def run(case: Case, pos_emb: torch.Tensor, **more):
    on = caches_to_device(case)
    out = torch.full_like(on.q, torch.nan)
    more = {"max_query_len": max(case.query_lens), "out": out, **more}
    got = cope_attention(*on.args, to_device(pos_emb), scale=on.scale, **more)
    assert got[0].data_ptr() == more["out"].data_ptr()
    return got[0].cpu(), got[1].cpu()


def assert_right(case: Case, pos_emb: torch.Tensor, got, logits: float = 0.0) -> None:
    """|out - truth| <= 2 |fp32 torch - truth| + rounding; see `cases.assert_close`.

    Rounding in the case's dtype: probabilities, before they are multiplied with values, and the
    output. Everything else is fp32 in any dtype; sums of gates are in another order than torch's,
    which moves a logit by as much as an embedding differs from the next.
    """
    true_out, true_lse = truth(case, pos_emb)
    torch_out, torch_lse = truth(case, pos_emb, torch.float32)
    largest = float(case.v_cache.float().nan_to_num().abs().max())
    allowed = 2 * (torch_out - true_out).abs().max().item()
    z = case.q.double() @ pos_emb.double().T * case.scale
    logits += len(pos_emb) * float(z.diff().abs().max()) if len(pos_emb) > 1 else 0.0
    allowed += torch.finfo(torch.float32).eps * largest * (4 + logits)
    if case.q.dtype != torch.float32:
        allowed += torch.finfo(case.q.dtype).eps * largest
    some = ~true_lse.isinf()
    slack = 2 * (torch_lse - true_lse)[some].abs().max().item()
    slack += 2e-5 + torch.finfo(torch.float32).eps * logits
    want = cope_reference.cope_attention(*case.args, pos_emb, scale=case.scale)
    for what, (out, lse) in (("kernel", got), ("reference", want)):
        assert not out.isnan().any() and not lse.isnan().any(), what
        error = (out.double() - true_out).abs().max().item()
        assert error <= allowed, f"{what}: out off by {error:.3g}, allowed {allowed:.3g}"
        assert torch.equal(lse.isinf(), ~some), f"{what}: -inf exactly where no key is seen"
        assert (out[~some] == 0).all(), f"{what}: 0 exactly where no key is seen"
        error = (lse.double() - true_lse)[some].abs().max().item()
        assert error <= slack, f"{what}: lse off by {error:.3g}, allowed {slack:.3g}"


@pytest.fixture
def few_programs(monkeypatch):
    """A device so large that short sequences are split as long ones are."""
    monkeypatch.setattr(paged_decode, "_slots", lambda *args: 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts(dtype):
    lens = [1, 63, 64, 65, 111]
    case = cope_case(lens, lens, heads=2, kv_heads=1, dtype=dtype)
    assert_right(*case, run(*case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_after_what_is_cached(dtype):
    case = cope_case([40, 70, 9], [300, 71, 200], heads=2, kv_heads=2, dtype=dtype)
    assert_right(*case, run(*case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype, few_programs):
    lens = [1, 63, 64, 65, 111, 300]
    case = cope_case([1] * len(lens), lens, heads=4, kv_heads=1, dtype=dtype)
    assert_right(*case, run(*case))


@pytest.mark.parametrize("slots", [1, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (16, 1)])
def test_speculated_tokens(heads, kv_heads, slots, monkeypatch):
    monkeypatch.setattr(paged_decode, "_slots", lambda *args: slots)
    case = cope_case([4, 1, 3, 2], [300, 65, 3, 129], heads=heads, kv_heads=kv_heads)
    assert_right(*case, run(*case))


def test_more_rows_than_a_program_takes(few_programs):
    case = cope_case([8, 5], [100, 200], heads=16, kv_heads=1)
    assert_right(*case, run(*case))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page"),
    [
        pytest.param(*t, id="H{}-KV{}-D{}-page{}".format(*t))
        for t in [(2, 2, 64, 64), (4, 2, 128, 128), (3, 1, 80, 48), (2, 1, 256, 64)]
    ],
)
@pytest.mark.parametrize("query_lens", [[1, 2], [20, 70]], ids=["decode", "prefill"])
def test_shapes(query_lens, heads, kv_heads, head_size, page, few_programs):
    case = cope_case(
        query_lens, [40, 170], heads=heads, kv_heads=kv_heads, head_size=head_size, page=page
    )
    assert_right(*case, run(*case))


def with_gates(case: Case, logit: float) -> Case:
    """Every logit near this one: the first dimension of queries and keys makes it."""
    case.q[..., 0] = 16.0
    case.k_cache[..., 0] = torch.where(case.k_cache[..., 0].isnan(), torch.nan, logit / 2.0)
    return case


@pytest.mark.parametrize("positions", [1, 2, 17, 64])
@pytest.mark.parametrize("logit", [20.0, -20.0, 0.0], ids=["ones", "zeros", "halves"])
@pytest.mark.parametrize("query_lens", [[1, 3], [10, 70]], ids=["decode", "prefill"])
def test_gates_and_tables(query_lens, logit, positions, few_programs):
    """Positions that reach the last row of the table at once, late, and never."""
    case, pos_emb = cope_case(query_lens, [80, 200], positions=positions, heads=2, kv_heads=1)
    case = with_gates(case, logit)
    assert_right(case, pos_emb, run(case, pos_emb), 40.0)


def test_heads_that_reach_the_last_position_at_different_keys(few_programs):
    for query_lens in ([2, 1], [70, 66]):
        case, pos_emb = cope_case(query_lens, [300, 66], positions=40)
        case.q *= torch.tensor([4.0, 1.0, 0.1, 0.0])[:, None].to(case.q.dtype)
        assert_right(case, pos_emb, run(case, pos_emb), 20.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_lens", [[1, 2], [20, 70]], ids=["decode", "prefill"])
def test_huge_logits(query_lens, dtype, few_programs):
    case, pos_emb = cope_case(
        query_lens, [100, 200], positions=64, heads=2, kv_heads=1, dtype=dtype
    )
    case.q *= 90.0  # logits to 300 and more, to either side
    assert_right(case, pos_emb, run(case, pos_emb), 1000.0)


@pytest.mark.parametrize("query_lens", [[1, 2, 1], [9, 5, 70]], ids=["decode", "prefill"])
def test_a_sequence_without_keys(query_lens):
    case = cope_case(query_lens, [40, 0, 90])
    out, lse = run(*case)
    rows = slice(query_lens[0], query_lens[0] + query_lens[1])
    assert (out[rows] == 0).all() and (lse[rows] == -torch.inf).all()
    assert_right(*case, (out, lse))


@pytest.mark.parametrize("query_lens", [[2, 1, 1], [20, 9, 2]], ids=["decode", "prefill"])
def test_rows_of_no_sequence_are_left_alone(query_lens):
    """As vLLM captures graphs for more sequences than there are, and pads the rows."""
    case, pos_emb = cope_case(query_lens, [50, 40, 9])
    case.query_start_loc[3] = case.query_start_loc[2]
    case.seq_lens[2] = 0
    on = caches_to_device(case)
    out = torch.full_like(on.q, 7.0)
    cope_attention(
        *on.args, to_device(pos_emb), scale=on.scale, out=out, max_query_len=max(query_lens)
    )
    end = int(case.query_start_loc[2])
    assert (out[end:] == 7.0).all()
    case.q, case.query_start_loc, case.seq_lens = (
        case.q[:end], case.query_start_loc[:3], case.seq_lens[:2],
    )  # fmt: skip
    want, _ = cope_reference.cope_attention(*case.args, pos_emb, scale=case.scale)
    torch.testing.assert_close(out[:end].cpu(), want, atol=4e-3 if HAS_GPU else 1e-5, rtol=0)


@pytest.mark.parametrize("query_lens", [[1, 2], [20, 70]], ids=["decode", "prefill"])
@pytest.mark.parametrize("layout", ["head-major", "token-major"])
def test_layouts(layout, query_lens):
    case, pos_emb = cope_case(query_lens, [40, 100], layout=layout)
    tokens, heads, head_size = case.q.shape
    # As parts of wider tensors.
    wide = torch.full((tokens, heads, 3 * head_size), torch.nan, dtype=case.q.dtype)
    wide[..., :head_size] = case.q
    case.q = wide[..., :head_size]
    out = to_device(torch.full((tokens, 2 * heads, head_size), 7.0, dtype=case.q.dtype))
    got = run(case, pos_emb, out=out[:, ::2])
    assert (out[:, 1::2] == 7.0).all()
    assert_right(case, pos_emb, got)


def test_the_path_follows_from_the_most_rows_of_a_sequence(monkeypatch):
    """Both read the same; without the number it is all rows that count."""
    taken = []
    for name in ("_decode", "_prefill"):
        inner = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, n=name, f=inner: (taken.append(n), f(*args))
        )
    case = cope_case([1] * 9, [20] * 9, heads=2, kv_heads=1)
    few = cope_case([1] * 3, [20] * 3, heads=2, kv_heads=1)
    assert_right(*case, run(*case))
    assert_right(*case, run(*case, max_query_len=None))
    assert_right(*few, run(*few, max_query_len=None))
    assert taken == ["_decode", "_prefill", "_decode"]


def test_a_nan_stays_in_its_row(few_programs):
    """Its position is in the table all the same."""
    for query_lens in ([2, 1], [70, 9]):
        case, pos_emb = cope_case(query_lens, [200, 80], positions=5)
        case.q[1, 2, 3] = torch.nan
        out, lse = run(case, pos_emb)
        bad = torch.zeros(lse.shape, dtype=torch.bool)
        bad[1, 2] = True
        assert torch.equal(out.isnan().any(-1), bad)


def test_no_queries():
    case, pos_emb = cope_case([1], [40])
    case.q = case.q[:0]
    out, lse = cope_attention(*to_device(case).args, to_device(pos_emb), scale=1.0)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: a graph is captured and replayed")
def test_a_captured_graph_follows_the_lengths():
    case, pos_emb = cope_case([2, 2], [4000, 30], heads=8, kv_heads=2, positions=64)
    on, table = caches_to_device(case), to_device(pos_emb)
    out = torch.empty_like(on.q)

    def step():
        cope_attention(*on.args, table, scale=on.scale, out=out, max_query_len=2)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lens in ((4000, 30), (2, 2), (65, 20), (2500, 30)):
        case.seq_lens[:] = torch.tensor(lens)
        on.seq_lens.copy_(case.seq_lens)
        graph.replay()
        want, _ = cope_reference.cope_attention(*case.args, pos_emb, scale=case.scale)
        torch.testing.assert_close(out.cpu(), want, atol=4e-3, rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pos_emb": torch.zeros(4, 63)}, "pos_emb: got torch.float32"),
        ({"pos_emb": torch.zeros(0, 64, dtype=ANY_DTYPE)}, "pos_emb: has no positions"),
        ({"max_query_len": 0}, "max_query_len: got 0"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"seq_lens": torch.tensor([40])}, "seq_lens: got torch.int64"),
        ({"query_start_loc": torch.zeros(3, dtype=torch.int32)}, "query_start_loc: got 3 entries"),
        ({"pos_emb": torch.zeros(1, 64, dtype=ANY_DTYPE).expand(1 << 23, 64)}, "at most 8,388,606"),
        (dict.fromkeys(("k_cache", "v_cache"), FP8_CACHE), "over FP8 caches|FP8 KV cache"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    case, pos_emb = cope_case([1], [40])
    names = ("q", "k_cache", "v_cache", "block_table", "query_start_loc", "seq_lens")
    args = dict(zip(names, case.args, strict=True)) | {"pos_emb": pos_emb, "scale": 1.0} | change
    args = {k: to_device(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with pytest.raises(ValueError, match=message):
        cope_attention(**args)


def test_rows_and_ranges_of_decode():
    target = launch.TARGETS["sm_90"]
    made = cope_split.constants(target, 128, group=4, page=16, tokens=8, splits=64, seqs=5)
    assert (made["ROWS"], made["ROW_TILES"], made["SEQS"]) == (32, 1, 8)
    made = cope_split.constants(target, 256, group=16, page=16, tokens=4, splits=64, seqs=1)
    assert (made["ROWS"], made["ROW_TILES"]) == (32, 2)
