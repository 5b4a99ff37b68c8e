"""CoPE in vLLM: vLLM's Llama, whose layers have contextual positions in place of RoPE."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.utils import set_weight_attrs

from .cope_backend import backend_of_platform, make_known
from .cope_config import CoPEConfig, table_shape


class CoPEAttention(nn.Module):
    """One layer's attention. Tensor parallelism cuts the heads; every rank has the whole table.

    Raises:
        ValueError: attention that is not causal, or a platform without kernels.
    """

    def __init__(
        self,
        config: CoPEConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: QuantizationConfig | None = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: CacheConfig | None = None,
        prefix: str = "",
        attn_type: str = "decoder",
    ) -> None:
        super().__init__()
        head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            hidden_size, head_dim, num_heads, num_kv_heads, bias=bias, quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            num_heads * head_dim, hidden_size, bias=bias_o_proj, quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads  # of this rank
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        # NaN shows where a checkpoint has no table and vLLM does not look: it does not ask that
        # every weight is there of a quantized one.
        table = torch.full(table_shape(config), torch.nan)
        self.pos_emb = nn.Parameter(table, requires_grad=False)
        set_weight_attrs(self.pos_emb, {"weight_loader": load_table})
        backend = backend_of_platform()
        make_known(backend)
        self.attn = Attention(
            heads, head_dim, head_dim**-0.5, kv_heads, cache_config=cache_config,
            quant_config=quant_config, prefix=f"{prefix}.attn", attn_type=attn_type,
            attn_backend=backend, pos_emb=self.pos_emb,
        )  # fmt: skip

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, hidden]; `positions` are those of RoPE, and not looked at."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out


class CoPEDecoderLayer(LlamaDecoderLayer):
    """A Llama's layer with CoPEAttention."""

    def __init__(
        self, vllm_config: VllmConfig, prefix: str = "", config: CoPEConfig | None = None
    ) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=CoPEAttention)


class CoPEForCausalLM(LlamaForCausalLM):
    """What vLLM serves of a checkpoint whose architecture has this name."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=CoPEDecoderLayer)


def load_table(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
    """Copy a checkpoint's table into a layer's.

    Raises:
        ValueError: config.json is of another size.
    """
    if loaded.shape != parameter.shape:
        raise ValueError(
            f"pos_emb: the checkpoint has a table of {list(loaded.shape)}, and config.json says "
            f"{list(parameter.shape)} (cope_positions, head_dim); correct config.json"
        )
    parameter.data.copy_(loaded)
