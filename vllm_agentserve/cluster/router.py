"""Ray Serve's router for the engines: asks for the engine of each request, and gives Ray that one only."""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from vllm_agentserve.cluster.actor import TableActor
from vllm_agentserve.cluster.chooser import Chooser
from vllm_agentserve.cluster.load import rate_in, report_in
from vllm_agentserve.cluster.relay import RelayedRequest
from vllm_agentserve.cluster.settings import ClusterSettings
from vllm_agentserve.cluster.timings import Timings

UNDER_WAY = 4096
"""Requests whose engine is remembered while Ray tries to send them."""

TELL_S = 0.5
"""Between two times that the table is told how long decisions took."""


class ConversationRouter(RequestRouter):
    """Sends every request where the table of pins wants it. There is one in each ingress's process."""

    def initialize_state(self, settings: Mapping[str, Any], app: str) -> None:
        """Args: the cluster's settings, and the name of its Ray Serve application."""
        found = ClusterSettings.from_mapping(settings)
        self._table = TableActor(app, found)
        self._timings = {"asked": Timings(), "known": Timings()}
        """Of decisions for which the table was asked, and of those that this ingress knew."""
        self._told_s = 0.0
        self._chooser = Chooser(self._table, found.policy, found.pin_seconds, found.max_pins)
        self._chosen: OrderedDict[tuple[str, tuple[str, ...]], str] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one replica that the request goes to. Ray asks again while that one cannot take it, or is gone."""
        request = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if pending_request is None or not isinstance(request, RelayedRequest) or not candidate_replicas:
            return [candidate_replicas]
        replicas = {one.replica_id.unique_id: one for one in candidate_replicas}
        if request.engine:
            return [[replicas[request.engine]] if request.engine in replicas else candidate_replicas]
        # Ray gives all calls that an ingress makes for one request the same number.
        number = (pending_request.metadata.internal_request_id, request.avoid)
        engine = self._chosen.get(number)
        if engine not in replicas:
            began_s = time.perf_counter()
            stats = {name: one.routing_stats or {} for name, one in replicas.items()}
            tokens = request.caller.prompt_tokens(request.per_character or rate_in(list(stats.values())))
            reports = {name: report_in(one) for name, one in stats.items()}
            engine = await self._chooser.choose(request.caller, tokens, reports, request.avoid)
            self._chosen[number] = engine
            self._count(time.perf_counter() - began_s)
            if len(self._chosen) > UNDER_WAY:
                self._chosen.popitem(last=False)
        return [[replicas[engine]]]

    def _count(self, took_s: float) -> None:
        self._timings["asked" if self._chooser.asked else "known"].add(took_s)
        now = time.monotonic()
        if now - self._told_s >= TELL_S:
            self._told_s = now
            with contextlib.suppress(Exception):  # the request goes on, whatever has become of the table
                self._table.timed({name: one.take() for name, one in self._timings.items()})
