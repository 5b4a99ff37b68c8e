"""Which implementation a linear layer runs on a GPU, by its rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gpu_cases import ANY_DTYPE, DEVICE, to_device
from torch.nn.functional import linear as in_torch

from vllm_sparse.linear import gpu_layer, method, op, timing
from vllm_sparse.linear.choice import ROWS, VLLM, Choice
from vllm_sparse.linear.gpu_layer import FLAT, GEMV

N, K = 48, 80


@pytest.fixture(autouse=True)
def no_choices(monkeypatch):
    monkeypatch.setattr(gpu_layer, "_choices", {})


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, int]]:
    """(implementation, rows) of each call."""
    calls: list[tuple[str, int]] = []
    for name, run in gpu_layer.IMPLEMENTATIONS.items():

        def recorded(x, *more, name=name, run=run):
            calls.append((name, len(x)))
            return run(x, *more)

        monkeypatch.setitem(gpu_layer.IMPLEMENTATIONS, name, recorded)
    return calls


def random(*shape: int, seed: int = 0, dtype=ANY_DTYPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return to_device(torch.randn(*shape, generator=generator).to(dtype))


def assert_right(got, x, weight, bias=None) -> None:
    want = in_torch(x.float(), weight.float(), None if bias is None else bias.float())
    assert got.shape == want.shape and got.dtype == x.dtype
    tolerance = 2e-5 if x.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [None, "bias"])
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((0,), GEMV), ((1,), GEMV), ((4,), GEMV), ((2, 2), GEMV), ((2, 0), GEMV),
        ((5,), FLAT), ((64,), FLAT), ((2, 32), FLAT),
        ((65,), VLLM), ((5, 13), VLLM), ((300,), VLLM),
    ],
    ids=str,
)  # fmt: skip
def test_without_a_measurement(shape, name: str, bias, ran):
    weight, bias = random(N, K), random(N, seed=2) if bias else None
    assert gpu_layer.decide(weight, False) == (gpu_layer.GIVEN, "given")
    x = random(*shape, K, seed=1)
    assert_right(gpu_layer.run(x, weight, bias), x, weight, bias)
    rows = x.numel() // K
    assert ran == [(name, rows)]


def test_the_line_of_what_is_given():
    line = "gemv for 1-4, flat for 5-64, vllm for 65 rows and more"
    assert gpu_layer.GIVEN.line() == line


def test_each_shape_and_type_has_its_own_choice(ran):
    kinds = [random(N, K), random(N + 1, K), random(N, K, dtype=torch.bfloat16)]
    names = [VLLM, GEMV, FLAT]
    for weight, name in zip(kinds, names, strict=True):
        gpu_layer._choices[gpu_layer.shape_of(weight)] = Choice.always(name)
    for weight in kinds[:2]:
        x = random(3, K)
        assert_right(gpu_layer.run(x, weight, None), x, weight)
    assert ran == [(name, 3) for name in names[:2]]
    with pytest.raises(KeyError):  # a shape that nobody decided on
        gpu_layer.run(random(3, K), random(N, K + 1), None)


class Clock:
    """Seconds that pass only where an implementation runs: one for each row and name's share."""

    def __init__(self, monkeypatch, **seconds) -> None:
        self.now, self.weights = 0.0, []
        for name, cost in seconds.items():
            monkeypatch.setitem(gpu_layer.IMPLEMENTATIONS, name, self._spends(name, cost))
        self.rows: dict[str, set[int]] = {name: set() for name in seconds}

    def _spends(self, name: str, cost):
        def run(x, weight, bias=None):
            assert x.dtype == weight.dtype and x.device == weight.device
            self.rows[name].add(len(x))
            self.weights.append(weight)
            self.now += cost(len(x))

        return run

    def __call__(self, run) -> float:
        begin = self.now
        run()
        return self.now - begin


@pytest.mark.parametrize(
    ("seconds", "choice"),
    [
        ((1.0, 2.0, 3.0), Choice((4, 64, 256), (GEMV, FLAT, VLLM))),
        ((3.0, 2.0, 1.0), Choice((256,), (VLLM,))),
        ((9.0, 1.0, 3.0), Choice((64, 256), (FLAT, VLLM))),
        ((1.0, 9.0, 3.0), Choice((4, 256), (GEMV, VLLM))),
    ],
    ids=str,
)
def test_the_fastest_by_the_clock(seconds, choice: Choice, monkeypatch):
    monkeypatch.setattr(timing, "TOGETHER_BYTES", 3 * N * K * ANY_DTYPE.itemsize)
    costs = {n: lambda _, s=s: s for n, s in zip((GEMV, FLAT, VLLM), seconds, strict=True)}
    clock = Clock(monkeypatch, **costs)
    weight = random(N, K)
    assert gpu_layer.choose(weight, clock) == choice
    # No kernel is tried with more rows than it is for.
    assert max(clock.rows[GEMV]) == 4 and max(clock.rows[FLAT]) == 64
    assert clock.rows[VLLM] == set(ROWS)
    assert len({one.data_ptr() for one in clock.weights}) == 3
    assert all(torch.equal(one, weight) for one in clock.weights[:3])


def test_a_measurement_is_kept_for_a_device_shape_and_type(monkeypatch, tmp_path, ran):
    clock = Clock(monkeypatch, **{GEMV: lambda m: m, FLAT: lambda m: 3.0, VLLM: lambda m: 9.0})
    monkeypatch.setattr(timing, "gpu_seconds", clock)
    monkeypatch.setattr(timing, "TOGETHER_BYTES", 1 << 14)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = ["a GPU"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: device[0])
    found = Choice((3, 64, 256), (GEMV, FLAT, VLLM))
    assert gpu_layer.decide(random(N, K), True) == (found, "measured")
    assert gpu_layer.decide(random(N, K, seed=1), True) == (found, "kept")
    for other in (random(N + 1, K), random(N, K + 1), random(N, K, dtype=torch.bfloat16)):
        assert gpu_layer.decide(other, True)[1] == "measured"
    device[0] = "another GPU"
    assert gpu_layer.decide(random(N, K), True)[1] == "measured"


def test_a_layer_on_a_gpu(monkeypatch, ran):
    """As vLLM's layers call it; off a GPU the operator has no implementation, and is left out."""
    monkeypatch.setattr(method, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    ours = method.FlatLinearMethod("flat")
    kept = method.UnquantizedLinearMethod
    monkeypatch.setattr(kept, "process_weights_after_loading", lambda self, layer: None)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(op, "gpu_linear", gpu_layer.run)
        monkeypatch.setattr(method.cpu, "native", lambda: object())
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(random(N, K), requires_grad=False)
    weight, bias = layer.weight.data.clone(), random(N, seed=2)
    ours.process_weights_after_loading(layer)
    assert torch.equal(layer.weight, weight)  # which stay where they are
    for rows, name in ((2, GEMV), (9, FLAT), (70, VLLM)):
        x = random(rows, K, seed=rows)
        assert_right(ours.apply(layer, x, bias), x, weight, bias)
        assert ran.pop() == (name, rows)


def test_shapes_are_known_without_running():
    x, weight = torch.empty(2, 3, K, device="meta"), torch.empty(N, K, device="meta")
    assert op.gpu_linear(x, weight, None).shape == (2, 3, N)
