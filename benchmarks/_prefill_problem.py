"""One layer's prefill over a paged cache, and the check that a result must pass to have a time."""

from __future__ import annotations

from dataclasses import dataclass, field

PAGE = 16
CHECKED_ROWS = 256
COVERAGE_SLACK = 0.01
DENSE_ERROR = 2e-2  # of the largest value; bfloat16 itself makes 4e-3
FP8_MOST = 448.0  # the largest float8_e4m3fn


@dataclass(frozen=True)
class Paged:
    """One layer's attention over a paged cache, as `kernels.sparse_prefill` takes it.

    k and v are what the cache stands for: with FP8 they have been rounded to it.
    """

    q: object  # [T, H, D], those of the last T of n tokens
    k: object  # [n, Hkv, D]
    v: object
    scale: float
    caches: tuple
    where: tuple  # block table, query starts, lengths
    scales: dict = field(default_factory=dict)  # k_scale and v_scale of an FP8 cache

    @classmethod
    def of(cls, q, k, v, scale: float, *, fp8: bool = False) -> Paged:
        import torch

        length, kv_heads, size = k.shape
        scales, stored = {}, (k, v)
        if fp8:
            scales = {"k_scale": fp8_scale(k), "v_scale": fp8_scale(v)}
            stored = tuple(
                (x.float() / s).clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)
                for x, s in zip((k, v), scales.values(), strict=True)
            )
            # Exact: an e4m3 number times a power of two is one of bfloat16's and float16's.
            k, v = (
                (x.float() * s).to(q.dtype) for x, s in zip(stored, scales.values(), strict=True)
            )
        pages = -(-length // PAGE)
        both = torch.zeros(pages * PAGE, kv_heads, 2 * size, dtype=q.dtype, device=k.device)
        both = both.to(stored[0].dtype)
        # By bytes: not every torch copies FP8 into a slice.
        width = size * both.element_size()
        for half, x in enumerate(stored):
            rows = both.view(torch.uint8)[:length, :, half * width : (half + 1) * width]
            rows.copy_(x.contiguous().view(torch.uint8))
        cache = both.view(pages, PAGE, kv_heads, 2 * size).transpose(1, 2)
        integers = dict(dtype=torch.int32, device=k.device)
        where = (
            torch.arange(pages, **integers)[None],
            torch.tensor([0, q.shape[0]], **integers),
            torch.tensor([length], **integers),
        )
        return cls(q, k, v, scale, tuple(cache.chunk(2, -1)), where, scales)

    @property
    def query_len(self) -> int:
        return self.q.shape[0]

    @property
    def seq_len(self) -> int:
        return self.k.shape[0]

    @property
    def pairs(self) -> float:
        """Queries and keys that they see, of one head."""
        before = self.seq_len - self.query_len
        return self.query_len * (before + (self.query_len + 1) / 2)

    def plan(self, coverage: float):
        from vllm_sparse.patterns import ADAPTIVE
        from vllm_sparse.planner.device import plan_on_device

        lengths = [self.query_len], [self.seq_len]
        return plan_on_device(
            self.q, self.caches[0], self.where[0], *lengths, (ADAPTIVE,) * self.q.shape[1],
            scale=self.scale, coverage=coverage, k_scale=self.scales.get("k_scale"),
        )  # fmt: skip

    def attend(self, indices):
        from vllm_sparse.kernels.gpu.sparse_prefill import sparse_prefill

        return sparse_prefill(
            self.q, *self.caches, *self.where, indices, scale=self.scale, **self.scales
        )


def fp8_scale(x):
    """float32 [1]: the power of two by which the largest of x just fits into float8_e4m3fn."""
    largest = x.abs().max().float().clamp(min=2.0**-20)
    return (largest / FP8_MOST).log2().ceil().exp2().reshape(1)


@dataclass(frozen=True)
class Checked:
    """What a check found: how much is read, what it covers, how far off the output is."""

    density: float
    covered: float
    error: float  # of the sparse output, relative, over the checked rows
    dense_error: float
    why: str | None  # it failed
    rows: object = None  # int64 [R], those that were checked
    truth: object = None  # float32 [R, H, D]

    def off(self, out) -> float:
        """How far another's output [T, H, D] is off, of the largest value."""
        return float((out[self.rows].float() - self.truth).abs().max() / self.truth.abs().max())


def check(problem: Paged, coverage: float) -> Checked:
    """Runs both forms once and holds them to float32 attention of some rows."""
    import torch

    indices = problem.plan(coverage)
    out, lse = problem.attend(indices)
    dense, dense_lse = problem.attend(None)
    last = problem.query_len - 1
    rows = torch.linspace(0, last, min(CHECKED_ROWS, last + 1), device=out.device).long()
    truth = float32_rows(problem, rows)
    dense_error = float((dense[rows].float() - truth).abs().max() / truth.abs().max())
    error = float((out[rows].float() - truth).norm() / truth.norm())
    covered = float((lse - dense_lse).exp().mean())
    density = indices_density(indices, problem)
    why = None
    if not dense_error <= DENSE_ERROR:  # NaN fails as well
        why = f"everything selected is off by {dense_error:.2g} of the largest value"
    elif not covered >= coverage - COVERAGE_SLACK:
        why = f"covered {covered:.3f} of the mass, asked for {coverage}"
    return Checked(density, covered, error, dense_error, why, rows, truth)


def indices_density(indices, problem: Paged) -> float:
    from vllm_sparse.cuda_runtime import Counters

    counters = Counters(indices.blocks.device)
    counters.add(indices, [problem.query_len], [problem.seq_len])
    return counters.keys_read / counters.causal


def float32_rows(problem: Paged, rows):
    """Attention of some rows in float32: [R, H, D]."""
    import torch

    group = problem.q.shape[1] // problem.k.shape[1]
    key = torch.arange(problem.seq_len, device=rows.device)
    position = problem.seq_len - problem.query_len + rows
    out = torch.empty(len(rows), *problem.q.shape[1:], device=rows.device)
    for head in range(problem.q.shape[1]):
        k, v = problem.k[:, head // group].float(), problem.v[:, head // group].float()
        scores = problem.q[rows, head].float() @ k.T * problem.scale
        scores.masked_fill_(key > position[:, None], -torch.inf)
        out[:, head] = scores.softmax(-1) @ v
    return out
