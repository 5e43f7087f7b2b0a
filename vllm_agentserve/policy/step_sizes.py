"""The sizes of steps: how many tokens a step with decodes and prompts has in all, and for which there are kernels."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

EVERY_SIZE_TO = 64
"""Up to so many tokens a step may have any size: decodes alone, or short returning prompts beside them."""


def size_quantum(total: int, granularity: int) -> int:
    """What a step of about `total` tokens has a multiple of: eight sizes to an octave, and multiples of the granularity."""
    return max(granularity, 1 << max(total.bit_length() - 4, 0))


def step_sizes(largest: int, granularity: int) -> list[int]:
    """The sizes that steps have again and again, growing: every one up to `EVERY_SIZE_TO`, those of the grid to which steps are
    rounded, and the largest.

    The last chunk of a prompt is not rounded: above `EVERY_SIZE_TO` tokens the step that ends one may have any size.

    Args:
        largest: tokens of a step, at most.
        granularity: of the grid.
    """
    sizes = list(range(1, min(EVERY_SIZE_TO, largest) + 1))
    size = EVERY_SIZE_TO
    while size < largest:
        quantum = size_quantum(size, granularity)
        size = min(size - size % quantum + quantum, largest)
        sizes.append(size)
    return sizes


class StepSize(NamedTuple):
    """What the matrices of a step depend on."""

    tokens: int
    requests: int
    """Each has one row of logits; 0: none are computed."""


KERNELS_PER_LAYER = 512
"""For how many sizes each layer keeps oneDNN's kernels beside a lane; those that were not used for longest go first. The grid has
about a hundred, and numbers of requests and steps of any other size come to it."""


class KernelSizes:
    """The sizes whose kernels have been made on all threads of a worker.

    oneDNN makes a kernel when it first multiplies matrices of a size, and vLLM keeps it by that size alone. A kernel never uses
    more threads than it was made on, however many there are later; on fewer it is as fast as one that was made on fewer.
    So a size has to come on all threads first (`tests/compat/test_onednn.py` shows it). Beside a working lane such a step shares
    cores, and takes up to a quarter of a second. So it is asked for only where sizes come again and again: numbers of requests,
    decodes alone, and steps of the grid. A size that has run on fewer threads stays on them, and is not asked for any more.

    Args:
        grid: `step_sizes`.
        most: sizes that are remembered, of tokens and of requests.
    """

    def __init__(self, grid: Iterable[int] = (), most: int = KERNELS_PER_LAYER) -> None:
        self._grid = frozenset(grid)
        self._most = most
        self._tokens: OrderedDict[int, None] = OrderedDict()
        self._requests: OrderedDict[int, None] = OrderedDict()

    def use(self, size: StepSize) -> bool:
        """A step of this size comes. Returns False if it is to run on all threads, since its kernels are not there yet."""
        tokens, requests = self._use(self._tokens, size.tokens), self._use(self._requests, size.requests)
        recurs = size.tokens == size.requests or size.tokens in self._grid
        return requests and (tokens or not recurs)

    def _use(self, used: OrderedDict[int, None], rows: int) -> bool:
        if not rows:
            return True
        known = rows in used
        used[rows] = None
        used.move_to_end(rows)
        if len(used) > self._most:
            used.popitem(last=False)
        return known
