"""The process of one engine in Ray Serve."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray import serve

from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.bench.server import bound_cores, ranks, serving_environment
from vllm_agentserve.cluster.actor import TableActor
from vllm_agentserve.cluster.engine import Engine, EngineError
from vllm_agentserve.cluster.load import Report, TokenRate, load_of, stats_of
from vllm_agentserve.cluster.relay import (
    ENGINE_HEADER,
    EVENT,
    USAGE_BYTES,
    Failure,
    Head,
    Part,
    RelayedRequest,
    Taken,
    usage,
)
from vllm_agentserve.cluster.settings import ClusterSettings

LOAD_S = 0.5
"""A page of metrics is not older than this when Ray asks for the engine's report."""
TELL_S = 5.0
"""So long an engine that did not start tries to tell why."""
HEALTH_S = 10.0
"""An engine whose server does not answer for so long is started anew."""


class EngineServer:
    """Starts an engine, hands requests to it, and says how it is.

    Args:
        settings: of the cluster.
    """

    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        found = ClusterSettings.from_mapping(settings)
        context = serve.get_replica_context()
        self.name: str = context.replica_tag
        self._table = TableActor(context.app_name, found)
        self._rate = TokenRate()
        self._reports = 0
        self._notes: set[asyncio.Task[None]] = set()
        rank = int(getattr(context.rank, "local_rank", 0) or 0)
        self._engine = Engine(found.model, found.engine_options(), environment(found, rank), found.start_timeout_s)
        try:
            await asyncio.wait_for(self._table.ready(), found.start_timeout_s)
            await self._engine.start()
        except BaseException as error:
            self._engine.stop()
            if isinstance(error, EngineError):
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(self._table.failed(str(error)), TELL_S)
            raise
        print(f"agentserve: engine {self.name} is ready, process {self._engine.pid}", flush=True)

    async def relay(self, request: RelayedRequest) -> AsyncIterator[Part]:
        """The parts of an answer."""
        yield Taken(self.name)
        if request.engine not in ("", self.name):
            yield Failure(f"there is no engine {request.engine!r} any more", delivered=False)
            return
        tail, events = b"", 0
        try:
            async for part in self._engine.answer(request):
                if isinstance(part, Head):
                    yield Head(part.status, (*part.headers, (ENGINE_HEADER, self.name.encode())))
                    continue
                if isinstance(part, bytes):
                    tail = (tail + part)[-USAGE_BYTES:]
                    events += part.count(EVENT)
                yield part
        finally:
            self._note(request, tail, events)

    def _note(self, request: RelayedRequest, tail: bytes, events: int) -> None:
        """Tells the table that a call has ended, without waiting for it."""
        if request.engine:
            return  # the table has not placed it
        caller, known = request.caller, usage(tail)
        if known is not None:
            prompt, answer = known
            self._rate.saw(caller.characters, prompt - caller.tokens)
        else:
            prompt, answer = caller.prompt_tokens(self._rate.per_character or 0.25), events
        task = asyncio.ensure_future(self._tell(caller.session, prompt + answer, caller.last))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _tell(self, session: str, context_tokens: int, last: bool) -> None:
        with contextlib.suppress(Exception):  # it is told of the next one
            await self._table.finished(session, self.name, context_tokens, last)

    async def record_routing_stats(self) -> dict[str, float]:
        """The report that Ray carries to the routers."""
        page = await self._engine.page("/metrics", LOAD_S * 4)
        if page is None:
            return stats_of(None, self._rate.per_character)
        self._reports += 1
        return stats_of(Report(self._reports, load_of(page.decode(errors="replace"))), self._rate.per_character)

    async def check_health(self) -> None:
        """Raises `RuntimeError` if the engine is to be started anew."""
        if not await self._engine.healthy(HEALTH_S):
            raise RuntimeError(self._engine.how_it_ended())

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()


def environment(settings: ClusterSettings, rank: int) -> dict[str, str]:
    """The environment of an engine's process.

    Args:
        settings: of the cluster.
        rank: of the engine among those of its machine.
    """
    base = dict(os.environ)
    # Ray sets it to 1 for its own workers.
    base.pop("OMP_NUM_THREADS", None)
    options = settings.engine_options()
    if settings.cores_shared and not has_nvidia_driver() and "VLLM_CPU_OMP_THREADS_BIND" not in base:
        cores, share = sorted(os.sched_getaffinity(0)), max(settings.engines, 1)
        own = bound_cores(cores, share).split("|")[rank % share]
        base["VLLM_CPU_OMP_THREADS_BIND"] = bound_cores([int(one) for one in own.split(",")], ranks(options))
    return serving_environment(base, offline=os.path.exists(settings.model), options=options)
