"""One attention layer of a vLLM backend, driven step by step as vLLM's runner does, in-process."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

NAME = "model.layers.0.self_attn.attn"


class PagedLayer:
    """A layer with its KV cache and page allocation.

    Args:
        model: checkpoint that the config is made for.
        shape: (query heads, KV heads, head size).
        pages: number of pages in the cache.
        engine: backend, dtype, block size and settings, as for LLM().
    """

    def __init__(self, model: str, shape: tuple[int, int, int], pages: int, **engine) -> None:
        self.config = EngineArgs(model=model, skip_tokenizer_init=True, **engine)
        self.config = self.config.create_engine_config()
        heads, kv_heads, head_size = shape
        dtype = self.config.model_config.dtype
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # as vLLM's loader does
        try:
            with set_current_vllm_config(self.config):
                self.layer = Attention(
                    heads,
                    head_size,
                    head_size**-0.5,
                    kv_heads,
                    cache_config=self.config.cache_config,
                    prefix=NAME,
                )
                spec = self.layer.get_kv_cache_spec(self.config)
                builder = self.layer.attn_backend.get_builder_cls()
                self.builder = builder(spec, [NAME], self.config, torch.device("cpu"))
        finally:
            torch.set_default_dtype(before)
        self.page = spec.block_size
        # Poisoned: what is read before it is written must not pass.
        shape = (pages, kv_heads, self.page, 2 * head_size)
        self.cache = torch.full(shape, torch.nan, dtype=dtype)
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(pages)).tolist()
        self.tables: dict[int, list[int]] = {}

    def admit(self, request: int, donor: int | None = None, shared: int = 0) -> int:
        """Start a request; returns how many of the `shared` tokens lie in pages of `donor`."""
        pages = shared // self.page
        self.tables[request] = list(self.tables[donor][:pages]) if donor is not None else []
        return pages * self.page

    def step(
        self,
        rows: Sequence[tuple[int, int, int]],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prompts: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        """Output [T, H, D] of a step.

        Args:
            rows: (request, tokens computed, new tokens) of each sequence, decodes first.
            query, key, value: the new tokens of the sequences after another, [T, heads, D].
            prompts: whether the new tokens are of the prompt; None: where there are several.
        """
        slots = []
        for request, computed, new in rows:
            table = self.tables[request]
            while len(table) * self.page < computed + new:
                table.append(self.free.pop())
            places = range(computed, computed + new)
            slots += [table[p // self.page] * self.page + p % self.page for p in places]
        metadata = self.builder.build(0, self._common(rows, slots, prompts))
        out = torch.full_like(query, torch.nan)
        impl = self.layer.impl
        impl.do_kv_cache_update(self.layer, key, value, self.cache, torch.tensor(slots))
        impl.forward(self.layer, query, key, value, self.cache, metadata, out)
        return out

    def _common(self, rows, slots, prompts) -> CommonAttentionMetadata:
        lens = torch.tensor([new for _, _, new in rows], dtype=torch.int32)
        starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
        starts[1:] = lens.cumsum(0)
        width = max(len(self.tables[r]) for r, _, _ in rows)
        table = torch.full((len(rows), width), -1, dtype=torch.int32)
        for i, (request, _, _) in enumerate(rows):
            table[i, : len(self.tables[request])] = torch.tensor(self.tables[request])
        total = torch.tensor([computed + new for _, computed, new in rows], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=total,
            num_reqs=len(rows),
            num_actual_tokens=len(slots),
            max_query_len=int(lens.max()),
            max_seq_len=int(total.max()),
            block_table_tensor=table,
            slot_mapping=torch.tensor(slots),
            is_prefilling=torch.tensor(
                [n > 1 for n in lens.tolist()] if prompts is None else prompts
            ),
        )


def named(index: int) -> SimpleNamespace:
    """Stands for layer `index` where only its name counts."""
    return SimpleNamespace(layer_name=f"model.layers.{index}.self_attn.attn")
