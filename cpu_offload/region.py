"""Shared memory of one worker: without a name, the owner's alone, gone with its processes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os

from .memory import available_memory

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Region:
    """Anonymous shared memory, zeroed and allocated in full.

    There is no file anywhere that could stay behind: when the last process that maps it has ended,
    by `kill -9` too, it is gone. Others map it through the owner's file descriptor. Nobody can make
    it shorter: a page that is cut off ends whoever reads it.

    Args:
        nbytes: of it.

    Raises:
        MemoryError: this machine, or the container's limit, has no room for it.
    """

    def __init__(self, nbytes: int):
        check_room(nbytes)
        self.nbytes = nbytes
        self.fd = os.memfd_create("vllm-sparse-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(self.fd, 0o600)
            os.posix_fallocate(self.fd, 0, nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, nbytes)
        except OSError as error:
            os.close(self.fd)
            raise _named(error, nbytes) from error
        _huge_pages(self._map)
        self.address = _address(self._map)

    @property
    def path(self) -> str:
        """Where another process of this user opens it, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def close(self) -> None:
        """Give this process's hold of it up; nothing may use its address any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._map.close()


class Attached:
    """Another process's region, by its descriptor here or its path; must be kept while in use."""

    def __init__(self, source: int | str):
        opened = isinstance(source, str)
        fd = os.open(source, os.O_RDWR | os.O_CLOEXEC) if opened else source
        try:
            self.nbytes = os.fstat(fd).st_size
            self._map = mmap.mmap(fd, self.nbytes)
        finally:
            os.close(fd)
        _huge_pages(self._map)
        self.address = _address(self._map)


def check_room(nbytes: int) -> None:
    """Raises MemoryError where this machine, or the container's limit, has no room for it."""
    room = available_memory()
    if nbytes > room:
        raise MemoryError(
            f"host memory: {nbytes / 2**30:.2f} GiB were asked for, and {room / 2**30:.2f} GiB are "
            "available; give less with host_gib"
        )


def _named(error: OSError, nbytes: int) -> OSError | MemoryError:
    if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG):
        return MemoryError(
            f"host memory: the system has no {nbytes / 2**30:.2f} GiB of shared memory "
            f"({error.strerror}); give less with host_gib"
        )
    return error


def _huge_pages(memory: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # not for shared memory here
            memory.madvise(mmap.MADV_HUGEPAGE)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
