"""The time budget: how long each part may take, so that those after it still come to their turn."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """What a part needs at least and takes at most, in seconds."""

    name: str
    least_s: float
    most_s: float


def allowance(span: Span, later: Sequence[Span], left_s: float) -> float | None:
    """Seconds for `span` when `left_s` are left for it and for `later`; None when it has to be left out.

    What the later ones need at least is kept for them, in their order, as far as there is enough for that.
    """
    if left_s < span.least_s:
        return None
    kept = 0.0
    for one in later:
        if kept + one.least_s <= left_s - span.least_s:
            kept += one.least_s
    return min(span.most_s, left_s - kept)
