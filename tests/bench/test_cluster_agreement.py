"""The comparison of the simulator with two engines, without any."""

import argparse
import itertools
import threading
import time
from contextlib import contextmanager
from dataclasses import astuple, replace
from typing import Any

import pytest

from benchmarks import cluster_agreement
from benchmarks.cluster_agreement import (
    DECODES,
    LONG,
    MIXED,
    PROMPTS,
    SHORT,
    Answer,
    Timed,
    at_once,
    compared,
    draw,
    errors,
    figures,
    fitted,
    least_s,
    measured,
    simulated,
)
from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.simulator.calibration import Sample

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
    assert with_ways["turn, mean (s)"] - without["turn, mean (s)"] == pytest.approx(0.1)
    beyond = "until all had ended, beyond arrivals and tools (s)"
    assert with_ways[beyond] - without[beyond] == pytest.approx(0.1 * len(agent.turns))
    context, took_ms = 0, 0.0
    for turn in agent.turns:
        took_ms += COST.step_ms(0, 0, [(turn.added, context)])
        context += turn.added + turn.answer
        took_ms += (turn.answer - 1) * COST.decode_ms(1, context - turn.answer / 2)
    assert without["turn, mean (s)"] * 1000 == pytest.approx(took_ms / len(agent.turns), rel=0.01)
    assert without[beyond] * 1000 == pytest.approx(took_ms, rel=0.01)


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
    assert found["conversation without tools, p95 (s)"] == pytest.approx(decoded_s + 0.02 * len(turns), abs=0.15)
    beyond = found["until all had ended, beyond arrivals and tools (s)"]
    assert beyond == pytest.approx(found["conversation without tools, p95 (s)"], abs=0.05)
    assert found["turns that changed their engine"] == 0
    assert found["share of turns on the engine with more"] == 1


def test_what_one_of_many_raises_is_raised() -> None:
    def fails() -> Answer:
        raise RuntimeError("a stream was answered with status 503")

    with pytest.raises(RuntimeError, match="status 503"):
        at_once([lambda: Answer(0.0, 1.0, "a"), fails])


def test_the_first_failure_ends_the_others_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when all others have come to their ends, a minute later."""

    def ask(address: str, prompt: list[int], tokens: int, session: str = "") -> Answer:
        if session.endswith(" 1"):
            raise RuntimeError("a request was answered with status 503")
        now_s = time.monotonic()
        return Answer(now_s, now_s, address)

    monkeypatch.setattr(cluster_agreement, "ask", ask)
    began_s = time.monotonic()
    with pytest.raises(RuntimeError, match="status 503"):
        measured("one engine", draw(6, 3, 100.0))  # type: ignore[arg-type]
    assert time.monotonic() - began_s < 2.5 < min(sum(t.gap_s for t in one.turns) for one in draw(6, 3, 100.0))


def timed(cost: StepCost, way_ms: float = 50.0) -> Timed:
    """What steps of that cost would be timed as."""
    short_ms = cost.step_ms(0, 0, [(SHORT, 0)])

    def decodes(streams: int, tokens: int) -> Sample:
        context = streams * (tokens + LONG // 2)
        return Sample(streams, context, (), cost.decode_ms(streams, context))

    def mixed(streams: int, tokens: int) -> Sample:
        context = streams * (SHORT + LONG // 2)
        return Sample(streams, context, ((tokens, 0),), cost.step_ms(streams, context, [(tokens, 0)]))

    return Timed(
        [decodes(*one) for one in DECODES],
        [mixed(*one) for one in MIXED],
        [(*one, cost.step_ms(0, 0, [one]) - short_ms) for one in PROMPTS],
        way_ms + short_ms,
    )


@pytest.mark.parametrize("prefill", [0.0, 11.0, 30.0])
def test_the_cost_is_found_again(prefill: float) -> None:
    """Also what a step with a prompt takes by itself, which prompts of either length have."""
    cost = replace(COST, prefill=prefill)
    found = fitted([timed(cost), timed(cost)])
    assert astuple(found) == pytest.approx(astuple(cost), rel=1e-3, abs=1e-3)
    assert max(errors(found, timed(cost)).values()) < 1e-3
    assert max(errors(replace(cost, base=2 * cost.base), timed(cost)).values()) > 0.3


def test_what_took_no_time_is_refused_by_its_name() -> None:
    wrong = timed(COST)
    wrong.alone[1] = (512, 0, -3.0)
    with pytest.raises(RuntimeError, match=r"a prompt of 512 tokens after 0 took -3\.0 ms.*when it is idle"):
        fitted([timed(COST), wrong])


def test_the_report_has_one_cost_for_all_policies(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(seed=1, conversations=4, per_s=1.0)
    engine = simulated(draw(1000, 4, 1.0), "conserve", COST, 0.05)
    found = {policy: (timed(COST), [engine]) for policy in ("conserve", "sticky")}
    report = compared(found, arguments)
    assert report["way_ms"] == pytest.approx(50.0, abs=0.1)
    said = capsys.readouterr().out
    assert "| conserve | 1 | turn, mean (s) |" in said
    ratios = [float(line.split("|")[-2]) for line in said.splitlines() if "conserve | 1" in line]
    assert ratios == pytest.approx([1.0] * 4, abs=0.01)


def test_figures_are_of_all_turns() -> None:
    found = figures([0.1, 0.3], [2.0, 4.0], 9.0, 1, {"a": 3, "b": 1})
    assert found["turn, mean (s)"] == pytest.approx(0.2)
    assert found["until all had ended, beyond arrivals and tools (s)"] == 9.0
    assert found["share of turns on the engine with more"] == pytest.approx(0.75)
    agents = draw(1, 3, 0.8)
    assert least_s(agents) == max(one.arrival_s + sum(turn.gap_s for turn in one.turns) for one in agents)
