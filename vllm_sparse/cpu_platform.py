"""Makes the backend selectable on CPU builds of vLLM.

CpuPlatform knows its own backends only and passes any other name over with an info line. Its
selection is wrapped rather than the platform replaced: a platform plugin is ignored under
`VLLM_TARGET_DEVICE=cpu`, and would have to rebuild vLLM's own CPU variants (Zen).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from . import compat, log, plugin
from .backend import HEAD_SIZES, PAGE_MULTIPLE, SparseAttentionBackend
from .config import SparseConfig
from .plugin import BACKEND, BACKEND_PATH, COPE_MODEL

logger = log.get_logger(__name__)

# vLLM's reasons say what is not supported; here is what was given and what is allowed instead.
DETAILS: dict[str, Callable] = {
    "MLA not supported": lambda c: (
        "the model uses multi-head latent attention (MLA), which has no per-head keys to select; "
        "this backend serves ordinary MHA and GQA models"
    ),
    "sparse not supported": lambda c: (
        "the model brings its own trained sparse attention (DeepSeek sparse attention); "
        "this backend serves ordinary MHA and GQA models"
    ),
    "head_size not supported": lambda c: (
        f"head size {c.head_size}: supported are the multiples of 16 from {HEAD_SIZES[0]} to "
        f"{HEAD_SIZES[-1]}"
    ),
    "dtype not supported": lambda c: (
        f"{c.dtype}: supported are float32, bfloat16 and float16 (--dtype)"
    ),
    "kv_cache_dtype not supported": lambda c: (
        f"KV cache dtype {c.kv_cache_dtype!r}: supported is the model's own (--kv-cache-dtype auto)"
    ),
    "block_size not supported": lambda c: (
        f"KV block size {c.block_size}: supported are the multiples of {PAGE_MULTIPLE} "
        "(--block-size)"
    ),
    "partial multimodal token full attention not supported": lambda c: (
        "the model attends to image tokens in both directions (prefix LM), and this backend "
        "is causal only"
    ),
    "non-causal attention not supported": lambda c: (
        "attention in both directions was asked for, and this backend is causal only"
    ),
    "batch invariance not supported": lambda c: (
        "batch invariance (VLLM_BATCH_INVARIANT) is not given: where chunks are cut decides how "
        "attention is computed"
    ),
    "DCP not supported": lambda c: (
        "decode context parallelism is not supported (--decode-context-parallel-size 1)"
    ),
    "PCP not supported": lambda c: (
        "prefill context parallelism is not supported (--prefill-context-parallel-size 1)"
    ),
}
WHAT_TO_DO = "Leave --attention-backend out to serve this model with vLLM's own backend."


def install(platform: type) -> None:
    """Wrap the CPU platform class's backend selection and its check of the config, once."""
    if getattr(platform.get_attn_backend_cls, "_knows_sparse", False):
        return
    select = platform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if not _is_ours(selected_backend):
            return select(cls, selected_backend, attn_selector_config, num_heads)
        if stays_with_vllm(attn_selector_config):
            return select(cls, None, attn_selector_config, num_heads)
        refuse_unsupported(attn_selector_config)
        return BACKEND_PATH

    get_attn_backend_cls._knows_sparse = True
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    watch_config(platform)


def watch_config(platform: type) -> None:
    """Wrap a platform class's check of the config, once."""
    if getattr(platform.check_and_update_config, "_knows_sparse", False):
        return
    check = platform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        check(cls, vllm_config)
        check_config(vllm_config)

    check_and_update_config._knows_sparse = True
    platform.check_and_update_config = classmethod(check_and_update_config)


def stays_with_vllm(selector_config) -> bool:
    """Whether layers of this kind are left to vLLM's own backend; says so once in a process."""
    if selector_config.use_mla or selector_config.attn_type != "decoder":
        return False
    stays = "layers stay with vLLM's own CPU backend; the sparse backend serves the others"
    if selector_config.has_sliding_window:
        log.once(logger, logging.INFO, f"Sliding-window {stays}")
    elif selector_config.has_sink:
        # Full-attention layers with sinks are what this backend would be for (gpt-oss).
        log.once(logger, logging.WARNING, f"Attention-sink {stays}, if there are any")
    return selector_config.has_sliding_window or selector_config.has_sink


def refuse_unsupported(selector_config) -> None:
    """Raise ValueError with every reason why the backend cannot serve such layers."""
    if said := unsupported(SparseAttentionBackend, selector_config):
        raise ValueError(
            f"The sparse attention backend cannot run: {'; '.join(said)}. {WHAT_TO_DO}"
        )


def unsupported(backend: type, selector_config, device_capability=None) -> list[str]:
    """Every reason why a backend cannot serve such layers, said in full; none: it can."""
    reasons = backend.validate_configuration(
        device_capability=device_capability, **selector_config._asdict()
    )
    if _other_cache_dtype(selector_config):
        reasons.append("kv_cache_dtype not supported")
    if getattr(selector_config, "use_dcp", False):  # not among vLLM's reasons before 0.30
        reasons.append("DCP not supported")
    return [DETAILS[r](selector_config) if r in DETAILS else r for r in dict.fromkeys(reasons)]


def check_config(vllm_config) -> None:
    """Raise ValueError for bad settings where the user stands, before any process is started."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(getattr(attention, "backend_per_kind", None) or {}).values()]
    if COPE_MODEL in getattr(vllm_config.model_config, "architectures", ()):
        check_cope(vllm_config, [backend.name for backend in chosen if backend is not None])
        return
    if not any(map(_is_ours, chosen)):
        return
    compat.warn_if_untested()
    config = SparseConfig.from_additional_config(vllm_config.additional_config)
    plugin.linear_asked = config.linear != "vllm"
    if plugin.linear_asked:
        from .linear import layers

        layers.install()
    # The settings' layers and patterns are the target's, and not a draft's.
    if vllm_config.model_config is not None and not compat.makes_draft(vllm_config):
        from .runtime import Model, fit_patterns, fit_phi  # loads the kernels and the planner

        model = Model.of(vllm_config)
        fit_phi(config, model, fit_patterns(config, model))
        if config.offloads:
            from .cpu_offload.connector import install as offloading

            offloading.install(vllm_config, config)
    # vLLM sets it only where every layer has the window.
    window = getattr(vllm_config.cache_config, "sliding_window", None)
    if window is not None:
        raise ValueError(
            "The sparse attention backend would have nothing to do: every layer of this model has "
            f"a sliding window (of {window} tokens), and those stay with vLLM's own. {WHAT_TO_DO}"
        )


def check_cope(vllm_config, chosen: list[str]) -> None:
    """Raise ValueError for settings under which CoPE models are not served.

    Their layers name their backend themselves, so that vLLM asks no backend what it supports.

    Args:
        chosen: names of the backends that the user chose.
    """
    from vllm.platforms import current_platform

    from .models.cope_backend import backend_of_platform, selector_config

    if chosen:
        raise ValueError(
            f"--attention-backend {chosen[0].lower()}: CoPE models bring their own attention, as "
            "no other computes contextual positions. Leave --attention-backend out"
        )
    said = unsupported(
        backend_of_platform(),
        selector_config(vllm_config),
        current_platform.get_device_capability(),
    )
    if said:
        raise ValueError(f"CoPE models cannot be served like this: {'; '.join(said)}")


def _is_ours(backend) -> bool:
    return getattr(backend, "name", None) == BACKEND


def _other_cache_dtype(selector_config) -> bool:
    """Whether the cache would hold another dtype than the queries, as the kernels demand one."""
    given = selector_config.kv_cache_dtype
    return given in ("float16", "bfloat16") and str(selector_config.dtype) != f"torch.{given}"
