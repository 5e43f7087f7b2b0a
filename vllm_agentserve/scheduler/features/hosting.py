"""Host memory by programs: whose copies make room when it is full."""

from collections.abc import Iterable
from time import perf_counter
from typing import TYPE_CHECKING

from vllm_agentserve.policy.call import Call
from vllm_agentserve.scheduler.features import Feature
from vllm_agentserve.vllm_compat import scheduler as compat

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_agentserve.vllm_compat.program_cache import ProgramCachePolicy


class HostPrograms(Feature):
    """Tells what orders the copies of calls and their programs.

    Args:
        copies: what vLLM asks whose copies make room.
        scheduler: whose requests.
    """

    def __init__(self, copies: "ProgramCachePolicy", scheduler: "Scheduler") -> None:
        self.copies = copies
        self._scheduler = scheduler
        self._waiting: set[Call] = set()
        """Those that have not been admitted yet, or have lost their places."""
        self._ended: list[str] = []
        """Requests that ended; vLLM stores their last blocks in the next step."""

    def arrived(self, call: Call) -> None:
        owner = call.owner
        if owner is not None:
            self.copies.names[call.name] = owner.context
            self._waiting.add(call)
            self.copies.hosting.arrive(owner.context, perf_counter(), named=owner.source == "explicit")

    def admitted(self, call: Call) -> None:
        # One that was preempted is admitted again.
        if call.owner is not None and call in self._waiting:
            self._waiting.remove(call)
            self.copies.hosting.admit(call.owner.context)

    def preempted(self, call: Call) -> None:
        # Also while it waits to run anew: then nothing changes.
        if call.owner is not None and call not in self._waiting:
            self._waiting.add(call)
            self.copies.hosting.waits_anew(call.owner.context)

    def freed(self, call: Call) -> None:
        self._ended.append(call.name)
        owner, hosting, request = call.owner, self.copies.hosting, call.request
        if owner is None:
            return
        waited = call in self._waiting
        self._waiting.discard(call)
        if not request.num_output_tokens:
            hosting.abort(owner.context, perf_counter(), waited=waited)
            return
        if waited:
            # It had lost its place.
            hosting.admit(owner.context)
        hosting.end(
            owner.context,
            perf_counter(),
            last=call.hints.last,
            tool=call.hints.tool,
            can_return=compat.can_return(self._scheduler, request),
        )

    def after_schedule(self) -> None:
        for name in self._ended:
            self.copies.names.pop(name, None)
        self._ended.clear()

    def faults(self, calls: Iterable[Call]) -> list[str]:
        known = set(calls)
        found = self.copies.faults()
        found += [f"{call.name!r} waits for its copies, and is gone" for call in self._waiting if call not in known]
        names = {call.name for call in known} | {*self._ended}
        return found + [
            f"a program of {name!r} is known, and it is gone" for name in self.copies.names if name not in names
        ]
