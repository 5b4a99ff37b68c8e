"""Dense causal attention as others do it, on one sequence's prompt or the last chunk of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator

import torch

from ._prefill_problem import Paged

Run = Callable[[], torch.Tensor]  # [T, H, D]

FLEX_BLOCK = 128
# Where FlashAttention 3 may be: in a CUDA build of vLLM, or its library alone in a package.
FLASH_3 = ("vllm.vllm_flash_attn", "vllm_fa3")
OF_CHUNKS = ("fa3", "triton")  # the others' causal masks are of whole prompts


def peers(problem: Paged, wanted: Iterable[str] | None = None) -> Iterator[tuple[str, Run | str]]:
    """(name, what runs it, or why it is not there) of the wanted PEERS (None: all).

    Over an FP8 cache only vLLM's Triton kernel reads what ours reads: the others have the same
    numbers in 16 bits, and are named so.
    """
    for key in PEERS if wanted is None else wanted:
        name, make = PEERS[key]
        if problem.scales and key != "triton":
            name += " (16 bits)"
        if problem.query_len < problem.seq_len and key not in OF_CHUNKS:
            yield name, "its mask is of whole prompts"
            continue
        try:
            run = make(problem)
            run()
            if problem.q.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:  # whatever keeps a library from running here is the reason
            yield name, " ".join(f"{type(error).__name__}: {error}".split())[:100]
        else:
            yield name, run


def batched(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[T, H, D] -> [1, H, T, D]."""
    return [x.transpose(0, 1)[None] for x in tensors]


def _sdpa(backend: str) -> Callable[[Paged], Run]:
    def make(p: Paged) -> Run:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def runner(*tensors: torch.Tensor, grouped: bool) -> Run:
            def run() -> torch.Tensor:
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    out = torch.nn.functional.scaled_dot_product_attention(
                        *tensors, is_causal=True, scale=p.scale, enable_gqa=grouped
                    )
                return out[0].transpose(0, 1)

            return run

        group = p.q.shape[1] // p.k.shape[1]
        run = runner(*batched(p.q, p.k, p.v), grouped=group > 1)
        try:
            run()
        except RuntimeError:
            if group == 1:
                raise
            # A backend without grouped heads: each query head has keys of its own.
            k, v = (x.repeat_interleave(group, 1) for x in (p.k, p.v))
            run = runner(*batched(p.q, k, v), grouped=False)
        return run

    return make


def _flex(p: Paged) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    mask = causal_mask(p.q.shape[0], p.q.device)
    compiled = torch.compile(flex_attention)
    tensors = batched(p.q, p.k, p.v)
    grouped = p.q.shape[1] != p.k.shape[1]

    def run() -> torch.Tensor:
        out = compiled(*tensors, block_mask=mask, scale=p.scale, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return run


def causal_mask(length: int, device: torch.device):
    """FlexAttention's causal mask, without the T x T matrix that `create_block_mask` makes."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    def mask(b, h, row, key):
        return row >= key

    if length % FLEX_BLOCK:
        return create_block_mask(mask, None, None, length, length, device=device)
    blocks = torch.arange(length // FLEX_BLOCK, dtype=torch.int32, device=device)
    count = len(blocks)
    # Of each row of blocks the last is cut by the diagonal, and those before it are whole.
    cut = blocks[:, None].expand(count, count).contiguous()[None, None]
    whole = blocks.expand(count, count).contiguous()[None, None]
    return BlockMask.from_kv_blocks(
        torch.ones_like(blocks)[None, None], cut, blocks[None, None], whole,
        BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask,
    )  # fmt: skip


def flash_attention_3(device: torch.device) -> Callable:
    """`flash_attn_varlen_func`, to be called with `fa_version=3`.

    Raises:
        RuntimeError: the device is none of Hopper's.
        ImportError: it is in none of FLASH_3.
    """
    if torch.cuda.get_device_capability(device)[0] != 9:
        raise RuntimeError("made for compute capability 9.0")
    reasons = []
    for name in FLASH_3:
        try:
            module = importlib.import_module(name)
            if getattr(module, "FA3_AVAILABLE", True):
                return module.flash_attn_varlen_func
            reasons.append(f"{name} has none")
        except (ImportError, AttributeError, OSError) as error:
            reasons.append(f"{name}: {error}")
    raise ImportError("; ".join(reasons))


def _fa3(p: Paged) -> Run:
    attend = flash_attention_3(p.q.device)
    of_rows, of_keys = (
        torch.tensor([0, n], dtype=torch.int32, device=p.q.device) for n in (p.query_len, p.seq_len)
    )

    def run() -> torch.Tensor:
        return attend(
            p.q, p.k, p.v, max_seqlen_q=p.query_len, cu_seqlens_q=of_rows, max_seqlen_k=p.seq_len,
            cu_seqlens_k=of_keys, softmax_scale=p.scale, causal=True, fa_version=3,
        )  # fmt: skip

    return run


def _triton(p: Paged) -> Run:
    from vllm_sparse.cuda_dense import triton_dense

    return lambda: triton_dense(p.q, *p.caches, *p.where, None, scale=p.scale, **p.scales)


def _xformers(p: Paged) -> Run:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    group = p.q.shape[1] // p.k.shape[1]
    # [1, T, Hkv, group, D]: its own form of grouped heads.
    grouped = p.q.unflatten(1, (p.k.shape[1], group))[None]
    keys, values = (x[None, :, :, None].expand(-1, -1, -1, group, -1) for x in (p.k, p.v))

    def run() -> torch.Tensor:
        out = memory_efficient_attention(
            grouped, keys, values, attn_bias=LowerTriangularMask(), scale=p.scale
        )
        return out[0].flatten(1, 2)

    return run


# The fastest to be there first: what is stopped half-way has those.
PEERS: dict[str, tuple[str, Callable[[Paged], Run]]] = {
    "fa3": ("FlashAttention 3", lambda p: _fa3(p)),
    "cudnn": ("SDPA cuDNN", _sdpa("CUDNN_ATTENTION")),
    "flash": ("SDPA flash", _sdpa("FLASH_ATTENTION")),
    "triton": ("vLLM Triton attention", lambda p: _triton(p)),
    "xformers": ("xformers", lambda p: _xformers(p)),
    "flex": ("FlexAttention", lambda p: _flex(p)),
}
