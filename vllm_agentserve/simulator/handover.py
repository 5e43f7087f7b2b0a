"""Disaggregation in the simulator: which prompts are computed on an engine of their own, and what moving their KV takes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vllm_agentserve.simulator.cluster_engine import ClusterEngine


@dataclass(frozen=True)
class Link:
    """How KV moves between engines. One prompt after the other leaves an engine.

    Args:
        token_bytes: KV of a token.
        bytes_per_s: of the link.
        latency_s: of a transfer.
    """

    token_bytes: int = 131_072
    bytes_per_s: float = 25e9
    latency_s: float = 0.005

    def seconds(self, tokens: int) -> float:
        """How long the link is taken."""
        return tokens * self.token_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Choice:
    """Where a turn goes: the engine that answers, and the one that computes its prompt if it is another."""

    decoder: ClusterEngine
    prefiller: ClusterEngine | None


class TurnPredictor:
    """Decides turn by turn from a prediction, as systems do that have the turn for their unit.

    For each decoder it predicts the time until the turn's answer is complete, with its prompt computed there and on a prefiller,
    and takes the shortest. What waits and runs on the engines, and what their KV caches hold, it knows exactly. The length of
    the answer it predicts as the mean of those seen. A prompt that is computed on a decoder delays the answers there, which
    counts as much as the prompt itself.

    Args:
        decoders: engines that answer.
        prefillers: engines that only compute prompts.
        link: between them.
        live: names of the engines that live.
    """

    def __init__(
        self,
        decoders: Sequence[ClusterEngine],
        prefillers: Sequence[ClusterEngine],
        link: Link,
        live: Collection[str],
    ) -> None:
        self._decoders = decoders
        self._prefillers = prefillers
        self._link = link
        self._live = live
        self._answers = self._answer_tokens = 0

    def learn(self, answer: int) -> None:
        """An answer had so many tokens."""
        self._answers += 1
        self._answer_tokens += answer

    @property
    def answer(self) -> float:
        """The predicted length of an answer."""
        return self._answer_tokens / self._answers if self._answers else 100.0

    def choose(self, name: str, prompt: int) -> Choice:
        ahead = [(self._prompt_ms(one, name, prompt), one) for one in self._prefillers if one.name in self._live]
        found = []
        for number, engine in enumerate(self._decoders):
            if engine.name not in self._live:
                continue
            answer_ms = self._answer_ms(engine, prompt)
            here_ms = self._prompt_ms(engine, name, prompt)
            if engine.decoding:
                here_ms += self._chunk_ms(engine, name, prompt)
            found.append((here_ms + answer_ms, number, Choice(engine, None)))
            if ahead:
                there_ms, prefiller = min(ahead, key=lambda one: one[0])
                moves_s = self._link.latency_s + self._link.seconds(prompt - engine.kv.cached(name))
                found.append((there_ms + 1000 * moves_s + answer_ms, number, Choice(engine, prefiller)))
        return min(found, key=lambda one: one[:2])[2]

    def _chunk_ms(self, engine: ClusterEngine, name: str, prompt: int) -> float:
        cached = min(engine.kv.cached(name), prompt - 1)
        return engine.tier.cost.chunk_ms(prompt - cached, cached)

    def _prompt_ms(self, engine: ClusterEngine, name: str, prompt: int) -> float:
        """Until the prompt is computed, after those before it."""
        before = engine.waiting_tokens + sum(job.prompt - job.computed for job in engine.prefilling)
        return engine.tier.cost.chunk_ms(before, 0) + self._chunk_ms(engine, name, prompt)

    def _answer_ms(self, engine: ClusterEngine, prompt: int) -> float:
        """The answer, and the wait for KV that others hold."""
        calls = engine.running + len(engine.waiting) + 1
        answer_ms = self.answer * engine.tier.cost.decode_ms(calls, engine.contexts + prompt)
        missing = engine.kv.running + prompt + self.answer - engine.kv.capacity
        return answer_ms * (2 if missing > 0 else 1)
