"""The agent workloads, as distributions with their sources."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllm_agentserve.bench.sessions import CRITICAL_HINT, WorkloadError


@dataclass(frozen=True)
class Uniform:
    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return rng.uniform(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" if self.low != self.high else f"{self.low:g}"


def around(mean: float) -> Uniform:
    """Spread evenly from three quarters to five quarters of the mean."""
    return Uniform(0.75 * mean, 1.25 * mean)


@dataclass(frozen=True)
class HeavyTail:
    """Log-normal with the given mean and standard deviation, cut off at `high`."""

    mean: float
    deviation: float
    high: float

    def draw(self, rng: random.Random) -> float:
        variance = math.log(1 + (self.deviation / self.mean) ** 2)
        return min(rng.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance)), self.high)

    def __str__(self) -> str:
        return f"{self.mean:g} ± {self.deviation:g}, at most {self.high:g}"


Distribution = Uniform | HeavyTail


@dataclass(frozen=True)
class Forks:
    """Sub-agents: the share of sessions that have them, how many fork from one context, and the turns of each."""

    share: float
    count: Uniform
    turns: Uniform


NO_FORKS = Forks(0.0, Uniform(0, 0), Uniform(0, 0))


@dataclass(frozen=True)
class Workload:
    """One kind of traffic. Lengths in tokens, times in seconds.

    Args:
        agents: how many work at once; `chats` and `batch` come on top.
        sessions: how many runs each agent makes, one after the other, each with a cold prompt of its own.
        shared: share of the system prompt that all agents have in common.
        stagger_s: time between the first starts of two agents.
        cpu_scale: factor on all lengths by default on machines without a GPU.
        critical: one of so many agents is critical, and its calls say so; 0 for none.
        chats: plain chat users beside the agents; batch: requests of one batch job that arrives at once; one_shots: single calls
            without a session, which arrive at random.
    """

    name: str
    summary: str
    source: str
    agents: int
    sessions: int
    turns: Distribution
    system: Distribution
    result: Distribution
    answer: Distribution
    tool_s: Distribution
    shared: float = 0.0
    stagger_s: float = 1.5
    cpu_scale: float = 1.0
    forks: Forks = NO_FORKS
    critical: int = 0
    chats: int = 0
    batch: int = 0
    one_shots: int = 0


AGENTSERVE = "AgentServe (arXiv 2603.10342): phases and token counts of its workload table, drawn uniformly"
REACT = Workload(
    name="react",
    summary="Think, call a tool, read a short result: many short resume prefills on one cold prompt.",
    source=AGENTSERVE,
    agents=4,
    sessions=2,
    turns=Uniform(5, 8),
    system=Uniform(2500, 3500),
    result=Uniform(30, 127),
    answer=Uniform(21, 141),
    tool_s=Uniform(0.1, 0.8),
)
PRESSURE = Workload(
    name="pressure",
    summary="Many agents over a KV cache that is too small: while one waits for its tool, others push its context out.",
    source="our assumption",
    agents=16,
    sessions=1,
    turns=Uniform(6, 6),
    system=Uniform(1350, 1650),
    result=Uniform(150, 250),
    answer=Uniform(32, 32),
    tool_s=around(1.0),
    stagger_s=0.0,
)
WORKLOADS = {
    workload.name: workload
    for workload in (
        REACT,
        Workload(
            name="plan-execute",
            summary="A plan, then steps with longer results: resume prefills that may be as bad for others as cold ones.",
            source=AGENTSERVE,
            agents=4,
            sessions=2,
            turns=Uniform(4, 7),
            system=Uniform(2500, 3500),
            result=Uniform(125, 421),
            answer=Uniform(21, 141),
            tool_s=Uniform(0.1, 0.8),
        ),
        Workload(
            name="coding",
            summary="An agent in a repository: a long context that grows with files and test output; tools with a heavy tail.",
            source="SWE-bench figures of Autellix and Tokencake: about 11 turns, tools 0.93 ± 3.55 s; lengths are our assumption",
            agents=4,
            sessions=1,
            turns=Uniform(9, 13),
            system=Uniform(6000, 12000),
            result=HeavyTail(900, 1200, 6000),
            answer=Uniform(60, 240),
            tool_s=HeavyTail(0.93, 3.55, 12.0),
            shared=0.3,
            cpu_scale=0.5,
        ),
        Workload(
            name="field",
            summary="Long sessions as seen in production, some with sub-agents that fork from their parent's context.",
            source="a 2026 production study quoted in vLLM RFC #57103: 43 turns, 142k input and 444 output tokens a turn, "
            "over 96 % cached, sub-agents in 44 % of sessions; tools as in `coding`",
            agents=4,
            sessions=1,
            turns=Uniform(35, 51),
            system=Uniform(50_000, 70_000),
            result=HeavyTail(3300, 3300, 20_000),
            answer=HeavyTail(444, 444, 4000),
            tool_s=HeavyTail(0.93, 3.55, 12.0),
            shared=0.3,
            cpu_scale=0.05,
            forks=Forks(0.44, Uniform(1, 3), Uniform(3, 8)),
        ),
        Workload(
            name="mixed",
            summary="`react` agents beside two people who chat and one batch job that arrives all at once.",
            source=AGENTSERVE + "; chat and batch lengths are our assumption",
            agents=4,
            sessions=2,
            turns=REACT.turns,
            system=REACT.system,
            result=REACT.result,
            answer=REACT.answer,
            tool_s=REACT.tool_s,
            chats=2,
            batch=8,
        ),
        PRESSURE,
        replace(
            PRESSURE,
            name="pressure-one-shot",
            summary="The agents of `pressure`, and as many single calls beside them.",
            one_shots=96,
        ),
        replace(
            PRESSURE,
            name="pressure-critical",
            summary="The agents of `pressure`; every fourth one is critical, and its calls say so.",
            critical=4,
        ),
    )
}
CHAT = Workload(
    name="chat",
    summary="",
    source="",
    agents=1,
    sessions=1,
    turns=Uniform(4, 6),
    system=Uniform(50, 300),
    result=Uniform(20, 120),
    answer=Uniform(80, 240),
    tool_s=Uniform(1.0, 3.0),
)
BATCH_AT_S = 3.0
BATCH_PROMPT, BATCH_ANSWER = Uniform(500, 1500), Uniform(128, 128)
ONE_SHOTS_S = 20.0
"""For how long single calls arrive."""
ONE_SHOT_PROMPT, ONE_SHOT_ANSWER = Uniform(600, 1000), Uniform(32, 32)


def explain(workload: Workload) -> list[str]:
    """What it is, in lines of text."""
    lines = [
        workload.summary,
        f"{workload.agents} agents, {workload.sessions} sessions each of {workload.turns} turns; cold prompt {workload.system}, "
        f"tool result {workload.result}, answer {workload.answer} tokens; tool {workload.tool_s} s",
    ]
    if workload.shared:
        lines.append(f"{workload.shared:.0%} of the cold prompt is shared by all agents")
    if workload.forks.share:
        lines.append(f"{workload.forks.share:.0%} of the sessions have {workload.forks.count} sub-agents")
    if workload.critical:
        lines.append(f"one of {workload.critical} agents is critical: its calls have the hint {CRITICAL_HINT}")
    if workload.chats or workload.batch:
        lines.append(f"beside them {workload.chats} people who chat and a batch job of {workload.batch} requests")
    if workload.one_shots:
        lines.append(f"beside them {workload.one_shots} single calls that arrive at random within {ONE_SHOTS_S:g} s")
    if workload.cpu_scale != 1:
        lines.append(f"without a GPU all lengths are scaled by {workload.cpu_scale:g} by default")
    return [*lines, f"source: {workload.source}"]


def find_workload(name: str, others: Iterable[str] = ()) -> Workload:
    """Raises `WorkloadError` for a name that is not in the table; it also names `others` to choose from."""
    if name not in WORKLOADS:
        raise WorkloadError(f"workload {name!r} is unknown: choose one of {', '.join((*WORKLOADS, *others))}")
    return WORKLOADS[name]
