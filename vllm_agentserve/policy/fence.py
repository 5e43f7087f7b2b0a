"""Which KV blocks may be read or written when. The one rule for steps, for lane jobs, and for copies between device and host.

vLLM puts a block into the prefix cache inside `schedule()`, before the step that fills it has run. Steps can rely on such a
block, because they run one after the other. Work beside the steps cannot. So:

1. One writer: a block is written by steps, by one lane job or by one copy, never by two of them at a time. It belongs to the
   writer until the scheduler has heard that the writer ended.
2. Work beside the steps is sent with a step, and begins when that step has run. All that it reads was written by that step or by
   earlier ones, or by work that had ended before it was sent; and that step, too, is the last to write what the work overwrites.
3. What work beside the steps has written is read by nobody before the scheduler has heard that the work ended.

vLLM keeps rules 1 and 3 for a KV connector: blocks of an asynchronous load are not in the prefix cache, and are not freed, before
the connector reports the load. `StepFence` keeps rule 2.
"""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Work = TypeVar("Work")


class StepFence(Generic[Work]):
    """Holds work on KV blocks, in the order it came, until the step that it was sent with has run."""

    def __init__(self) -> None:
        self._held: list[Work] = []

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, work: Iterable[Work]) -> None:
        """A step begins: this work was sent with it."""
        self._held += work

    def step_has_run(self) -> list[Work]:
        """The step has run, or whatever the caller begins now is ordered behind it: the work that may begin."""
        held, self._held = self._held, []
        return held

    def drop(self, unwanted: Callable[[Work], bool]) -> list[Work]:
        """Takes out work that has not begun and never will; returns it."""
        dropped = [work for work in self._held if unwanted(work)]
        self._held = [work for work in self._held if not unwanted(work)]
        return dropped
