"""How much memory is free, by the machine and by the limits that this process stands under."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

HEADROOM = 0.05  # of what is free, left to everybody else
# A group's limit and its use, in version 2 of control groups and in version 1.
FILES = {
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def available_memory() -> int:
    """Bytes that this process may still take.

    Limits are those of control groups: of a container, of a job of Slurm's, of a systemd unit.
    """
    room = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                room.append(int(line.split()[1]) * 1024)
    for group, limit, used in _groups():
        with contextlib.suppress(OSError, ValueError):  # no limit there, or "max"
            most = int((group / limit).read_text())
            room.append(most - int((group / used).read_text()) + _reclaimable(group))
    return max(0, int(min(room) * (1 - HEADROOM))) if room else 1 << 62


def _groups() -> Iterator[tuple[Path, str, str]]:
    """Folders of the groups that this process is in, and the names of their files.

    A container sees its own group as the root, and, with version 1, may be told a path that it
    does not see.
    """
    lines = ["0::/", "0:memory:/"]
    with contextlib.suppress(OSError):
        lines += Path("/proc/self/cgroup").read_text().splitlines()
    found = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            if name in FILES:
                root = Path("/sys/fs/cgroup", name)
                group = root / path.lstrip("/")
                found.update(
                    {g: FILES[name] for g in (group, *group.parents) if g.is_relative_to(root)}
                )
    yield from ((group, *files) for group, files in found.items())


def _reclaimable(group: Path) -> int:
    """The page cache that the group's use counts."""
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Version 1 has the groups below in numbers of their own.
        return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return 0
