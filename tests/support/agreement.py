"""Whether another benchmark client measures what ours does: the same work in turns, medians of all turns, one rule.

The rule: after three, six or nine pairs of runs the median of every figure lies within a third of the other client's. That is
the noise of two busy cores; a kernel that lets a light process wait beside them spoils single runs of either client.
"""

import random
import statistics
from collections.abc import Callable, Iterable

import uvloop

from vllm_agentserve.bench.client import StreamingClient
from vllm_agentserve.bench.experiment import in_session
from vllm_agentserve.bench.measure import round_figures
from vllm_agentserve.bench.metrics import METRICS
from vllm_agentserve.bench.replay import Replay
from vllm_agentserve.bench.sessions import Session, Turn
from vllm_agentserve.bench.tokens import draw_tokens

LOWEST, HIGHEST = 0.75, 1.34
PAIRS, MOST_PAIRS = 3, 9
CONCURRENCY, REQUESTS, INPUT, OUTPUT = 4, 24, 256, 64

Figures = dict[str, float]
"""Medians: `ttft`, `tpot` and `itl` in ms; `tokens_per_s` is the throughput of a whole run."""


def ours(url: str, seed: int, turns: int = 1, tokens: int = INPUT, answer: int = OUTPUT) -> Figures:
    """What our client measures: `REQUESTS` requests in sessions of so many turns, `CONCURRENCY` sessions at a time."""
    rng = random.Random(seed)
    sessions = []
    for worker in range(CONCURRENCY):
        for number in range(REQUESTS // CONCURRENCY // turns):
            after = f"{worker}.{number - 1}" if number else None
            drawn = tuple(Turn(draw_tokens(rng, tokens), answer) for _ in range(turns))
            sessions.append(Session(f"{worker}.{number}", f"{worker}", drawn, after=after))
    replay = Replay(StreamingClient(url), sessions, answers="fixed", suffix=f" {seed}")
    uvloop.run(in_session(replay))
    assert len(replay.records) == REQUESTS
    figures = round_figures(0, replay.seconds, replay.records, {})
    by_key = {metric.key: metric for metric in METRICS}
    return {
        "ttft": statistics.median(one.ttft_ms for one in replay.records),
        "tpot": by_key["tpot_p50_ms"].of_sessions(figures.sessions),
        "itl": by_key["itl_p50_ms"].of_sessions(figures.sessions),
        "tokens_per_s": figures.tokens_per_s,
    }


def ratios(pairs: Iterable[tuple[Figures, Figures]]) -> Figures:
    """Our medians over the other client's, of the figures that both have."""
    sides = list(zip(*pairs, strict=True))
    keys = sides[0][0].keys() & sides[1][0].keys()
    medians = [{key: statistics.median(one[key] for one in side) for key in keys} for side in sides]
    return {key: medians[1][key] / medians[0][key] for key in sorted(keys)}


def agree(theirs: Callable[[int], Figures], ours: Callable[[int], Figures]) -> tuple[Figures, int]:
    """Runs both in turns, each with the seeds from 1; returns the ratios and how many pairs they are of.

    Raises:
        AssertionError: after `MOST_PAIRS` pairs they do not agree.
    """
    pairs: list[tuple[Figures, Figures]] = []
    while len(pairs) < MOST_PAIRS:
        pairs += [(theirs(seed), ours(seed)) for seed in range(len(pairs) + 1, len(pairs) + PAIRS + 1)]
        found = ratios(pairs)
        print(f"after {len(pairs)} pairs, ours over theirs: {found}")
        if all(LOWEST < ratio < HIGHEST for ratio in found.values()):
            return found, len(pairs)
    raise AssertionError((found, pairs))
