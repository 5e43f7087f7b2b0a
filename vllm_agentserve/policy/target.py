"""The target of a step where no `tpot_slo_ms` is given: streams that decode weighed against prompts that wait."""

from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class Backlog:
    """The prompts that are not computed yet, waiting and running.

    Args:
        prompts: how many.
        tokens: what is left to compute of them all.
        waited_ms: how long those that wait have waited, on average.
    """

    prompts: int = 0
    tokens: int = 0
    waited_ms: float = 0.0


NOTHING = Backlog()


@dataclass(frozen=True)
class TargetTrade:
    """The target between a floor and a limit, by who waits.

    A step of T ms beside decodes of d ms gives prefill T - d. Reading everything that waits takes R ms of the whole device, and
    so R d / (T - d) ms more than that; every one of m prompts waits so much longer, and counts more the longer it has waited, w.
    Each of n streams sees T - d ms more between two tokens. The sum of both, k m (R + w) d / (T - d) + n (T - d), with the
    weight k, is smallest at

        T = d + sqrt(k m (R + w) d / n)

    So one prompt beside many streams gets the floor, many prompts beside few streams get the limit, a share of the step that
    stock vLLM would run: a shorter one costs prompts more, a longer one streams. T follows from the moment alone and has no
    memory, so that it cannot oscillate by itself.
    """

    weight: float = 5.0
    """What a ms of waiting for a prompt counts against a ms between two tokens."""
    stock_share: float = 0.55
    """The limit, as a share of the duration of a step with as many prompt tokens as the engine takes."""

    stretch: float = 0.5
    """Share of the target by which a step may be longer that ends a prompt."""

    def target_ms(
        self, floor_ms: float, decodes_ms: float, streams: int, backlog: Backlog, read_ms: float, stock_ms: float
    ) -> float:
        """The target of the next step.

        Args:
            floor_ms: the target when nobody waits; the result is never below it.
            decodes_ms: what the step takes without prefill.
            streams: sequences that decode, at least 1.
            backlog: the prompts that wait or are being read.
            read_ms: what the whole device takes to read them all.
            stock_ms: what a step with as many prompt tokens as the engine takes would last.
        """
        waits = backlog.prompts * (read_ms + backlog.waited_ms)
        wanted = decodes_ms + sqrt(self.weight * waits * decodes_ms / max(streams, 1))
        return max(floor_ms, min(wanted, self.stock_share * stock_ms))

    def stretch_ms(self, target_ms: float, stock_ms: float) -> float:
        """How much longer a step may take that ends a prompt, within the same limit: the step that is saved is worth it."""
        return max(min(self.stretch * target_ms, self.stock_share * stock_ms - target_ms), 0.0)
