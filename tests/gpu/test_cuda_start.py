"""The start of a worker on a GPU, where vLLM may have set torch's default device and type."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import torch
from gpu_cases import HAS_GPU
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from vllm_sparse import cuda_runtime
from vllm_sparse.config import SparseConfig
from vllm_sparse.kernels.gpu import launch
from vllm_sparse.kernels.gpu.block_sums import _block_sums
from vllm_sparse.planner import device, device_break_even
from vllm_sparse.planner.break_even import NEVER

pytestmark = pytest.mark.skipif(HAS_GPU, reason="stands in for a GPU; here is one")

CPU = torch.device("cpu")


class NothingByDefault(TorchFunctionMode):
    """Fails where a tensor is made and not told where: vLLM makes layers, and the loader's
    default device is the GPU then, which neither pins nor takes a generator of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _device_constructors():
            self.made += 1
            assert kwargs.get("device") is not None, f"{function.__name__} without a device"
        return function(*args, **kwargs)


@pytest.fixture
def idle_kernels(monkeypatch):
    """Triton's kernels do nothing, and the rest of what runs is real: interpreted, a start takes
    a minute."""
    monkeypatch.setattr(type(_block_sums), "run", lambda *a, **k: None)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # the loader's
    cuda_runtime.start.cache_clear()
    yield
    cuda_runtime.start.cache_clear()
    torch.set_default_dtype(dtype)


def start(settings: dict, cache_dtype: torch.dtype, has_sinks: bool):
    return cuda_runtime.start(
        SparseConfig(**settings), dtype=torch.bfloat16, cache_dtype=cache_dtype,
        head_size=64, num_heads=4, num_kv_heads=2, chunk=600, page=16, device=CPU,
        has_sinks=has_sinks, dense=dense,
    )  # fmt: skip


def test_a_start_leaves_nothing_on_the_device(idle_kernels, monkeypatch):
    """vLLM may sleep, and what its memory pool held at the start is garbage afterwards."""
    made: list[weakref.ref] = []

    def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        made.append(weakref.ref(x))
        return x

    monkeypatch.setattr(device, "upload", upload)
    start({"break_even": 4096}, torch.bfloat16, False)
    gc.collect()
    assert len(made) > 10 and not any(x() is not None for x in made)
    for cached in (device.chunk_of, device.limits):
        assert cached.cache_info().currsize == 0


def dense(q, *where, scale, **scales) -> None:
    assert set(scales) <= {"k_scale", "v_scale"}


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_start_takes_nothing_from_torchs_defaults(
    cache_dtype, has_sinks, idle_kernels, monkeypatch, tmp_path
):
    settings = {"break_even": 4096, "mean_correction": True}
    with NothingByDefault() as mode:
        assert start(settings, cache_dtype, has_sinks).tokens == 4096
    assert mode.made > 20
    # And where it is measured.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(device_break_even, "_timed", lambda run: (run(), 0.001)[1])
    monkeypatch.setattr(device_break_even, "LENGTHS", (4096,))
    with NothingByDefault():
        assert start({}, cache_dtype, has_sinks).tokens in (4096, NEVER)


def test_slices_of_a_batch_compile_no_code_of_their_own():
    """A segment that does not begin with the batch has addresses that are not multiples of 16,
    which Triton would compile for while it serves."""
    sliced = {"table", "block_table", "seq_lens", "query_start_loc", "slot_mapping"}
    seen = 0
    for name, kernel in launch.kernels().items():
        function = kernel.function  # interpreted or compiled
        given = getattr(function, "kwargs", None) or vars(function)
        exempt = set(given.get("do_not_specialize_on_alignment") or ())
        ours = sliced.intersection(inspect.signature(function.fn).parameters)
        seen += len(ours)
        assert ours <= exempt, (name, ours - exempt)
    assert seen > 15
