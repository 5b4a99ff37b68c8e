"""A Llama forward pass in plain torch, which shows the queries, keys and values of every layer.

Activations are computed in the given dtype with the same roundings as in a serving engine: cosines
and sines are stored in that dtype, norms and softmax accumulate in float32.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROWS = 4096  # tokens that the linear layers take at a time


@dataclass(frozen=True)
class Llama:
    """Sizes and tensors of a checkpoint, in the dtype it is to run in."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    weights: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[f"{name}.weight"]


@dataclass(frozen=True)
class LayerInputs:
    """What a layer's attention sees, after RoPE: q [T, H, D], k and v [T, H_kv, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
    """Read config.json and model.safetensors."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    weights = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    return Llama(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        rope_theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
        weights=weights,
    )


@torch.no_grad()
def run_layers(
    model: Llama, token_ids: Sequence[int]
) -> Iterator[tuple[LayerInputs, torch.Tensor]]:
    """Yield, layer by layer, the attention's inputs and the stream [T, hidden] after the layer.

    Both are overwritten or dropped as the next layer runs, unless the caller keeps them. The
    stream is one tensor throughout, updated in place.
    """
    stream = model["model.embed_tokens"][torch.tensor(token_ids)]
    cos, sin = _rotation(model, len(token_ids), stream.dtype)
    for number in range(model.layers):
        layer = f"model.layers.{number}"
        inputs = _inputs(model, layer, stream, cos, sin)
        attended = attention(inputs)
        for start in range(0, len(stream), ROWS):
            part = stream[start : start + ROWS]
            rows = attended[start : start + ROWS].flatten(1)
            part += rows @ model[f"{layer}.self_attn.o_proj"].T
            normed = _norm(part, model[f"{layer}.post_attention_layernorm"], model.eps)
            gate = F.silu(normed @ model[f"{layer}.mlp.gate_proj"].T)
            gate *= normed @ model[f"{layer}.mlp.up_proj"].T
            part += gate @ model[f"{layer}.mlp.down_proj"].T
        yield inputs, stream


@torch.no_grad()
def logits(model: Llama, token_ids: Sequence[int], last: int = 1) -> torch.Tensor:
    """Logits [last, words] in float32 at the last positions."""
    _, stream = deque(run_layers(model, token_ids), maxlen=1).pop()
    normed = _norm(stream[-last:], model["model.norm"], model.eps)
    return (normed @ model["lm_head"].T).float()


def capture_qkv(
    folder: str | Path, token_ids: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(q [T, H, D], k [T, H_kv, D], v [T, H_kv, D]) of every layer, after RoPE."""
    layers = run_layers(load_model(folder, dtype), token_ids)
    return [(inputs.q, inputs.k, inputs.v) for inputs, _ in layers]


def attention(inputs: LayerInputs) -> torch.Tensor:
    """Exact causal attention [T, H, D], one query head at a time to save memory."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    out = torch.empty_like(inputs.q)
    for head in range(inputs.q.shape[1]):
        q, k, v = inputs.q[:, head], inputs.k[:, head // group], inputs.v[:, head // group]
        out[:, head] = F.scaled_dot_product_attention(
            q[None, None], k[None, None], v[None, None], is_causal=True
        )[0, 0]
    return out


def _inputs(
    model: Llama, layer: str, stream: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> LayerInputs:
    parts: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    for start in range(0, len(stream), ROWS):
        rows = slice(start, start + ROWS)
        normed = _norm(stream[rows], model[f"{layer}.input_layernorm"], model.eps)
        for name, done in parts.items():
            made = normed @ model[f"{layer}.self_attn.{name}_proj"].T
            made = made.unflatten(1, (-1, model.head_dim))
            done.append(made if name == "v" else _rotate(made, cos[rows], sin[rows]))
    return LayerInputs(*(torch.cat(done) for done in parts.values()))


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def _rotation(model: Llama, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, D / 2]."""
    half = model.head_dim // 2
    speed = model.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(length, dtype=torch.float32)[:, None, None] * speed
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
