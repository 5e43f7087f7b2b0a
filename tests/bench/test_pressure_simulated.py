"""Agents whose contexts are lost between turns, in the simulator: the default target against stock vLLM's steps."""

import random
from statistics import mean

import pytest

from vllm_agentserve.bench.calls import CallShape, ProgramShape
from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.policy.budget import TargetTrade
from vllm_agentserve.policy.program import Beginnings
from vllm_agentserve.simulator.simulator import Order, Simulator

COST = StepCost(base=5.5, sequence=0.25, context=0.48, tokens=120.0, attended=31.0, prefill=2.0)
"""About the toy model on two cores that a server and clients share."""
SEEDS = range(5)


LAUNCHED = StepCost(base=5.0, sequence=0.05, context=0.005, tokens=9.0, attended=0.6, prefill=22.0)
"""About a 7B model on an H200: a step with a prompt takes 22 ms longer, whatever its length."""


def agents(
    lost: float, gap_s: float, seed: int, number: int = 16, prompt: int = 1500, result: int = 200, answer: int = 32
) -> list[ProgramShape]:
    """Sixteen agents of six turns: prompts of about 1500 tokens, tool results of 200, answers of 32; a share `lost` of the turns
    finds nothing of its context cached."""
    rng = random.Random(seed)
    made = []
    for agent in range(number):
        calls, context = [], 0
        for turn in range(6):
            added = int((result if turn else prompt) * rng.uniform(0.8, 1.2))
            cached = context if turn and rng.random() >= lost else 0
            gap = gap_s * rng.uniform(0.5, 1.5) if turn else 0.0
            calls.append(CallShape(context + added - cached, cached, answer, gap, (turn - 1,) if turn else ()))
            context += added + answer
        made.append(ProgramShape(f"agent-{agent}", 0.0, tuple(calls)))
    return made


def run(order: Order, lost: float, gap_s: float, trade: TargetTrade | None = None) -> tuple[float, float]:
    """Seconds a session takes and seconds until all are through, means over the seeds."""
    sessions, spans = [], []
    for seed in SEEDS:
        simulator = Simulator(order, COST, slots=64, step_tokens=2048)
        if trade is not None:
            simulator.policy.controller.trade = trade
        ended = simulator.run(agents(lost, gap_s, seed))
        sessions.append(mean(program.seconds for program in ended))
        spans.append(max(program.ended_s for program in ended))
    return mean(sessions), mean(spans)


@pytest.mark.parametrize("lost", [0.0, 0.5, 0.85])
@pytest.mark.parametrize("gap_s", [0.2, 1.0, 5.0])
def test_the_default_target_costs_agents_nothing(lost: float, gap_s: float) -> None:
    stock, ours = run("stock", lost, gap_s), run("fcfs", lost, gap_s)
    assert ours[0] <= 1.02 * stock[0]
    assert ours[1] <= 1.03 * stock[1]


def test_a_target_that_weighs_nobody_does() -> None:
    """Five decode steps whoever waits: the last agent is through more than a tenth later."""
    stock, fixed = run("stock", 0.85, 0.2), run("fcfs", 0.85, 0.2, TargetTrade(weight=0.0, stretch=0.0))
    assert fixed[1] > 1.1 * stock[1]


@pytest.mark.parametrize(("number", "gap_s"), [(6, 0.3), (16, 1.0)])
def test_where_mixing_takes_most_of_a_step_sessions_take_little_longer(number: int, gap_s: float) -> None:
    """Chunks that ignore it make them take x1.28 and x1.58 of stock's time."""
    found = {}
    for order in ("stock", "fcfs"):
        sessions = []
        for seed in SEEDS:
            simulator = Simulator(order, LAUNCHED, slots=64, step_tokens=8192)  # type: ignore[arg-type]
            ended = simulator.run(agents(0.0, gap_s, seed, number, 5000, 1100, 100))
            sessions.append(mean(program.seconds for program in ended))
        found[order] = mean(sessions)
    assert found["fcfs"] <= 1.035 * found["stock"]


def test_where_contexts_are_gone_the_oldest_program_first_ends_programs_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen agents on nine places. Without the ages of programs cold prompts go by arrival, and all agents end together."""

    def sessions() -> tuple[float, float]:
        took, spans = [], []
        for seed in SEEDS:
            ended = Simulator("fcfs", COST, slots=9, step_tokens=2048).run(agents(0.97, 0.2, seed))
            took.append(mean(program.seconds for program in ended))
            spans.append(max(program.ended_s for program in ended))
        return mean(took), mean(spans)

    by_age = sessions()
    monkeypatch.setattr(Beginnings, "number", lambda self, key: 0)
    by_arrival = sessions()
    assert by_age[0] <= 0.92 * by_arrival[0]
    assert by_age[1] <= 1.04 * by_arrival[1]
