"""Puts the connector into vLLM's configuration, and refuses what it cannot go with."""

from __future__ import annotations

import torch
from vllm.config import KVTransferConfig

from vllm_sparse.config import SECTION, SparseConfig

from .. import actor
from ..layout import PAGE_ROWS, Layout
from ..sampling import Sampling

NAME, MODULE = "SparseOffloadConnector", "vllm_sparse.cpu_offload.connector"


def install(vllm_config, config: SparseConfig) -> None:
    """Make the offload connector vLLM's.

    Raises:
        ValueError: something else in the configuration excludes it.
    """
    ours = vllm_config.kv_transfer_config
    if ours is not None and ours.kv_connector_module_path == MODULE:
        return  # vLLM checks a config again when it makes one out of another
    sampling_of(config)
    if config.ray and not actor.is_installed():
        raise ValueError(
            f'{SECTION}["ray"] is true, and Ray is not installed; run: '
            "pip install 'vllm-sparse[ray]', or leave ray out: actors are local processes then"
        )
    if reasons := refusals(vllm_config, config):
        raise ValueError(
            f'{SECTION}["decode"] is {config.decode!r}, which keeps keys and '
            f"values in host memory. That does not go with {'; nor with '.join(reasons)}"
        )
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector=NAME, kv_connector_module_path=MODULE, kv_role="kv_both"
    )


def sampling_of(config: SparseConfig) -> Sampling:
    """What decode samples.

    Raises:
        ValueError: the sampler has no such option, or not with this value.
    """
    try:
        return Sampling.of(config.decode, config.rows, dict(config.sampler_options))
    except ValueError as error:
        raise ValueError(f'{SECTION}["sampler_options"]: {error}') from None


def layout_of(
    config: SparseConfig, layers: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> Layout:
    """How the host keeps rows of layers that are offloaded, of a model in `dtype`."""
    sampling, kept = sampling_of(config), torch.int8 if config.host_dtype == "int8" else dtype
    return Layout(
        layers, kv_heads, head_size, kept, PAGE_ROWS, sampling.sketched, sampling.hash_tables
    )


def refusals(vllm_config, config: SparseConfig) -> list[str]:
    """What is in the way, each with what to do."""
    found = []
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None:
        found.append(
            f"the KV connector {transfer.kv_connector!r} of --kv-transfer-config: that one moves "
            "blocks of the device, which no longer has most of them; leave one of the two out"
        )
    cache = vllm_config.cache_config
    if getattr(cache, "kv_offloading_size", None):
        found.append(
            f"--kv-offloading-size {cache.kv_offloading_size}, vLLM's own host cache for the "
            "device's blocks; leave one of the two out"
        )
    if str(getattr(cache, "cache_dtype", "auto")).startswith("fp8"):
        found.append(
            f"--kv-cache-dtype {cache.cache_dtype}: host memory has rows in the model's dtype, "
            "or as int8 with host_dtype; leave it at auto"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        found.append(
            "--disable-hybrid-kv-cache-manager, which would keep every block; leave it out"
        )
    if vllm_config.speculative_config is not None:
        found.append("speculative decoding; leave --speculative-config out")
    if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        found.append(f"--pipeline-parallel-size {stages}; use 1")
    model = vllm_config.model_config
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        found.append(
            f"a model with layers of other kinds than full attention ({', '.join(sorted(kinds))}), "
            "in this version; leave decode out"
        )
    layers = model.get_total_num_hidden_layers()
    if len(config.resident_layers) >= layers:
        found.append(
            f"resident_layers {list(config.resident_layers)}, which are all layers; leave some out"
        )
    return found
