"""How sessions are drawn from a workload's distributions."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from vllm_agentserve.bench.sessions import CRITICAL, ONE_SHOT, Session, Turn, WorkloadError
from vllm_agentserve.bench.tokens import draw_tokens
from vllm_agentserve.bench.workloads import (
    BATCH_ANSWER,
    BATCH_AT_S,
    BATCH_PROMPT,
    CHAT,
    ONE_SHOT_ANSWER,
    ONE_SHOT_PROMPT,
    ONE_SHOTS_S,
    Distribution,
    Workload,
)


@dataclass(frozen=True)
class WorkloadOptions:
    """What the user may change of a workload; None keeps the workload's own."""

    agents: int | None = None
    sessions: int | None = None
    turns: int | None = None
    shared: float | None = None
    scale: float = 1.0


def draw_sessions(workload: Workload, chosen: WorkloadOptions, seed: int) -> list[Session]:
    """Draws all sessions; the same arguments give the same sessions, and more agents leave the others as they are."""
    agents = chosen.agents or workload.agents
    shared = workload.shared if chosen.shared is None else chosen.shared
    if chosen.scale <= 0 or not 0 <= shared <= 1:
        raise WorkloadError(f"scale {chosen.scale:g} must be above 0, and the shared part {shared:g} from 0 to 1")
    common = draw_tokens(random.Random(f"{workload.name} {seed} common"), scaled(workload.system, chosen.scale, max_of))
    drawn: list[Session] = []
    for number in range(agents):
        critical = workload.critical and number % workload.critical == workload.critical - 1
        for run in range(chosen.sessions or workload.sessions):
            agent = f"agent-{number + 1}"
            name = f"{agent}.{run + 1}"
            rng = random.Random(f"{workload.name} {seed} {name}")
            drawer = Drawer(workload, chosen, rng)
            start = number * workload.stagger_s if run == 0 else workload.tool_s.draw(rng)
            after = f"{agent}.{run}" if run else None
            drawn += drawer.sessions(name, agent, CRITICAL if critical else "agent", start, after, common, shared)
    for number in range(workload.chats):
        name = f"chat-{number + 1}"
        drawer = Drawer(CHAT, chosen, random.Random(f"{workload.name} {seed} {name}"))
        drawn += drawer.sessions(name, name, "chat", 0.5 + number * workload.stagger_s, None, (), 0.0)
    for number in range(workload.batch):
        rng = random.Random(f"{workload.name} {seed} batch {number}")
        length = scaled(BATCH_PROMPT, chosen.scale, rng)
        turn = Turn(draw_tokens(rng, length), scaled(BATCH_ANSWER, chosen.scale, rng))
        drawn.append(Session(f"batch-{number + 1}", "batch", (turn,), "batch", BATCH_AT_S))
    for number in range(workload.one_shots):
        rng = random.Random(f"{workload.name} {seed} one-shot {number}")
        length = scaled(ONE_SHOT_PROMPT, chosen.scale, rng)
        turn = Turn(draw_tokens(rng, length), scaled(ONE_SHOT_ANSWER, chosen.scale, rng))
        start_s = rng.uniform(0.0, ONE_SHOTS_S)
        drawn.append(Session(f"{ONE_SHOT}-{number + 1}", ONE_SHOT, (turn,), ONE_SHOT, start_s))
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

    def __init__(self, workload: Workload, chosen: WorkloadOptions, rng: random.Random) -> None:
        self.workload = workload
        self.chosen = chosen
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
        system = scaled(self.workload.system, self.chosen.scale, self.rng)
        prefix = common[: round(system * shared)]
        count = self.chosen.turns or round(self.workload.turns.draw(self.rng))
        turns = [Turn(prefix + draw_tokens(self.ids, system - len(prefix)), self.answer())]
        turns += [self.turn() for _ in range(count - 1)]
        forks: list[Session] = []
        if self.workload.forks.share and count > 1 and self.rng.random() < self.workload.forks.share:
            where = self.rng.randrange(count - 1)
            forks = [
                self.fork(f"{name}.sub-{number + 1}", kind)
                for number in range(round(self.workload.forks.count.draw(self.rng)))
            ]
            before = turns[where]
            turns[where] = Turn(before.added, before.answer, before.tool_s, tuple(fork.name for fork in forks))
        return [Session(name, agent, tuple(turns), kind, start_s, after), *forks]

    def turn(self) -> Turn:
        result = draw_tokens(self.ids, scaled(self.workload.result, self.chosen.scale, self.rng))
        return Turn(result, self.answer(), self.workload.tool_s.draw(self.rng))

    def answer(self) -> int:
        return scaled(self.workload.answer, self.chosen.scale, self.rng)

    def fork(self, name: str, kind: str) -> Session:
        count = round(self.workload.forks.turns.draw(self.rng))
        return Session(name, name, tuple(self.turn() for _ in range(count)), kind, forked=True)
