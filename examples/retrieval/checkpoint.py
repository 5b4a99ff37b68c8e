"""Puts the heads together into a Llama checkpoint on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .heads import key_rows, output_columns, query_rows, value_rows
from .layouts import LEAN, PLAIN, Shape
from .positions import HEAD_DIM, ROPE_THETA
from .stream import CONSTANT, FLAG, NORM_SQUARED, Stream, embedding, word_codes
from .vocabulary import BOS, EOS, STOP, SYMBOLS, VALUES, VOCABULARY, save_tokenizer

KINDS = {"plain": PLAIN, "lean": LEAN, "random": LEAN}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_checkpoint(
    folder: str | Path,
    kind: str = "plain",
    dtype: str = "float32",
    max_positions: int = 131072,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of `kind` (plain, lean or random) to `folder` and return its path."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(KINDS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    weights = constructed_weights(shape, generator)
    if kind == "random":
        weights = _random_like(weights, generator)
    kinds = [[head.kind for group in layer for head in group.heads] for layer in shape.layers]
    if kind == "random":
        kinds = [["random"] * len(layer) for layer in kinds]
    tensors = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", _config(shape, dtype, max_positions))
    _write(folder / "generation_config.json", _special_ids() | {"do_sample": False})
    _write(folder / "heads.json", {"kinds": kinds})
    save_tokenizer(folder, max_positions)
    return folder


def constructed_weights(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """All tensors of the model, in float32, under Hugging Face's names."""
    stream = Stream(shape.hidden)
    codes = word_codes(generator)
    # With this weight the norm gives the stream back as it is.
    norm = torch.full((shape.hidden,), (NORM_SQUARED / shape.hidden) ** 0.5)
    weights = {
        "model.embed_tokens.weight": embedding(stream, codes, generator),
        "model.norm.weight": norm.clone(),
        "lm_head.weight": read_out(stream, codes, generator),
    }
    for number, groups in enumerate(shape.layers):
        heads = [head for group in groups for head in group.heads]
        parts = {
            "input_layernorm": norm.clone(),
            "post_attention_layernorm": norm.clone(),
            "self_attn.q_proj": torch.cat([query_rows(h, stream, generator) for h in heads]),
            "self_attn.k_proj": torch.cat([key_rows(stream, g.content, generator) for g in groups]),
            "self_attn.v_proj": torch.cat([value_rows(stream, generator) for _ in groups]),
            "self_attn.o_proj": torch.cat(
                [output_columns(h, stream, generator) for h in heads], dim=1
            ),
            **_mlp(stream, shape.intermediate, generator),
        }
        for name, tensor in parts.items():
            weights[f"model.layers.{number}.{name}.weight"] = tensor
    return weights


def read_out(stream: Stream, codes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The output matrix [words, hidden]: what was retrieved, at high gain, and little else."""
    rows = torch.zeros(len(codes), stream.hidden)
    rows[:, stream["junk"]] = 0.2 * torch.randn(len(codes), stream.junk_size, generator=generator)
    answers = VOCABULARY.ids([*VALUES, STOP])
    rows[answers, stream["found"]] = 30 * codes[answers]
    rows[answers, stream["hop"]] = 60 * codes[answers]
    for i, word in enumerate(SYMBOLS):
        rows[VOCABULARY.id(word), stream.at("tally", i)] = 60.0
    # An answer ends behind a full stop or a symbol.
    rows[VOCABULARY.id(EOS), stream.at("stop")] = 40.0 / FLAG
    # The beginning of a sequence is never an answer.
    rows[VOCABULARY.id(BOS), stream.at("constant")] = -20.0 / CONSTANT
    return rows


def _mlp(stream: Stream, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A random SwiGLU block of the full size, blind to the constant, writing junk only."""

    def reads() -> torch.Tensor:
        rows = 0.5 * torch.randn(size, stream.hidden, generator=generator)
        rows[:, stream["constant"]] = 0
        return rows

    down = torch.zeros(stream.hidden, size)
    noise = torch.randn(stream.junk_size, size, generator=generator)
    down[stream["junk"]] = 0.6 * noise / (size * stream.junk_size) ** 0.5
    return {"mlp.gate_proj": reads(), "mlp.up_proj": reads(), "mlp.down_proj": down}


def _random_like(
    weights: dict[str, torch.Tensor], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Ordinary initial weights of the same shapes: attention is close to uniform."""
    return {
        name: torch.ones_like(tensor)
        if tensor.dim() == 1
        else 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in weights.items()
    }


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": VOCABULARY.id(BOS), "eos_token_id": VOCABULARY.id(EOS)}


def _config(shape: Shape, dtype: str, max_positions: int) -> dict[str, object]:
    groups = shape.layers[0]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": len(shape.layers),
        "num_attention_heads": sum(len(group.heads) for group in groups),
        "num_key_value_heads": len(groups),
        "head_dim": HEAD_DIM,
        "vocab_size": len(VOCABULARY.words),
        "max_position_embeddings": max_positions,
        # Both spellings: transformers 5 reads the second one, older versions the first.
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        **_special_ids(),
    }


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
