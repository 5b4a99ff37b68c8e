"""CoPE in plain torch, as Hugging Face models are: for training, and as the meaning of ours in
vLLM. It writes out every position of every query, [B, H, T, T]."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from ..kernels.cope_reference import contextual_logits
from .cope_config import CoPEConfig, table_shape


class CoPEAttention(nn.Module):
    """Attention with contextual positions; the names of the weights are Llama's, and `pos_emb`."""

    def __init__(self, config: CoPEConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scale = self.head_dim**-0.5
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.dropout = config.attention_dropout or 0.0
        bias = config.attention_bias
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias)
        # Zeros: training starts without positions, as the authors' does.
        self.pos_emb = nn.Parameter(torch.zeros(table_shape(config)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [B, T, hidden]; attention_mask additive [B, 1, T, N], None: causal."""
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        k = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        v = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        k = k.repeat_interleave(self.group, 1)
        v = v.repeat_interleave(self.group, 1)
        if attention_mask is None:
            rows, keys = q.shape[2], k.shape[2]
            seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
        elif attention_mask.dtype == torch.bool:
            seen = attention_mask[..., : k.shape[2]]
        else:
            seen = attention_mask[..., : k.shape[2]] == 0
        logits = (q @ k.transpose(2, 3)).float() * self.scale
        z = (q @ self.pos_emb.T).float() * self.scale
        weights = torch.softmax(contextual_logits(logits, seen, z), -1).to(q.dtype)
        # A row of padding sees nothing, and NaN would reach the others through the next layer.
        weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        out = (weights @ v).transpose(1, 2).flatten(2)
        return self.o_proj(out), None


class CoPEForCausalLM(LlamaForCausalLM):
    """A Llama whose attention has contextual positions in place of RoPE."""

    config_class = CoPEConfig
    # Attention is its own; the masks are those of eager attention.
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __init__(self, config: CoPEConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = CoPEAttention(config, index)
        self.post_init()
