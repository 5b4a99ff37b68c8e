"""The plugin's registration: idempotent, quick, and alive in spawned processes."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_sparse import compat, log, plugin
from vllm_sparse.config import SparseConfig


@pytest.fixture(autouse=True, scope="module")
def registered():
    plugin.register()


def in_fresh_process(code: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> str:
    """Standard output of `python -c code`; fails where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=stdin,
        capture_output=True,
        timeout=120,
        cwd="/",
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return done.stdout.decode()


def test_registering_twice_is_registering_once():
    from vllm.platforms import current_platform

    member = AttentionBackendEnum["SPARSE"]
    select = current_platform.get_attn_backend_cls.__func__
    plugin.register()
    assert AttentionBackendEnum["SPARSE"] is member
    assert current_platform.get_attn_backend_cls.__func__ is select
    assert list(AttentionBackendEnum.__members__).count("SPARSE") == 1


def test_the_member_leads_to_the_backend():
    from vllm_sparse.backend import SparseAttentionBackend

    member = AttentionBackendEnum["SPARSE"]
    assert member.get_class() is SparseAttentionBackend
    assert AttentionBackendEnum[SparseAttentionBackend.get_name()] is member


def test_old_vllm_without_names_gets_the_member_too(monkeypatch):
    # vLLM before 0.32 has no `register` on the enum: the member is made by hand.
    from vllm.v1.attention.backends import registry

    monkeypatch.delattr(registry.AttentionBackendEnum, "register", raising=False)
    member = compat.backend_member("SPARSE_OLD", "some.module.Class")
    try:
        assert registry.AttentionBackendEnum["SPARSE_OLD"] is member
        assert member.get_path() == "some.module.Class"
        assert member in list(registry.AttentionBackendEnum)
    finally:
        enum = registry.AttentionBackendEnum
        type.__delattr__(enum, "SPARSE_OLD")
        del enum._member_map_["SPARSE_OLD"], enum._value2member_map_["some.module.Class"]
        enum._member_names_.remove("SPARSE_OLD")
        registry._ATTN_OVERRIDES.pop(member)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_copies_are_the_member_itself(protocol):
    import cloudpickle

    member = AttentionBackendEnum["SPARSE"]
    assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert pickle.loads(cloudpickle.dumps(member, protocol)) is member
    assert copy.deepcopy({"backend": member})["backend"] is member


def test_the_other_members_pickle_as_before():
    member = AttentionBackendEnum.CPU_ATTN
    assert b"vllm_sparse" not in pickle.dumps(member)
    assert pickle.loads(pickle.dumps(member)) is member


def test_a_fresh_process_unpickles_the_member():
    # As the engine core does: the config arrives before plugins are loaded.
    out = in_fresh_process(
        "import pickle, sys; x = pickle.load(sys.stdin.buffer); print(x['backend'].name)",
        pickle.dumps({"backend": AttentionBackendEnum["SPARSE"]}),
    )
    assert out.split()[-1] == "SPARSE"


def test_importing_the_package_loads_no_torch():
    out = in_fresh_process(
        "import sys, vllm_sparse, vllm_sparse.plugin, vllm_sparse.config, vllm_sparse.patterns;"
        "print([m for m in ('torch', 'vllm') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_vllm_finds_the_entry_point():
    from importlib.metadata import entry_points

    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "sparse"]
    assert [e.value for e in found] == ["vllm_sparse.plugin:register"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--attention-backend", "sparse"],
        ["--attention-backend", "SPARSE"],
        ["--attention-config.backend", "Sparse"],
        ["--attention-config", '{"backend": "sparse"}'],
    ],
)
def test_the_backend_is_chosen_on_the_command_line(arguments):
    parsed = parse_arguments(arguments)
    attention = EngineArgs.from_cli_args(parsed).attention_config
    chosen = parsed.attention_backend or attention.backend
    assert getattr(chosen, "name", chosen).upper() == "SPARSE"


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (["--additional-config", '{"sparse": {"coverage": 0.9}}'], "coverage", 0.9),
        (["--additional-config.sparse.coverage", "0.9"], "coverage", 0.9),
        (["--additional-config.sparse.break_even", "2k"], "break_even", 2000),
        (["--additional-config.sparse.break_even", "null"], "break_even", None),
        (["--additional-config.sparse.dense_layers", "3"], "dense_layers", (3,)),
        (["--additional-config.sparse.dense_layers", "0,3"], "dense_layers", (0, 3)),
        (["--additional-config.sparse.dense_layers+", "0,3"], "dense_layers", (0, 3)),
        (["--additional-config.sparse.dense_layers", "[0, 3]"], "dense_layers", (0, 3)),
        (["--additional-config.sparse.patterns", "/a/b.json"], "patterns", "/a/b.json"),
    ],
)
def test_settings_are_given_on_the_command_line(arguments, key, value):
    config = SparseConfig.from_additional_config(parse_arguments(arguments).additional_config)
    assert getattr(config, key) == value


def parse_arguments(arguments: list[str]):
    return EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(arguments)


@pytest.mark.parametrize(
    "version, usable, says",
    [
        ("0.25.1", False, "vLLM 0.25.1 is too old"),
        ("0.9.2", False, "vLLM 0.9.2 is too old"),
        ("0.26.0", True, "not tested with vLLM 0.26.0"),
        ("0.28.0", True, "not tested"),
        ("0.29.0", True, None),
        ("0.32.0", True, None),
        ("0.32.1rc1.dev3+g123", True, None),
        ("0.33.0+cpu", True, None),
        ("0.34.0", True, "not tested with vLLM 0.34.0"),
        ("1.0.0", True, "not tested"),
        ("0.1.dev1+g123", True, "not tested"),  # built without git tags
        ("dev", True, "cannot read"),
    ],
)
def test_which_vllm_is_supported(version, usable, says):
    can, problem = compat.version_problem(version)
    assert can is usable
    assert problem is None if says is None else says in problem
    assert problem is None or "0.29 to 0.33" in problem


def test_log_lines_go_where_vllms_go():
    class Collector(logging.Handler):
        def __init__(self):
            super().__init__()
            self.lines = []

        def emit(self, record):
            self.lines.append(record.getMessage())

    vllm_logger, collector = logging.getLogger("vllm"), Collector()
    # A handler that is added later counts too: vLLM configures its logging again.
    vllm_logger.addHandler(collector)
    try:
        log.get_logger("vllm_sparse.anything").warning("one line")
        log.once(log.get_logger("vllm_sparse.x"), logging.WARNING, "said once")
        log.once(log.get_logger("vllm_sparse.x"), logging.WARNING, "said once")
    finally:
        vllm_logger.removeHandler(collector)
    assert collector.lines == ["one line", "said once"]


def test_the_kernel_threads_run_on_the_workers_cores():
    cores = sorted(os.sched_getaffinity(0), reverse=True)[:2]
    code = (
        "import torch; from vllm_sparse import compat;"
        "print(compat.worker_cores(torch.get_num_threads()))"
    )

    def found(**binding: str) -> str:
        return in_fresh_process(code, env={"OMP_NUM_THREADS": str(len(cores)), **binding}).strip()

    # As vLLM binds where torch's libgomp is preloaded: a core for each thread, in this order.
    assert found(GOMP_CPU_AFFINITY=" ".join(map(str, cores))) == str(cores)
    if len(os.sched_getaffinity(0)) > 1:
        assert found(OMP_PROC_BIND="false") == "None"
