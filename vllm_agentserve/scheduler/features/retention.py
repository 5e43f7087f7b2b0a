"""Retention: KV blocks of programs that come back are handed out last; and the reserve of critical calls."""

from collections import Counter
from collections.abc import Iterable, MutableMapping
from time import perf_counter
from typing import TYPE_CHECKING

from vllm_agentserve.kv.ledger import Ledger
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.order import BYPASS_STEPS, Urgency
from vllm_agentserve.policy.retention import Retention
from vllm_agentserve.policy.space import Space
from vllm_agentserve.policy.waiting import VllmOrder
from vllm_agentserve.scheduler.features import Feature
from vllm_agentserve.vllm_compat import scheduler as compat
from vllm_agentserve.vllm_compat.free_blocks import blocks_in_use, cached_blocks, pool_blocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


class Retain(Feature):
    """Args:
    retention: decides which programs are kept.
    ledger: has their blocks.
    scheduler: whose requests.
    waiting: the calls that wait.
    counts: gets `retention_broken_blocks`.
    space: the reserve of critical calls.
    """

    def __init__(
        self,
        retention: Retention,
        ledger: Ledger,
        scheduler: "Scheduler",
        waiting: VllmOrder,
        counts: MutableMapping[str, float],
        space: Space,
    ) -> None:
        self.retention = retention
        self.space = space
        self.ledger = ledger
        self._scheduler = scheduler
        self._waiting = waiting
        self._counts = counts
        self._headroom = compat.headroom_blocks(scheduler)
        """KV blocks that vLLM keeps free when it admits a request, as configured."""
        self._running: Counter[str] = Counter()
        """Calls that have been admitted and have not ended, by program."""
        self._critical: dict[Call, None] = {}
        """Critical calls that have not ended."""
        self._critical_begun: dict[Call, None] = {}
        """Those of them that have been admitted."""
        self._reserved = 0
        """Free blocks that other calls may not have in this step."""
        self._passed: dict[Call, None] = {}
        """Waiting calls that were refused kept blocks."""
        self._asked: tuple[Call, bool] | None = None
        """The call that vLLM looked for blocks for last in this step, and whether it must not have kept ones."""

    @staticmethod
    def _name(call: Call) -> str | None:
        return None if call.owner is None else call.owner.context

    def arrived(self, call: Call) -> None:
        name, critical = self._name(call), call.hints.critical
        if critical:
            self._critical[call] = None
        if name is not None and call.owner is not None:
            named = call.owner.source == "explicit"
            self.retention.arrive(name, perf_counter(), named=named, critical=critical)

    def before_step(self, decodes: int, context: int) -> None:
        now = perf_counter()
        for name in self.retention.expire(now):
            self.ledger.give_up(name)
        self._reserved = self._reserve(now)
        for call in [*self._passed]:
            if self._over(call):
                self._waiting.let_pass(call, False)

    def _reserve(self, now_s: float) -> int:
        """Free blocks that calls which are not critical may not have, while there are critical calls or programs."""
        kept = self.retention.critical_blocks
        if not (kept or self._critical):
            return 0
        running = sum(blocks_in_use(self._scheduler, call.request) for call in self._critical_begun)
        used = pool_blocks(self._scheduler) - compat.free_blocks(self._scheduler)
        self.space.adapt(now_s, used + self.retention.away_blocks(self._running, None, critical=True))
        return self.space.reserved(running)

    def _over(self, call: Call) -> bool:
        """Whether it has waited for long enough; those of class batch until they are overdue."""
        since = call.passed_step
        return since is not None and not call.hints.batch and self._scheduler.current_step - since >= BYPASS_STEPS

    def asked(self, call: Call, computed: int) -> None:
        # While nothing runs vLLM keeps no headroom. All others wait behind who is overdue or was preempted.
        waits = call.key is not None and call.key.urgency > Urgency.OVERDUE and not self._over(call)
        waits = waits and 2 * computed < call.request.num_tokens
        critical = call.hints.critical
        kept = self.retention.away_blocks(self._running, self._name(call), critical) if waits else 0
        if waits and not critical:
            kept = max(kept, self._reserved)
        compat.keep_headroom(self._scheduler, self._headroom + kept)
        self._asked = call, kept > 0

    def after_schedule(self) -> None:
        compat.keep_headroom(self._scheduler, self._headroom)
        if self._asked is not None:
            call, kept = self._asked
            if kept and call.key is not None:
                if call.passed_step is None:
                    call.passed_step = self._scheduler.current_step
                self._passed[call] = None
            # One that was admitted waits no more, and is passed by nobody.
            self._waiting.let_pass(call, kept)
            self._asked = None

    def admitted(self, call: Call) -> None:
        name = self._name(call)
        self._passed.pop(call, None)
        call.passed_step = None
        if call in self._critical:
            self._critical_begun[call] = None
        # One that was preempted is admitted again.
        if name is not None and not call.holds:
            call.holds = True
            self._running[name] += 1

    def freed(self, call: Call) -> None:
        now, request, name = perf_counter(), call.request, self._name(call)
        self._passed.pop(call, None)
        self._critical.pop(call, None)
        self._critical_begun.pop(call, None)
        if name is None:
            return
        if call.holds:
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]
        if call.cached_tokens is None or not request.num_output_tokens:
            self.retention.abort(name, now)
            return
        blocks = cached_blocks(self._scheduler, request)
        keeps, gone = self.retention.end(
            name,
            now,
            self.ledger.own(name, blocks),
            last=call.hints.last,
            tool=call.hints.tool,
            can_return=compat.can_return(self._scheduler, request),
        )
        if keeps and blocks:
            # vLLM gives them back when this is over, or later: then they are recognized.
            self.ledger.keep(name, blocks)
        else:
            self.ledger.give_up(name)
            self.retention.release(name)
        # What they share with this one is counted as its own only if its blocks are known.
        for other in gone:
            self.ledger.give_up(other)

    def after_reset(self) -> None:
        self.ledger.clear()

    def report(self) -> dict[str, float]:
        self._counts["retention_broken_blocks"] = self.ledger.broken
        return {
            "retention_blocks": float(self.retention.blocks),
            "retention_programs": float(len(self.retention)),
            "reserve_ratio": self.space.share,
            "reserved_blocks": float(self._reserved),
        }

    def faults(self, calls: Iterable[Call]) -> list[str]:
        found = self.retention.faults() + self.ledger.faults()
        kept = {name for name in self.ledger.segments if name not in self.retention}
        found += [f"blocks of {name!r} are kept, and it is not" for name in sorted(kept)]
        if len(self.ledger.segments) != len(self.retention):
            found.append(f"{len(self.retention)} programs are kept, and {len(self.ledger.segments)} have blocks")
        known = set(calls)
        if Counter(self._name(call) for call in known if call.holds) != self._running:
            found.append("the calls that run are not those that are counted, by program")
        found += [f"{call.name!r} is passed by others, and is gone" for call in self._passed if call not in known]
        found += [f"{call.name!r} is critical, and is gone" for call in self._critical if call not in known]
        return found
