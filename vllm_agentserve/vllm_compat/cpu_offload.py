"""vLLM's OffloadingConnector on its CPU build: KV blocks are copied to other memory and back by one thread.

The connector names this module as `spec_module_path`; nothing else imports it. Its scheduler half, its records and its eviction
are vLLM's own.
"""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from threading import Condition, Thread
from time import perf_counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

Rows = npt.NDArray[np.int8]
"""Blocks of one tensor, each a row of bytes."""
Places = npt.NDArray[np.int64]


class Part(NamedTuple):
    """Blocks that move alike in several tensors.

    Args:
        tensors: their indexes.
        blocks: rows of the KV cache.
        slots: rows of the host, one for each block.
    """

    tensors: Sequence[int]
    blocks: Places
    slots: Places


class Job(NamedTuple):
    """Blocks to copy; `stores`: from the KV cache to the host."""

    number: int
    stores: bool
    parts: Sequence[Part]


def runs(source: Places, target: Places) -> list[tuple[int, int, int]]:
    """First row of the source, first row of the target, and length, of rows that follow each other in both."""
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    bounds = [0, *breaks.tolist(), len(source)]
    return [(int(source[begin]), int(target[begin]), end - begin) for begin, end in pairwise(bounds)]


class BlockCopies(OffloadingWorker):
    """Copies blocks on a thread of its own while the model runs: what a step waits for first, then what requests wait for, and
    else in the order in which it is asked for. vLLM itself waits for copies of blocks that it is about to use for something else.

    NumPy copies whole runs of blocks and lets other threads run meanwhile. Copies by torch would wait for the threads of OpenMP
    that compute the model.

    Args:
        caches: the KV cache.
        per_chunk: blocks of the KV cache that the host keeps together.
        chunks: how many such the host has room for. Memory is taken as it is filled.
    """

    LOADS_S = 0.005
    """A step in which requests wait for copies may be longer by this, so that they need not wait for the next one."""

    def __init__(self, caches: CanonicalKVCaches, per_chunk: int, chunks: int) -> None:
        self._per_chunk = per_chunk
        self._caches = [rows_of(one) for one in caches.tensors]
        self._host = [np.zeros((chunks * per_chunk, rows.shape[1]), np.int8) for rows in self._caches]
        self._tensors = [sorted({ref.tensor_idx for ref in refs}) for refs in caches.group_data_refs]
        """Of each group of layers."""
        self._changed = Condition()
        self._first: deque[Job] = deque()
        """Those that a step waits for."""
        self._loads: deque[Job] = deque()
        self._stores: deque[Job] = deque()
        self._open: dict[int, bool] = {}
        """The jobs that wait or are being copied, by their numbers, and whether they store."""
        self._ended: list[TransferResult] = []
        self._error: Exception | None = None
        self._stops = False
        self._thread = Thread(target=self._copy_all, name="agentserve-kv-copies", daemon=True)
        self._thread.start()

    # -- what vLLM asks -------------------------------------------------------------------------------------------------

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._submit(Job(job_id, True, self._parts(src_spec, dst_spec)))

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        """`expedited` (vLLM 0.33): the step waits for it."""
        return self._submit(Job(job_id, False, self._parts(dst_spec, src_spec)), first=expedited)

    def get_finished(self) -> list[TransferResult]:
        with self._changed:
            if not all(self._open.values()):
                self._changed.wait_for(lambda: self._error is not None or all(self._open.values()), self.LOADS_S)
            self._raise_error()
            ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        with self._changed:
            self._bring_forward(job_ids)
            self._changed.wait_for(lambda: self._error is not None or self._open.keys().isdisjoint(job_ids))
            self._raise_error()

    def shutdown(self) -> None:
        with self._changed:
            self._stops = True
            self._changed.notify_all()
        self._thread.join()
        self._caches, self._host = [], []

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _parts(self, blocks: GPULoadStoreSpec, host: LoadStoreSpec) -> list[Part]:
        """Where each block of the KV cache has its place in the host. The first one may be in the middle of a chunk."""
        assert isinstance(host, BlockIDsLoadStoreSpec)
        per_chunk, parts = self._per_chunk, []
        block_ids, chunk_ids = blocks.block_ids.astype(np.int64), host.block_ids.astype(np.int64)
        block, chunk = 0, 0
        for tensors, count, index in zip(self._tensors, blocks.group_sizes, blocks.block_indices, strict=True):
            if not count:
                continue
            skipped = index % per_chunk
            chunks = -(-(skipped + count) // per_chunk)
            slots = (chunk_ids[chunk : chunk + chunks, None] * per_chunk + np.arange(per_chunk)).ravel()
            parts.append(Part(tensors, block_ids[block : block + count], slots[skipped : skipped + count]))
            block, chunk = block + count, chunk + chunks
        assert (block, chunk) == (len(block_ids), len(chunk_ids))
        return parts

    def _submit(self, job: Job, first: bool = False) -> bool:
        with self._changed:
            self._raise_error()
            self._open[job.number] = job.stores
            queue = self._stores if job.stores else self._loads
            if first:
                queue.appendleft(job)
            else:
                queue.append(job)
            self._changed.notify_all()
        return True

    def _bring_forward(self, job_ids: set[int]) -> None:
        """A step that needs a block waits for its store. It must not wait for all loads that are queued, too.

        Loads still go before stores: after a reset a store may go to a place that a load of before reads.
        """
        for queue in (self._loads, self._stores):
            others = [job for job in queue if job.number not in job_ids]
            if len(others) < len(queue):
                self._first.extend(job for job in queue if job.number in job_ids)
                queue.clear()
                queue.extend(others)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RuntimeError("copying KV blocks between the KV cache and host memory failed") from self._error

    def _copy_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._first or self._loads or self._stores or self._stops)
                if self._stops:
                    return
                job = (self._first or self._loads or self._stores).popleft()
            began = perf_counter()
            try:
                size = self._copy(job)
            except Exception as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            took_s = perf_counter() - began
            with self._changed:
                del self._open[job.number]
                self._ended.append(TransferResult(job.number, True, size, took_s))
                self._changed.notify_all()

    def _copy(self, job: Job) -> int:
        """Returns how many bytes were copied."""
        size = 0
        for tensors, blocks, slots in job.parts:
            places = runs(blocks, slots) if job.stores else runs(slots, blocks)
            for index in tensors:
                source, target = self._caches[index], self._host[index]
                if not job.stores:
                    source, target = target, source
                for begin, to, count in places:
                    target[to : to + count] = source[begin : begin + count]
                size += len(blocks) * source.shape[1]
        return size


def rows_of(cache: CanonicalKVCacheTensor) -> Rows:
    """The same memory, a row per block."""
    rows: Rows = cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes).numpy()
    return rows


class NumpyOffloadingSpec(CPUOffloadingSpec):
    """vLLM's own, but for the worker, which copies without CUDA.

    Raises:
        ValueError: the host has no room for a single block, or a layout of blocks is asked for that is not kept here.

    Retired by: `CPUOffloadingSpec` with a worker for CPUs.
    """

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        if config.canonical_layout:
            raise ValueError("'canonical_layout' needs a copy of blocks that CPUs do not have: leave it out")
        if self.num_chunks < 1:
            raise ValueError(
                f"host memory of {self.extra_config['cpu_bytes_to_use']} bytes has no room for a KV block of "
                f"{self.kv_bytes_per_chunk} bytes: give more"
            )
        self._copies: BlockCopies | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._copies is None:
            self._copies = BlockCopies(kv_caches, self.blocks_per_chunk, self.num_chunks)
        return self._copies
