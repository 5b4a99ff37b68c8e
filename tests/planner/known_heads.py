"""Queries and keys whose attention is known: one KV head's keys, and query heads of each kind.

The 128 dimensions are split: one for the sink, one that marks the columns, 64 that turn with the
position (32 random frequencies), 62 for the word codes. A query head puts weight on one of them.
"""

from __future__ import annotations

import math

import torch

SIZE, PAIRS, CODE = 128, 32, 62
SCALE = SIZE**-0.5
SHARP = 26.0  # logit of what a head looks for, above 0 for the rest


class Heads:
    """Keys [n, D] of one KV head, and the queries [n, D] of any kind of head on them."""

    def __init__(self, n: int, *, words: int = 4000, columns: int = 200, seed: int = 0):
        self.n, self.rng = n, torch.Generator().manual_seed(seed)
        self.position = torch.arange(n, dtype=torch.float64)
        self.theta = torch.rand(PAIRS, generator=self.rng, dtype=torch.float64) * 3
        codes = torch.nn.functional.normalize(self._randn(words, CODE), dim=1)
        self.words = torch.randint(words, (n,), generator=self.rng)
        self.codes = codes
        self.columns = torch.randperm(n, generator=self.rng)[:columns].sort().values
        self.keys = torch.zeros(n, SIZE)
        self.keys[0, 0] = 1.0
        self.keys[self.columns, 1] = 1.0
        self.keys[:, 2 : 2 + 2 * PAIRS] = self._turned(0)
        self.keys[:, 2 + 2 * PAIRS :] = codes[self.words]
        self.keys[0, 1:] = 0.0

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng)

    def _turned(self, distance: int) -> torch.Tensor:
        angle = (self.position[:, None] - distance) * self.theta
        return (torch.cat([angle.cos(), angle.sin()], 1) / PAIRS**0.5).float()

    def query(self, **parts: torch.Tensor | float) -> torch.Tensor:
        """Queries with logits `sink`, `column`, and for position and code the given vectors."""
        q = torch.zeros(self.n, SIZE)
        for name, value in parts.items():
            where = {
                "sink": slice(0, 1),
                "column": slice(1, 2),
                "position": slice(2, 2 + 2 * PAIRS),
                "code": slice(2 + 2 * PAIRS, SIZE),
            }[name]
            q[:, where] = value
        return q / SCALE

    def slash(self, distance: int) -> torch.Tensor:
        """Each row looks `distance` tokens back, or at the sink where there is no such token."""
        return self.query(sink=SHARP / 2, position=SHARP * self._turned(distance))

    def sink_window(self, share: float = 0.5) -> torch.Tensor:
        """`share` on the sink, the rest on the row's own and the nearest tokens."""
        return self.query(
            sink=SHARP + math.log(share / (1 - share)), position=SHARP * self._turned(0)
        )

    def vertical(self) -> torch.Tensor:
        return self.query(sink=SHARP, column=SHARP - 1.0)

    def same_word(self) -> torch.Tensor:
        """Each row on the earlier places of its own word, the row itself among them."""
        return self.query(sink=SHARP / 2, code=SHARP * self.codes[self.words])

    def uniform(self) -> torch.Tensor:
        return self._randn(self.n, SIZE) * 0.3

    def only_sink(self) -> torch.Tensor:
        return self.query(sink=SHARP)

    def retrieval(self, needle: int, rows: int = 1) -> torch.Tensor:
        """On the sink but for the last rows, which look for the word at `needle`."""
        q = self.only_sink()
        look = self.query(sink=1.0, code=SHARP * self.codes[self.words[needle]].expand(self.n, -1))
        q[-rows:] = look[-rows:]
        return q

    def averaging(self, rows: int = 1) -> torch.Tensor:
        """On the sink but for the last rows, which attend all keys about alike."""
        q = self.only_sink()
        q[-rows:] = self._randn(rows, SIZE) * 0.3
        return q


def paged(keys: torch.Tensor, page: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [Hkv, n, D] in a shuffled cache: k_cache [pages, Hkv, page, D], block table [1, P]."""
    kv_heads, n, size = keys.shape
    pages = -(-n // page)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))
    cache = torch.full((pages, kv_heads, page, size), torch.nan, dtype=keys.dtype)
    padded = torch.full((kv_heads, pages * page, size), torch.nan, dtype=keys.dtype)
    padded[:, :n] = keys
    cache[order] = padded.unflatten(1, (pages, page)).transpose(0, 1)
    return cache, order[None].to(torch.int32)


def noisy_prompt(n: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last rows of a prompt of n tokens: queries [rows, 6, 128] of a head of each kind, and the
    cache and block table of two KV heads. With noise, so that no two keys are worth the same."""
    heads = Heads(n, columns=40)
    kinds = [
        heads.sink_window(), heads.vertical(), heads.slash(200), heads.same_word(),
        heads.uniform(), heads.retrieval(n // 2),
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    queries = torch.stack(kinds, 1)[n - rows :]
    queries = queries + 0.3 * torch.randn(queries.shape, generator=generator)
    keys = torch.stack([heads.keys] * 2) + 0.05 * torch.randn(2, n, 128, generator=generator)
    return queries, *paged(keys)


def exact_mass(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last rows: queries [Tq, H, D], keys [Hkv, n, D] -> [H, Tq, n]."""
    n, rows = keys.shape[1], queries.shape[0]
    keys = keys.float().repeat_interleave(queries.shape[1] // keys.shape[0], 0)
    score = torch.einsum("qhd,hkd->hqk", queries.float() * SCALE, keys)
    position = torch.arange(n - rows, n)
    return score.masked_fill(torch.arange(n) > position[:, None], -torch.inf).softmax(-1)


def covered(indices, mass: torch.Tensor) -> torch.Tensor:
    """Mass [H, Tq, n] that one sequence's indices select: [H, Tq]."""
    heads, rows, n = mass.shape
    out = torch.empty(heads, rows)
    for tile in range(-(-rows // 64)):
        for head in range(heads):
            keys = selected(indices, tile * heads + head, n)
            out[head, tile * 64 : tile * 64 + 64] = mass[
                head, tile * 64 : tile * 64 + 64, keys
            ].sum(-1)
    return out


def selected(indices, row: int, n: int) -> torch.Tensor:
    """Positions that row `row` of the lists selects; each once, or the lists are wrong."""
    first, last = indices.block_offsets[row : row + 2].tolist()
    blocks = indices.blocks[first:last].long()
    assert (blocks.diff() > 0).all()
    keys = (blocks[:, None] * 64 + torch.arange(64)).flatten()
    first, last = indices.column_offsets[row : row + 2].tolist()
    columns = indices.columns[first:last].long()
    assert (columns.diff() > 0).all()
    keys = torch.cat([keys[keys < n], columns])
    assert len(keys.unique()) == len(keys)
    return keys
