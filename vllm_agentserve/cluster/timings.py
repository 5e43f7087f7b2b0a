"""How long decisions take, counted in classes: cheap to add to, and small to send."""

from bisect import bisect_left

BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0)
"""Upper bounds of the classes; the last class has none."""
Counts = tuple[float, ...]
"""The sum in seconds, then the number in each class."""
NONE: Counts = (0.0,) * (len(BOUNDS_S) + 2)


class Timings:
    """Times that have been counted and not been taken."""

    def __init__(self) -> None:
        self._counts = list(NONE)

    def add(self, seconds: float) -> None:
        self._counts[0] += seconds
        self._counts[1 + bisect_left(BOUNDS_S, seconds)] += 1

    def take(self) -> Counts:
        """What was counted since it was last asked."""
        found, self._counts = tuple(self._counts), list(NONE)
        return found


def both(one: Counts, other: Counts) -> Counts:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def samples(name: str, labels: str, counts: Counts) -> list[str]:
    """The same as lines of a histogram for Prometheus."""
    found, total = [], 0.0
    for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), counts[1:], strict=True):
        total += count
        found.append(f'{name}_bucket{{{labels},le="{bound}"}} {total:.0f}')
    return [*found, f"{name}_sum{{{labels}}} {counts[0]:.9f}", f"{name}_count{{{labels}}} {total:.0f}"]
