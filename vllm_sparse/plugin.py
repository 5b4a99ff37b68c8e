"""register(): what vLLM calls in the API server, the engine core and every worker."""

from __future__ import annotations

BACKEND = "SPARSE"
BACKEND_PATH = "vllm_sparse.backend.SparseAttentionBackend"


def register() -> None:
    """Make `attention_backend="sparse"` known to vLLM in this process. May be called again."""
    from . import compat, log

    log.follow_vllm()
    if not compat.check_version():
        return
    sparse_member()

    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from . import cpu_platform

        cpu_platform.install(type(current_platform))


def sparse_member():
    """The SPARSE member of vLLM's backend enum, added on the first call.

    It is also what the member unpickles to. vLLM's config, which holds the member, is unpickled in
    a spawned engine core before that process has loaded any plugin, and an enum pickles by value:
    the process would die with "... is not a valid AttentionBackendEnum". vLLM on CPU always spawns.
    """
    from . import compat

    member = compat.backend_member(BACKEND, BACKEND_PATH)
    # On the instance, as pickle, cloudpickle and deepcopy look there first: vLLM's own members
    # keep their way of pickling, which a reducer for the whole enum class would change.
    member.__reduce_ex__ = _reduce
    return member


def _reduce(protocol: int):
    return sparse_member, ()
