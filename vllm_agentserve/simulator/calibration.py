"""What steps take on the engine at hand, and the cost model that says so: timed steps, least squares."""

import itertools
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from scipy import optimize

from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.bench.tokens import draw_tokens

DECODE_CONTEXTS = (64, 256, 1024)
DECODE_STEPS = 24
CHUNKS = (8, 24, 50, 100, 200, 400, 800)
CHUNK_CONTEXTS = (0, 256, 1024)
REPEATS = 3


@dataclass(frozen=True)
class Sample:
    """A step: its decodes, their summed context in tokens, its chunks as (tokens, tokens before), and what it took."""

    sequences: int
    context: int
    chunks: tuple[tuple[int, int], ...]
    ms: float


def fit(samples: Sequence[Sample]) -> StepCost:
    """The cost that explains the samples best, no coefficient below 0: what decodes take from the steps without chunks, then
    what chunks take on top of it from the others. Errors count relative to the root of the duration, so that neither the many
    short steps nor the few long ones decide alone."""
    quiet = [one for one in samples if not one.chunks]
    base, sequence, context = solve([[1.0, one.sequences, one.context / 1000] for one in quiet], quiet)
    decodes = StepCost(base, sequence, context, 0.0, 0.0)
    mixed = [one for one in samples if one.chunks]
    rows = [
        [
            sum(tokens for tokens, _ in one.chunks) / 1000,
            sum(tokens * (before + tokens / 2) for tokens, before in one.chunks) / 1e6,
            1.0,
        ]
        for one in mixed
    ]
    alone = [decodes.step_ms(one.sequences, one.context, ()) for one in mixed]
    tokens, attended, prefill = solve(rows, mixed, alone)
    return StepCost(base, sequence, context, tokens, attended, prefill)


def solve(rows: Sequence[Sequence[float]], samples: Sequence[Sample], known: Sequence[float] = ()) -> list[float]:
    """Coefficients from 0 of the rows that explain the durations less what is known of them."""
    weights = 1 / np.sqrt([sample.ms for sample in samples])
    rest = np.asarray([sample.ms for sample in samples]) - (np.asarray(known) if len(known) else 0.0)
    found, _ = optimize.nnls(np.asarray(rows) * weights[:, None], rest * weights)
    return [float(one) for one in found]


def misfit(cost: StepCost, samples: Sequence[Sample]) -> dict[str, float]:
    """Predicted over measured time, by kind of step: in sum, and the mean relative error."""
    found = {}
    for kind, own in (
        ("decode", [sample for sample in samples if not sample.chunks]),
        ("prefill", [sample for sample in samples if sample.chunks]),
    ):
        predicted = [cost.step_ms(one.sequences, one.context, one.chunks) for one in own]
        found[f"{kind}_sum"] = sum(predicted) / sum(one.ms for one in own)
        found[f"{kind}_error"] = statistics.fmean(abs(p / one.ms - 1) for p, one in zip(predicted, own, strict=True))
    return found


class Calibration:
    """Times steps of an engine in this process. Its scheduler has to run prompts whole, as vLLM's own does.

    Args:
        engine: an `LLMEngine`.
        slots: sequences at once.
        most_tokens: of a prompt and its answer.
    """

    def __init__(self, engine: Any, slots: int, most_tokens: int, seed: int = 0) -> None:
        self._engine = engine
        self._slots = slots
        self._most_tokens = most_tokens
        self._rng = random.Random(f"calibration {seed}")
        self._numbers = itertools.count()

    def run(self) -> list[Sample]:
        """All samples; each is the median of some steps that are alike."""
        self._decodes(1, 64)
        samples = [self._decodes(n, c) for n in self._batches() for c in self._within(DECODE_CONTEXTS)]
        for decodes in {0, self._slots // 2, self._slots - 1}:
            samples += self._prefills(decodes)
        return samples

    def _batches(self) -> list[int]:
        return sorted({1, 2, self._slots // 2, self._slots * 3 // 4, self._slots} - {0})

    def _within(self, lengths: Sequence[int]) -> list[int]:
        return [length for length in lengths if length + DECODE_STEPS * 8 <= self._most_tokens]

    def _add(self, prompt: Sequence[int], answer: int) -> str:
        from vllm import SamplingParams

        name = f"calibration-{next(self._numbers)}"
        parameters = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0.0, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, parameters)
        return name

    def _drain(self) -> None:
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _decoding(self, sequences: int, context: int, answer: int) -> list[str]:
        """So many streams that have their first token."""
        names = [self._add(draw_tokens(self._rng, context), answer) for _ in range(sequences)]
        begun: set[str] = set()
        while len(begun) < sequences:
            begun |= {output.request_id for output in self._engine.step()}
        return names

    def _decodes(self, sequences: int, context: int) -> Sample:
        self._decoding(sequences, context, 2 * DECODE_STEPS)
        times = []
        for _ in range(DECODE_STEPS):
            begin = perf_counter()
            self._engine.step()
            times.append((perf_counter() - begin) * 1000)
        self._drain()
        return Sample(sequences, sequences * (context + DECODE_STEPS // 2), (), statistics.median(times))

    def _prefills(self, decodes: int) -> Iterator[Sample]:
        """Chunks of several lengths over several contexts, beside so many streams."""
        for before, tokens in itertools.product(CHUNK_CONTEXTS, CHUNKS):
            if before + tokens > self._most_tokens:
                continue
            contexts, times = [], []
            for _ in range(REPEATS):
                context = 128 if decodes else 0
                streams = self._decoding(decodes, context, 64)
                prefix = draw_tokens(self._rng, before)
                if before:
                    self._step(prefix, 1)
                prompt = (*prefix, *draw_tokens(self._rng, tokens))
                contexts.append(decodes * (context + 3))
                times.append(self._step(prompt, 1))
                if streams:
                    self._engine.abort_request(streams)
                self._drain()
            yield Sample(decodes, round(statistics.fmean(contexts)), ((tokens, before),), statistics.median(times))

    def _step(self, prompt: Sequence[int], answer: int) -> float:
        """Runs a prompt; what the step took that gave its token, in ms, with what it takes to hand it in."""
        begin = perf_counter()
        name = self._add(prompt, answer)
        while True:
            outputs = self._engine.step()
            took_ms = (perf_counter() - begin) * 1000
            if any(output.request_id == name for output in outputs):
                return took_ms
