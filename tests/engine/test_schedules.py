"""Random schedules of requests through one layer: everything selected, against vLLM's CPU_ATTN."""

from __future__ import annotations

import random

import pytest
import torch
from engine_run import DENSE, EVERYTHING
from paged_layer import PagedLayer

from vllm_sparse import impl, plugin
from vllm_sparse.kernels import cpu
from vllm_sparse.patterns import ADAPTIVE, HeadPattern, PatternFile
from vllm_sparse.stats import STATS

SCHEDULES = 200
VOCAB = 64
# (query heads, KV heads, head size), our page size. CPU_ATTN keeps 32, the least it takes.
LAYERS = [
    ((4, 2, 64), 16),
    ((4, 4, 64), 32),  # MHA
    ((8, 2, 128), 64),
    ((4, 1, 80), 128),  # MQA, a head size between powers of two
]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    plugin.register()
    monkeypatch.setattr(impl, "get_tensor_model_parallel_rank", lambda: 0)
    # Thousands of steps of a millisecond: on shared cores, waiting for a second thread costs more
    # than it brings (250 s instead of 5 s).
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu.set_threads(1)
    yield
    torch.set_num_threads(before)
    cpu.set_threads(before)


class Tokens:
    """Query, key and value of a token at a position: the same wherever a prefix is shared."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        heads, kv_heads, size = shape
        rng = torch.Generator().manual_seed(0)
        self.q = torch.randn(VOCAB, heads, size, generator=rng)
        self.k = torch.randn(VOCAB, kv_heads, size, generator=rng)
        self.v = torch.randn(VOCAB, kv_heads, size, generator=rng)
        self.at = torch.randn(4096, 1, size, generator=rng) * 0.5
        self.head = torch.randn(heads * size, VOCAB, generator=rng)

    def __call__(self, tokens: list[int], first: int) -> tuple[torch.Tensor, ...]:
        at = self.at[first : first + len(tokens)]
        return self.q[tokens] * 2 + at, self.k[tokens] + at, self.v[tokens]

    def next(self, out: torch.Tensor) -> list[int]:
        return (out.flatten(1) @ self.head).argmax(-1).tolist()


def schedule(rng: random.Random):
    """Requests (tokens, donor, shared tokens) and a budget of tokens for each step."""
    requests = []
    for i in range(rng.randint(1, 5)):
        donor = rng.randrange(i) if i and rng.random() < 0.5 else None
        length = rng.choice([1, 2, 15, 16, 17, 63, 64, 65, 127, 128, rng.randint(1, 300)])
        tokens = [rng.randrange(VOCAB) for _ in range(length)]
        shared = 0
        if donor is not None:
            shared = rng.randint(0, len(requests[donor][0]))
            tokens = requests[donor][0][:shared] + tokens
        requests.append((tokens, donor, shared))
    return requests, rng.choice([16, 64, 100, 512])


def replay(layer: PagedLayer, tokens: Tokens, requests, budget: int, new_tokens: int):
    """Serve the requests in order of arrival; returns the tokens and outputs of each."""
    texts = [list(text) for text, _, _ in requests]
    done = [0] * len(texts)
    outputs: list[list[torch.Tensor]] = [[] for _ in texts]
    for i, (text, donor, shared) in enumerate(requests):
        # The last token is always computed, as its output is the next token.
        while donor is not None and done[donor] < len(requests[donor][0]):
            _step(layer, tokens, requests, texts, done, outputs, budget, range(i), new_tokens)
        done[i] = layer.admit(i, donor, min(shared, len(text) - 1))
    while any(len(t) < len(r[0]) + new_tokens for t, r in zip(texts, requests, strict=True)):
        everyone = range(len(texts))
        _step(layer, tokens, requests, texts, done, outputs, budget, everyone, new_tokens)
    return texts, outputs


def _step(layer, tokens, requests, texts, done, outputs, budget, who, new_tokens) -> None:
    limits = [len(requests[i][0]) + new_tokens for i in who]
    running = [i for i in who if len(texts[i]) < limits[i]]
    running.sort(key=lambda i: len(texts[i]) - done[i] != 1)  # decodes first
    rows = []
    for i in running:
        new = min(len(texts[i]) - done[i], budget - sum(r[2] for r in rows))
        if new > 0:
            rows.append((i, done[i], new))
    rows.sort(key=lambda r: r[2] != 1)
    parts = [tokens(texts[i][first : first + new], first) for i, first, new in rows]
    out = layer.step(rows, *(torch.cat(p) for p in zip(*parts, strict=True)))
    assert torch.isfinite(out).all()
    for (i, first, new), part in zip(rows, out.split([r[2] for r in rows]), strict=True):
        outputs[i].append(part)
        done[i] = first + new
        if done[i] == len(texts[i]):
            texts[i] += tokens.next(part[-1:])


@pytest.mark.parametrize("shape, page", LAYERS, ids=str)
def test_random_schedules_give_the_dense_tokens(shape, page, llama):
    rng = random.Random(page)
    tokens = Tokens(shape)
    sizes = {"max_model_len": 4096, "dtype": "float32"}
    ours = PagedLayer(llama, shape, 4096 // page * 4, block_size=page, **EVERYTHING, **sizes)
    dense = PagedLayer(llama, shape, 512, block_size=32, **DENSE, **sizes)
    dense.cache.zero_()  # CPU_ATTN multiplies what lies beyond a sequence's end by 0
    free = list(ours.free), list(dense.free)
    for _ in range(SCHEDULES // len(LAYERS)):
        ours.free, dense.free = list(free[0]), list(free[1])
        requests, budget = schedule(rng)
        got, got_out = replay(ours, tokens, requests, budget, new_tokens=3)
        want, want_out = replay(dense, tokens, requests, budget, new_tokens=3)
        assert got == want, (requests, budget)
        for a, b in zip(got_out, want_out, strict=True):
            # What came from a shared prefix differs by whole pages: compare the common tail.
            a, b = torch.cat(a), torch.cat(b)
            n = min(len(a), len(b))
            torch.testing.assert_close(a[-n:], b[-n:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pages_and_dtypes(page: int, dtype: str, llama):
    shape = (4, 2, 64)
    layer = PagedLayer(
        llama, shape, 1024 // page, block_size=page, dtype=dtype, max_model_len=4096, **EVERYTHING
    )
    tokens = Tokens(shape)
    text = [i * 7 % VOCAB for i in range(333)]
    layer.admit(0)
    q, k, v = (x.to(layer.cache.dtype) for x in tokens(text, 0))
    out = torch.cat(
        [layer.step([(0, a, b - a)], q[a:b], k[a:b], v[a:b]) for a, b in ((0, 200), (200, 333))]
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.float().transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    tolerance = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


def test_break_even_and_speculated_tokens_decide_what_is_dense(llama, monkeypatch):
    settings = {"sparse": {"coverage": 1.0, "break_even": 100}}
    layer = PagedLayer(
        llama, (4, 2, 64), 64, dtype="float32", block_size=16, max_model_len=4096,
        attention_backend="sparse", additional_config=settings,
    )  # fmt: skip
    tokens, planned = Tokens((4, 2, 64)), []
    plan = impl.plan_prefill

    def spy(q, *args, **kwargs):
        planned.append(len(q))
        return plan(q, *args, **kwargs)

    monkeypatch.setattr(impl, "plan_prefill", spy)

    def step(rows, prompts=None):
        parts = [tokens([1] * new, first) for _, first, new in rows]
        layer.step(rows, *(torch.cat(p) for p in zip(*parts, strict=True)), prompts)

    for request in range(4):
        layer.admit(request)
    step([(0, 0, 99)])  # one token short
    assert planned == []
    step([(0, 99, 2)])  # the context counts, not the chunk
    assert planned == [2]
    before = STATS.sparse_chunks, STATS.dense_chunks, STATS.decode_rows
    step([(0, 101, 1), (1, 0, 100), (2, 0, 150), (3, 0, 20)])
    assert planned == [2, 250]  # both in one plan
    after = STATS.sparse_chunks, STATS.dense_chunks, STATS.decode_rows
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 1, 1]
    step([(2, 150, 5)], prompts=[False])  # speculated tokens are decoded, exactly
    assert planned == [2, 250]
    before, after = after, (STATS.sparse_chunks, STATS.dense_chunks, STATS.decode_rows)
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 0, 5]


def test_layers_of_a_draft_have_none_of_the_targets_settings(llama, monkeypatch, tmp_path):
    """Eagle's go on counting after the target's; a draft model has fewer than the settings name."""
    window = HeadPattern(kind="a_shape", sink=64, window=64)
    model = {"name": "m", "layers": 4, "heads": 4, "kv_heads": 2, "head_size": 64}
    path = tmp_path / "patterns.json"
    phi = {i: [0.0] * 4 for i in range(4)}
    layers = {i: dict.fromkeys(range(4), window) for i in range(4)}
    PatternFile(model=model, layers=layers, phi=phi).save(path)
    settings = {"patterns": str(path), "softmax": "unified", "dense_layers": [3]}

    def made(draft: bool) -> PagedLayer:
        monkeypatch.setattr(impl.compat, "makes_draft", lambda config: draft)
        return PagedLayer(
            llama, (4, 2, 64), 64, dtype="float32", block_size=16, max_model_len=4096,
            attention_backend="sparse", additional_config={"sparse": settings},
        ).layer.impl  # fmt: skip

    target, draft = made(False), made(True)
    for one in (target, draft):
        one._find_patterns("model.layers.3.self_attn.attn")
    assert target.always_dense and target.phi is not None and target._softmax() == "unified"
    assert target.patterns == (window,) * 4
    for name in ("model.layers.3.self_attn.attn", "model.layers.4.self_attn.attn"):
        draft._find_patterns(name)
        assert draft.patterns == (ADAPTIVE,) * 4 and not draft.always_dense
        assert draft.phi is None and draft._softmax() == "online"
    target._find_patterns("model.layers.4.self_attn.attn")
    assert target.patterns == (ADAPTIVE,) * 4


def test_dense_layers_never_plan(llama, monkeypatch):
    settings = {"sparse": {"break_even": 0, "dense_layers": [0]}}
    layer = PagedLayer(
        llama, (4, 2, 64), 64, dtype="float32", block_size=16, max_model_len=4096,
        attention_backend="sparse", additional_config=settings,
    )  # fmt: skip
    monkeypatch.setattr(impl, "plan_prefill", lambda *a, **k: pytest.fail("planned"))
    layer.admit(0)
    layer.step([(0, 0, 200)], *Tokens((4, 2, 64))([1] * 200, 0))


def test_mean_correction_reaches_the_layer_and_brings_it_nearer(llama, tmp_path):
    shape = (4, 2, 64)
    window = HeadPattern(kind="a_shape", sink=64, window=64)
    model = {"name": "m", "layers": 4, "heads": 4, "kv_heads": 2, "head_size": 64}
    path = tmp_path / "patterns.json"
    layers = {0: dict.fromkeys(range(4), window)}
    PatternFile(schema_version=1, model=model, layers=layers).save(path)
    # Alike keys, each with values of its own: what is left out weighs as much as what is read.
    q, k, v = Tokens(shape)([1] * 1000, 0)
    k = k[:1].expand_as(k).contiguous()
    v = torch.randn(v.shape, generator=torch.Generator().manual_seed(3))
    outs = []
    for settings in ({}, {"mean_correction": True}, {"coverage": 1.0, "patterns": None}):
        settings = {"patterns": str(path), "break_even": 0, **settings}
        layer = PagedLayer(
            llama, shape, 64, dtype="float32", block_size=16, max_model_len=4096,
            attention_backend="sparse", additional_config={"sparse": settings},
        )  # fmt: skip
        layer.admit(0)
        parts = [layer.step([(0, i, 500)], *(x[i : i + 500] for x in (q, k, v))) for i in (0, 500)]
        outs.append(torch.cat(parts))
    plain, corrected, exact = outs
    assert (plain - exact).abs().max() > 0.1
    torch.testing.assert_close(corrected, exact, atol=2e-5, rtol=0)


def test_padding_rows_are_left_alone(llama):
    layer = PagedLayer(
        llama, (4, 2, 64), 64, dtype="float32", block_size=16, max_model_len=4096, **EVERYTHING
    )
    layer.admit(0)
    q, k, v = Tokens((4, 2, 64))([1] * 8, 0)
    layer.step([(0, 0, 5)], q[:5], k[:5], v[:5])
    # The last of the five again, in a batch that is padded to eight rows.
    metadata = layer.builder.build(0, layer._common([(0, 4, 1)], [0], None))
    out = torch.full_like(q, 7.0)
    layer.layer.impl.forward(layer.layer, q, k, v, layer.cache, metadata, out)
    assert (out[1:] == 7.0).all()
    assert torch.isfinite(out).all()
    # Without metadata vLLM measures memory.
    layer.layer.impl.forward(layer.layer, q, k, v, layer.cache, None, out)
    assert (out == 0).all()
