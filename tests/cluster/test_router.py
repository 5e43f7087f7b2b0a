"""Ray's router and the application, without a Ray that runs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster.test_pins import Clock, Near
from vllm_agentserve.cluster.answers import Answers
from vllm_agentserve.cluster.caller import Caller
from vllm_agentserve.cluster.chooser import Chooser
from vllm_agentserve.cluster.prefill import ENDED, UNREACHED
from vllm_agentserve.cluster.relay import Failure, Head, Part, RelayedRequest, Taken
from vllm_agentserve.cluster.settings import ClusterSettings, SettingsError

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `cluster`")

SETTINGS = ClusterSettings("model").mapping()
STATS = {
    "number": 1,
    "running": 0,
    "waiting": 0,
    "kv_tokens": 0,
    "capacity_tokens": 10_000,
    "tokens_per_character": 0.5,
}


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats=STATS)


def pending(request: Any, number: str = "1") -> Any:
    return SimpleNamespace(args=[request], metadata=SimpleNamespace(internal_request_id=number))


@pytest.fixture
def near() -> Near:
    return Near(Clock())


@pytest.fixture
def router(near: Near) -> Any:
    from vllm_agentserve.cluster.router import ConversationRouter

    found: Any = ConversationRouter.__new__(ConversationRouter)
    found.initialize_state(settings=SETTINGS, app="agentserve")
    found._chooser = Chooser(near)
    return found


REPLICAS = [replica(name) for name in "abc"]


async def test_a_request_is_placed_once_however_often_ray_asks(router: Any, near: Near) -> None:
    request = RelayedRequest("POST", "/v1/completions", caller=Caller("s", characters=100))
    chosen = [await router.choose_replicas(REPLICAS, pending(request)) for _ in range(4)]
    assert all(one == chosen[0] for one in chosen)
    assert [len(rank) for rank in chosen[0]] == [1]
    assert (near.asked, near.turns) == (1, 0)


async def test_the_length_of_a_prompt_is_estimated_as_the_ingress_has_seen_it(router: Any) -> None:
    asked: list[int] = []

    async def choose(caller: Caller, tokens: int, *rest: Any) -> str:
        asked.append(tokens)
        return "a"

    router._chooser.choose = choose
    for number, known in enumerate((None, 0.2)):
        request = RelayedRequest("POST", "/v1/completions", caller=Caller("s", characters=100), per_character=known)
        await router.choose_replicas(REPLICAS, pending(request, f"{number}"))
    assert asked == [50, 20]  # that of the engines' reports, and its own


class Handle:
    """A deployment's handle that chooses one replica. What Ray was given to carry is in `carried`."""

    def __init__(self, node: str, **told: str) -> None:
        self.chosen = SimpleNamespace(replica_id="e1", node_id=node, replica_metadata=told)
        self.carried: list[RelayedRequest] = []

    @contextlib.asynccontextmanager
    async def choose_replica(self, request: RelayedRequest, _reserve: bool) -> AsyncIterator[Any]:
        assert not _reserve
        yield self.chosen

    async def remote(self, request: RelayedRequest) -> AsyncIterator[Part]:
        self.carried.append(request)
        yield Taken("e1")
        yield Head(200, ())


class Straight:
    """A connection to an engine."""

    async def answer(self, request: RelayedRequest) -> AsyncIterator[Part]:
        yield Head(200, ())
        yield b"straight"


class Reached:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def to(self, engine: str, socket: str, process: str) -> Straight | None:
        self.asked.append((engine, socket))
        return Straight() if socket else None


def ingress(handle: Handle, direct: Reached | None) -> Any:
    from vllm_agentserve.cluster.application import Ingress

    found: Any = Ingress.__new__(Ingress)
    found._engines, found._node, found._direct = handle, "here", direct
    found._answers = Answers(SimpleNamespace(finished=nothing))  # type: ignore[arg-type]
    return found


async def nothing(*given: Any) -> None:
    pass


async def test_an_ingress_asks_an_engine_of_its_machine_itself() -> None:
    handle, direct = Handle("here", socket="/tmp/engine"), Reached()
    found = [part async for part in ingress(handle, direct)._send_to(RelayedRequest("POST", "/v1/completions"))]
    assert found == [Taken("e1"), Head(200, ((b"x-agentserve-engine", b"e1"),)), b"straight"]
    assert (handle.carried, direct.asked) == ([], [("e1", "/tmp/engine")])


@pytest.mark.parametrize("why", ["another machine", "no socket", "prefillers", "a page of one engine"])
async def test_ray_carries_the_other_requests(why: str) -> None:
    handle = Handle("there" if why == "another machine" else "here", **({} if why == "no socket" else {"socket": "/e"}))
    own = ingress(handle, None if why == "prefillers" else Reached())
    request = RelayedRequest("GET", "/metrics", engine="e1" if why == "a page of one engine" else "")
    assert [part async for part in own._send_to(request)] == [Taken("e1"), Head(200, ())]
    assert handle.carried == [request]


class Told:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def finished(self, *given: Any) -> None:
        self.calls.append(given)


@pytest.mark.parametrize("left", ["before the engine is reached", "before it answers"])
async def test_a_client_that_leaves_has_its_call_counted(left: str) -> None:
    class Slow(Reached):
        async def to(self, engine: str, socket: str, process: str) -> Straight | None:
            await asyncio.sleep(60 if left.startswith("before the engine") else 0)
            return Straight()

    told = Told()
    own = ingress(Handle("here", socket="/e"), Slow())
    own._answers = Answers(told)
    parts = own._send_to(RelayedRequest("POST", "/v1/completions", caller=Caller("s", tokens=7)))
    if left.startswith("before the engine"):
        waiting = asyncio.ensure_future(anext(parts))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        assert await anext(parts) == Taken("e1")
        await parts.aclose()
    await asyncio.sleep(0)
    assert told.calls == [("s", "e1", 7, False)]


@pytest.mark.parametrize(
    ("parts", "answer"),
    [
        ([Head(200, ()), b"{}", b"{}"], (200, b"{}{}")),
        ([Head(400, ()), b"no"], (400, b"no")),
        ([Failure("gone", delivered=False)], (UNREACHED, b"gone")),
        ([Failure("broke", delivered=True)], (ENDED, b"broke")),
        ([Head(200, ()), b"ha", Failure("broke", delivered=True)], (ENDED, b"broke")),
        ([], (UNREACHED, b"")),
    ],
)
async def test_a_prefiller_gives_its_whole_answer_or_says_what_became_of_it(
    parts: list[Part], answer: tuple[int, bytes]
) -> None:
    from vllm_agentserve.cluster.server import EngineServer

    async def answers(request: RelayedRequest) -> AsyncIterator[Part]:
        for part in parts:
            yield part

    server: Any = EngineServer.__new__(EngineServer)
    server._engine = SimpleNamespace(answer=answers, wait_until_idle=lambda most_s: None, stop=lambda: None)
    server._healthy = True
    assert await server.prefill(RelayedRequest("POST", "/v1/completions")) == answer


def test_ray_gives_an_engine_the_time_that_it_may_take_to_end() -> None:
    from vllm_agentserve.cluster.application import STOP_S
    from vllm_agentserve.cluster.engine import STOP_STEPS
    from vllm_agentserve.cluster.server import DRAIN_S

    # Ray waits for 2 s before it looks whether there are requests, see `graceful_shutdown_wait_loop_s`.
    assert 2 + DRAIN_S + sum(seconds for _, seconds in STOP_STEPS) <= STOP_S


@pytest.mark.parametrize(("healthy", "waits"), [(True, 1), (False, 0)])
def test_an_engine_is_ended_whatever_comes_of_waiting_for_its_requests(healthy: bool, waits: int) -> None:
    from vllm_agentserve.cluster.server import EngineServer

    done: list[str] = []

    def wait(most_s: float) -> None:
        done.append("waited")
        raise OSError

    server: Any = EngineServer.__new__(EngineServer)
    server._engine = SimpleNamespace(wait_until_idle=wait, stop=lambda: done.append("stopped"))
    server._healthy = healthy
    with contextlib.suppress(OSError):
        server.__del__()
    assert done == ["waited"] * waits + ["stopped"]
    server._engine = SimpleNamespace(wait_until_idle=lambda most_s: None, stop=lambda: None)


async def test_a_replica_that_is_gone_is_chosen_anew(router: Any, near: Near) -> None:
    request = RelayedRequest("POST", "/v1/completions", caller=Caller("s"))
    ((first,),) = await router.choose_replicas(REPLICAS, pending(request))
    left = [one for one in REPLICAS if one is not first]
    ((second,),) = await router.choose_replicas(left, pending(request))
    assert second in left
    assert near.table.shown()["moves"] == 1


async def test_the_next_try_of_a_request_goes_elsewhere(router: Any) -> None:
    """Ray gives both tries the same number."""
    request = RelayedRequest("POST", "/v1/completions", caller=Caller("s"))
    ((first,),) = await router.choose_replicas(REPLICAS, pending(request))
    name = first.replica_id.unique_id
    again = RelayedRequest("POST", "/v1/completions", caller=Caller("s"), avoid=(name,))
    ((second,),) = await router.choose_replicas(REPLICAS, pending(again))
    assert second is not first


async def test_a_page_is_read_from_the_engine_it_is_asked_of(router: Any, near: Near) -> None:
    for one in REPLICAS:
        request = RelayedRequest("GET", "/metrics", engine=one.replica_id.unique_id)
        assert await router.choose_replicas(REPLICAS, pending(request)) == [[one]]
    gone = RelayedRequest("GET", "/metrics", engine="gone")
    assert await router.choose_replicas(REPLICAS, pending(gone)) == [REPLICAS]
    assert near.asked == 0


async def test_what_is_no_request_of_ours_goes_anywhere(router: Any) -> None:
    assert await router.choose_replicas(REPLICAS, None) == [REPLICAS]
    assert await router.choose_replicas(REPLICAS, pending("other")) == [REPLICAS]


async def test_how_long_decisions_take_is_told_by_whether_the_table_was_asked(router: Any) -> None:
    told: list[Any] = []
    router._table = SimpleNamespace(timed=told.append)
    for number in range(5):
        await router.choose_replicas(REPLICAS, pending(RelayedRequest("POST", "/", caller=Caller("s")), f"{number}"))
    router._told_s = 0.0
    await router.choose_replicas(REPLICAS, pending(RelayedRequest("POST", "/", caller=Caller("t")), "t"))
    assert len(told) == 2
    counts = {name: sum(sum(one[name][1:]) for one in told) for name in ("asked", "known")}
    assert counts == {"asked": 2, "known": 4}


def test_prefillers_are_a_deployment_of_their_own() -> None:
    from vllm_agentserve.cluster.application import build

    ingress = build({"model": "model", "engines": 2, "prefillers": 3})._bound_deployment
    (engines,) = [one._bound_deployment for one in ingress.init_args if hasattr(one, "_bound_deployment")]
    (prefillers,) = [one._bound_deployment for one in engines.init_args if hasattr(one, "_bound_deployment")]
    assert (engines.num_replicas, prefillers.name, prefillers.num_replicas) == (2, "prefillers", 3)
    assert prefillers.init_args[1:] == (None, True)


def test_the_application_is_what_its_settings_say() -> None:
    from vllm_agentserve.cluster.application import build

    application = build({"model": "model", "engines": 3, "ingresses": 2, "app": "other"})
    ingress = application._bound_deployment
    (engines,) = [one._bound_deployment for one in ingress.init_args if hasattr(one, "_bound_deployment")]
    assert (ingress.name, ingress.num_replicas, engines.name, engines.num_replicas) == ("ingress", 2, "engines", 3)
    for wrong in ({"model": "model", "engine": 3}, {}, {"model": "model", "policy": "best"}):
        with pytest.raises(SettingsError):
            build(wrong)


def test_what_ray_shows_of_a_deployment_holds_no_option_of_an_engine() -> None:
    """Whoever can ask Ray for its status sees what the router is given."""
    from vllm_agentserve.cluster.application import build

    application = build({"model": "model", "options": ["--api-key", "secret"]})
    ingress = application._bound_deployment
    deployments = [ingress, *(one._bound_deployment for one in ingress.init_args if hasattr(one, "_bound_deployment"))]
    assert len(deployments) == 2
    assert "secret" not in str([one._deployment_config.model_dump() for one in deployments])


async def test_a_request_goes_on_when_the_table_cannot_be_told_how_long_it_took(router: Any) -> None:
    def timed(timings: Any) -> None:
        raise RuntimeError("the actor has died")

    router._table = SimpleNamespace(timed=timed)
    (chosen,) = await router.choose_replicas(REPLICAS, pending(RelayedRequest("POST", "/", caller=Caller("s"))))
    assert len(chosen) == 1
