"""Sessions under way at most: the line, and engines in this process that keep to it."""

from typing import Any

import pytest

from vllm_agentserve.bench.closed_loop import ClosedLoop
from vllm_agentserve.bench.live import LiveSessions
from vllm_agentserve.bench.sessions import Session, Turn


def test_who_waits_begins_in_order_when_a_place_is_free() -> None:
    live = LiveSessions(2)
    assert [live.begin(name) for name in "abcd"] == [True, True, False, False]
    assert live.begin("a"), "it is under way already"
    assert live.end("b") == "c"
    assert live.begin("c")
    assert live.end("b") is None, "it has no place any more"
    assert live.end("a") == "d"
    assert live.end("c") is None
    assert live.begin("e")


def test_without_a_limit_nobody_waits_and_spawned_sessions_take_no_place() -> None:
    assert all(LiveSessions(None).begin(str(number)) for number in range(99))
    live = LiveSessions(1, {"child"})
    assert live.begin("parent")
    assert live.begin("child")
    assert live.end("child") is None
    assert not live.begin("other")
    assert live.end("parent") == "other"


class TwoSteps:
    """An engine that ends every request in its second step; remembers how many sessions were under way."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, Any]] = []
        self.left: dict[str, int] = {}

    def add_request(self, name: str, prompt: Any, parameters: Any, session_id: str | None = None) -> None:
        self.asked.append((name, session_id, (parameters.extra_args or {}).get("agent_parent")))
        self.left[name] = 2

    def step(self) -> list[Any]:
        outputs = []
        for name in list(self.left):
            self.left[name] -= 1
            ended = not self.left[name]
            answer = type("Answer", (), {"token_ids": [9]})
            fields = {"request_id": name, "outputs": [answer], "finished": ended, "num_cached_tokens": 0}
            outputs.append(type("Output", (), fields))
            if ended:
                del self.left[name]
        return outputs


@pytest.mark.parametrize(
    ("live", "order"),
    [
        (None, "a0 b0 c0 a1 b1 c1"),
        (2, "a0 b0 a1 b1 c0 c1"),
        (1, "a0 a1 b0 b1 c0 c1"),
    ],
)
def test_a_closed_loop_lets_so_many_sessions_in(live: int | None, order: str) -> None:
    """Those that wait count from when they were due."""
    engine = TwoSteps()
    sessions = [Session(name, name, (Turn((1,), 1), Turn((2,), 1, 0.02))) for name in "abc"]
    records = ClosedLoop(engine, sessions, live=live).run()
    assert [name.replace("/", "") for name, _, _ in engine.asked] == order.split()
    assert len(records) == 6
    assert all(one.sent_us < 5_000 for one in records if one.turn == 0)
    last = next(one for one in records if (one.session, one.turn) == ("c", 0))
    assert live is None or last.stamps_us[0] > 20_000


def test_session_ids_of_a_closed_loop_get_a_suffix() -> None:
    engine = TwoSteps()
    sessions = [Session("a", "a", (Turn((1,), 1, spawns=("b",)),)), Session("b", "b", (Turn((3,), 1),), forked=True)]
    ClosedLoop(engine, sessions, told=True, suffix="@7").run()
    assert engine.asked == [("a/0", "a@7", None), ("b/0", "b@7", "a@7")]
