"""A small closed-loop agent workload: every turn starts when the tool of the turn before has answered."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from vllm_agentserve.bench.client import Stream, StreamingClient


@dataclass(frozen=True)
class AgentPlan:
    """What one agent will do, fixed before anything runs, so that every arm gets the same requests.

    Args:
        name: also its session id.
        start_s: when it starts, in seconds after the workload.
        system_prompt: token ids of the cold prefill.
        tool_results: token ids appended to the context before each later turn.
        answers: tokens it generates in each turn.
        tool_s: how long each tool takes, in seconds.
    """

    name: str
    start_s: float
    system_prompt: list[int]
    tool_results: list[list[int]]
    answers: list[int]
    tool_s: list[float]


def plan_agents(
    agents: int = 5,
    turns: int = 6,
    system_tokens: tuple[int, int] = (3000, 8000),
    result_tokens: tuple[int, int] = (30, 400),
    answer_tokens: tuple[int, int] = (40, 140),
    tool_s: tuple[float, float] = (0.1, 0.8),
    every_s: float = 4.0,
    vocabulary: int = 4000,
    seed: int = 0,
) -> list[AgentPlan]:
    """Draws agents from uniform ranges around the token counts of AgentServe's ReAct and plan-and-execute sessions."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(count)]

    return [
        AgentPlan(
            name=f"agent-{number}",
            start_s=number * every_s,
            system_prompt=tokens(rng.randint(*system_tokens)),
            tool_results=[tokens(rng.randint(*result_tokens)) for _ in range(turns - 1)],
            answers=[rng.randint(*answer_tokens) for _ in range(turns)],
            tool_s=[rng.uniform(*tool_s) for _ in range(turns - 1)],
        )
        for number in range(agents)
    ]


@dataclass
class Replay:
    """What the agents saw."""

    streams: list[Stream] = field(default_factory=list)
    sessions_finished: int = 0
    began: float = 0.0
    ended: float = 0.0


async def replay(url: str, plans: list[AgentPlan], on_turn: Callable[[], None] = lambda: None) -> Replay:
    """Runs all agents against the server at `url`; raises `StreamError` if a request fails."""
    result = Replay()

    async def run(agent: AgentPlan, client: StreamingClient) -> None:
        await asyncio.sleep(agent.start_s)
        context = list(agent.system_prompt)
        for turn, answer in enumerate(agent.answers):
            if turn:
                await asyncio.sleep(agent.tool_s[turn - 1])
                context += agent.tool_results[turn - 1]
            stream = Stream("resume" if turn else "cold", perf_counter())
            result.streams.append(stream)
            await client.generate(stream.kind, context, answer, session_id=agent.name, into=stream)
            context += stream.token_ids
            on_turn()
        result.sessions_finished += 1

    async with StreamingClient(url) as client:
        await client.generate("warm-up", [5] * 64, 8)
        result.began = perf_counter()
        async with asyncio.TaskGroup() as group:
            for agent in plans:
                group.create_task(run(agent, client))
        result.ended = perf_counter()
    return result
