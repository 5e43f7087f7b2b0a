"""What is optional in the scheduler: an object with events, each of which does nothing unless a feature needs it."""

from collections.abc import Callable, Iterable
from typing import Any

from vllm_agentserve.policy.call import Call, Chunk


class Feature:
    """A part of the scheduler that can be absent. It gets all it needs in its constructor, and keeps what it knows of a request
    in that request's `Call`.

    In a step without prompts and waiting requests only `preempted`, `finished`, `answered` and `freed` happen.
    """

    def arrived(self, call: Call) -> None:
        """A request came; it is in the waiting list by now."""

    def before_step(self, decodes: int, context: int) -> None:
        """A step is about to be scheduled, with so many sequences that decode, and their summed context in tokens."""

    def before_plan(self) -> None:
        """The waiting requests are in order, and the budget of the step is about to be planned."""

    def after_schedule(self) -> None:
        """vLLM has scheduled the step, or failed to."""

    def asked(self, call: Call, computed: int, restored: int = 0) -> None:
        """vLLM is about to look for KV blocks for a waiting request.

        Args:
            computed: tokens of it that are computed, cached or in host memory.
            restored: those of them that are copied from host memory into new blocks.
        """

    def admitted(self, call: Call) -> None:
        """A step takes up the prompt of a request; what it found in the KV cache is known by now."""

    def preempted(self, call: Call) -> None:
        """A running request has lost its place, and waits; it is admitted once more."""

    def finished(self, sequences: int, interval_ms: float | None, chunks: Iterable[Chunk], beside_lane: bool) -> None:
        """The output of a step is there.

        Args:
            sequences: decodes in it.
            interval_ms: time since the output of the decode step before it; None after an idle gap or without decodes.
            chunks: of prompts; empty in a step of decodes only.
            beside_lane: whether a prefill lane had part of the device.
        """

    def answered(self, call: Call) -> None:
        """A request has its first token."""

    def freed(self, call: Call) -> None:
        """A request has ended, in whatever way."""

    def before_reset(self) -> None:
        """The prefix cache is about to be reset, and running requests with it.

        Raises:
            RuntimeError: that is not possible now; the message says why, and what to do.
        """

    def after_reset(self) -> None:
        """The prefix cache was reset: no KV block can be found any more."""

    def report(self) -> dict[str, float]:
        """Gauges for `/metrics`; counters are brought up to date in the same call."""
        return {}

    def faults(self, calls: Iterable[Call]) -> list[str]:
        """What does not agree between two steps, `calls` being all there are; O(n)."""
        return []


class Events:
    """The features of a scheduler. A feature's event is called in a step only if the feature has something to do there."""

    def __init__(self, features: Iterable[Feature]) -> None:
        self.features = tuple(features)
        self.arrived = self._of("arrived")
        self.before_step = self._of("before_step")
        self.before_plan = self._of("before_plan")
        self.after_schedule = self._of("after_schedule")
        self.asked = self._of("asked")
        self.admitted = self._of("admitted")
        self.preempted = self._of("preempted")
        self.finished = self._of("finished")
        self.answered = self._of("answered")
        self.freed = self._of("freed")
        self.before_reset = self._of("before_reset")
        self.after_reset = self._of("after_reset")

    def _of(self, event: str) -> tuple[Callable[..., Any], ...]:
        return tuple(
            getattr(feature, event)
            for feature in self.features
            if getattr(type(feature), event) is not getattr(Feature, event)
        )
