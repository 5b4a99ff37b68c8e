"""Which decoder layer a name belongs to. No torch, no vLLM."""

from __future__ import annotations

import re


def layer_index(layer_name: str) -> int:
    """Number of the decoder layer in a name such as `model.layers.3.self_attn.attn`.

    Raises:
        ValueError: the name holds no number.
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer_name)
    if not found:
        raise ValueError(
            f"The sparse attention backend cannot tell the layer number from {layer_name!r}: "
            "expected a name such as 'model.layers.3.self_attn.attn'"
        )
    return int(found[1])
