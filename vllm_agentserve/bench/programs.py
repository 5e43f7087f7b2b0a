"""Programs drawn from a seed, for the simulator and for engines."""

import random
import statistics
from collections.abc import Callable

from vllm_agentserve.bench.agent_graphs import code_writer, deep_research
from vllm_agentserve.bench.calls import CallShape, ProgramShape, in_blocks, scaled
from vllm_agentserve.bench.cost import StepCost

SLOTS = 32


def lognormal(rng: random.Random, median: float, sigma: float, low: int, high: int) -> int:
    return min(max(round(rng.lognormvariate(0.0, sigma) * median), low), high)


def chat(rng: random.Random) -> tuple[CallShape, ...]:
    """A conversation: some turns, long answers, nobody thinks in between."""
    calls: list[CallShape] = []
    context = 0
    for turn in range(1 + min(int(rng.expovariate(1 / 2.5)), 20)):
        uncached, output = lognormal(rng, 120, 1.0, 8, 2000), lognormal(rng, 180, 0.9, 8, 1000)
        calls.append(CallShape(uncached, context, output, 0.0, (turn - 1,) if turn else ()))
        context += uncached + output
    return tuple(calls)


def tools(rng: random.Random) -> tuple[CallShape, ...]:
    """Function calling: about six turns, short answers, tools of about two seconds."""
    calls: list[CallShape] = []
    context = 0
    for turn in range(max(round(rng.gauss(6.3, 3.0)), 1)):
        uncached, output = (lognormal(rng, 150, 0.7, 16, 1500) if turn else 1500), lognormal(rng, 50, 0.5, 8, 200)
        tool_s = lognormal(rng, 1300, 0.9, 100, 15_000) / 1000 if turn else 0.0
        calls.append(CallShape(uncached, context, output, tool_s, (turn - 1,) if turn else ()))
        context += uncached + output
    return tuple(calls)


def search(rng: random.Random) -> tuple[CallShape, ...]:
    """Tree search: rounds of parallel attempts on one context, then a call that judges them all."""
    calls = [CallShape(1200, 0, 100)]
    context = 1300
    for _ in range(rng.randint(6, 14)):
        judge = len(calls) - 1
        attempts = range(len(calls), len(calls) + 5)
        calls += [CallShape(60, context, lognormal(rng, 150, 0.5, 20, 500), 0.0, (judge,)) for _ in attempts]
        calls.append(CallShape(800, context, 60, 0.3, tuple(attempts)))
        context += 860
    return tuple(calls)


def mixed(rng: random.Random) -> tuple[CallShape, ...]:
    """Many short programs beside few long ones."""
    return rng.choices((chat, tools, search), weights=(0.45, 0.4, 0.15))[0](rng)


KINDS: dict[str, Callable[[random.Random], tuple[CallShape, ...]]] = {
    "chat": chat,
    "tools": tools,
    "search": search,
    "mixed": mixed,
    "code-writer": code_writer,
    "deep-research": deep_research,
}


def draw_programs(
    kind: str,
    number: int,
    load: float,
    cost: StepCost,
    slots: int,
    seed: int,
    scale: float = 1.0,
    block: int = 1,
) -> list[ProgramShape]:
    """So many programs that arrive at random, as fast as the load says; the same ones for every load, sooner or later.

    Args:
        kind: one of `KINDS`.
        load: share of the time in which an engine of this cost, its slots always full, would have work.
        scale: factor on lengths and tool times.
        block: tokens per block of the prefix cache; only the load depends on it, `in_blocks` does the rest.
    """
    rng = random.Random(f"{kind} {seed}")
    drawn = [KINDS[kind](rng) for _ in range(number)]
    if scale != 1.0:
        drawn = [scaled(calls, scale) for calls in drawn]
    work_ms = [sum(cost.call_ms(call, slots) for call in in_blocks(calls, block)) for calls in drawn]
    work_s = statistics.fmean(work_ms) / 1000
    arrival, programs = 0.0, []
    for index, calls in enumerate(drawn):
        arrival += rng.expovariate(load / work_s)
        programs.append(ProgramShape(f"{kind}-{index}", arrival, calls))
    return programs
