"""The agent workloads, as distributions with their sources, and how sessions are drawn from them."""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vllm_agentserve.bench.sessions import Session, Turn, WorkloadError, draw_tokens


@dataclass(frozen=True)
class Uniform:
    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return rng.uniform(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" if self.low != self.high else f"{self.low:g}"


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


@dataclass(frozen=True)
class Workload:
    """One kind of traffic. Lengths in tokens, times in seconds.

    Args:
        agents: how many work at once; `chats` and `batch` come on top.
        sessions: how many runs each agent makes, one after the other, each with a cold prompt of its own.
        shared: share of the system prompt that all agents have in common.
        stagger_s: time between the first starts of two agents.
        cpu_scale: factor on all lengths by default on machines without a GPU.
        chats: plain chat users beside the agents; batch: requests of one batch job that arrives at once.
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
    forks: Forks | None = None
    chats: int = 0
    batch: int = 0


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


def explain(workload: Workload) -> list[str]:
    """What it is, in lines of text."""
    lines = [
        workload.summary,
        f"{workload.agents} agents, {workload.sessions} sessions each of {workload.turns} turns; cold prompt {workload.system}, "
        f"tool result {workload.result}, answer {workload.answer} tokens; tool {workload.tool_s} s",
    ]
    if workload.shared:
        lines.append(f"{workload.shared:.0%} of the cold prompt is shared by all agents")
    if workload.forks is not None:
        lines.append(f"{workload.forks.share:.0%} of the sessions have {workload.forks.count} sub-agents")
    if workload.chats or workload.batch:
        lines.append(f"beside them {workload.chats} people who chat and a batch job of {workload.batch} requests")
    if workload.cpu_scale != 1:
        lines.append(f"without a GPU all lengths are scaled by {workload.cpu_scale:g} by default")
    return [*lines, f"source: {workload.source}"]


@dataclass(frozen=True)
class Shape:
    """What the user may change of a workload; None keeps the workload's own."""

    agents: int | None = None
    sessions: int | None = None
    turns: int | None = None
    shared: float | None = None
    scale: float = 1.0


def find_workload(name: str, others: Iterable[str] = ()) -> Workload:
    """Raises `WorkloadError` for a name that is not in the table; it also names `others` to choose from."""
    if name not in WORKLOADS:
        raise WorkloadError(f"workload {name!r} is unknown: choose one of {', '.join((*WORKLOADS, *others))}")
    return WORKLOADS[name]


def draw_sessions(workload: Workload, shape: Shape, seed: int) -> list[Session]:
    """Draws all sessions; the same arguments give the same sessions, and more agents leave the others as they are."""
    agents = shape.agents or workload.agents
    shared = workload.shared if shape.shared is None else shape.shared
    if shape.scale <= 0 or not 0 <= shared <= 1:
        raise WorkloadError(f"scale {shape.scale:g} must be above 0, and the shared part {shared:g} from 0 to 1")
    common = draw_tokens(random.Random(f"{workload.name} {seed} common"), scaled(workload.system, shape.scale, max_of))
    drawn: list[Session] = []
    for number in range(agents):
        for run in range(shape.sessions or workload.sessions):
            agent = f"agent-{number + 1}"
            name = f"{agent}.{run + 1}"
            rng = random.Random(f"{workload.name} {seed} {name}")
            drawer = Drawer(workload, shape, rng)
            start = number * workload.stagger_s if run == 0 else workload.tool_s.draw(rng)
            after = f"{agent}.{run}" if run else None
            drawn += drawer.sessions(name, agent, "agent", start, after, common, shared)
    for number in range(workload.chats):
        name = f"chat-{number + 1}"
        drawer = Drawer(CHAT, shape, random.Random(f"{workload.name} {seed} {name}"))
        drawn += drawer.sessions(name, name, "chat", 0.5 + number * workload.stagger_s, None, (), 0.0)
    for number in range(workload.batch):
        rng = random.Random(f"{workload.name} {seed} batch {number}")
        length = scaled(BATCH_PROMPT, shape.scale, rng)
        turn = Turn(draw_tokens(rng, length), scaled(BATCH_ANSWER, shape.scale, rng))
        drawn.append(Session(f"batch-{number + 1}", "batch", (turn,), "batch", BATCH_AT_S))
    return drawn


def max_of(distribution: Distribution) -> float:
    return distribution.high


def scaled(distribution: Distribution, scale: float, by: random.Random | Callable[[Distribution], float]) -> int:
    """A length in tokens: drawn, or some other figure of the distribution, times `scale`; at least 4."""
    value = distribution.draw(by) if isinstance(by, random.Random) else by(distribution)
    return max(round(value * scale), 4)


class Drawer:
    """Draws one session and its sub-agents.

    Lengths and times come from `rng`, token ids from a generator of their own: another scale changes nothing but lengths.
    """

    def __init__(self, workload: Workload, shape: Shape, rng: random.Random) -> None:
        self.workload = workload
        self.shape = shape
        self.rng = rng
        self.ids = random.Random(rng.random())

    def sessions(
        self,
        name: str,
        agent: str,
        kind: str,
        start_s: float,
        after: str | None,
        common: tuple[int, ...],
        shared: float,
    ) -> list[Session]:
        """The session called `name`, and after it those that fork from it."""
        system = scaled(self.workload.system, self.shape.scale, self.rng)
        prefix = common[: round(system * shared)]
        count = self.shape.turns or round(self.workload.turns.draw(self.rng))
        turns = [Turn(prefix + draw_tokens(self.ids, system - len(prefix)), self.answer())]
        turns += [self.turn() for _ in range(count - 1)]
        forks: list[Session] = []
        if self.workload.forks is not None and count > 1 and self.rng.random() < self.workload.forks.share:
            where = self.rng.randrange(count - 1)
            forks = [
                self.fork(f"{name}.sub-{number + 1}", kind)
                for number in range(round(self.workload.forks.count.draw(self.rng)))
            ]
            before = turns[where]
            turns[where] = Turn(before.added, before.answer, before.tool_s, tuple(fork.name for fork in forks))
        return [Session(name, agent, tuple(turns), kind, start_s, after), *forks]

    def turn(self) -> Turn:
        result = draw_tokens(self.ids, scaled(self.workload.result, self.shape.scale, self.rng))
        return Turn(result, self.answer(), self.workload.tool_s.draw(self.rng))

    def answer(self) -> int:
        return scaled(self.workload.answer, self.shape.scale, self.rng)

    def fork(self, name: str, kind: str) -> Session:
        assert self.workload.forks is not None
        count = round(self.workload.forks.turns.draw(self.rng))
        return Session(name, name, tuple(self.turn() for _ in range(count)), kind, forked=True)
