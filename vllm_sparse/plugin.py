"""register(): what vLLM calls in the API server, the engine core and every worker."""

from __future__ import annotations

import logging

from . import log

BACKEND = "SPARSE"
BACKEND_PATH = "vllm_sparse.backend.SparseAttentionBackend"
CUDA_BACKEND_PATH = "vllm_sparse.cuda_backend.SparseCudaBackend"
COPE_MODEL = "CoPEForCausalLM"
COPE_MODEL_PATH = "vllm_sparse.models.cope_vllm:CoPEForCausalLM"

logger = log.get_logger(__name__)

# Whether the configuration that this process serves by asks for our linear layers: set where it is
# made, and handed on with the member to processes that unpickle it.
linear_asked = False


def register() -> None:
    """Make `attention_backend="sparse"` and CoPE models known to vLLM in this process. May be
    called again."""
    from . import compat

    log.follow_vllm()
    if not compat.check_version():
        return
    sparse_member()
    register_cope()
    if linear_asked:
        from .linear import layers

        layers.install()

    from vllm.platforms import current_platform

    if current_platform.is_cpu() or current_platform.is_cuda():
        from . import cpu_platform

        if current_platform.is_cpu():
            cpu_platform.install(type(current_platform))
        else:
            # vLLM's CUDA platform selects by name, and needs no more than its settings checked.
            cpu_platform.watch_config(type(current_platform))


def register_cope() -> None:
    """Make vLLM know CoPE models: their configuration, and where to find the model itself."""
    from vllm import ModelRegistry

    try:
        from . import models  # noqa: F401  makes AutoConfig know the configuration
    except Exception as error:
        # Those who serve another model, with another transformers, are to notice nothing else.
        log.once(logger, logging.INFO, f"CoPE models cannot be served by this vLLM: {error}")
        return
    if COPE_MODEL not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(COPE_MODEL, COPE_MODEL_PATH)


def sparse_member():
    """The SPARSE member of vLLM's backend enum, added on the first call.

    The member unpickles by it as well. vLLM's config, which holds the member, is unpickled in a
    spawned engine core before that process has loaded any plugin, and an enum pickles by value:
    the process would die with "... is not a valid AttentionBackendEnum". vLLM on CPU always spawns.
    """
    from vllm.platforms import current_platform

    from . import compat

    path = CUDA_BACKEND_PATH if current_platform.is_cuda() else BACKEND_PATH
    member = compat.backend_member(BACKEND, path)
    # On the instance, as pickle, cloudpickle and deepcopy look there first: vLLM's own members
    # keep their way of pickling, which a reducer for the whole enum class would change.
    member.__reduce_ex__ = _reduce
    return member


def unpickled_member(linear: bool = False):
    """The SPARSE member, in a process that was handed a configuration with it.

    Replacing layers has to wait for `register`: the configuration's other parts are not there yet.
    """
    global linear_asked
    linear_asked = linear_asked or linear
    return sparse_member()


def _reduce(protocol: int):
    return unpickled_member, (linear_asked,)
