"""NUMA nodes: which CPUs are near which memory, and from where a thread takes its memory.

Two system calls and what the system says under /sys: libnuma need not be there. Loads no torch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

logger = logging.getLogger("vllm_sparse.offload")

FOLDER = Path("/sys/devices/system/node")
DEFAULT, BIND = 0, 2  # MPOL_DEFAULT, MPOL_BIND
MOST_NODES = 1024  # what the kernel can be built for
_CALLS = {  # set_mempolicy, get_mempolicy
    "x86_64": (238, 239), "aarch64": (237, 236), "riscv64": (237, 236),
}  # fmt: skip
_BITS = ctypes.c_ulong(MOST_NODES + 1)  # the kernel takes one bit less than it is told
_Mask = ctypes.c_ulong * (MOST_NODES // 64)


def nodes(folder: Path | None = None) -> dict[int, set[int]]:
    """The CPUs of each node that has any; {} where the system does not say."""
    found = {}
    for path in (folder or FOLDER).glob("node[0-9]*"):
        cpus = parse((path / "cpulist").read_text())
        if cpus:
            found[int(path.name.removeprefix("node"))] = cpus
    return dict(sorted(found.items()))


def parse(text: str) -> set[int]:
    """The numbers of a list as the system writes them: "0-3,8"."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def by_node(cpus: Iterable[int]) -> list[list[int]]:
    """These CPUs by node, in order of the nodes; nodes without any are left out."""
    cpus = set(cpus)
    groups = [sorted(cpus & mine) for mine in nodes().values()]
    known = set().union(*groups)
    groups.append(sorted(cpus - known))  # all of them, where nothing is known
    return [group for group in groups if group]


def divide(cpus: Iterable[int], actors: int) -> list[list[int]]:
    """These CPUs among actors; no actor's are on two nodes, unless there are fewer actors."""
    groups = by_node(cpus)
    if len(groups) > actors:
        return [[cpu for group in groups[i::actors] for cpu in group] for i in range(actors)]
    there = len(groups) or 1
    counts = [len(range(i, actors, there)) for i in range(there)]
    groups = groups or [[]]
    return [groups[i % there][i // there :: counts[i % there]] for i in range(actors)]


def memory_of(cpus: Sequence[int]) -> list[int]:
    """The nodes of these CPUs, to be bound to; [] where there is nothing to choose."""
    known = nodes()
    if len(known) < 2:
        _say_once("This machine has one NUMA node: actors' memory is not bound.")
        return []
    return [node for node, mine in known.items() if mine & set(cpus)]


@functools.cache
def _say_once(text: str) -> None:
    logger.debug(text)


def bind(nodes: Sequence[int]) -> None:
    """Let the calling thread, and those that it starts from now on, take memory from these nodes
    only; [] from wherever the system thinks best.

    Raises:
        OSError: the system refuses: a node without memory, a container without this right.
    """
    mask = _Mask()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    _call(0, BIND if nodes else DEFAULT, ctypes.byref(mask) if nodes else None, _BITS)


def policy() -> tuple[int, list[int]]:
    """How the calling thread takes memory (DEFAULT, BIND or another), and from which nodes.

    Raises:
        OSError: the system does not say.
    """
    mode, mask = ctypes.c_int(), _Mask()
    _call(1, ctypes.byref(mode), ctypes.byref(mask), _BITS, None, 0)
    return mode.value, [n for n in range(MOST_NODES) if mask[n // 64] >> n % 64 & 1]


def _call(which: int, *arguments) -> None:
    machine = platform.machine()
    if machine not in _CALLS:
        raise OSError(f"memory policies are not known for {machine}; bind it from outside")
    libc = ctypes.CDLL(None, use_errno=True)
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if libc.syscall(ctypes.c_long(_CALLS[machine][which]), *given) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
