"""Queries, keys and values of a real model's layers on a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

NAME = "vllm_sparse_capture"


@dataclass(frozen=True)
class Inputs:
    """One layer's attention: q [T, H, D], k and v [T, Hkv, D], and the factor on the logits."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float


class _Done(Exception):
    """The last wanted layer was seen: the rest of the model need not run."""


def capture(
    model: str | Path,
    prompt: list[int],
    layers: list[int] | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Inputs]:
    """What some layers (None: all) of a Hugging Face causal model attend with, on one prompt.

    All layers up to the last wanted one run; a layer's tensors are handed out after the whole
    prompt went through, so that memory for those of all wanted layers is needed.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    found: list[Inputs] = []
    last = None if layers is None else max(layers)

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer = module.layer_idx
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if layers is None or layer in layers:
            rows = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
            found.append(Inputs(layer, *rows, scale))
        if layer == last:
            raise _Done
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=NAME)
    loaded = loaded.to(device).eval()
    try:
        with torch.inference_mode():
            loaded(torch.tensor([prompt], device=device), use_cache=False, logits_to_keep=1)
    except _Done:
        pass
    yield from sorted(found, key=lambda inputs: inputs.layer)
