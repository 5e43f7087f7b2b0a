"""Memory that two processes share. It has no name in the file system, so nothing is left when both have ended."""

import mmap
import os
from contextlib import AbstractContextManager

import torch

from vllm_agentserve.vllm_compat import cpu

CLOSED = -1
"""Number of a descriptor that is none."""


class SharedMemory:
    """An anonymous memory file.

    Args:
        size: in bytes; a new one is zeros.
        descriptor: an inherited one of that size; None makes a new one.
    """

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        self.size = size
        self.descriptor = os.memfd_create("agentserve") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, size)
        self._map = mmap.mmap(self.descriptor, size)

    def close(self) -> None:
        """Closes the descriptor, once: its number may be another file's by the next call. What is mapped stays until its tensors
        are gone."""
        descriptor, self.descriptor = self.descriptor, CLOSED
        if descriptor != CLOSED:
            os.close(descriptor)

    def tensor(self, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        """All of it, shape (size / itemsize,)."""
        return torch.frombuffer(self._map, dtype=dtype)

    def numbers(self) -> "memoryview[float]":
        """All of it, as numbers of eight bytes."""
        return memoryview(self._map).cast("d")


class KvMemory:
    """The KV cache of a worker and its lane.

    Args:
        memory: where it is; None makes it when vLLM asks for it with its size.
    """

    def __init__(self, memory: SharedMemory | None = None) -> None:
        self.memory = memory

    def allocation(self) -> AbstractContextManager[None]:
        """Within it, vLLM's KV cache is allocated here; see `vllm_compat.cpu.kv_cache_placed`."""
        return cpu.kv_cache_placed(self._place)

    def _place(self, size: int) -> torch.Tensor:
        if self.memory is None:
            self.memory = SharedMemory(size)
        if self.memory.size != size:
            raise RuntimeError(f"the lane's KV cache has {size} bytes, the worker's {self.memory.size}")
        return self.memory.tensor()
