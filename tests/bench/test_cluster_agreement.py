"""The comparison of the simulator with two engines, without any."""

import itertools
import threading
import time
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks import cluster_agreement
from benchmarks.cluster_agreement import Answer, Timing, at_once, draw, figures, measured, simulated
from vllm_agentserve.bench.cost import StepCost

COST = StepCost(base=8.0, sequence=0.5, context=0.2, tokens=150.0, attended=20.0)


def test_conversations_are_the_same_for_a_seed_and_begin_in_order() -> None:
    agents = draw(3, 20, 0.8)
    assert agents == draw(3, 20, 0.8) != draw(4, 20, 0.8)
    arrivals = [agent.arrival_s for agent in agents]
    assert arrivals == sorted(arrivals)
    assert 10 < arrivals[-1] < 60
    assert all(4 <= len(agent.turns) <= 7 and agent.turns[0].gap_s == 0 for agent in agents)


def test_a_conversation_alone_takes_its_steps_and_the_ways_to_them() -> None:
    """Ways of 0.1 s: one for each turn."""
    agent = draw(1, 1, 0.8)[0]
    without, with_ways = (simulated([agent], "conserve", COST, way_s) for way_s in (0.0, 0.1))
    turns = len(agent.turns)
    assert with_ways["conversation without tools, mean (s)"] - without[
        "conversation without tools, mean (s)"
    ] == pytest.approx(0.1 * turns)
    assert with_ways["turn, mean (s)"] - without["turn, mean (s)"] == pytest.approx(0.1)
    decoded_ms = sum((turn.answer - 1) * COST.decode_ms(1, 1000) for turn in agent.turns)
    read_ms = sum(COST.step_ms(0, 0, [(turn.added, 500)]) for turn in agent.turns)
    assert without["conversation without tools, mean (s)"] == pytest.approx((decoded_ms + read_ms) / 1000, rel=0.1)


@contextmanager
def engines(monkeypatch: pytest.MonkeyPatch, seconds: Any) -> Any:
    """Answers without engines, one at a time for each address: `seconds(prompt, tokens)` until the first token, and a token."""
    locks: dict[str, threading.Lock] = {}

    def ask(address: str, prompt: list[int], tokens: int, session: str = "") -> Answer:
        asked_s = time.monotonic()
        first_s, each_s = seconds(prompt, tokens)
        with locks.setdefault(address, threading.Lock()):
            time.sleep(first_s + each_s * (tokens - 1))
            end_s = time.monotonic()
        return Answer(asked_s, end_s, address)

    monkeypatch.setattr(cluster_agreement, "ask", ask)
    yield


def test_a_run_is_measured_from_when_its_calls_were_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client of a turn waits for its tool is no part of it, and prompts hold the answers before them."""
    prompts: list[list[int]] = []

    def seconds(prompt: list[int], tokens: int) -> tuple[float, float]:
        prompts.append(list(prompt))
        return 0.02, 0.0005

    agents = draw(5, 1, 50.0)
    with engines(monkeypatch, seconds):
        found = measured("one engine", agents)  # type: ignore[arg-type]
    turns = agents[0].turns
    assert [len(b) - len(a) for a, b in itertools.pairwise(prompts)] == [
        before.answer + turn.added for before, turn in itertools.pairwise(turns)
    ]
    assert all(b[: len(a)] == a for a, b in itertools.pairwise(prompts))
    decoded_s = sum(0.0005 * (turn.answer - 1) for turn in turns)
    assert found["turn, mean (s)"] == pytest.approx(0.02 + decoded_s / len(turns), abs=0.03)
    assert found["conversation without tools, mean (s)"] == pytest.approx(decoded_s + 0.02 * len(turns), abs=0.15)
    assert found["turns that changed their engine"] == 0
    assert found["share of turns on the engine with more"] == 1


def test_what_one_of_many_raises_is_raised() -> None:
    def fails() -> Answer:
        raise RuntimeError("a stream was answered with status 503")

    with pytest.raises(RuntimeError, match="status 503"):
        at_once([lambda: Answer(0.0, 1.0, "a"), fails])


def test_timing_finds_what_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(self: Timing, streams: int, tokens: int) -> cluster_agreement.Sample:
        context = streams * (tokens + cluster_agreement.LONG // 2)
        return cluster_agreement.Sample(streams, context, (), COST.decode_ms(streams, context))

    monkeypatch.setattr(Timing, "decodes", timed)

    def beside(self: Timing, streams: int, tokens: int, decode_ms: float) -> cluster_agreement.Sample:
        context = streams * (cluster_agreement.SHORT + cluster_agreement.LONG // 2)
        return cluster_agreement.Sample(streams, context, ((tokens, 0),), COST.step_ms(streams, context, [(tokens, 0)]))

    monkeypatch.setattr(Timing, "mixed", beside)
    monkeypatch.setattr(Timing, "prompt_s", lambda self, tokens: 0.03 + COST.step_ms(0, 0, [(tokens, 0)]) / 1000)
    monkeypatch.setattr(Timing, "way_s", lambda self: 0.05 + COST.step_ms(0, 0, [(cluster_agreement.SHORT, 0)]) / 1000)
    cost, way_s, _ = Timing.__new__(Timing).run()
    for tokens in (300, 1500):
        assert cost.step_ms(0, 0, [(tokens, 0)]) == pytest.approx(COST.step_ms(0, 0, [(tokens, 0)]), rel=0.05)
    assert cost.decode_ms(3, 2000) == pytest.approx(COST.decode_ms(3, 2000), rel=0.01)
    assert way_s == pytest.approx(0.05, abs=0.003)


def test_figures_are_of_all_turns() -> None:
    found = figures([0.1, 0.3], [2.0, 4.0], 9.0, 1, {"a": 3, "b": 1})
    assert found["turn, mean (s)"] == pytest.approx(0.2)
    assert found["conversation without tools, mean (s)"] == pytest.approx(3.0)
    assert found["share of turns on the engine with more"] == pytest.approx(0.75)
