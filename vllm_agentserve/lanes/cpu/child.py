"""A child process that its parent starts, watches and ends without ever waiting for it."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence


class Child:
    """Runs a command in a process of its own.

    A thread of this process starts it and waits for its end, so no other thread has to. The thread lives as long as the child for
    a second reason: the signal that Linux sends when a parent ends (`PR_SET_PDEATHSIG`) comes when the thread that made the child
    ends, not its process.

    Args:
        command: program and arguments.
        descriptors: the child inherits these.
        environment: of the child.
        started: called by the thread when the child has its descriptors, or could not be made.

    Raises:
        RuntimeError: no thread can be made.
    """

    def __init__(
        self,
        command: Sequence[str],
        descriptors: Sequence[int],
        environment: dict[str, str],
        started: Callable[[], None],
    ) -> None:
        self.how: str | None = None
        """How it ended, as text; None while it runs."""
        self._command = list(command)
        self._descriptors = tuple(descriptors)
        self._environment = environment
        self._on_start = started
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._killed = False
        self._lock = threading.Lock()
        self._made, self._gone = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="agentserve-lane", daemon=True).start()

    def _run(self) -> None:
        how = "it could not be started"
        try:
            try:
                process = subprocess.Popen(
                    self._command, pass_fds=self._descriptors, stdin=subprocess.DEVNULL, env=self._environment
                )
            finally:
                self._on_start()
            with self._lock:
                self._process, self._pid = process, process.pid
                if self._killed:
                    process.kill()
            self._made.set()
            # Without reaping it: until it is reaped its number is not used again, so `kill` cannot hit another process.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                self._process = None
                how = f"its process ended with exit code {process.wait()}"
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            how = f"its process could not be started: {error}"
        finally:
            self.how = how
            self._made.set()
            self._gone.set()

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self._gone.is_set()

    @property
    def pid(self) -> int:
        """Its process id, kept after its end; 0 when it could not be made. Waits for the fork."""
        self._made.wait()
        return self._pid

    def kill(self) -> None:
        """Kills it, now or as soon as it is made, even while it is stopped (SIGSTOP). Does not wait for its end."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._process.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> bool:
        """Waits for its end for so many seconds at most; returns whether it has ended."""
        return self._gone.wait(seconds)
