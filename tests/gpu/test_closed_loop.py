"""The closed loop that drives an engine in its process, on engines that are none: programs, and how many sessions are let in."""

from typing import Any

import pytest

from tests.support.bench_records import FORKING
from vllm_agentserve.bench.closed_loop import ClosedLoop
from vllm_agentserve.bench.sessions import Session, Turn


class Echo:
    """An engine that answers every request with one token a step, and keeps who asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int], dict]] = []
        self.left: dict[str, list[int]] = {}

    def add_request(self, name: str, prompt: dict, parameters: object, **more) -> None:
        self.asked.append((name, prompt["prompt_token_ids"], more | (parameters.extra_args or {})))
        self.left[name] = [parameters.max_tokens, 0]

    def step(self) -> list:
        outputs = []
        for name, state in list(self.left.items()):
            state[1] += 1
            answer = type("Answer", (), {"token_ids": [900] * state[1]})
            fields = {"request_id": name, "outputs": [answer], "finished": state[0] == state[1], "num_cached_tokens": 0}
            outputs.append(type("Output", (), fields))
            if state[0] == state[1]:
                del self.left[name]
        return outputs


@pytest.mark.parametrize("told", [True, False])
def test_the_closed_loop_forks_and_joins(told: bool) -> None:
    engine = Echo()
    records = ClosedLoop(engine, FORKING, told=told).run()
    assert [name for name, _, _ in engine.asked] == ["p/0", "p.1/0", "p.2/0", "p.1/1", "p/1"]
    prompts = {name: prompt for name, prompt, _ in engine.asked}
    assert prompts["p.1/1"] == [1] * 8 + [900] * 2 + [3] * 4 + [900] * 2 + [4] * 4
    assert prompts["p/1"] == [1] * 8 + [900] * 2 + [2] * 4
    hints = {name: more for name, _, more in engine.asked}
    assert hints["p.2/0"] == ({"session_id": "p.2", "agent_parent": "p"} if told else {})
    assert hints["p/0"] == ({"session_id": "p"} if told else {})
    assert {one.program for one in records} == {"p"}


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
