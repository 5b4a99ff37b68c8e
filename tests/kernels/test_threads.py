"""The kernels' threads: where the system has none more, and in a child that is forked."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vllm_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.native_error() is not None, reason="needs the native kernels")

BEGIN = """
import os, resource, sys, threading, time
import torch
from vllm_sparse.kernels import cpu
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], cwd="/", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


@pytest.mark.skipif(
    "san" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer ends where memory is short"
)
def test_threads_that_cannot_be_started_are_an_error_and_one_goes_on():
    code = """
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
try:
    cpu.set_threads(1000)
except RuntimeError as error:
    print(error)
print(cpu.num_threads())
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
cpu.set_threads(3)
print(cpu.num_threads())
"""
    said = run(code).splitlines()
    assert "set_threads" in said[0] and said[1:] == ["1", "3"]


def test_a_forked_child_ends():
    code = """
cpu.set_threads(3)
child = os.fork()
if not child:
    sys.exit(0)  # by the exit handlers
until = time.monotonic() + 20
while os.waitpid(child, os.WNOHANG) == (0, 0):
    if time.monotonic() > until:
        os.kill(child, 9)
        sys.exit("the child hangs")
    time.sleep(0.01)
print(cpu.num_threads())
"""
    assert run(code) == "3\n"


def test_a_child_can_be_forked_while_kernels_run():
    code = """
from vllm_sparse.kernels import paged_decode
cpu.set_threads(2)
q = torch.randn(8, 8, 64)
cache = torch.randn(64, 2, 128, 64)
table = torch.arange(64, dtype=torch.int32).view(8, 8)
lens = torch.full((8,), 1024, dtype=torch.int32)
going = True

def work():
    while going:
        paged_decode(q, cache, cache, table, lens, scale=0.1)

thread = threading.Thread(target=work)
thread.start()
try:
    for _ in range(20):
        child = os.fork()
        if not child:
            os._exit(0 if cpu.num_threads() == 1 else 1)
        until = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                os.kill(child, 9)
                sys.exit("the child hangs")
            time.sleep(0.001)
        assert ended[1] == 0
finally:
    going = False
    thread.join()
"""
    run(code)
