"""Copies between a device and memory that the host's kernels read and write."""

from __future__ import annotations

import functools

import torch


class Transfers:
    """Host buffers of one device and one stream at a time, pinned where it is a GPU, kept from
    step to step.

    What `fetch` returns holds the device's rows once `wait` has returned, and until the next
    `fetch` of that name. What `send` copies may be written again after the next `wait`: by then
    the stream has come that far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._buffers: dict[str, torch.Tensor] = {}
        self._fetched = torch.cuda.Event() if self.on_gpu else None

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous host tensor; of the same name, the same memory while it is large enough."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        kept = self._buffers.get(name)
        if kept is None or len(kept) < nbytes:
            room = max(1 << (nbytes - 1).bit_length(), 1 << 12)
            with torch.inference_mode(False):  # it outlives the step
                kept = torch.empty(room, dtype=torch.uint8, device="cpu", pin_memory=self.on_gpu)
            self._buffers[name] = kept
        return kept[:nbytes].view(dtype).view(shape)

    def fetch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Begin to copy x to the host; the tensor that holds it after `wait`."""
        on_host = self.buffer(name, x.shape, x.dtype)
        on_host.copy_(x, non_blocking=True)
        return on_host

    def launched(self) -> None:
        """All is fetched that the next `wait` is for."""
        if self._fetched is not None:
            self._fetched.record()

    def wait(self) -> None:
        """Return when the device has come to where `launched` was called."""
        if self._fetched is not None:
            self._fetched.synchronize()

    def send(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of a buffer on the device, for what is launched from now on."""
        return x.to(self.device, non_blocking=True)


@functools.cache
def shared_transfers(device: torch.device) -> Transfers:
    """Those of all layers of a process: they run after another."""
    return Transfers(device)
