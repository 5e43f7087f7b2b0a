"""Agents whose contexts are lost between turns, in the simulator: the default target against stock vLLM's steps."""

import random
from statistics import mean

import pytest

from vllm_agentserve.bench.calls import CallShape, ProgramShape
from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.policy.budget import TargetTrade
from vllm_agentserve.simulator.simulator import Order, Simulator

COST = StepCost(base=5.5, sequence=0.25, context=0.48, tokens=120.0, attended=31.0, prefill=2.0)
"""About the toy model on two cores that a server and clients share."""
SEEDS = range(5)


def agents(lost: float, gap_s: float, seed: int) -> list[ProgramShape]:
    """Sixteen agents of six turns: prompts of about 1500 tokens, tool results of 200, answers of 32; a share `lost` of the turns
    finds nothing of its context cached."""
    rng = random.Random(seed)
    made = []
    for agent in range(16):
        calls, context = [], 0
        for turn in range(6):
            added = int((200 if turn else 1500) * rng.uniform(0.8, 1.2))
            cached = context if turn and rng.random() >= lost else 0
            gap = gap_s * rng.uniform(0.5, 1.5) if turn else 0.0
            calls.append(CallShape(context + added - cached, cached, 32, gap, (turn - 1,) if turn else ()))
            context += added + 32
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
