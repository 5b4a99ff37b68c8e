"""Batches some of whose sequences begin with the same pages."""

from __future__ import annotations

import torch
from cases import Case


def batch(
    given: list[tuple[int, int, int] | None], queries: list[int] | None = None, page: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(block table, query starts, lengths) of sequences, each (prefix, its pages, keys in all) or
    None: 200 keys of its own."""
    lens = [200 if x is None else x[2] for x in given]
    width = max([-(-n // page) for n in lens], default=0) + 1
    table = 1000 + torch.arange(len(given) * width, dtype=torch.int32).view(len(given), width)
    for s, x in enumerate(given):
        if x is not None:
            prefix, pages, _ = x
            table[s, :pages] = 100 * prefix + torch.arange(pages, dtype=torch.int32)
    queries = [1] * len(given) if queries is None else queries
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    return table, starts, torch.tensor(lens, dtype=torch.int32)


def random_batch(
    seqs: int, page: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences of up to three prefixes of up to 1,000 keys, and some padding at the end."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    given = []
    for _ in range(seqs):
        pages = below(1000 // page + 1)
        given.append((below(3), pages, max(pages * page + below(3 * page) - page, 1)))
    queries = [1 + below(3) for _ in given]
    queries = [min(n, x[2]) for n, x in zip(queries, given, strict=True)]
    padding = min(below(4), seqs - 1)
    queries[seqs - padding :] = [0] * padding
    return batch(given, queries, page)


def share_pages(case: Case, first: int, others: list[int], pages: int) -> None:
    """Let sequences of a case read another one's first pages."""
    case.block_table[others, :pages] = case.block_table[first, :pages]
