"""vLLM's own layer classes with our methods: when they are ours, and that they compute the same."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear as in_torch
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor import custom_op
from vllm.model_executor.layers import linear, vocab_parallel_embedding

from vllm_sparse import log, plugin
from vllm_sparse.kernels import cpu
from vllm_sparse.linear import cpu_layer, layers, method, op, timing
from vllm_sparse.linear.choice import Choice
from vllm_sparse.stats import STATS

K, HEAD = 96, 32
MAKE = {
    "ColumnParallelLinear": lambda c, **more: c(K, 130, **more),
    "MergedColumnParallelLinear": lambda c, **more: c(K, [64, 32], **more),
    "QKVParallelLinear": lambda c, **more: c(K, HEAD, 4, 2, **more),
    "ReplicatedLinear": lambda c, **more: c(K, 17, **more),
    "RowParallelLinear": lambda c, **more: c(K, 65, **more),
    "ParallelLMHead": lambda c, **more: c(200, K, **more),
    "VocabParallelEmbedding": lambda c, **more: c(200, K, **more),
}
THEIRS = {
    **{name: getattr(linear, name) for name in layers.LINEAR},
    **{name: getattr(vocab_parallel_embedding, name) for name in layers.EMBEDDINGS},
}
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope="module")
def registry():
    """What other tests make is vLLM's afterwards; one rank, as far as layers ask."""
    plugin.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custom_op, "op_registry_oot", {})
        patch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
        yield


@pytest.fixture(scope="module")
def configs(registry, llama) -> dict:
    """By the value of `linear`, or by what else there is."""

    def made(**settings):
        args = EngineArgs(model=llama, skip_tokenizer_init=True, dtype="float32", **settings)
        return args.create_engine_config()

    ours = {
        setting: made(attention_backend="sparse", additional_config={"sparse": {"linear": setting}})
        for setting in ("flat", "auto", "vllm")
    }
    # The section alone does not select the backend.
    section = made(additional_config={"sparse": {"linear": "flat"}})
    return {**ours, "unset": made(attention_backend="sparse"), "section": section}


@pytest.fixture(autouse=True)
def lines(monkeypatch):
    """What is said; nothing was before, and nothing counted."""
    monkeypatch.setattr(STATS, "fallbacks", {})
    monkeypatch.setattr(method, "_said", set())
    log.once.cache_clear()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    method.logger.addHandler(handler)
    yield said
    method.logger.removeHandler(handler)


def make(config, name: str, dtype=torch.float32, seed: int = 0, load: bool = True, **more):
    """A layer of random weights as vLLM makes and loads it; its weights and bias as they were."""
    with set_current_vllm_config(config):
        layer = MAKE[name](THEIRS[name], params_dtype=dtype, **more)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    bias = getattr(layer, "bias", None)
    was = layer.weight.data.clone(), None if bias is None else bias.data.clone()
    if load:
        layer.quant_method.process_weights_after_loading(layer)
    return layer, *was


def rows(*shape: int, dtype=torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_right(got: torch.Tensor, x, weight, bias=None) -> None:
    want = in_torch(x.float(), weight.float(), None if bias is None else bias.float())
    assert got.shape == want.shape and got.dtype == x.dtype
    tolerance = TOLERANCES[x.dtype]
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def is_ours(layer) -> bool:
    return isinstance(layer.quant_method, (method.FlatLinearMethod, method.FlatEmbeddingMethod))


@pytest.mark.parametrize("name", MAKE)
def test_classes_are_replaced_and_stay_vllms(name: str, configs):
    layer, *_ = make(configs["flat"], name)
    assert type(layer) is not THEIRS[name] and isinstance(layer, THEIRS[name])
    assert type(layer).__name__ == name
    assert is_ours(layer) and layer.quant_method.setting == "flat"
    kind = "Embedding" if name in layers.EMBEDDINGS else "Linear"
    assert type(layer.quant_method).__name__ == f"Flat{kind}Method"
    assert type(layer.quant_method).__mro__[2].__name__ == f"Unquantized{kind}Method"


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("setting", ["vllm", "unset", "section", None])
def test_layers_of_models_that_do_not_ask_are_vllms(setting: str | None, name: str, configs):
    if setting is None:
        layer = MAKE[name](THEIRS[name], params_dtype=torch.float32)  # in no configuration
    else:
        layer, *_ = make(configs[setting], name, load=False)
    module = vocab_parallel_embedding if name in layers.EMBEDDINGS else linear
    kind = "Embedding" if name in layers.EMBEDDINGS else "Linear"
    assert type(layer.quant_method) is getattr(module, f"Unquantized{kind}Method")


@pytest.mark.parametrize("name", ["RowParallelLinear", "VocabParallelEmbedding"])
def test_layers_with_another_method_are_left_alone(name: str, configs):
    layer, *_ = make(configs["vllm"], name, load=False)
    other = type("Other", (type(layer.quant_method),), {})()
    layer.quant_method = other
    for setting in ("vllm", "flat"):
        with set_current_vllm_config(configs[setting]):
            layers.adopt(layer)
        assert layer.quant_method is other
        assert STATS.fallbacks == ({"linear_quantized": 1} if setting == "flat" else {})


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", layers.LINEAR)
def test_flat_computes_the_layer(name: str, dtype, configs):
    layer, weight, bias = make(configs["flat"], name, dtype, bias=True)
    assert layer.weight.numel() == 0  # memory is given back
    for shape in [(1,), (3,), (70,), (0,), (2, 3), (1, 1), (2, 0)]:
        x = rows(*shape, dtype=dtype)
        assert_right(layer(x)[0], x, weight, bias)
    assert STATS.fallbacks == {}


@pytest.mark.parametrize("name", layers.LINEAR)
def test_without_bias(name: str, configs):
    x = rows(5)
    layer, weight, _ = make(configs["flat"], name, bias=False)
    got, returned = layer(x)
    assert returned is None
    assert_right(got, x, weight)
    layer, weight, bias = make(configs["flat"], name, bias=True, skip_bias_add=True)
    got, returned = layer(x)
    assert torch.equal(returned, bias)
    assert_right(got, x, weight)
    layer, weight, bias = make(configs["flat"], name, bias=True, return_bias=False)
    assert_right(layer(x), x, weight, bias)


def test_rows_that_lie_apart(configs):
    layer, weight, bias = make(configs["flat"], "RowParallelLinear", bias=True)
    wide = torch.full((4, 3 * K), torch.nan)
    wide[:, K : 2 * K] = rows(4)
    assert_right(layer(wide[:, K : 2 * K])[0], rows(4), weight, bias)
    assert_right(layer(rows(4).T.contiguous().T)[0], rows(4), weight, bias)


@pytest.mark.parametrize("setting", ["flat", "auto"])
def test_output_layers_are_packed_when_loaded_and_embeddings_not(setting, configs, monkeypatch):
    both(monkeypatch)
    packed = []
    real = method.PackedWeight
    monkeypatch.setattr(method, "PackedWeight", lambda w: packed.append(w.shape) or real(w))
    embedding, weight, _ = make(configs[setting], "VocabParallelEmbedding")
    head, *_ = make(configs[setting], "ParallelLMHead", load=False, seed=5)
    assert head.tie_weights(embedding) is head
    head.quant_method.process_weights_after_loading(head)
    ids = torch.tensor([[0, 199, 7]])

    def check() -> None:
        assert torch.equal(embedding(ids), weight[ids])
        assert embedding.weight.shape == weight.shape

    check()
    assert packed == [weight.shape]  # of the output layer alone
    for count in (1, 5, 1):
        x = rows(count)
        assert_right(head.quant_method.apply(head, x), x, weight)
        check()
    assert len(packed) == 1
    with torch.inference_mode():  # as vLLM runs; who could know that it is an output layer?
        assert_right(embedding.quant_method.apply(embedding, x), x, weight)
    check()
    assert len(packed) == 2
    assert not embedding.flat_key.is_inference() and not embedding.flat.packed.data.is_inference()


def test_a_tied_embedding_is_packed_when_loaded(configs, monkeypatch):
    text_config = configs["flat"].model_config.hf_text_config
    monkeypatch.setattr(text_config, "tie_word_embeddings", True)
    embedding, weight, _ = make(configs["flat"], "VocabParallelEmbedding")
    assert embedding.flat.packed.num_outputs == len(weight)  # before vLLM shares out memory
    assert_right(embedding.quant_method.apply(embedding, rows(2)), rows(2), weight)


def test_a_bias_of_the_output_layer(configs):
    head, weight, bias = make(configs["flat"], "ParallelLMHead", bias=True)
    assert_right(head.quant_method.apply(head, rows(3), head.bias), rows(3), weight, bias)
    assert_right(head.quant_method.apply(head, rows(3)), rows(3), weight)


def both(monkeypatch, choice: Choice | None = None) -> list[tuple[int, int]]:
    """Two rows and less are ours, more vLLM's, as if measured; sizes of what was measured."""
    measured: list[tuple[int, int]] = []

    def choose(runs, num_inputs, *_):
        measured.append((num_inputs, len(runs["flat"])))
        return choice or Choice((2, 3), ("flat", "vllm"))

    monkeypatch.setattr(timing, "TOGETHER_BYTES", 1 << 17)
    monkeypatch.setattr(timing, "choose", choose)
    monkeypatch.setattr(timing, "kept_file", lambda name: cpu_layer_cache)
    monkeypatch.setattr(timing, "_here", {})
    cpu_layer_cache.unlink(missing_ok=True)
    return measured


@pytest.fixture(autouse=True, scope="module")
def cache_for_all(tmp_path_factory):
    global cpu_layer_cache
    cpu_layer_cache = tmp_path_factory.mktemp("cache") / "linear.json"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_both_implementations_by_rows(dtype, configs, monkeypatch, lines):
    measured, ours, theirs = both(monkeypatch), [], []
    real = cpu_layer.linear
    monkeypatch.setattr(cpu_layer, "linear", lambda x, *a: ours.append(len(x)) or real(x, *a))
    for i in range(3):
        layer, weight, bias = make(configs["auto"], "RowParallelLinear", dtype, i, bias=True)
        run = layer.flat.theirs
        layer.flat.theirs = lambda x, *a, run=run: theirs.append(len(x)) or run(x, *a)
        x = rows(6, dtype=dtype, seed=i)
        assert_right(layer(x)[0], x, weight, bias)
        assert_right(torch.cat([layer(x[j : j + 2])[0] for j in (0, 2, 4)]), x, weight, bias)
        assert_right(layer(x[None, :1])[0], x[None, :1], weight, bias)
    assert ours == [2, 2, 2, 1] * 3 and theirs == [6] * 3
    copies = (1 << 17) // (65 * K * x.itemsize)
    assert measured == [(K, copies)]  # one shape, measured once
    name = str(dtype).removeprefix("torch.")
    line = f"Linear layers 65x{K} {name}: flat for 1-2, vllm for 3 rows and more"
    assert lines == [f"{line} (measured)"]


def test_a_bias_whose_type_vllm_changes(configs, monkeypatch):
    """As it does for SGLang's kernels, where there is AMX."""

    def dispatch(layer, remove_weight):
        weight = layer.weight
        layer.bias.data = layer.bias.float()
        layer.cpu_linear = lambda x, _, bias: in_torch(x, weight, bias.to(x.dtype))

    monkeypatch.setattr(method, "vllms_own_of", lambda weight: None)
    monkeypatch.setattr(method, "dispatch_cpu_unquantized_gemm", dispatch)
    both(monkeypatch)
    layer, weight, bias = make(configs["auto"], "RowParallelLinear", torch.bfloat16, bias=True)
    assert layer.bias.dtype == torch.float32
    for count in (2, 3):
        x = rows(count, dtype=torch.bfloat16)
        assert_right(layer(x)[0], x, weight, bias)


@pytest.mark.parametrize("name", cpu_layer.NAMES)
def test_what_the_choice_does_not_name_is_not_made(name: str, configs, monkeypatch):
    both(monkeypatch, Choice.always(name))
    layer, weight, bias = make(configs["auto"], "RowParallelLinear", bias=True)
    assert (layer.flat.packed is None) == (name == "vllm")
    assert (layer.flat.theirs is None) == (name == "flat")
    assert layer.weight.numel() == 0
    assert_right(layer(rows(5))[0], rows(5), weight, bias)


def test_each_shape_is_said_once(configs, lines):
    for _ in range(2):
        for name in ("RowParallelLinear", "ColumnParallelLinear"):
            make(configs["flat"], name)
    assert lines == [f"Linear layers {n}x{K} float32: flat for any rows (given)" for n in (65, 130)]


@pytest.mark.parametrize("name", ["RowParallelLinear", "ParallelLMHead"])
@pytest.mark.parametrize("reason", ["linear_dtype", "linear_no_native_kernels"])
def test_layers_that_are_left_to_vllm(reason: str, name: str, configs, monkeypatch, lines):
    dtype = torch.float64 if reason == "linear_dtype" else torch.float32
    if reason == "linear_no_native_kernels":
        monkeypatch.setattr(cpu, "native", lambda: None)
    for count in (1, 2):
        layer, weight, _ = make(configs["flat"], name, dtype, bias=False)
        for m in (1, 5):
            x = rows(m, dtype=dtype)
            got = layer.quant_method.apply(layer, x)
            torch.testing.assert_close(got, in_torch(x, weight), rtol=1e-5, atol=2e-5)
        assert STATS.fallbacks == {reason: count}
    assert lines == [f"Some linear layers are left to vLLM: {reason}"]


def test_weights_that_are_read_elsewhere_are_left(configs):
    layer, weight, _ = make(configs["flat"], "ColumnParallelLinear", bias=False, load=False)
    layer._cpu_skip_gemm_dispatch = True  # as vLLM's MLA says
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight, weight)
    assert_right(layer(rows(3))[0], rows(3), weight)
    assert STATS.fallbacks == {"linear_read_as_weights": 1}


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(8, 1, 4), torch.zeros(0), torch.zeros(8, K, device="meta")],
    ids=["3-D", "removed", "meta"],
)
def test_weights_that_are_no_matrix_are_left(weight: torch.Tensor, configs):
    layer, *_ = make(configs["flat"], "ColumnParallelLinear", load=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.quant_method.process_weights_after_loading(layer)
    assert STATS.fallbacks == {"linear_without_weights": 1}
    assert layer.weight.shape == weight.shape and not hasattr(layer, "flat")


def test_a_layer_that_is_gone_leaves_the_registry(configs):
    first, *_ = make(configs["flat"], "RowParallelLinear")
    second, *_ = make(configs["flat"], "RowParallelLinear")
    assert first.flat_key is first.flat.key and int(first.flat_key) != int(second.flat_key)
    assert cpu_layer.CpuLayer.of(first.flat_key) is first.flat
    assert "flat_key" not in first.state_dict()
    number, gone = int(first.flat_key), weakref.ref(first.flat)
    del first
    gc.collect()
    assert gone() is None and number not in cpu_layer._layers
    assert cpu_layer.CpuLayer.of(second.flat_key) is second.flat


def test_one_compiled_graph_for_any_rows_and_layer(configs):
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(x, bias, key):
        return op.cpu_linear(x * 2, bias, key, 65) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for seed in range(3):
        layer, weight, bias = make(configs["flat"], "RowParallelLinear", seed=seed, bias=True)
        for m in (2, 7):
            got = compiled(rows(m), layer.bias, layer.flat_key)
            assert_right(got - 1, rows(m) * 2, weight, bias)
    assert len(graphs) == 1


def test_a_compiled_module(configs):
    both_layers = [make(configs["flat"], n, bias=True) for n in ("RowParallelLinear",) * 2]
    (first, *_), (second, *_) = both_layers

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return torch.relu(self.first(x)[0]) - self.second(x)[0]

    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for m in (3, 9):
        torch.testing.assert_close(compiled(rows(m)), model(rows(m)))


def test_the_operator_is_as_torch_demands(configs):
    layer, *_ = make(configs["flat"], "RowParallelLinear", bias=True)
    for x in (rows(3), rows(2, 3)):
        for bias in (layer.bias, None):
            torch.library.opcheck(
                torch.ops.vllm_sparse.cpu_linear.default, (x, bias, layer.flat_key, 65)
            )
