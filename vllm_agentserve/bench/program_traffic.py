"""Programs as traffic for servers: the simulator's own programs as sessions that fork and join, with token ids."""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from vllm_agentserve.bench.arms import last_value
from vllm_agentserve.bench.calls import ProgramShape, forks, origin
from vllm_agentserve.bench.cost import SERVER_GPU, TOY_CPU, StepCost, read_cost
from vllm_agentserve.bench.programs import SLOTS, draw_programs
from vllm_agentserve.bench.sessions import Session, Turn, WorkloadError
from vllm_agentserve.bench.tokens import draw_tokens

Traffic = tuple[Callable[[int], list[Session]], dict[str, Any]]
LOAD = 0.9
SLOTS_OPTION = "--max-num-seqs"
LONGEST_NUMBER = 12
"""Digits of the value of an option."""
CPU_SLOTS = 4
"""Sequences at once by default without a GPU: programs only wait for admission where slots are few."""
BLOCK_OPTION = "--block-size"
BLOCKS, CPU_BLOCKS = 16, 32
"""Tokens per KV block by default: vLLM's own with a GPU; without one the smallest its kernels like, as prompts are short."""
AUTELLIX = (
    "after the ShareGPT, BFCL and LATS workloads of Autellix (arXiv 2502.13965); the distributions are our assumption"
)
TOKENCAKE = (
    "after the Code-Writer and Deep-Research graphs of Tokencake (arXiv 2510.18586), calls and answers of the first as its "
    "repository counts them; the division into agents, tools and all other lengths are our assumption"
)


@dataclass(frozen=True)
class ProgramWorkload:
    """One kind of programs.

    Args:
        kind: what `programs.KINDS` draws.
        programs: how many by default.
        cpu_scale: factor on all lengths and tool times by default on machines without a GPU.
        cpu_slots: sequences at once by default on such machines: few where programs are to wait for admission, as many as come
            where they are to fill the KV cache.
    """

    name: str
    kind: str
    summary: str
    programs: int = 64
    cpu_scale: float = 0.2
    source: str = AUTELLIX
    cpu_slots: int = CPU_SLOTS

    def explain(self) -> list[str]:
        """What it is, in lines of text."""
        return [
            self.summary,
            f"{self.programs} programs arrive at random, as fast as --load says; --programs, --scale and --step-cost too",
            f"without a GPU all lengths and tool times are scaled by {self.cpu_scale:g} by default",
            f"source: {self.source}",
        ]


PROGRAM_WORKLOADS = {
    workload.name: workload
    for workload in (
        ProgramWorkload(
            "programs",
            "mixed",
            "Many short programs beside few long ones: of 100, 45 as `programs-chat`, 40 as `programs-tools`, 15 as "
            "`programs-search`.",
        ),
        ProgramWorkload("programs-chat", "chat", "Conversations: some turns, long answers, nobody thinks in between."),
        ProgramWorkload(
            "programs-tools", "tools", "Function calling: about six turns, short answers, tools of about two seconds."
        ),
        ProgramWorkload(
            "programs-search",
            "search",
            "Tree search: rounds of five attempts beside each other on one context, then a call that judges them.",
            programs=16,
        ),
        ProgramWorkload(
            "code-writer",
            "code-writer",
            "Several agents write code: a plan, coders beside each other that write and test, a parent that waits for all of "
            "them, reviews.",
            programs=24,
            source=TOKENCAKE,
            cpu_slots=32,
        ),
        ProgramWorkload(
            "deep-research",
            "deep-research",
            "Several agents do research: rounds of researchers beside each other that search and read, whose contexts grow; a "
            "parent that waits for all of them and writes.",
            programs=24,
            source=TOKENCAKE,
            cpu_slots=32,
        ),
    )
}


@dataclass(frozen=True)
class ProgramOptions:
    """What the user may choose of a workload of programs.

    Args:
        number: of programs.
        load: share of the time in which an engine whose batches are always full would have work.
        scale: factor on all lengths and tool times.
        cost: of the engine's steps, which turns the load into a pace.
        slots: sequences at once.
        block: tokens per block of the prefix cache.
    """

    number: int
    load: float
    scale: float
    cost: StepCost
    slots: int
    block: int

    def shapes(self, workload: ProgramWorkload, seed: int) -> list[ProgramShape]:
        """The programs as the simulator takes them, but for `in_blocks`."""
        return draw_programs(workload.kind, self.number, self.load, self.cost, self.slots, seed, self.scale, self.block)

    def sessions(self, workload: ProgramWorkload, seed: int) -> list[Session]:
        """The same programs as sessions."""
        return [one for shape in self.shapes(workload, seed) for one in sessions_of(shape, seed)]


def default_cost(gpu: bool) -> StepCost:
    return SERVER_GPU if gpu else TOY_CPU


def sessions_of(program: ProgramShape, seed: int) -> list[Session]:
    """One program: the session called as it is, and those that fork from it, which are called NAME.CALL.

    A call goes on in the session of the call whose context it has, but where several do so beside each other: each of these
    is a session of its own.

    Raises:
        WorkloadError: more than one call of the program has a new prompt, which no session can begin with.
    """
    ids = random.Random(f"{program.name} {seed} tokens")
    calls = program.calls
    turns: dict[str, list[Turn]] = {program.name: []}
    places: list[tuple[str, int]] = []
    for index, call in enumerate(calls):
        before = origin(calls, index)
        if before is None and index:
            raise WorkloadError(f"program {program.name!r}: call {index} has no parent, only the first one may")
        name = program.name if before is None else places[before][0]
        if before is not None and forks(calls, index):
            parent, turn = places[before]
            name = f"{program.name}.{index}"
            turns[name] = []
            spawning = turns[parent][turn]
            turns[parent][turn] = replace(spawning, spawns=(*spawning.spawns, name))
        places.append((name, len(turns[name])))
        turns[name].append(Turn(draw_tokens(ids, call.uncached), call.output, call.tool_s))
    return [
        Session(
            name,
            program.name,
            tuple(own),
            start_s=0.0 if number else program.arrival_s,
            forked=number > 0,
            program=program.name,
        )
        for number, (name, own) in enumerate(turns.items())
    ]


def program_serve_options(gpu: bool, workload: ProgramWorkload) -> tuple[str, ...]:
    """Options of vllm serve by default for workloads of programs."""
    if gpu:
        return (SLOTS_OPTION, str(SLOTS))
    return (SLOTS_OPTION, str(workload.cpu_slots), BLOCK_OPTION, str(CPU_BLOCKS))


def program_traffic(arguments: argparse.Namespace, serve: Sequence[str], gpu: bool) -> Traffic:
    """The sessions of every round by its number, and their description.

    Args:
        arguments: of `agentserve bench run`.
        serve: options of vllm serve for all arms; slots and block size are read from them.

    Raises:
        WorkloadError: one of these options, or the file with the step's cost, is wrong.
    """
    workload = PROGRAM_WORKLOADS[arguments.workload]
    cost = default_cost(gpu) if arguments.step_cost is None else read_cost(arguments.step_cost)
    chosen = ProgramOptions(
        arguments.programs or workload.programs,
        arguments.load or LOAD,
        arguments.scale or (1.0 if gpu else workload.cpu_scale),
        cost,
        int(option_value(serve, SLOTS_OPTION, str(SLOTS))),
        int(option_value(serve, BLOCK_OPTION, str(BLOCKS))),
    )

    @cache
    def drawn(number: int) -> list[Session]:
        return chosen.sessions(workload, arguments.seed * 1000 + number)

    described = {"name": workload.name, "scale": f"{chosen.scale:g}", "programs": chosen.number}
    described |= {"load": f"{chosen.load:g}", "slots": chosen.slots}
    return drawn, described | {"summary": workload.summary, "source": workload.source}


def option_value(options: Sequence[str], name: str, default: str) -> str:
    """The last value of an option in a command line; raises `WorkloadError` where it is no whole number above 0."""
    value = default if (given := last_value(options, name)) is None else given
    if not value.isdecimal() or len(value) > LONGEST_NUMBER or not int(value):
        raise WorkloadError(f"--serve: {name} {value!r} is not allowed: give a whole number above 0")
    return value
