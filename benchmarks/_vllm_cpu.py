"""vLLM's own CPU attention on plain tensors: the peer of our CPU kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch


class VllmCpuAttention:
    """One layer's paged cache in vLLM's own layout, and its attention over it."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, page: int = 128) -> None:
        """keys, values: [n, Hkv, D] of one sequence."""
        import vllm  # noqa: F401  (the platform comes first)
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        current_platform.import_kernels()
        if keys.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()  # what vLLM's worker does by its first matmul
        n, kv_heads, head_size = keys.shape
        pages = -(-n // page)
        self.ops, self.page = ops, page
        self.isa = _get_attn_isa(keys.dtype, page, head_size)
        cache = torch.zeros(pages, kv_heads, 2 * page, head_size, dtype=keys.dtype)
        self.k_cache, self.v_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            keys.contiguous(), values.contiguous(), self.k_cache, self.v_cache,
            torch.arange(n), self.isa,
        )  # fmt: skip
        self.block_table = torch.arange(pages, dtype=torch.int32)[None]

    def attend(self, q: torch.Tensor, seq_len: int, out: torch.Tensor) -> None:
        """out [Tq, H, D] = causal attention of the last Tq positions q of the first `seq_len`."""
        rows, heads, head_size = q.shape
        starts = torch.tensor([0, rows], dtype=torch.int32)
        lens = torch.tensor([seq_len], dtype=torch.int32)
        plan = self._plan(heads, head_size, q.dtype, starts, lens)
        self._run(q, out, starts, lens, self.block_table, plan)

    def decoder(self, q: torch.Tensor, seqs: int, out: torch.Tensor) -> Callable[[], None]:
        """What decodes q [seqs, H, D] over the cached tokens as so many sequences, of whole pages
        each; planned once, as vLLM does for all layers of a step."""
        _, heads, head_size = q.shape
        table = self.block_table.view(seqs, -1)
        starts = torch.arange(seqs + 1, dtype=torch.int32)
        lens = torch.full((seqs,), table.shape[1] * self.page, dtype=torch.int32)
        plan = self._plan(heads, head_size, q.dtype, starts, lens)
        return lambda: self._run(q, out, starts, lens, table, plan)

    def _plan(self, heads: int, head_size: int, dtype, starts, lens):
        return self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=lens.numel(), num_heads=heads, num_kv_heads=self.k_cache.shape[1],
            head_dim=head_size, seq_lens=lens, dtype=dtype, query_start_loc=starts, causal=True,
            sliding_window_size=-1, isa=self.isa, enable_kv_split=True,
        )  # fmt: skip

    def _run(self, q: torch.Tensor, out: torch.Tensor, starts, lens, table, plan) -> None:
        self.ops.cpu_attention_with_kv_cache(
            query=q, key_cache=self.k_cache, value_cache=self.v_cache, output=out,
            query_start_loc=starts, seq_lens=lens, scale=q.shape[2] ** -0.5, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0,
            scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip
