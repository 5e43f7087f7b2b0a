"""The process of one engine in Ray Serve."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.bench.server import bound_cores, ranks, serving_environment
from vllm_agentserve.cluster.actor import TableActor
from vllm_agentserve.cluster.answers import Answers
from vllm_agentserve.cluster.direct import PROCESS, SOCKET, life_of
from vllm_agentserve.cluster.engine import Engine, EngineError
from vllm_agentserve.cluster.load import PER_CHARACTER, Report, load_of, stats_of
from vllm_agentserve.cluster.prefill import ENDED, UNREACHED, Answer, Prefills, names_kv
from vllm_agentserve.cluster.relay import (
    ENGINE_HEADER,
    Failure,
    Head,
    Part,
    RelayedRequest,
    Taken,
    error_body,
)
from vllm_agentserve.cluster.settings import ClusterSettings
from vllm_agentserve.vllm_compat.nixl import PAUSE, PAUSE_US

LOAD_S = 0.5
"""A page of metrics is not older than this when Ray asks for the engine's report."""
TELL_S = 5.0
"""So long an engine that did not start tries to tell why."""
SIDE_CHANNEL, SIDE_CHANNEL_FIRST = "VLLM_NIXL_SIDE_CHANNEL_PORT", 15_600
"""Names the port on which an engine says where its KV is; that of the first engine of a machine. It is outside of those that are
given out by chance: vLLM binds it late, and an engine whose port is taken by then waits until its start is given up."""
PORTS_APART = 20
"""Between those of two engines."""
HEALTH_S = 10.0
"""An engine whose server does not answer for so long is started anew."""
DRAIN_S = 20.0
"""So long an engine that is to end waits for the requests that it has."""
INLINE_BYTES = 1 << 18
"""Longer bodies are read beside the streams of others."""
NO_PARAMS = "kv_transfer_params is not allowed: engines of this cluster set it themselves. Leave it out."


class EngineServer:
    """Starts an engine, hands requests to it, and says how it is.

    Args:
        settings: of the cluster.
        prefillers: the handle of those that compute prompts for this one; None if there are none.
        prefills: whether this one computes prompts for others.
    """

    async def __init__(  # type: ignore[misc]
        self, settings: Mapping[str, Any], prefillers: DeploymentHandle[Any] | None = None, prefills: bool = False
    ) -> None:
        found = ClusterSettings.from_mapping(settings)
        context = serve.get_replica_context()
        self.name: str = context.replica_tag
        self._table = TableActor(context.app_name, found)
        self._answers = Answers(self._table)
        self._reports = 0
        self._healthy = True
        """At the last look."""
        rank = int(getattr(context.rank, "local_rank", 0) or 0)
        self._moves_kv = found.prefillers > 0
        self._prefills: Prefills | None = None
        if prefillers is not None:
            self._handle = prefillers.options(method_name="prefill")
            self._prefills = Prefills(self._ask, found.prefill_tokens, found.prefill_seconds, found.max_pins)
        place = rank + found.engines if prefills else rank
        self._engine = Engine(found.model, found.engine_options(), environment(found, place), found.start_timeout_s)
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

    async def relay(self, request: RelayedRequest) -> AsyncGenerator[Part, None]:
        """The parts of an answer."""
        yield Taken(self.name)
        if request.engine not in ("", self.name):
            yield Failure(f"there is no engine {request.engine!r} any more", delivered=False)
            return
        if self._moves_kv and await self._names_kv(request):
            yield Head(400, ((b"content-type", b"application/json"), (ENGINE_HEADER, self.name.encode())))
            yield error_body(request.path, 400, NO_PARAMS)
            return
        async with contextlib.aclosing(self._answers.of(self.name, request, self._answer(request))) as parts:
            async for part in parts:
                yield part

    async def _answer(self, request: RelayedRequest) -> AsyncGenerator[Part, None]:
        if self._prefills is not None and not request.engine:
            tokens = request.caller.prompt_tokens(self._answers.per_character or PER_CHARACTER)
            request, outcome = await self._prefills.prepared(request, tokens)
            if outcome:
                self._answers.soon(self._table.prefilled(outcome))
        async with contextlib.aclosing(self._engine.answer(request)) as parts:
            async for part in parts:
                yield part

    @staticmethod
    async def _names_kv(request: RelayedRequest) -> bool:
        return await asyncio.to_thread(names_kv, request) if len(request.body) > INLINE_BYTES else names_kv(request)

    async def prefill(self, request: RelayedRequest) -> Answer:
        """A prefiller's answer."""
        status, content = UNREACHED, b""
        async for part in self._engine.answer(request):
            if isinstance(part, Failure):
                return ENDED if part.delivered else UNREACHED, part.text.encode()
            if isinstance(part, Head):
                status = part.status
            elif isinstance(part, bytes):
                content += part
        return status, content

    async def _ask(self, request: RelayedRequest) -> Answer:
        answering = self._handle.remote(request)
        try:
            status, content = await answering
        except asyncio.CancelledError:
            answering.cancel()
            raise
        return status, content

    def record_replica_metadata(self) -> dict[str, str]:
        """What Ray tells the routers once: ingresses of the same machine hand requests to the engine's socket themselves."""
        return {} if self._moves_kv else {SOCKET: self._engine.socket, PROCESS: life_of(os.getpid())}

    async def record_routing_stats(self) -> dict[str, float]:
        """The report that Ray carries to the routers."""
        page = await self._engine.page("/metrics", LOAD_S * 4)
        if page is None:
            return stats_of(None, self._answers.per_character)
        self._reports += 1
        return stats_of(Report(self._reports, load_of(page.decode(errors="replace"))), self._answers.per_character)

    async def check_health(self) -> None:
        """Raises `RuntimeError` if the engine is to be started anew."""
        self._healthy = await self._engine.healthy(HEALTH_S)
        if not self._healthy:
            raise RuntimeError(self._engine.how_it_ended())

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is None:
            return
        try:
            if self._healthy:
                # Ray has waited for what it carries itself.
                engine.wait_until_idle(DRAIN_S)
        finally:
            engine.stop()


def free_ports(host: str, first: int, count: int) -> int:
    """The first of so many TCP ports in a row on which nobody listens, from `first` on."""
    for port in range(first, first + PORTS_APART):
        with contextlib.ExitStack() as probes:
            try:
                for place in range(count):
                    probe = probes.enter_context(socket.socket())
                    probe.bind((host, port + place))
            except OSError:
                continue
            return port
    raise EngineError(
        f"no {count} ports in a row are free on {host} from {first} on, on which engines say where their KV is: choose others "
        f"with {SIDE_CHANNEL}"
    )


def environment(settings: ClusterSettings, rank: int) -> dict[str, str]:
    """The environment of an engine's process.

    Args:
        settings: of the cluster.
        rank: of the engine among those of its machine; prefillers come after the others.
    """
    base = dict(os.environ)
    # Ray sets it to 1 for its own workers.
    base.pop("OMP_NUM_THREADS", None)
    if settings.prefillers:
        host = base.setdefault("VLLM_NIXL_SIDE_CHANNEL_HOST", ray.util.get_node_ip_address())
        first, count = int(base.get(SIDE_CHANNEL, SIDE_CHANNEL_FIRST)), ranks(settings.engine_options())
        base[SIDE_CHANNEL] = str(free_ports(host, first + rank * max(PORTS_APART, count), count))
        base.setdefault(PAUSE, str(PAUSE_US))
    options = settings.engine_options()
    if settings.cores_shared and not has_nvidia_driver() and "VLLM_CPU_OMP_THREADS_BIND" not in base:
        cores, share = sorted(os.sched_getaffinity(0)), max(settings.engines + settings.prefillers, 1)
        own = bound_cores(cores, share).split("|")[rank % share]
        base["VLLM_CPU_OMP_THREADS_BIND"] = bound_cores([int(one) for one in own.split(",")], ranks(options))
    return serving_environment(base, offline=os.path.exists(settings.model), options=options)
