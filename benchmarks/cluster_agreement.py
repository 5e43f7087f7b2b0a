"""The simulator of several engines held against two real ones: the same conversations, placed by the same policy.

    python -m benchmarks.cluster_agreement --output docs/results/NAME.json

Two engines of the toy model, one core each, behind one ingress. What their steps take is timed over HTTP on both at once,
and so is the way through the cluster. Then conversations arrive at random, in real time. When all policies have run, one cost of
steps is fitted to all that was timed, and the simulator runs the same conversations. Engines run in mode `stock`, as those of the
simulator do.
"""

import argparse
import itertools
import json
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances
from benchmarks.several_engines import Address, Cluster, serving, socket_of
from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.bench.measure import quantiles
from vllm_agentserve.bench.server import free_port
from vllm_agentserve.policy.placement import Placement
from vllm_agentserve.simulator.calibration import Sample, solve
from vllm_agentserve.simulator.cluster import Cluster as SimulatedCluster
from vllm_agentserve.simulator.cluster_engine import Power, Tier
from vllm_agentserve.simulator.pressure import Agent, Turn
from vllm_agentserve.toy import make_toy_model

SLOTS, STEP_TOKENS, BLOCK, KV_BYTES = 16, 2048, 32, 1 << 30
KV_TOKENS = 100_000
"""More than all contexts together, in the simulator as on the engines."""
OPTIONS = (
    *("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", str(SLOTS), "--enforce-eager"),
    *("--max-num-batched-tokens", str(STEP_TOKENS), "--block-size", str(BLOCK)),
    *("--kv-cache-memory-bytes", str(KV_BYTES), "--served-model-name", "model"),
    *("--additional-config", json.dumps({"agentserve": {"mode": "stock"}})),
)
ANSWERED = 7
"""The only token that answers have, so that what a turn adds to its context is known beforehand."""
DECODES = ((1, 64), (2, 64), (4, 64), (8, 64), (1, 1500), (4, 1500))
"""Streams at once and tokens of their prompts, while decode steps are timed."""
PROMPTS = ((256, 0), (512, 0), (1024, 0), (1500, 0), (128, 512), (128, 1536), (256, 1024))
"""Tokens of prompts that are timed with nothing beside them, and of what is in the KV cache of them."""
MIXED = ((1, 256), (1, 1024), (2, 512), (4, 256), (4, 1024))
"""Streams at once and tokens of a prompt that comes beside them."""
SHORT = 16
"""Tokens of a prompt that takes next to nothing."""
LONG, BRIEF, REPEATS = 64, 4, 5
"""Tokens of the answers that are timed, and how often each is."""
NO_POWER = Power(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Answer:
    """When an answer was asked for and when it was complete, in seconds, and its engine."""

    asked_s: float
    end_s: float
    engine: str

    @property
    def took_s(self) -> float:
        return self.end_s - self.asked_s


def ask(address: Address, prompt: Sequence[int], tokens: int, session: str = "") -> Answer:
    """Asks for an answer of so many tokens, all `ANSWERED`. Not as a stream: every token on its way would take time of the
    engines' cores.

    Raises:
        RuntimeError: it was refused.
    """
    body = {"model": "model", "prompt": list(prompt), "max_tokens": tokens, "ignore_eos": True}
    asked_s = time.monotonic()
    with address.open("POST", "/v1/completions", body | {"allowed_token_ids": [ANSWERED]}, session) as answer:
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"a request was answered with status {answer.status}: {content[-300:]!r}")
        return Answer(asked_s, time.monotonic(), answer.getheader("x-agentserve-engine") or "")


class StoppedError(RuntimeError):
    """Another one of those that run at the same time has failed."""


def at_once(tasks: Sequence[Callable[[], Answer]], stop: threading.Event | None = None) -> list[Answer]:
    """Runs all at the same time; raises what the first one raised.

    Args:
        stop: set when one has failed, and at the end; those that look at it can end.
    """
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(task) for task in tasks]
        ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if stop is not None:
            stop.set()
    for one in (*ended, *futures):
        one.result()
    return [one.result() for one in futures]


@dataclass(frozen=True)
class Timed:
    """What was timed on both engines at once.

    Args:
        decodes: steps without a prompt.
        mixed: steps with a prompt, beside streams.
        alone: for prompts with nothing beside them, (tokens, tokens before) and how many ms longer an answer to it takes than one
            to a prompt of `SHORT` tokens.
        way_ms: an answer of one token to a prompt of `SHORT` tokens through the cluster.
    """

    decodes: list[Sample]
    mixed: list[Sample]
    alone: list[tuple[int, int, float]]
    way_ms: float

    def faults(self) -> list[str]:
        """What cannot be: something that takes no time."""
        steps = [(f"{one.sequences} decodes {one.chunks or ''}", one.ms) for one in (*self.decodes, *self.mixed)]
        steps += [(f"a prompt of {tokens} tokens after {before}", ms) for tokens, before, ms in self.alone]
        return [f"{name} took {ms:.1f} ms" for name, ms in steps if ms <= 0]


def fitted(timed: Sequence[Timed]) -> StepCost:
    """The cost of steps that explains all of it best.

    Raises:
        RuntimeError: something took no time: the machine was too busy for this.
    """
    if faults := [fault for one in timed for fault in one.faults()]:
        raise RuntimeError(f"steps cannot be timed on this machine now: {'; '.join(faults)}. Try again when it is idle")
    quiet = [sample for one in timed for sample in one.decodes]
    base, sequence, context = solve([[1.0, one.sequences, one.context / 1000] for one in quiet], quiet)
    decodes = StepCost(base, sequence, context, 0.0, 0.0)

    def chunk(tokens: int, before: int) -> tuple[float, float]:
        return tokens / 1000, tokens * (before + tokens / 2) / 1e6

    mixed = [sample for one in timed for sample in one.mixed]
    rows = [[*chunk(*sample.chunks[0]), 1.0] for sample in mixed]
    known = [decodes.decode_ms(sample.sequences, sample.context) for sample in mixed]
    longer = [Sample(0, 0, ((tokens, before),), ms) for one in timed for tokens, before, ms in one.alone]
    # What a step with a prompt takes by itself is in both answers.
    short = chunk(SHORT, 0)
    rows += [[a - b for a, b in zip(chunk(*sample.chunks[0]), short, strict=True)] + [0.0] for sample in longer]
    tokens, attended, prefill = solve(rows, [*mixed, *longer], [*known, *(0.0 for _ in longer)])
    return StepCost(base, sequence, context, tokens, attended, prefill)


def errors(cost: StepCost, timed: Timed) -> dict[str, float]:
    """By kind of what was timed: the mean relative error of the cost."""
    short = cost.chunk_ms(SHORT, 0)
    pairs = {
        "decodes": [(cost.decode_ms(one.sequences, one.context), one.ms) for one in timed.decodes],
        "mixed": [(cost.step_ms(one.sequences, one.context, one.chunks), one.ms) for one in timed.mixed],
        "alone": [(cost.chunk_ms(tokens, before) - short, ms) for tokens, before, ms in timed.alone],
    }
    return {kind: statistics.fmean(abs(said / ms - 1) for said, ms in found) for kind, found in pairs.items()}


class Timing:
    """Times both engines at their sockets, at the same time, as they work later."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._sockets = [Address(path=socket_of(pid)) for _, pid in sorted(cluster.engines().items())]
        self._dice = random.Random(f"timing {seed}")

    def _prompt(self, tokens: int) -> list[int]:
        return [self._dice.randrange(5, 4000) for _ in range(tokens)]

    def _cached(self, count: int, tokens: int) -> list[tuple[Address, list[int]]]:
        """So many prompts for each engine, which has them in its KV cache."""
        asked = [(address, self._prompt(tokens)) for address in self._sockets for _ in range(count)]
        for address, prompt in asked:
            ask(address, prompt, 1)
        return asked

    def decodes(self, streams: int, tokens: int) -> Sample:
        """A step of so many sequences: what a long answer takes longer than a short one. Their prompts are in the KV cache, so
        that all begin together."""
        asked = self._cached(streams, tokens)
        more = []
        for _ in range(REPEATS):
            long, short = (at_once([lambda a=a, p=p, n=n: ask(a, p, n) for a, p in asked]) for n in (LONG, BRIEF))
            more.append(statistics.fmean(one.took_s for one in long) - statistics.fmean(one.took_s for one in short))
        each_s = statistics.median(more) / (LONG - BRIEF)
        return Sample(streams, streams * (tokens + LONG // 2), (), 1000 * each_s)

    def mixed(self, streams: int, tokens: int, decode_ms: float) -> Sample:
        """A step of so many sequences with a prompt: what their answers take longer when a prompt comes in the middle."""
        asked = self._cached(streams, SHORT)
        more = []
        for _ in range(REPEATS):
            alone = at_once([lambda a=a, p=p: ask(a, p, LONG) for a, p in asked])

            def comes(address: Address, prompt: Sequence[int]) -> Answer:
                time.sleep(LONG / 2 * decode_ms / 1000)
                return ask(address, prompt, 1)

            given = [(address, self._prompt(tokens)) for address in self._sockets]
            prompts = [lambda a=a, p=p: comes(a, p) for a, p in given]
            beside = at_once([*(lambda a=a, p=p: ask(a, p, LONG) for a, p in asked), *prompts])[: len(asked)]
            more.append(statistics.fmean(one.took_s for one in beside) - statistics.fmean(one.took_s for one in alone))
        ms = decode_ms + 1000 * statistics.median(more)
        return Sample(streams, streams * (SHORT + LONG // 2), ((tokens, 0),), ms)

    def prompt_s(self, tokens: int, before: int = 0) -> float:
        """An answer of one token to a prompt of so many after `before` in the KV cache, with nothing beside it, median."""
        times = []
        for _ in range(REPEATS):
            prompts = [self._prompt(before + tokens) for _ in self._sockets]
            asked = [*zip(self._sockets, prompts, strict=True)]
            if before:
                for address, prompt in asked:
                    ask(address, prompt[:before], 1)
            times += [one.took_s for one in at_once([lambda a=a, p=p: ask(a, p, 1) for a, p in asked])]
        return statistics.median(times)

    def way_s(self) -> float:
        """The same for a short prompt through the cluster."""
        return statistics.median(
            ask(self._cluster, self._prompt(SHORT), 1, f"way {number}").took_s for number in range(4 * REPEATS)
        )

    def run(self) -> Timed:
        """Everything."""
        self.decodes(2, SHORT)
        decodes = [self.decodes(*one) for one in DECODES]
        short_s = self.prompt_s(SHORT)
        alone = [(*one, 1000 * (self.prompt_s(*one) - short_s)) for one in PROMPTS]
        by_streams = {one.sequences: one.ms for one in reversed(decodes)}
        mixed = [self.mixed(streams, tokens, by_streams[streams]) for streams, tokens in MIXED]
        return Timed(decodes, mixed, alone, 1000 * self.way_s())


def draw(seed: int, number: int, per_s: float) -> list[Agent]:
    """So many conversations, which begin at random times."""
    dice, now_s, found = random.Random(f"conversations {seed}"), 0.0, []
    for index in range(number):
        now_s += dice.expovariate(per_s)
        turns = [Turn(dice.randint(300, 1500), dice.randint(20, 60))]
        turns += [
            Turn(dice.randint(40, 200), dice.randint(20, 60), dice.uniform(0.5, 1.5)) for _ in range(dice.randint(3, 6))
        ]
        found.append(Agent(f"conversation {seed} {index}", now_s, tuple(turns)))
    return found


Figures = dict[str, float]


def least_s(agents: Sequence[Agent]) -> float:
    """When all had ended if engines took no time."""
    return max(agent.arrival_s + sum(turn.gap_s for turn in agent.turns) for agent in agents)


def figures(
    turns_s: Sequence[float], talks_s: Sequence[float], more_s: float, changes: int, engines: Mapping[str, int]
) -> Figures:
    """Of one run.

    Args:
        turns_s: of every turn, the time to the end of its answer.
        talks_s: of every conversation, from its first call to its last answer, without its tools.
        more_s: when the last answer was complete, later than if engines took no time.
        changes: turns that went to another engine than the one before.
        engines: how many turns each had.
    """
    return {
        "turn, mean (s)": statistics.fmean(turns_s),
        "turn, p95 (s)": quantiles(turns_s)["p95"],
        "conversation without tools, p95 (s)": quantiles(talks_s)["p95"],
        "until all had ended, beyond arrivals and tools (s)": more_s,
        "turns that changed their engine": float(changes),
        "share of turns on the engine with more": max(engines.values()) / sum(engines.values()),
    }


COMPARED = 4
"""The first so many figures are times."""


def converse(cluster: Cluster, agent: Agent, began_s: float, stop: threading.Event) -> list[Answer]:
    """One conversation, in real time."""
    prompt: list[int] = []
    dice, found = random.Random(agent.name), list[Answer]()
    for number, turn in enumerate(agent.turns):
        due_s = began_s + agent.arrival_s if number == 0 else found[-1].end_s + turn.gap_s
        if stop.wait(max(due_s - time.monotonic(), 0.0)):
            raise StoppedError("another conversation failed")
        prompt += [dice.randrange(5, 4000) for _ in range(turn.added)]
        answer = ask(cluster, prompt, turn.answer, agent.name)
        # The call was due then, whatever the client was doing.
        found.append(replace(answer, asked_s=due_s))
        prompt += [ANSWERED] * turn.answer
    return found


def measured(cluster: Cluster, agents: Sequence[Agent]) -> Figures:
    """What the engines did."""
    began_s, stop = time.monotonic() + 0.5, threading.Event()
    by_agent: dict[str, list[Answer]] = {}

    def run(agent: Agent) -> Answer:
        by_agent[agent.name] = converse(cluster, agent, began_s, stop)
        return by_agent[agent.name][-1]

    at_once([lambda agent=agent: run(agent) for agent in agents], stop)
    answers = [by_agent[agent.name] for agent in agents]
    turns = [one for own in answers for one in own]
    names = {one.engine for one in turns}
    return figures(
        [one.took_s for one in turns],
        [
            own[-1].end_s - own[0].asked_s - sum(turn.gap_s for turn in agent.turns)
            for own, agent in zip(answers, agents, strict=True)
        ],
        max(one.end_s for one in turns) - began_s - least_s(agents),
        sum(a.engine != b.engine for own in answers for a, b in itertools.pairwise(own)),
        {name: sum(one.engine == name for one in turns) for name in names},
    )


def simulated(agents: Sequence[Agent], policy: str, cost: StepCost, way_s: float) -> Figures:
    """What the simulator says. Its calls take no way: the way is put into the gap before each turn but the first, so that calls
    come when they would, and added to what each turn takes."""
    tier = Tier(cost, KV_TOKENS, NO_POWER, SLOTS, STEP_TOKENS)
    later = [
        replace(
            agent,
            turns=tuple(replace(turn, gap_s=turn.gap_s + way_s * bool(at)) for at, turn in enumerate(agent.turns)),
        )
        for agent in agents
    ]
    cluster = SimulatedCluster([tier, tier], Placement(policy))
    served = cluster.run(later)
    return figures(
        [one + way_s for one in served.answers_s],
        [served.whole_s[agent.name] + way_s * len(agent.turns) for agent in agents],
        served.ends_s + way_s - least_s(agents),
        served.changes,
        served.turns,
    )


def run_policy(policy: str, arguments: argparse.Namespace) -> tuple[Timed, list[Figures]]:
    """One policy: a cluster of its own, timed, and then the conversations of each round."""
    own = ("--engines", "2", "--ingresses", "1", "--policy", policy)
    with serving(make_toy_model(), free_port(), OPTIONS, own) as cluster:
        timed = Timing(cluster, arguments.seed).run()
        return timed, [measured(cluster, drawn(arguments, number)) for number in range(arguments.rounds)]


def drawn(arguments: argparse.Namespace, number: int) -> list[Agent]:
    return draw(arguments.seed * 1000 + number, arguments.conversations, arguments.per_s)


def compared(found: Mapping[str, tuple[Timed, list[Figures]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a line per policy, round and figure; returns the report. One cost for all: engines and model are the same."""
    timed = [one for one, _ in found.values()]
    cost = fitted(timed)
    # A step with a short prompt is part of that answer.
    step_ms = cost.step_ms(0, 0, [(SHORT, 0)])
    way_ms = statistics.fmean(one.way_ms for one in timed) - step_ms
    print("| policy | round | figure | engines | simulator | simulator / engines |\n|---|---|---|---|---|---|")
    policies = {}
    for policy, (own, rounds) in found.items():
        both = []
        for number, engine in enumerate(rounds):
            model = simulated(drawn(arguments, number), policy, cost, max(way_ms, 0.0) / 1000)
            for name in [*engine][:COMPARED]:
                ratio = model[name] / engine[name]
                print(f"| {policy} | {number + 1} | {name} | {engine[name]:.2f} | {model[name]:.2f} | {ratio:.2f} |")
            both.append({"engine": engine, "simulator": model})
        policies[policy] = {"timed": asdict(own), "errors": errors(cost, own), "rounds": both}
    said = {policy: {kind: f"{error:.0%}" for kind, error in one["errors"].items()} for policy, one in policies.items()}
    print(f"mean error of the cost for what was timed: {said}; way {way_ms:.1f} ms", flush=True)
    return {"cost": asdict(cost), "way_ms": way_ms, "policies": policies}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["conserve", "least-loaded"])
    parser.add_argument("--conversations", type=int, default=30)
    parser.add_argument("--per-s", type=float, default=0.5, help="conversations that begin per second")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a file for the figures, as JSON")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found: dict[str, tuple[Timed, list[Figures]]] = {}
    for policy in arguments.policies:
        found[policy] = run_policy(policy, arguments)
        # After each policy, so that one that fails costs none of the others.
        report = {**circumstances(__spec__.name), **compared(found, arguments)}
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
