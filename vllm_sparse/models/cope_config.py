"""The configuration of a CoPE model's checkpoint."""

from __future__ import annotations

from transformers import LlamaConfig


class CoPEConfig(LlamaConfig):
    """A Llama's configuration, whose layers have contextual positions in place of RoPE.

    `rope_parameters` and the length that they were made for mean nothing here:
    `max_position_embeddings` is only the longest context that is served unless asked for more.
    """

    model_type = "cope"

    # Positions in each layer's table: what lies beyond the last counts as the last.
    cope_positions: int = 64


def table_shape(config: CoPEConfig) -> tuple[int, int]:
    """[positions, head size] of a layer's table.

    Raises:
        ValueError: no whole number of positions from 1. Transformers checks the types of its own
            configurations in newer versions alone.
    """
    positions = config.cope_positions
    if not isinstance(positions, int) or positions < 1:
        raise ValueError(f"cope_positions: got {positions!r}; give a whole number from 1")
    return positions, config.head_dim
