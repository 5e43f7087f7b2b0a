"""A second thread that works in slices, only while the first one waits for it: one of the two runs at any time."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any, Protocol


class Globals(Protocol):
    """State of the process that the work sets for itself, and that other code must not see meanwhile."""

    def take(self) -> Any:
        """The state as it is."""

    def put(self, state: Any) -> None:
        """Makes it so."""


class Relay:
    """Runs one piece of work at a time in a thread of its own. The work calls `pause` wherever it may be interrupted; once its
    slice is over it stands still there until `go_on` is called again.

    Between two slices the caller may do anything, also what the work is in the middle of: the state of the process is swapped,
    and whatever context the caller enters meanwhile it has left before the work goes on, so contexts nest.

    The thread lives as long as the relay: libraries keep handles and scratch memory per thread.

    Args:
        shared: what is swapped between the two threads.
        within: entered by the thread once, for state that is kept per thread.
        clock: in seconds.

    Raises:
        BaseException: what `within` raised; there is no thread then.
    """

    def __init__(
        self,
        shared: Globals,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._shared = shared
        self._within = within
        self._clock = clock
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._work: Callable[[], None] | None = None
        self._state: Any = None
        self._paused = False
        self._until = inf
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="agentserve-relay", daemon=True)
        self._thread.start()
        self._back.acquire()
        self._raise()

    @property
    def busy(self) -> bool:
        """Whether there is work that has not ended."""
        return self._work is not None

    def begin(self, work: Callable[[], None]) -> None:
        """Takes work; nothing of it runs before `go_on`. Raises `RuntimeError` while there is other work."""
        if self._work is not None:
            raise RuntimeError("the relay has work that has not ended")
        self._work, self._paused, self._failure = work, False, None

    def go_on(self, seconds: float = inf) -> bool:
        """Lets the work run to its first pause after so many seconds; True when it has ended, also where there is none.

        Raises:
            BaseException: what the work raised, which has ended then.
        """
        if self._work is None:
            return True
        mine = self._shared.take()
        if self._paused:
            self._shared.put(self._state)
        self._until = self._clock() + seconds
        self._go.release()
        interrupt = self._wait()
        self._state = self._shared.take()
        self._shared.put(mine)
        if interrupt is not None:
            raise interrupt
        self._raise()
        return self._work is None

    def _wait(self) -> BaseException | None:
        """Waits until the other thread stands still; returns an exception that came meanwhile, as with Ctrl-C. The two threads
        never run at once."""
        interrupt: BaseException | None = None
        while True:
            try:
                self._back.acquire()
            except BaseException as raised:
                # The slice ends at its next pause.
                interrupt, self._until = raised, -inf
            else:
                return interrupt

    def pause(self) -> None:
        """Called by the work: stands still here if its slice is over. Does nothing in another thread."""
        if threading.current_thread() is not self._thread or self._clock() < self._until:
            return
        self._paused = True
        self._back.release()
        self._go.acquire()

    def close(self) -> None:
        """Ends the thread. Raises `RuntimeError` while there is work that has not ended."""
        if self._work is not None:
            raise RuntimeError("the relay has work that has not ended")
        self._go.release()
        self._thread.join()

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> None:
        try:
            with self._within():
                self._back.release()
                self._serve()
        except BaseException as failure:
            self._failure = failure
            self._back.release()

    def _serve(self) -> None:
        while True:
            self._go.acquire()
            if self._work is None:
                return
            try:
                self._work()
            except BaseException as failure:
                self._failure = failure
            self._work = None
            self._back.release()
