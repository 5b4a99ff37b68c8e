"""Whether a layer on a GPU keeps sums of its cache's pages, from which planning has mean keys."""

from __future__ import annotations

import logging

import torch

from . import log
from .kernels.block_indices import BLOCK
from .kernels.gpu.block_means import PageSums, unit
from .kernels.paged_cache import FP8
from .stats import STATS

logger = log.get_logger(__name__)

# Memory that keeping sums of pages must leave free: they are not part of what vLLM counts.
SPARE_BYTES = 2 << 30


class LayerSums:
    """Sums of the pages of one layer's cache, where they can be kept.

    Args:
        dtype: of the model; cache_config: vLLM's.
        from_elsewhere: whether a KV connector fills pages.
    """

    def __init__(self, dtype: torch.dtype, cache_config, *, from_elsewhere: bool) -> None:
        self.dtype, self.cache_config, self.from_elsewhere = dtype, cache_config, from_elsewhere
        self.sums: PageSums | None = None
        self._of: tuple | None = None  # address and shape of vLLM's cache that `sums` is for

    def is_new(self, kv_cache: torch.Tensor) -> bool:
        """Whether this is another cache than it was asked about before. Asked for each layer of
        each step: slicing the keys from it first would take 5 us."""
        cache = (kv_cache.data_ptr(), kv_cache.shape)
        if cache == self._of:
            return False
        self._of = cache
        return True

    def prepare(self, k_cache: torch.Tensor) -> None:
        """Make room for the sums of pages of a new cache, or say once that there is none. Both hold
        for this cache: vLLM tries graphs on a small one before it makes the one that serves.

        To be called with the layer's keys [pages, Hkv, page, D] before a page is written: what is
        written without it is in no sum. The builder does, as the first write may be inside a
        graph's capture. vLLM binds two caches: a small one to measure what graphs take, and the
        one it serves with.
        """
        self.sums = None
        why = self._why_none(k_cache)
        if why is None:
            self.sums = PageSums(k_cache, self.dtype)
            # Compiles the kernels, and writes nothing.
            on = k_cache.device
            self.sums.update(k_cache, torch.full((2,), -1, device=on))
            fp8 = k_cache.dtype == FP8
            scale = torch.ones(1, dtype=torch.float32, device=on) if fp8 else None
            table = torch.zeros(1, dtype=torch.int32, device=on)
            self.sums.means(table, 1, torch.arange(k_cache.shape[1], device=on), scale)
            return
        message = f"Mean keys of pages are not kept, planning reads the keys instead: {why}"
        log.once(logger, logging.WARNING, message)
        STATS.fell_back("means_from_keys")

    def _why_none(self, k_cache: torch.Tensor) -> str | None:
        """Why no sums are kept of a cache's pages, or None: they are."""
        pages, heads, page, size = k_cache.shape
        if self.from_elsewhere:
            return "a KV connector fills pages, which come without"
        if unit(page) is None:
            return f"pages of {page} tokens are no part or multiple of {BLOCK}"
        # Where a prefix hit ends inside a block, vLLM copies the block's keys, and not their sums.
        # Of one unit that is no matter: the first token that is written after them sums it anew.
        shared = getattr(self.cache_config, "hash_block_size", None)
        blocks = self.cache_config.num_gpu_blocks
        tokens = pages * page // blocks if blocks else page
        if self.cache_config.enable_prefix_caching and shared and max(shared, unit(page)) < tokens:
            return f"vLLM shares prefixes by {shared} tokens and parts of blocks of {tokens}"
        if not k_cache.is_cuda:
            return None
        need = pages * page // unit(page) * heads * size * self.dtype.itemsize
        if torch.cuda.is_current_stream_capturing():
            return "pages were first written inside a CUDA graph"
        if torch.cuda.mem_get_info(k_cache.device)[0] < need + SPARE_BYTES:
            return "too little GPU memory is left (a lower --gpu-memory-utilization leaves more)"
        return None
