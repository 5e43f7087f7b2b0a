"""The table of pins as a named Ray actor, and how other processes reach it."""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any

import ray

from vllm_agentserve.cluster.settings import ClusterSettings
from vllm_agentserve.cluster.table import NAMESPACE, PinTable, Reports
from vllm_agentserve.cluster.timings import Counts

FIND_AGAIN_S = 1.0
"""A table that could not be reached is looked for no sooner."""

ASK_S = 5.0
"""So long a question without a loop waits for an answer."""


class TableActor:
    """The table in another process, found by its name; the first that looks for it makes it.

    It outlives the process that made it, and starts empty if it has to start again.

    Args:
        app: name of the Ray Serve application.
        settings: of the cluster.
    """

    def __init__(self, app: str, settings: ClusterSettings) -> None:
        self.name = f"{app} {settings.policy} {settings.bound:g} {settings.pin_seconds:g} {settings.max_pins}"
        self._settings = settings.without_options().mapping()
        self._handle: Any = None
        self._search: asyncio.Task[Any] | None = None
        self._looked = 0.0

    async def place(
        self, session: str, tokens: int, parent: str | None, reports: Reports, gone: tuple[str, ...], missed: int
    ) -> tuple[str, str]:
        handle = await self._found()
        try:
            engine, reason = await handle.place.remote(session, tokens, parent, dict(reports), gone, missed)
        except Exception:
            self._handle = None
            raise
        return engine, reason

    def turn(self, session: str, tokens: int, engine: str) -> None:
        """Does not wait: to send it takes longer than to choose an engine that is known, so it is sent after that."""
        if self._handle is not None:
            asyncio.get_running_loop().call_soon(self._send_turn, session, tokens, engine)

    def _send_turn(self, session: str, tokens: int, engine: str) -> None:
        if self._handle is not None:
            with contextlib.suppress(Exception):  # it counts one call less
                self._handle.turn.remote(session, tokens, engine)

    async def finished(self, session: str, engine: str, context_tokens: int, last: bool) -> None:
        """Does not wait for the table."""
        (await self._found()).finished.remote(session, engine, context_tokens, last)

    def timed(self, timings: Mapping[str, Counts]) -> None:
        """Does not wait. Times that it cannot tell are lost."""
        if self._handle is not None:
            self._handle.timed.remote(dict(timings))

    async def prefilled(self, outcome: str) -> None:
        """Does not wait for the table."""
        (await self._found()).prefilled.remote(outcome)

    async def failed(self, reason: str) -> None:
        await (await self._found()).failed.remote(reason)

    def first_failure(self, within_s: float) -> str:
        """See `PinTable.first_failure`; "" if the table cannot be asked. Waits, and makes no table."""
        try:
            handle = ray.get_actor(self.name, namespace=NAMESPACE)
            return str(ray.get(handle.first_failure.remote(within_s), timeout=ASK_S))
        except Exception:
            return ""

    async def ready(self) -> None:
        """Returns when the table can be asked: its process takes seconds to start."""
        await self.shown()

    async def shown(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await (await self._found()).shown.remote()
        return found

    async def _found(self) -> Any:
        """Its handle. Raises any exception if there is none, or there was none a moment ago."""
        if self._handle is None:
            if self._search is None:
                if time.monotonic() - self._looked < FIND_AGAIN_S:
                    raise RuntimeError("the table of pins could not be reached a moment ago")
                self._looked = time.monotonic()
                self._search = asyncio.ensure_future(self._look())
            # All that come meanwhile wait for the same search, and it goes on if they leave.
            return await asyncio.shield(self._search)
        return self._handle

    async def _look(self) -> Any:
        try:
            # It may wait for Ray, and other requests must not.
            self._handle = await asyncio.to_thread(self._find)
            return self._handle
        finally:
            self._search = None

    def _find(self) -> Any:
        return (
            ray.remote(PinTable)
            .options(
                name=self.name,
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                max_restarts=-1,
                num_cpus=0,
            )
            .remote(self._settings)
        )
