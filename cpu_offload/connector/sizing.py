"""How much host memory the stores get."""

from __future__ import annotations

import os

GIB = 1 << 30


def store_bytes(
    host_gib: float | None, *, layers: int, row_bytes: int, page_rows: int, max_tokens: int,
    max_requests: int, ranks: int,
) -> int:  # fmt: skip
    """Bytes of one worker's stores; row_bytes is a row's of one layer.

    Unless told, what all requests at their longest would need, and at most half of the memory that
    is free.

    Raises:
        ValueError: not even one request at its longest would fit.
    """
    pages = -(-max_tokens // page_rows)
    needed = pages * page_rows * row_bytes * layers
    if host_gib is None:
        size = min(needed * max_requests, _available() // (2 * ranks))
    else:
        size = int(host_gib * GIB) // ranks
    if size < needed:
        given = "unset, which gives" if host_gib is None else f"{host_gib:g}, which is"
        raise ValueError(
            f'additional_config["sparse"]["host_gib"] is {given} {size / GIB:.2f} GiB for each of '
            f"{ranks} workers: one request of {max_tokens} tokens (--max-model-len) takes "
            f"{needed / GIB:.2f} GiB there. Set host_gib to {needed * ranks / GIB:.2f} or "
            "more, or lower --max-model-len"
        )
    return size


def _available() -> int:
    """Bytes of memory that are free for new use."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
