"""How much host memory the stores get."""

from __future__ import annotations

GIB = 1 << 30


def store_pages(
    host_gib: float | None, *, page_bytes: int, page_rows: int, max_tokens: int,
    max_requests: int, ranks: int, free: int, engines: int = 1,
) -> int:  # fmt: skip
    """Pages of one worker's stores; page_bytes is a page's of all layers.

    Unless told, what all requests at their longest would need, and at most half of the memory that
    is free.

    Args:
        ranks: workers of this engine; engines: on this machine (data parallelism), where each takes
            a host_gib of its own.
        free: bytes of memory that are. The same for all ranks, as their stores are of one size.

    Raises:
        ValueError: not even one request at its longest would fit, or there is not so much memory.
    """
    needed = -(-max_tokens // page_rows)
    if host_gib is None:
        pages = min(needed * max_requests, free // (2 * ranks * engines) // page_bytes)
    else:
        pages = int(host_gib * GIB) // ranks // page_bytes
        if pages * ranks * page_bytes > free:
            raise ValueError(
                f'additional_config["sparse"]["host_gib"] is {host_gib:g}, and {free / GIB:.2f} '
                "GiB of memory are free on this machine, or within the limit of its container. "
                "Set host_gib to less, or leave it out"
            )
    if pages < needed:
        given = "unset, which gives" if host_gib is None else f"{host_gib:g}, which is"
        raise ValueError(
            f'additional_config["sparse"]["host_gib"] is {given} {pages * page_bytes / GIB:.2f} '
            f"GiB for each of {ranks} workers: one request of {max_tokens} tokens "
            f"(--max-model-len) takes {needed * page_bytes / GIB:.2f} GiB there. Set host_gib to "
            f"{(needed + 1) * page_bytes * ranks / GIB:.2f} or more, or lower --max-model-len"
        )
    return pages
