"""How the table of pins is found in another process, without a Ray that runs."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_agentserve.cluster.settings import ClusterSettings

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `cluster`")


async def placed(*arguments: Any) -> tuple[str, str]:
    return "a", "first"


HANDLE = SimpleNamespace(place=SimpleNamespace(remote=placed))


def table(**options: Any) -> Any:
    from vllm_agentserve.cluster.actor import TableActor

    return TableActor("agentserve", ClusterSettings("model", **options))


async def test_calls_that_come_while_the_table_is_looked_for_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first calls of all conversations may come together. Each that is placed without the table moves later."""
    found, looked, may_go = table(), [], threading.Event()

    def find() -> Any:
        looked.append(1)
        may_go.wait(20)
        return HANDLE

    monkeypatch.setattr(found, "_find", find)
    calls = [asyncio.ensure_future(found.place(f"{number}", 1, None, {}, (), 0)) for number in range(20)]
    left = asyncio.ensure_future(found.place("left", 1, None, {}, (), 0))
    await asyncio.sleep(0.05)
    left.cancel()
    may_go.set()
    assert await asyncio.gather(*calls) == [("a", "first")] * 20
    assert looked == [1]


async def test_a_table_that_is_not_there_is_looked_for_once_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    found, looked = table(), []

    def find() -> Any:
        looked.append(1)
        raise ConnectionError("no Ray")

    monkeypatch.setattr(found, "_find", find)
    for kind in (ConnectionError, RuntimeError, RuntimeError):
        with pytest.raises(kind):
            await found.place("s", 1, None, {}, (), 0)
    assert looked == [1]
    found._looked = 0.0
    monkeypatch.setattr(found, "_find", lambda: HANDLE)
    assert await found.place("s", 1, None, {}, (), 0) == ("a", "first")


def test_the_table_is_not_given_the_options_of_engines() -> None:
    assert "secret" not in str(table(options=("--api-key", "secret"))._settings)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_turn_is_sent_after_the_engine_was_chosen(fails: bool) -> None:
    sent: list[Any] = []

    def turn(*given: Any) -> None:
        sent.append(given)
        if fails:
            raise ConnectionError("no Ray")

    found, problems = table(), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    found.turn("s", 7, "e1")  # nobody has looked for the table yet
    found._handle = SimpleNamespace(turn=SimpleNamespace(remote=turn))
    found.turn("s", 8, "e1")
    assert sent == []
    await asyncio.sleep(0)
    assert (sent, problems) == ([("s", 8, "e1")], [])
