"""Models that vLLM does not have: CoPE, a Llama with contextual positions.

`import vllm_sparse.models` also makes Hugging Face's AutoConfig and AutoModelForCausalLM know it;
vLLM learns of it from the plugin.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from .cope_config import CoPEConfig
from .cope_torch import CoPEForCausalLM

__all__ = ["CoPEConfig", "CoPEForCausalLM"]

AutoConfig.register(CoPEConfig.model_type, CoPEConfig, exist_ok=True)
AutoModelForCausalLM.register(CoPEConfig, CoPEForCausalLM, exist_ok=True)
