"""Host memory without a model: the worker half of vLLM's OffloadingConnector with our copies, over a KV cache whose contents are
known.

The KV of a token is a number that depends on all tokens before it. Every step is checked as attention would read it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor
from vllm.v1.outputs import KVConnectorOutput

from tests.support.schedulers import BLOCK, Driver
from vllm_agentserve.scheduler.features.host import HostMemory
from vllm_agentserve.vllm_compat.cpu_offload import BlockCopies, Job

TOKEN_BYTES = 8
"""What a token takes in the model of `make_scheduler`."""


class Contents:
    """The KV of tokens that follow each other."""

    def __init__(self) -> None:
        self.states: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        state = self.states[-1] if self.states else 7
        for token in tokens:
            state = (state * 1_000_003 + token + 1) % (2**61 - 1)
            self.states.append(state)


class HeldCopies(BlockCopies):
    """Copies that begin when they are waited for, or when `let_go` is called."""

    def __init__(self, *arguments: Any) -> None:
        self.held: list[tuple[Job, bool]] = []
        self.waited = 0
        """Jobs that vLLM waited for before they had begun."""
        super().__init__(*arguments)

    def _submit(self, job: Job, first: bool = False) -> bool:
        self.held.append((job, first))
        return True

    def let_go(self, count: int | None = None) -> None:
        """Makes so many copies, the oldest first; all if it is None."""
        now, self.held = self.held[:count], self.held[len(self.held[:count]) :]
        for job, first in now:
            super()._submit(job, first)
        super().wait({job.number for job, _ in now})

    def wait(self, job_ids: set[int]) -> None:
        waited = [place for place, (job, _) in enumerate(self.held) if job.number in job_ids]
        self.waited += len(waited)
        if waited:
            self.let_go(waited[-1] + 1)
        super().wait(job_ids)


class HostDriver(Driver):
    """Plays the worker. Copies are made in the step in which they are asked for, unless `holds` says so.

    Args:
        holds: copies wait for `copies.let_go()`.
        depth: steps in flight.
    """

    def __init__(self, scheduler: Any, holds: bool = False, depth: int = 1) -> None:
        super().__init__(scheduler, depth)
        blocks = scheduler.kv_cache_config.num_blocks
        self.cache = torch.zeros((blocks, BLOCK), dtype=torch.int64)
        self.connector: Any = OffloadingConnector(
            scheduler.vllm_config, KVConnectorRole.WORKER, scheduler.kv_cache_config
        )
        half = self.connector.connector_worker
        tensor = CanonicalKVCacheTensor(self.cache.view(torch.int8), BLOCK * TOKEN_BYTES)
        caches = CanonicalKVCaches([tensor], [[CanonicalKVCacheRef(0, BLOCK * TOKEN_BYTES)]])
        self.holds = holds
        self.copies: Any = HeldCopies(caches, half.spec.blocks_per_chunk, half.spec.num_chunks)
        half.worker = self.copies
        self._contents: dict[str, Contents] = {}
        self.checked = 0
        """Tokens whose contents were compared."""
        self.wrong: list[str] = []
        self._places: dict[int, dict[str, tuple[Any, int, list[int]]]] = {}
        """Of the steps in flight: the requests in them, the tokens they have after it, and their blocks."""
        schedule = scheduler.schedule

        def scheduled(throttle_prefills: bool = False) -> SchedulerOutput:
            output = schedule(throttle_prefills)
            requests, manager = scheduler.requests, scheduler.kv_cache_manager
            self._places[id(output)] = {
                name: (requests[name], requests[name].num_computed_tokens, *manager.get_block_ids(name))
                for name in output.num_scheduled_tokens
            }
            return output

        scheduler.schedule = scheduled

    @property
    def memory(self) -> HostMemory:
        (feature,) = [one for one in self.scheduler._events.features if isinstance(one, HostMemory)]
        return feature

    def transfers(self, output: SchedulerOutput) -> KVConnectorOutput:
        connector, metadata = self.connector, output.kv_connector_metadata
        connector.handle_preemptions(metadata)
        connector.bind_connector_metadata(metadata)
        places = self._places.pop(id(output))
        for name, tokens in output.num_scheduled_tokens.items():
            self._compute(name, tokens, *places[name])
        connector.start_load_kv(None)
        connector.wait_for_save()
        if not self.holds:
            self.copies.let_go()
        ended = connector.get_transfer_results(output.finished_req_ids)
        said = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        return KVConnectorOutput(finished_recving=ended.finished_recving or None, kv_connector_worker_meta=said)

    def _compute(self, name: str, tokens: int, request: Any, end: int, blocks: list[int]) -> None:
        """Reads the context of a request, and writes the KV of its next tokens."""
        begin = end - tokens
        wanted = self._contents.setdefault(name, Contents())
        wanted.extend(request.all_token_ids[len(wanted.states) : end])
        if len(wanted.states) < end:
            # It has ended meanwhile, and with asynchronous scheduling this step is for nothing.
            return
        rows = self.cache[blocks].reshape(-1)
        found, right = rows[:begin].tolist(), wanted.states[:begin]
        self.checked += begin
        if found != right:
            first = next(place for place, pair in enumerate(zip(found, right, strict=True)) if pair[0] != pair[1])
            self.wrong.append(f"{name} reads something else at token {first} of {begin}")
        rows[begin:end] = torch.tensor(wanted.states[begin:end])
        first = begin // BLOCK
        self.cache[blocks[first:]] = rows.reshape(-1, BLOCK)[first:]

    def close(self) -> None:
        self.copies.let_go()
        self.connector.shutdown()
