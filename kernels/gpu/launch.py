"""The launch table: the constants, warps and stages that each Triton kernel is compiled with.

What launches and what reports (`aot.py`, `benchmarks/compile_report.py`) both read it, so that the
report is about what runs. A kernel's file adds its own entries with `@kernel`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ..paged_cache import FP8, check_scales

FP8_CAPABILITY = (8, 9)  # from which on Triton converts float8_e4m3fn

# Files with Triton kernels, each of which fills its part of the table.
MODULES = (
    "block_means",
    "block_sums",
    "choose_pattern",
    "cope_split",
    "cope_tile",
    "flat_gemm",
    "gemv",
    "index_lists",
    "key_worth",
    "last_union",
    "left_out",
    "line_sums",
    "pack_tiles",
    "prefill_tile",
    "search_columns",
    "search_threshold",
    "search_window",
    "shared_prefix",
    "sort_columns",
    "split_decode",
    "write_kv",
)


@dataclass(frozen=True)
class Target:
    """A kind of GPU that kernels are compiled for."""

    name: str
    backend: str  # as Triton calls it
    arch: int | str
    warp_size: int
    shared_bytes: int  # that one program may have

    @property
    def fp8(self) -> bool:
        """Whether its Triton converts float8_e4m3fn: MI300 has other FP8."""
        return self.backend == "cuda" and divmod(self.arch, 10) >= FP8_CAPABILITY


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166912),
        Target("sm_90", "cuda", 90, 32, 232448),
        Target("sm_100", "cuda", 100, 32, 232448),
        Target("gfx942", "hip", "gfx942", 64, 65536),
    )
}

DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
    FP8: "fp8e4nv",
}
# What serving runs on; float32 is for the interpreter.
SERVING_DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 96, 128, 256)


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel.

    signature: the type of each argument that is no constant, as Triton writes types ("*bf16",
    "i32", "fp32"); what is launched has just these types.
    aligned: the arguments that are multiples of 16 (addresses and strides, as vLLM makes them).
    """

    name: str
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    signature: Mapping[str, str]
    serving: bool
    aligned: frozenset[str] = frozenset()

    @property
    def options(self) -> dict[str, Any]:
        return options(self.num_warps, self.num_stages)


def options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Keyword arguments of a launch or a compilation, beside the constants."""
    # Multiply-adds round once, which Triton 3.10 will not do unless told to.
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def unspecialized(
    numbers: tuple[str, ...] = (), pointers: tuple[str, ...] = ()
) -> dict[str, tuple[str, ...]]:
    """Keyword arguments of `triton.jit`: arguments whose values compile no code of their own.

    Triton compiles anew for a number that is 1 or a multiple of 16, and for an address that is
    not. What changes from step to step must not, or the first long prompt waits for a compiler.
    """
    return {
        "do_not_specialize": numbers,
        "do_not_specialize_on_alignment": pointers,
    }


@dataclass(frozen=True)
class Kernel:
    """A Triton function and its configurations on a target."""

    name: str
    function: Any  # triton.JITFunction
    configs: Callable[[Target], Iterator[Config]]

    def serving(self, target: Target) -> list[Config]:
        return [config for config in self.configs(target) if config.serving]


_kernels: dict[str, Kernel] = {}


def kernel(function: Any) -> Callable:
    """Enter a Triton function into the table; decorates the function target -> its Configs."""

    def enter(configs: Callable[[Target], Iterator[Config]]) -> Callable:
        def of_target(target: Target) -> Iterator[Config]:
            for config in configs(target):
                # AMD's are compiled to see that they can be; nothing serves on them.
                yield replace(config, serving=config.serving and target.backend == "cuda")

        name = function.__name__.strip("_")
        _kernels[name] = Kernel(name, function, of_target)
        return configs

    return enter


def kernels() -> dict[str, Kernel]:
    """Every kernel of the package by name."""
    for module in MODULES:
        importlib.import_module(f".{module}", __package__)
    return dict(sorted(_kernels.items()))


def caches(target: Target, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What caches of serving hold for queries of a dtype; float16 is shown without FP8."""
    return (dtype, FP8) if target.fp8 and dtype is torch.bfloat16 else (dtype,)


def scale_types(cache: torch.dtype, *names: str) -> tuple[dict[str, str], dict[str, None]]:
    """Of a Config with such a cache: what its scales add to the signature and the constants."""
    return (dict.fromkeys(names, "*fp32"), {}) if cache == FP8 else ({}, dict.fromkeys(names))


def named(dtype: torch.dtype, cache: torch.dtype) -> str:
    """Queries and cache in a Config's name."""
    return f"{DTYPES[dtype]}-e4m3" if cache == FP8 else DTYPES[dtype]


def scales(
    device: torch.device, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both or none, which are the two forms of a kernel; where one is given, the other is 1."""
    check_scales(device, k_scale=k_scale, v_scale=v_scale)
    if k_scale is None and v_scale is None:
        return None, None
    one = _one(device)
    return one if k_scale is None else k_scale, one if v_scale is None else v_scale


@cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones(1, dtype=torch.float32, device=device)


def check_fp8(device: torch.device) -> None:
    """Raises ValueError for a device whose Triton does not read FP8 caches (float8_e4m3fn)."""
    if device.type == "cpu":  # the interpreter
        return
    if torch.version.hip:
        got = "an AMD GPU, whose FP8 formats are others (fnuz on gfx942)"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= FP8_CAPABILITY:
            return
        got = f"a GPU of compute capability {major}.{minor}"
    raise ValueError(
        "FP8 KV cache: its float8_e4m3fn is read from compute capability "
        f"{FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} on, got {got}; use --kv-cache-dtype auto"
    )


@cache
def sms_of(device: torch.device) -> int:
    """Streaming multiprocessors of a device; on the interpreter's CPU those of an H100."""
    if device.type == "cpu":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def target_of(device: torch.device) -> Target:
    """The Target whose configurations fit a device; a CPU's (the interpreter's) is sm_90.

    Raises:
        ValueError: no kernel is made for the device.
    """
    if device.type == "cpu":
        return TARGETS["sm_90"]
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if name in TARGETS:
            return TARGETS[name]
    elif device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"sm_{major}{minor}"
        for least, target in ((100, "sm_100"), (90, "sm_90"), (80, "sm_80")):
            # Consumer Blackwell (12.0) has no more shared memory for a program than Ada.
            if 10 * major + minor >= least and major < 12:
                return TARGETS[target]
        if major >= 12:
            return TARGETS["sm_80"]
    else:
        name = str(device)
    raise ValueError(
        f"device: the GPU kernels are made for {', '.join(TARGETS)}, got {name}; "
        "use a dense backend there"
    )
