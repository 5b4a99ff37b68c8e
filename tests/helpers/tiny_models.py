"""Tiny random checkpoints. Weights of std 0.12 give logits that differ: with transformers' 0.02
the same token wins everywhere, and equal tokens would prove nothing."""

from __future__ import annotations

from pathlib import Path

VOCAB = 512


def save_llama(path: Path, *, layers: int = 4, heads: int = 4, kv_heads: int = 2, **extra) -> str:
    """A Llama with hidden size 256 and heads of 64; kv_heads == heads is MHA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "initializer_range": 0.12,
            "tie_word_embeddings": False,
            **extra,
        }
    )
    return _save(LlamaForCausalLM, config, path)


def save_gemma3(path: Path, *, layers: int = 6, window: int = 128) -> str:
    """A Gemma 3 whose layers 2 and 5 are full attention, the others a sliding window."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=8192,
        sliding_window=window,
        layer_types=kinds,
        initializer_range=0.12,
    )
    return _save(Gemma3ForCausalLM, config, path)


def save_cope(path: Path, *, positions: bool = True, **extra) -> str:
    """A CoPE model of 3 layers, 4 query heads, 2 KV heads of 64, and 16 positions.

    Gates lie all over (0, 1), and tables weigh as much as keys: positions decide tokens.

    Args:
        positions: False: the same model with tables of zeros, which has no positions at all.
    """
    import torch

    from vllm_sparse.models import CoPEConfig, CoPEForCausalLM

    config = CoPEConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "initializer_range": 0.12,
            "tie_word_embeddings": False,
            "cope_positions": 16,
            **extra,
        }
    )
    torch.manual_seed(0)
    model = CoPEForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.pos_emb.normal_(std=2.0 if positions else 0.0)
            # Products of queries and keys are then of std 2 or so, after the scale.
            attention.q_proj.weight.mul_(0.7)
            attention.k_proj.weight.mul_(0.7)
            if config.attention_bias:
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    getattr(attention, name).bias.normal_(std=0.5)
    model.save_pretrained(path)
    return str(path)


def _save(model_class: type, config, path: Path) -> str:
    import torch

    torch.manual_seed(0)
    model_class(config).float().save_pretrained(path)
    return str(path)
