"""A process that leads a group, with all that it has started: does any of it live, and how it is ended in time."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterable


def signal_group(group: int, kind: int) -> None:
    """Sends a signal to all processes of a group; a group that has ended needs none."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, kind)


def group_lives(group: int) -> bool:
    """Whether any process of it is there, one that nobody has waited for included."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def stop_group(leader: "subprocess.Popen[bytes]", steps: Iterable[tuple[int, float]]) -> None:
    """Asks a group to end, then makes it. The leader has ended then, and so has what it started, unless that outlives all steps.

    Args:
        leader: a process that was started with `start_new_session`.
        steps: signals in their order, each with the seconds that the group gets before the next one.
    """
    for kind, patience_s in steps:
        if not group_lives(leader.pid):
            break
        signal_group(leader.pid, kind)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and group_lives(leader.pid):
            # A leader that has ended counts until it was waited for.
            leader.poll()
            time.sleep(0.05)
    leader.wait()
