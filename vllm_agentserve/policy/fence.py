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

from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

Work = TypeVar("Work")


class StepFence(Generic[Work]):
    """Holds work on KV blocks, in the order it came, until the step that it was sent with has run.

    Steps run in the order in which they begin; a step may begin before the one before it has run.
    """

    def __init__(self) -> None:
        self._held: deque[list[Work]] = deque()
        """Per step that has not run, the oldest first."""

    def __len__(self) -> int:
        return sum(len(sent) for sent in self._held)

    def begin_step(self, work: Iterable[Work] = ()) -> None:
        """A step begins: this work was sent with it."""
        self._held.append(list(work))

    def step_has_run(self) -> list[Work]:
        """The oldest step has run, or whatever the caller begins now is ordered behind it: the work that may begin."""
        return self._held.popleft() if self._held else []

    def drop(self) -> list[Work]:
        """Takes out all work that has not begun, which never will; returns it."""
        dropped = [work for sent in self._held for work in sent]
        for sent in self._held:
            sent.clear()
        return dropped
