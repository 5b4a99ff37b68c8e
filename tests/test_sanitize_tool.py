"""`make sanitize`: a library that was compiled without the sanitizer does not pass."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
from scripts import load

REPORTS = """==================
WARNING: ThreadSanitizer: data race (pid=1)
  Read of size 8 at 0x7ffc27894688 by thread T2:
    #0 memcpy (libtsan.so+0x5dda6)
    #1 at::copy <null> (libtorch_cpu.so+0x197e56a)
==================
==================
WARNING: ThreadSanitizer: data race (pid=1)
  Write of size 8 at 0x7ffc27894690 by thread T3:
    #0 work kernels/csrc/thread_pool.cpp:90 (_cpu.abi3.so+0x1234)
==================
==================
WARNING: ThreadSanitizer: data race (pid=1)
  Write of size 8 at 0x7b0c00189008 by thread T21:
    #0 free (libtsan.so+0x47e82)
    #1 __GI__dl_deallocate_tls (ld-linux-x86-64.so.2+0x11785)
  Previous read of size 8 at 0x7b0c00189008 by thread T20:
    #0 vllm_sparse::Scratch::~Scratch() kernels/csrc/scratch.h:11 (_cpu.abi3.so+0x13adc)
==================
"""


@pytest.fixture
def sanitize():
    return load("tools/sanitize.py")


@pytest.mark.parametrize("name", ["ADDRESSES", "THREADS"])
def test_a_library_without_the_sanitizer_is_refused(sanitize, name, monkeypatch, tmp_path):
    sanitizer = replace(getattr(sanitize, name), folder=str(tmp_path / "built"))
    called, environment = b"", {}

    def compile_(command, *, env, **more):
        environment.update(env)
        (tmp_path / "built").mkdir()
        (tmp_path / "built" / "_cpu.abi3.so").write_bytes(b"\x7fELF " + called)

    monkeypatch.setattr(subprocess, "run", compile_)
    with pytest.raises(SystemExit, match="compiled without -fsanitize"):
        sanitize.build(sanitizer)
    called = sanitizer.calls
    assert sanitize.build(sanitizer) == tmp_path / "built" / "_cpu.abi3.so"
    # A C++ compiler is given the second.
    assert environment["CFLAGS"] == environment["CXXFLAGS"] == sanitizer.flags


def test_reports_of_other_libraries_are_not_ours(sanitize):
    [found] = sanitize.ours(REPORTS)
    assert "thread_pool.cpp:90" in found and "torch" not in found
