"""One layer of the CUDA backend on the CPU: the kernels are interpreted, and reference attention
stands in for vLLM's own, which does not run without a GPU."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparse import cuda_impl, cuda_metadata, cuda_runtime
from vllm_sparse.kernels import reference

NAME = "model.layers.0.self_attn.attn"
HEADS, KV_HEADS, SIZE, PAGE, PAGES = 2, 1, 64, 16, 120


class Layer:
    """One layer of the CUDA backend on the CPU, step by step."""

    def __init__(
        self,
        model: str,
        monkeypatch,
        *,
        kv_cache_dtype: str = "auto",
        speculated: int = 0,
        **settings,
    ) -> None:
        self.config = EngineArgs(
            model=model, skip_tokenizer_init=True, dtype="float16", block_size=PAGE,
            max_num_batched_tokens=4096, additional_config={"sparse": settings},
        ).create_engine_config()  # fmt: skip
        if speculated:
            self.config.speculative_config = SimpleNamespace(
                num_speculative_tokens=speculated, parallel_drafting=False
            )
        self.calls: list[tuple[int, int]] = []  # (rows, sequences) of each call of vLLM's own
        # Functions, as a bound method would not be given the impl.
        monkeypatch.setattr(TritonAttentionImpl, "forward", lambda *a: self._dense(*a))
        monkeypatch.setattr(TritonAttentionImpl, "do_kv_cache_update", lambda *a: self._write(*a))
        cuda_runtime.start.cache_clear()
        group = SimpleNamespace(rank_in_group=0, broadcast_object=lambda found: found)
        monkeypatch.setattr(cuda_impl, "get_tp_group", lambda: group)
        monkeypatch.setattr(cuda_impl, "get_tensor_model_parallel_rank", lambda: 0)
        # Stands for another GPU in each test.
        monkeypatch.setattr(
            cuda_impl, "shared_counters", functools.cache(lambda on: cuda_runtime.Counters(on))
        )
        self.warm_ups: list[dict] = []
        monkeypatch.setattr(
            cuda_runtime.device_break_even, "warm_up", lambda *a, **k: self.warm_ups.append(k)
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        try:
            with set_current_vllm_config(self.config):
                self.impl = cuda_impl.SparseCudaImpl(
                    HEADS, SIZE, SIZE**-0.5, KV_HEADS, kv_cache_dtype=kv_cache_dtype
                )
        finally:
            torch.set_default_dtype(before)
        self.layer = SimpleNamespace(layer_name=NAME, impl=self.impl)
        layers = {NAME: self.layer}
        monkeypatch.setattr(cuda_metadata, "get_layers_from_vllm_config", lambda *a, **k: layers)
        shape = (PAGES, KV_HEADS, PAGE, 2 * SIZE)
        self.cache = torch.full(shape, torch.nan, dtype=torch.float16)
        self.scales: dict[str, torch.Tensor] = {}
        if kv_cache_dtype != "auto":
            # Bytes, as vLLM has them; these are NaN.
            self.cache = torch.full(shape, 0x7F, dtype=torch.uint8)
            self.layer._k_scale, self.layer._v_scale = torch.tensor(0.03), torch.tensor(0.5)
            self.scales = {"k_scale": self.layer._k_scale, "v_scale": self.layer._v_scale}
        self.builder = self.build()

    def build(self, page: int = PAGE) -> cuda_metadata.SparseCudaMetadataBuilder:
        """The builder that vLLM makes once pages have this size."""
        spec = FullAttentionSpec(
            block_size=page, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float16
        )
        return cuda_metadata.SparseCudaMetadataBuilder(
            spec, [NAME], self.config, torch.device("cpu")
        )

    def caches(self, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache = cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache
        return cache[..., :SIZE], cache[..., SIZE:]

    def want(self, query, table, starts, total, out=None) -> torch.Tensor:
        given = (query, *self.caches(self.cache), table, starts, total, None)
        return reference.sparse_prefill(*given, scale=SIZE**-0.5, out=out, **self.scales)[0]

    def _dense(self, impl, layer, query, key, value, cache, metadata, output, *scales):
        m = metadata
        rows = slice(0, m.num_actual_tokens)
        self.calls.append((m.num_actual_tokens, len(m.seq_lens)))
        assert m.max_query_len == int((m.query_start_loc[1:] - m.query_start_loc[:-1]).max())
        assert cache is self.cache and layer is self.layer
        self.want(query[rows], m.block_table, m.query_start_loc, m.seq_lens, output[rows])
        return output

    def _write(self, impl, layer, key, value, cache, slots):
        assert layer is self.layer
        reference.write_kv(key, value, *self.caches(cache), slots, **self.scales)

    def step(self, rows: list[tuple[int, int]], prompts=None, seed: int = 0, shared: int = 0):
        """(computed, new) tokens of each sequence, whose pages follow each other; the first
        `shared` pages are those of the first sequence in all."""
        generator = torch.Generator().manual_seed(seed)
        new = [n for _, n in rows]
        total = torch.tensor([a + b for a, b in rows], dtype=torch.int32)
        starts = torch.tensor([0, *new]).cumsum(0).int()
        each = PAGES // len(rows)
        table = torch.arange(each * len(rows), dtype=torch.int32).view(len(rows), each)
        table[:, :shared] = table[0, :shared]

        def places(i: int, first: int, count: int) -> torch.Tensor:
            at = torch.arange(first, first + count)
            return table[i].long()[at // PAGE] * PAGE + at % PAGE

        slots = torch.cat([places(i, *row) for i, row in enumerate(rows)])
        for i, (computed, _) in enumerate(rows):
            old = torch.randn(computed, 1, 2 * SIZE, generator=generator).half()
            before = places(i, 0, computed)
            reference.write_kv(*old.chunk(2, -1), *self.caches(self.cache), before, **self.scales)
            self.impl.prepare(self.cache)
            if self.impl.sums is not None:
                self.impl.sums.update(self.caches(self.cache)[0], before)
        tokens = sum(new)
        query = torch.randn(tokens + 3, HEADS, SIZE, generator=generator).half()
        key, value = torch.randn(2, tokens, KV_HEADS, SIZE, generator=generator).half()
        common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=total,
            num_reqs=len(rows), num_actual_tokens=tokens, max_query_len=max(new),
            max_seq_len=int(total.max()), block_table_tensor=table, slot_mapping=slots,
            is_prefilling=torch.tensor([n > 1 for n in new] if prompts is None else prompts),
        )  # fmt: skip
        metadata = self.builder.build(0, common)
        out = torch.full_like(query, torch.nan)
        self.impl.do_kv_cache_update(self.layer, key, value, self.cache, slots)
        self.impl.forward(self.layer, query, key, value, self.cache, metadata, out)
        return out[:tokens], self.want(query[:tokens], table, starts, total), metadata
