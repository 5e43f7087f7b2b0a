"""The Ray Serve application of a cluster, as `serve deploy` and `agentserve cluster serve` build it."""

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.bench.server import ranks
from vllm_agentserve.cluster.actor import TableActor
from vllm_agentserve.cluster.answers import Answers
from vllm_agentserve.cluster.connection import EngineConnection
from vllm_agentserve.cluster.direct import PROCESS, SOCKET, DirectConnections
from vllm_agentserve.cluster.engine import STOP_STEPS
from vllm_agentserve.cluster.ingress import IngressApplication
from vllm_agentserve.cluster.relay import Part, RelayedRequest, Taken
from vllm_agentserve.cluster.server import DRAIN_S, EngineServer
from vllm_agentserve.cluster.settings import ClusterSettings

NAME = "agentserve"
"""Of the application, unless a file says otherwise."""
ROUTER = "vllm_agentserve.cluster.router.ConversationRouter"
REPORT_S = 1.0
"""Between two reports of an engine."""
HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 30.0
UNLIMITED = 1_000_000
"""Calls that Ray gives to an engine or an ingress at once: vLLM has its own waiting line."""
DRAIN_FIRST_S = 2.0
"""Ray's own wait before it looks whether it still carries requests."""
STOP_S = DRAIN_FIRST_S + DRAIN_S + sum(seconds for _, seconds in STOP_STEPS) + 5.0
"""Ray kills the process of an engine that has not ended by then, and an engine that hangs would go on. While Ray carries
requests, as to other machines, it waits for them in the same time."""


class Ingress:
    """The process that takes requests.

    Args:
        engines: the handle of their deployment.
        settings: of the cluster.
    """

    def __init__(self, engines: DeploymentHandle[Any], settings: Mapping[str, Any]) -> None:
        self._engines = engines.options(method_name="relay", stream=True)
        found = ClusterSettings.from_mapping(settings)
        self._table = TableActor(serve.get_replica_context().app_name, found)
        self._client_names = found.client_names
        self._start_timeout_s = found.start_timeout_s
        self._node = ray.get_runtime_context().get_node_id()
        self._answers = Answers(self._table)
        # Prompts that a prefiller computes first, and what is refused beside them, are the business of the engine's process.
        self._direct = None if found.prefillers else DirectConnections()

    async def __serve_build_asgi_app__(self) -> IngressApplication:
        await asyncio.wait_for(self._table.ready(), self._start_timeout_s)
        return IngressApplication(self._send_to, self._table.shown, self._client_names)

    async def _send_to(self, request: RelayedRequest) -> AsyncGenerator[Part, None]:
        request = replace(request, per_character=self._answers.per_character)
        if self._direct is not None and not request.engine:
            async with self._engines.choose_replica(request, _reserve=False) as chosen:
                engine = chosen.replica_id
                told = chosen.replica_metadata if chosen.node_id == self._node else {}
            try:
                connection = await self._direct.to(engine, told.get(SOCKET, ""), told.get(PROCESS, ""))
            except BaseException:
                self._answers.left(engine, request)
                raise
            if connection is not None:
                async with contextlib.aclosing(
                    self._answers.of(engine, request, taken(engine, connection, request))
                ) as parts:
                    async for part in parts:
                        yield part
                return
        # Ray asks the router again, which gives the same engine to the same request.
        carried = self._engines.remote(request)
        try:
            async for part in carried:
                yield part
        except asyncio.CancelledError:
            carried.cancel()
            raise
        except GeneratorExit:
            carried.cancel()
            raise


async def taken(engine: str, connection: EngineConnection, request: RelayedRequest) -> AsyncGenerator[Part, None]:
    """What an engine answers that is asked without Ray."""
    yield Taken(engine)
    async with contextlib.aclosing(connection.answer(request)) as parts:
        async for part in parts:
            yield part


def cores() -> float:
    """Of all machines of a Ray that runs; otherwise of this one."""
    known = ray.cluster_resources().get("CPU", 0.0) if ray.is_initialized() else 0.0
    return float(known) or float(os.cpu_count() or 1)


def build(given: Mapping[str, Any]) -> Any:
    """The application.

    Args:
        given: settings by name, see `ClusterSettings`; `app` is the application's name if it is not `agentserve`.

    Raises:
        SettingsError: one of them is not allowed.
    """
    rest = dict(given)
    app = rest.pop("app", NAME)
    settings = ClusterSettings.from_mapping(rest)
    gpus = ranks(settings.options) if has_nvidia_driver() else 0
    # With more engines than cores each takes a part of one.
    cpus = 0.0 if gpus else min(1.0, cores() / (settings.engines + settings.prefillers))
    common: dict[str, Any] = {
        "max_ongoing_requests": UNLIMITED,
        "max_constructor_retry_count": 2,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": STOP_S,
        "ray_actor_options": {"num_cpus": math.floor(cpus * 1000) / 1000, "num_gpus": gpus},
    }
    prefillers = None
    if settings.prefillers:
        prefillers = serve.deployment(EngineServer, name="prefillers", num_replicas=settings.prefillers, **common).bind(
            settings.mapping(), None, True
        )
    engines = serve.deployment(
        EngineServer,
        name="engines",
        num_replicas=settings.engines,
        **common,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,
            # Ray shows them to whoever asks for its status. An API key may be among the options.
            request_router_kwargs={"settings": settings.without_options().mapping(), "app": app},
            request_routing_stats_period_s=REPORT_S,
        ),
    ).bind(settings.mapping(), prefillers)
    return serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=settings.ingresses,
        max_ongoing_requests=UNLIMITED,
        ray_actor_options={"num_cpus": 0},
    ).bind(engines, settings.mapping())
