"""Compile a kernel for a GPU that need not be there, and read what it takes of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .launch import Config, Kernel, Target

CUOBJDUMP_TIMEOUT_S = 60


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: registers a thread, bytes of shared memory a program, bytes
    spilled and of stack a thread; whether it multiplies with wgmma (None: no NVIDIA target)."""

    kernel: str
    config: str
    serving: bool
    target: str
    registers: int
    shared_bytes: int
    spills: int
    stack: int
    wgmma: bool | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compile(kernel: Kernel, config: Config, target: Target) -> Any:
    """Triton's CompiledKernel.

    Raises:
        RuntimeError: in a process in which Triton interprets.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel.function, JITFunction):
        raise RuntimeError(
            f"{kernel.name}: Triton interprets in this process, and compiles nothing; unset "
            "TRITON_INTERPRET before it starts"
        )
    names = kernel.function.arg_names
    missing = set(names) - set(config.constants) - set(config.signature)
    assert not missing, f"{kernel.name} {config.name}: no type for {sorted(missing)}"
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(names)
        if name in config.aligned
    }
    source = ASTSource(
        kernel.function,
        {name: config.signature.get(name, "constexpr") for name in names},
        constexprs=dict(config.constants),
        attrs=attributes,
    )
    return triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=config.options,
    )


def usage(kernel: Kernel, config: Config, target: Target) -> Usage:
    """Compile for the target and read the binary.

    Raises:
        RuntimeError: it does not compile, or takes more shared memory than the target has.
    """
    compiled = compile(kernel, config, target)
    shared = compiled.metadata.shared
    if shared > target.shared_bytes:
        raise RuntimeError(
            f"{kernel.name} {config.name}: {shared} bytes of shared memory, {target.name} gives a "
            f"program {target.shared_bytes}"
        )
    if target.backend == "cuda":
        registers, stack, spills = _cubin_usage(compiled.asm["cubin"], target)
        wgmma = "wgmma.mma_async" in compiled.asm["ptx"]
    else:
        registers, stack, spills = _amd_usage(compiled.asm["amdgcn"])
        wgmma = None
    return Usage(
        kernel.name, config.name, config.serving, target.name, registers, shared, spills, stack,
        wgmma,
    )  # fmt: skip


def _cubin_usage(cubin: bytes, target: Target) -> tuple[int, int, int]:
    """(registers, bytes of stack, bytes of local memory written and read) of a cubin."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        dump = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        sass = _run(knobs.nvidia.nvdisasm.path, str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage names no registers: {dump[-200:]!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, spilled_bytes(sass) + local


def spilled_bytes(sass: str) -> int:
    """Bytes that a kernel's machine code puts into the thread's own memory.

    Spilled registers lie on the stack, which cuobjdump's LOCAL does not count.
    """
    return sum(int(bits or 32) // 8 for bits in re.findall(r"\bSTL(?:\.(64|128))?\b", sass))


def _amd_usage(assembly: str) -> tuple[int, int, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if not found:
            raise RuntimeError(f"the AMD assembly names no {name}")
        return int(found[1])

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return number("vgpr_count"), number("private_segment_fixed_size"), 4 * spills


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=CUOBJDUMP_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-200:]}")
    return done.stdout
