"""Buffers that are used again."""

from __future__ import annotations

import threading

import torch

from vllm_sparse.planner import workspace
from vllm_sparse.planner.workspace import Workspace

CPU = torch.device("cpu")


def test_a_buffer_is_used_again_and_grows():
    work = Workspace()
    first = work.empty("a", (4, 8), torch.float32, CPU)
    assert first.shape == (4, 8) and first.is_contiguous()
    assert work.empty("a", (2, 3), torch.float32, CPU).data_ptr() == first.data_ptr()
    assert work.empty("b", (4, 8), torch.float32, CPU).data_ptr() != first.data_ptr()
    assert work.empty("a", (4, 8), torch.bfloat16, CPU).data_ptr() != first.data_ptr()
    assert work.empty("a", (40, 80), torch.float32, CPU).shape == (40, 80)


def test_large_buffers_are_not_kept(monkeypatch):
    monkeypatch.setattr(workspace, "MAX_KEPT", 64)
    work = Workspace()
    first = work.empty("a", (17,), torch.float32, CPU)
    assert work.empty("a", (17,), torch.float32, CPU).data_ptr() != first.data_ptr()
    assert work.empty("a", (15,), torch.float32, CPU).numel() == 15  # growth stops at the limit


def test_threads_do_not_share():
    work = Workspace()
    mine, other = work.empty("a", (8,), torch.float32, CPU), []
    thread = threading.Thread(
        target=lambda: other.append(work.empty("a", (8,), torch.float32, CPU))
    )
    thread.start()
    thread.join()
    assert other[0].data_ptr() != mine.data_ptr()
