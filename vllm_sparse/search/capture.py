"""Runs a Hugging Face model over a prompt and shows each layer's attention inputs as they pass.

One layer's queries, keys and values are held at a time. Beside the weights a prompt of T tokens
takes about T x (hidden + 2 x intermediate + 2 x (H + 2 Hkv) x D) x the dtype's size: 0.7 GB for
an 8B model in bfloat16 at 16K tokens. No logits are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vllm_sparse.errors import UserError
from vllm_sparse.patterns import ModelInfo, shown, whole

NAME = "vllm_sparse_capture"
ROWS = 1024  # query rows of a sliding-window layer that are computed at a time
DTYPES = ("float32", "bfloat16", "float16")
# Keyword arguments of transformers' attention functions that change what attention means.
SPECIAL = {"softcap": "logits soft-capping", "s_aux": "attention sinks"}

_visit: Callable[[LayerInputs], None] | None = None


class ModelError(UserError, ValueError):
    """A model that cannot be loaded or run; the message says why and what to do."""


@dataclass(frozen=True)
class LayerInputs:
    """What the attention of one layer sees, after rotary embedding, and what it answers.

    q [T, H, D], k and v [T, Hkv, D], out [T, H, D]: exact causal attention. `window`, where there
    is one, is the number of last tokens that the layer itself looks at.
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    out: torch.Tensor
    window: int | None = None


def load_model(name: str, *, device: str = "cpu", dtype: str | None = None) -> torch.nn.Module:
    """The decoder of a model, without its output layer, from a folder or the Hugging Face hub.

    Args:
        dtype: one of DTYPES; None: float32 on a CPU, else as the checkpoint says.

    Raises:
        ModelError: it cannot be loaded, or not on this device.
    """
    import transformers

    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype: got {shown(dtype)}; allowed: {', '.join(DTYPES)}")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ModelError(f"device: got {shown(device)}; allowed: cpu, cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device: {shown(device)} is not here: torch finds no GPU; use cpu")
    transformers.AttentionInterface.register(NAME, _attention)
    wanted = dtype or ("float32" if device == "cpu" else "auto")
    try:
        model = transformers.AutoModel.from_pretrained(
            name,
            dtype=wanted if wanted == "auto" else getattr(torch, wanted),
            attn_implementation=NAME,
        )
        model = model.to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"model {whole(name)} cannot be loaded: {said}") from error
    return model


def model_info(model: torch.nn.Module, name: str) -> ModelInfo:
    """Shape and rotary settings of a loaded model.

    Raises:
        ModelError: its config does not tell them.
    """
    return _info(model.config, name)


def config_info(name: str) -> ModelInfo:
    """The same from the config alone, without loading the model.

    Raises:
        ModelError: it cannot be loaded, or does not tell them.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"config of {whole(name)} cannot be loaded: {said}") from error
    return _info(config, name)


def _info(config: Any, name: str) -> ModelInfo:
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not heads or not layers:
        raise ModelError(
            f"model {whole(name)}: its config names no num_attention_heads or num_hidden_layers; "
            "give a decoder with ordinary attention"
        )
    return ModelInfo(
        name=name[:512],
        layers=layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rope=rope_settings(config),
    )


def rope_settings(config: Any) -> dict[str, Any]:
    """The rotary settings of a Hugging Face config as flat entries; empty where it has none."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    flat: dict[str, Any] = {}
    for key, value in rope.items():
        for name, entry in (
            ((f"{key}.{k}", v) for k, v in value.items())
            if isinstance(value, dict)
            else [(key, value)]
        ):
            if isinstance(entry, bool | int | float | str | list | tuple) or entry is None:
                flat[str(name)] = list(entry) if isinstance(entry, tuple) else entry
    return flat


@torch.inference_mode()
def capture(
    model: torch.nn.Module, token_ids: Sequence[int], visit: Callable[[LayerInputs], None]
) -> None:
    """Run the model over a prompt; `visit` is called once a layer, in order.

    The tensors belong to the model: `visit` may not change them, and a view of them that it keeps
    keeps their memory.

    Raises:
        ModelError: the model's attention goes another way than transformers' interface, or is of
            a kind that the sparse backend does not serve.
    """
    global _visit
    seen: list[int] = []

    def note(inputs: LayerInputs) -> None:
        seen.append(inputs.layer)
        visit(inputs)

    device = next(model.parameters()).device
    _visit = note
    try:
        model(input_ids=torch.tensor([list(token_ids)], device=device), use_cache=False)
    finally:
        _visit = None
    if not seen:
        raise ModelError(
            f"{type(model).__name__} does not use transformers' attention interface; "
            "this version searches models that do"
        )


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: [1, heads, T, D] in, [1, T, heads, D] out."""
    special = [SPECIAL[k] for k, v in kwargs.items() if k in SPECIAL and v is not None]
    if special:
        raise ModelError(f"layers with {', '.join(special)} are not served by the sparse backend")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = sliding_window or getattr(module, "sliding_window", None)
    out = dense_attention(query, key, value, scale, window).transpose(1, 2)
    if _visit is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        _visit(LayerInputs(int(module.layer_idx), q, k, v, scale, out[0], window))
    return out, None


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """Exact causal attention: q [1, H, T, D], k and v [1, Hkv, T, D] -> [1, H, T, D]."""
    length = q.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    parts = []
    for begin in range(0, length, ROWS):
        end = min(begin + ROWS, length)
        first = max(begin - window + 1, 0)
        distance = (
            torch.arange(begin, end, device=q.device)[:, None]
            - torch.arange(first, end, device=q.device)
        )  # fmt: skip
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, begin:end], k[:, :, first:end], v[:, :, first:end],
                attn_mask=(distance >= 0) & (distance < window), scale=scale, enable_gqa=grouped,
            )
        )  # fmt: skip
    return torch.cat(parts, 2)
