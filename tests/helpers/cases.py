"""Paged caches with adversarial shapes, the fp64 meaning of attention over them, and tolerances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vllm_sparse.kernels.block_indices import BLOCK, TILE, BlockIndices, num_tiles


@dataclass
class Case:
    """A batch of sequences over one paged cache."""

    q: torch.Tensor  # [T, H, D]
    k_cache: torch.Tensor  # [pages, Hkv, page, D]
    v_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scale: float

    @property
    def query_lens(self) -> list[int]:
        return (self.query_start_loc[1:] - self.query_start_loc[:-1]).tolist()

    @property
    def args(self) -> tuple[torch.Tensor, ...]:
        return (
            self.q, self.k_cache, self.v_cache, self.block_table, self.query_start_loc,
            self.seq_lens,
        )  # fmt: skip


def make_case(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = "head-major",
    seed: int = 0,
) -> Case:
    """Random keys in shuffled pages; every cache row that belongs to no sequence is NaN."""
    generator = torch.Generator().manual_seed(seed)
    pages_of = [-(-n // page) for n in seq_lens]
    total = sum(pages_of) + 3
    order = torch.randperm(total, generator=generator).to(torch.int32)
    table = torch.full((len(seq_lens), max([*pages_of, 1]) + 1), total - 1, dtype=torch.int32)
    shape = {
        "head-major": (total, kv_heads, page, 2 * head_size),  # what vLLM calls LBHNC
        "token-major": (total, page, kv_heads, 2 * head_size),  # LBNHC
    }[layout]
    cache = torch.full(shape, torch.nan, dtype=dtype)
    if layout == "token-major":
        cache = cache.transpose(1, 2)
    used = 0
    for s, n in enumerate(seq_lens):
        table[s, : pages_of[s]] = order[used : used + pages_of[s]]
        used += pages_of[s]
        rows = torch.randn(n, kv_heads, 2 * head_size, generator=generator).to(dtype)
        position = torch.arange(n)
        cache[table[s][position // page].long(), :, position % page] = rows
    tokens = sum(query_lens)
    q = torch.randn(tokens, heads, head_size, generator=generator).to(dtype)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    return Case(
        q=q,
        k_cache=cache[..., :head_size],
        v_cache=cache[..., head_size:],
        block_table=table,
        query_start_loc=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        scale=head_size**-0.5,
    )


def in_fp8(case: Case, k_scale: float, v_scale: float) -> tuple[Case, Case]:
    """The case with its caches as halves of one FP8 cache, and with what these stand for, in fp32.

    With scales that are powers of two the second's keys are exact multiples of the first's.
    """
    both = torch.cat([case.k_cache.float() / k_scale, case.v_cache.float() / v_scale], -1)
    both = both.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    k, v = both.chunk(2, -1)
    stands_for = replace(case, k_cache=k.float() * k_scale, v_cache=v.float() * v_scale)
    return replace(case, k_cache=k, v_cache=v), stands_for


def one_list(blocks: list[int], columns: list[int]) -> BlockIndices:
    """What one tile of one head selects, as it is given: entries that cannot be too."""
    return BlockIndices(
        num_heads=1,
        tile_offsets=torch.tensor([0, 1], dtype=torch.int32),
        block_offsets=torch.tensor([0, len(blocks)], dtype=torch.int32),
        blocks=torch.tensor(blocks, dtype=torch.int32),
        column_offsets=torch.tensor([0, len(columns)], dtype=torch.int32),
        columns=torch.tensor(columns, dtype=torch.int32),
    )


def random_indices(case: Case, density: float, seed: int = 0) -> BlockIndices:
    """A random selection with blocks and columns; some rows of the lists stay empty."""
    generator = torch.Generator().manual_seed(seed)
    heads, parts = case.q.shape[1], []
    for query_len, seq_len in zip(case.query_lens, case.seq_lens.tolist(), strict=True):
        tiles, blocks = num_tiles(query_len), -(-seq_len // BLOCK)
        mask = torch.rand(tiles, heads, blocks, generator=generator) < density
        mask[torch.rand(tiles, heads, generator=generator) < 0.2] = False
        column_mask = torch.rand(tiles * heads, seq_len, generator=generator) < density / 4
        column_mask &= ~mask.flatten(0, 1).repeat_interleave(BLOCK, -1)[:, :seq_len]
        counts = column_mask.sum(-1)
        offsets = torch.zeros(tiles * heads + 1, dtype=torch.int32)
        offsets[1:] = counts.cumsum(0)
        columns = column_mask.nonzero()[:, 1].to(torch.int32)
        parts.append(BlockIndices.from_masks(mask, offsets, columns))
    return BlockIndices.cat(parts)


def oracle(
    case: Case, indices: BlockIndices | None, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax over whole score matrices, written apart from `kernels.reference`.

    With float64 it is the truth; with the case's own dtype it shows the error that plain torch
    makes, by which tolerances are calibrated.
    """
    tokens, heads, head_size = case.q.shape
    group = heads // case.k_cache.shape[1]
    page = case.k_cache.shape[2]
    out = torch.zeros(tokens, heads, head_size, dtype=dtype)
    lse = torch.full((tokens, heads), -torch.inf, dtype=torch.float64)
    tile0 = 0
    for s, query_len in enumerate(case.query_lens):
        n = int(case.seq_lens[s])
        position = torch.arange(n)
        pages = case.block_table[s][position // page].long()
        k = case.k_cache[pages, :, position % page].to(dtype)  # [n, Hkv, D]
        v = case.v_cache[pages, :, position % page].to(dtype)
        begin = int(case.query_start_loc[s])
        seen = position[None, :] <= (torch.arange(query_len) + n - query_len)[:, None]
        for head in range(heads):
            mask = seen.clone()
            if indices is not None:
                for tile in range(num_tiles(query_len)):
                    row = (tile0 + tile) * heads + head
                    wanted = torch.zeros(n, dtype=torch.bool)
                    for b in indices.blocks[slice(*indices.block_offsets[row : row + 2])].tolist():
                        if b >= 0:
                            wanted[b * BLOCK : (b + 1) * BLOCK] = True
                    for c in indices.columns[
                        slice(*indices.column_offsets[row : row + 2])
                    ].tolist():
                        if 0 <= c < n:
                            wanted[c] = True
                    mask[tile * TILE : (tile + 1) * TILE] &= wanted
            rows = slice(begin, begin + query_len)
            scores = (case.q[rows, head].to(dtype) @ k[:, head // group].T) * case.scale
            scores = scores.masked_fill(~mask, -torch.inf)
            some = mask.any(-1)
            p = torch.zeros_like(scores)
            p[some] = torch.softmax(scores[some], -1)
            out[rows, head] = p @ v[:, head // group]
            lse[rows, head] = torch.logsumexp(scores.double(), -1)
        tile0 += num_tiles(query_len)
    return out, lse


def left_out_oracle(
    case: Case, indices: BlockIndices, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention in which every key that is left out has been overwritten with its mean.

    What mean correction means, written apart from `kernels.left_out`, which makes no such keys.
    """
    heads, page = case.q.shape[1], case.k_cache.shape[2]
    group = heads // case.k_cache.shape[1]
    out = torch.zeros(case.q.shape, dtype=dtype)
    lse = torch.full(case.q.shape[:2], -torch.inf, dtype=torch.float64)
    tile0 = 0
    for s, query_len in enumerate(case.query_lens):
        n, begin = int(case.seq_lens[s]), int(case.query_start_loc[s])
        key = torch.arange(n)
        pages = case.block_table[s][key // page].long()
        for tile in range(num_tiles(query_len)):
            rows = slice(begin + tile * TILE, begin + min((tile + 1) * TILE, query_len))
            position = torch.arange(rows.start, rows.stop) - begin + n - query_len
            for head in range(heads):
                k = case.k_cache[pages, head // group, key % page].to(dtype)
                v = case.v_cache[pages, head // group, key % page].to(dtype)
                read = torch.zeros(n, dtype=torch.bool)
                row = (tile0 + tile) * heads + head
                for b in indices.blocks[slice(*indices.block_offsets[row : row + 2])].tolist():
                    if b >= 0:
                        read[b * BLOCK : (b + 1) * BLOCK] = True
                for c in indices.columns[slice(*indices.column_offsets[row : row + 2])].tolist():
                    if 0 <= c < n:
                        read[c] = True
                counts = read.clone()
                for b in range(n // BLOCK):
                    if (b + 1) * BLOCK - 1 <= position[0]:
                        rest = key[(key // BLOCK == b) & ~read]
                        k[rest], v[rest] = k[rest].mean(0), v[rest].mean(0)
                        counts[rest] = True
                scores = (case.q[rows, head].to(dtype) @ k.T) * case.scale
                mask = counts & (key <= position[:, None])
                scores = scores.masked_fill(~mask, -torch.inf)
                some = mask.any(-1)
                out[rows, head][some] = torch.softmax(scores[some], -1) @ v
                lse[rows, head] = torch.logsumexp(scores.double(), -1)
        tile0 += num_tiles(query_len)
    return out, lse


def assert_close(
    case: Case,
    indices: BlockIndices | None,
    got: tuple,
    logits: float = 0.0,
    meaning: Callable[..., tuple[torch.Tensor, torch.Tensor]] = oracle,
) -> None:
    """|out - truth| <= 2 |torch in the same dtype - truth| + rounding, everywhere.

    Rounding: of the output in its dtype, and of fp32 sums of values in another order than torch's
    (an output is an average of values, so their largest times the fp32 epsilon is the unit).
    Where logits are huge, `logits` is their magnitude: fp32 knows them to that times its epsilon.
    lse is fp32 whatever the dtype: it is held to 2e-5 beside the same calibration, and to its own
    last digit where logits are huge. `meaning` is what the truth is, with oracle's signature.
    """
    out, lse = got
    true_out, true_lse = meaning(case, indices)
    torch_out, torch_lse = meaning(case, indices, case.q.dtype)
    rounding = torch.finfo(case.q.dtype).eps * _largest(true_out)
    largest = _largest(case.v_cache.float().nan_to_num())
    rounding += torch.finfo(torch.float32).eps * largest * (2 + logits)
    allowed = 2 * (torch_out.double() - true_out).abs().max().item() + rounding
    error = (out.double() - true_out).abs().max().item() if out.numel() else 0.0
    assert error <= allowed, f"out: error {error:.3g}, allowed {allowed:.3g}"
    empty = true_lse.isinf()
    assert torch.equal(lse.isinf(), empty), "lse: -inf exactly where nothing is selected"
    assert (out[empty] == 0).all(), "out: 0 exactly where nothing is selected"
    error = (lse.double() - true_lse)[~empty].abs()
    allowed = 2 * (torch_lse - true_lse)[~empty].abs().max().item() if len(error) else 0.0
    allowed += 2e-5 + torch.finfo(torch.float32).eps * logits
    assert not len(error) or error.max().item() <= allowed, f"lse: error {error.max():.3g}"


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
