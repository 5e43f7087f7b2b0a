"""Conversations of agents, drawn from a seed: what the simulator of several engines serves."""

import random
from dataclasses import dataclass
from math import exp, log

from vllm_agentserve.simulator.pressure import Agent, Turn


@dataclass(frozen=True)
class LogNormal:
    """A distribution: its median, the deviation of the logarithm, and bounds."""

    median: float
    sigma: float
    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return min(max(exp(rng.gauss(log(self.median), self.sigma)), self.low), self.high)


FIRST = LogNormal(6000, 0.6, 1000, 40_000)
SHORT_FIRST = LogNormal(800, 0.6, 200, 2000)
ADDED = LogNormal(250, 1.0, 20, 8000)
ANSWER = LogNormal(80, 0.7, 8, 1000)
GAP_S = LogNormal(1.5, 1.0, 0.05, 60.0)
"""Tokens of first prompts, of those of small conversations, that a turn adds, and of an answer; seconds of a tool. Our
assumption."""
SHORT_SHARE = 0.2
"""Of conversations with a short first prompt."""
TURNS = 9.0
"""On average after the first one."""
MOST_TURNS = 40
LAST_ANSWER = 3
"""The last answer is so many times longer: the user reads it."""


def draw_conversations(seed: int, number: int, per_second: float) -> list[Agent]:
    """So many conversations, which begin at random times, so many per second."""
    rng = random.Random(seed)
    found, now_s = [], 0.0
    for index in range(number):
        now_s += rng.expovariate(per_second)
        count = 1 + min(int(rng.expovariate(1 / TURNS)) + 1, MOST_TURNS)
        first = SHORT_FIRST if rng.random() < SHORT_SHARE else FIRST
        turns = [Turn(int(first.draw(rng)), int(ANSWER.draw(rng)))]
        turns += [Turn(int(ADDED.draw(rng)), int(ANSWER.draw(rng)), GAP_S.draw(rng)) for _ in range(count - 1)]
        last = turns[-1]
        turns[-1] = Turn(last.added, last.answer * LAST_ANSWER, last.gap_s)
        found.append(Agent(f"conversation-{seed}-{index}", now_s, tuple(turns)))
    return found
