"""The exact selection of a chunk's last rows."""

from __future__ import annotations

import pytest
import torch

from vllm_sparse.kernels import heaviest
from vllm_sparse.planner.last_rows import select


def masses(rows: int, n: int, power: float, seed: int) -> torch.Tensor:
    """Rows [2, R, n] of mass 1; the higher the power, the fewer keys hold it."""
    rng = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, rows, n, generator=rng).pow(power)
    return mass / mass.sum(-1, keepdim=True)


@pytest.mark.parametrize("power", [0.0, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("coverage", [0.5, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("rows", [1, 64])
def test_every_row_is_covered(power: float, coverage: float, rows: int):
    n = 2048
    mass = masses(rows, n, power, seed=rows)
    blocks = mass.unflatten(2, (-1, 64)).sum(-1)
    base = torch.zeros(n // 64, dtype=torch.bool)
    base[[0, -2, -1]] = True
    outside = mass * ~base.repeat_interleave(64)
    columns = outside.amax(1).topk(200).indices
    column_mass = outside.gather(2, columns[:, None].expand(-1, rows, -1))
    chosen, single = select(blocks, base, columns, column_mass, torch.full((2,), coverage))
    assert (chosen & base).sum() == 2 * 3
    for head in range(2):
        keys = chosen[head].repeat_interleave(64)
        assert not keys[columns[head][single[head]]].any()
        keys[columns[head][single[head]]] = True
        assert mass[head][:, keys].sum(-1).min() >= coverage - 1e-5


def test_single_keys_are_read_as_columns_and_runs_as_blocks():
    n = 2048
    mass = torch.zeros(1, 4, n)
    mass[0, :, [100, 500, 901, 1300]] = torch.eye(4)  # a row each
    runs = torch.zeros(1, 4, n)
    runs[0, :, 640:704] = 1 / 64
    base = torch.zeros(n // 64, dtype=torch.bool)
    for case, blocks_read, columns_read in ((mass, 0, 4), (runs, 1, 0)):
        columns = case.amax(1).topk(128).indices
        column_mass = case.gather(2, columns[:, None].expand(-1, 4, -1))
        blocks = case.unflatten(2, (-1, 64)).sum(-1)
        chosen, single = select(blocks, base, columns, column_mass, torch.tensor([0.95]))
        assert (int(chosen.sum()), int(single.sum())) == (blocks_read, columns_read)


@pytest.mark.parametrize("power", [0.0, 1.0, 30.0])
def test_heaviest_takes_few_more_than_needed(power: float):
    mass = masses(16, 256, power, seed=3)
    chosen = heaviest(mass, torch.full((2, 16), 0.9))
    assert (mass * chosen).sum(-1).min() >= 0.9
    fewest = (mass.sort(-1, descending=True).values.cumsum(-1) < 0.9).sum(-1) + 1
    assert (chosen.sum(-1) <= fewest * 1.15 + 1).all()


def test_heaviest_takes_nothing_where_nothing_is_needed():
    assert not heaviest(torch.rand(1, 3, 8), torch.zeros(1, 3)).any()
    assert heaviest(torch.rand(1, 3, 8), torch.full((1, 3), 99.0)).all()
