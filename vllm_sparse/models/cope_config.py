"""The configuration of a CoPE model's checkpoint."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


@strict
class CoPEConfig(LlamaConfig):
    """A Llama's configuration, whose layers have contextual positions in place of RoPE.

    `rope_parameters` and the length that they were made for mean nothing here:
    `max_position_embeddings` is only the longest context that is served unless asked for more.
    """

    model_type = "cope"

    # Positions in each layer's table: what lies beyond the last counts as the last.
    cope_positions: int = 64

    def validate_cope_positions(self):
        """Part of the validation by `@strict`."""
        if self.cope_positions < 1:
            raise ValueError(
                f"cope_positions: got {self.cope_positions}; a table has at least 1 position"
            )
