"""Dense causal attention as others do it, on one sequence's whole prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

Run = Callable[[], torch.Tensor]  # [T, H, D]


def peers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> Iterator[tuple[str, Run | str]]:
    """(name, what runs it, or why it is not there); q [T, H, D], k and v [T, Hkv, D]."""
    for name, make in (
        ("SDPA cuDNN", _sdpa("CUDNN_ATTENTION")),
        ("SDPA flash", _sdpa("FLASH_ATTENTION")),
        ("FlexAttention", _flex),
        ("FlashAttention 3", _fa3),
        ("xformers", _xformers),
    ):
        try:
            run = make(q, k, v, scale)
            run()
        except Exception as error:  # whatever keeps a library from running here is the reason
            yield name, " ".join(f"{type(error).__name__}: {error}".split())[:100]
        else:
            yield name, run


def batched(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[T, H, D] -> [1, H, T, D]."""
    return [x.transpose(0, 1)[None] for x in tensors]


def _sdpa(backend: str) -> Callable[..., Run]:
    def make(q, k, v, scale) -> Run:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        one, many = batched(q), batched(k, v)
        grouped = q.shape[1] != k.shape[1]

        def run() -> torch.Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                out = torch.nn.functional.scaled_dot_product_attention(
                    *one, *many, is_causal=True, scale=scale, enable_gqa=grouped
                )
            return out[0].transpose(0, 1)

        return run

    return make


def _flex(q, k, v, scale) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[0]
    mask = create_block_mask(
        lambda b, h, row, key: row >= key, None, None, length, length, device=q.device
    )
    compiled = torch.compile(flex_attention)
    tensors = batched(q, k, v)
    grouped = q.shape[1] != k.shape[1]

    def run() -> torch.Tensor:
        out = compiled(*tensors, block_mask=mask, scale=scale, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return run


def _fa3(q, k, v, scale) -> Run:
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        raise RuntimeError("made for compute capability 9.0")
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    length = q.shape[0]
    starts = torch.tensor([0, length], dtype=torch.int32, device=q.device)

    def run() -> torch.Tensor:
        return flash_attn_varlen_func(
            q, k, v, max_seqlen_q=length, cu_seqlens_q=starts, max_seqlen_k=length,
            cu_seqlens_k=starts, softmax_scale=scale, causal=True, fa_version=3,
        )  # fmt: skip

    return run


def _xformers(q, k, v, scale) -> Run:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    group = q.shape[1] // k.shape[1]
    # [1, T, Hkv, group, D]: its own form of grouped heads.
    grouped = q.unflatten(1, (k.shape[1], group))[None]
    keys, values = (x[None, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))

    def run() -> torch.Tensor:
        out = memory_efficient_attention(
            grouped, keys, values, attn_bias=LowerTriangularMask(), scale=scale
        )
        return out[0].flatten(1, 2)

    return run
