"""Retention: KV blocks of programs that come back are handed out last; and the reserve of critical calls."""

from collections import Counter
from collections.abc import Iterable, MutableMapping
from itertools import chain
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
from vllm_agentserve.vllm_compat.free_blocks import blocks_of, cached_blocks, pool_blocks

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
        """Calls that have had blocks and have not ended, by program."""
        self._critical: dict[Call, None] = {}
        """Critical calls that have not ended, but those of class batch: nobody waits for them."""
        self._critical_begun: dict[Call, None] = {}
        """Those of them that have blocks: they run, or come back from host memory, or are in a lane."""
        self._shared: int | None = 0
        """How many of their blocks are counted more than once if all are added up; None if it is not known."""
        self._reserved = 0
        """Free blocks that other calls may not have in this step."""
        self._passed: dict[Call, None] = {}
        """Waiting calls that were refused kept blocks."""
        self._asked: tuple[Call, bool] | None = None
        """The call that vLLM looked for blocks for last in this step, and whether it must not have kept ones."""
        self._looked_for: list[Call] = []
        """All those in this step that had none before, as far as is known."""

    @staticmethod
    def _name(call: Call) -> str | None:
        return None if call.owner is None else call.owner.context

    def arrived(self, call: Call) -> None:
        name, critical = self._name(call), call.critical
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
        if not self._reserves:
            return 0
        running = self._critical_in_use()
        used = pool_blocks(self._scheduler) - compat.free_blocks(self._scheduler)
        self.space.adapt(now_s, used + self.retention.away_blocks(self._running, None, critical=True))
        return self.space.reserved(running)

    @property
    def _reserves(self) -> bool:
        """Whether there is anybody whom blocks are reserved for. A call that load control holds needs none yet."""
        if not self.space.most:
            return False
        return bool(self.retention.critical_blocks) or len(self._critical) > self._waiting.held_critical

    def _critical_in_use(self) -> int:
        """Blocks that critical calls have; one that several of them have counts once."""
        held = {call: blocks_of(self._scheduler, call.request) for call in self._critical_begun}
        if not all(held.values()):
            # Prompts that came back, or were in a lane, may lose their blocks without a word.
            held = {call: blocks for call, blocks in held.items() if blocks}
            self._critical_begun, self._shared = dict.fromkeys(held), None
        added_up = sum(map(len, held.values()))
        if self._shared is None:
            # What a call shares it has from the moment on at which it got its first blocks.
            self._shared = added_up - len(set(map(id, chain.from_iterable(held.values()))))
        return added_up - self._shared

    def _over(self, call: Call) -> bool:
        """Whether it has waited for long enough; those of class batch until they are overdue."""
        since = call.passed_step
        return since is not None and not call.hints.batch and self._scheduler.current_step - since >= BYPASS_STEPS

    def asked(self, call: Call, computed: int, restored: int = 0) -> None:
        # While nothing runs vLLM keeps no headroom. All others wait behind who is overdue or was preempted.
        waits = call.key is not None and call.key.urgency > Urgency.OVERDUE and not self._over(call)
        tokens, critical, kept = call.request.num_tokens, call.critical, 0
        if waits and 2 * computed < tokens:
            kept = self.retention.away_blocks(self._running, self._name(call), critical)
        # A context that comes back from host memory takes as many blocks as one that is computed.
        if waits and not critical and 2 * (computed - restored) < tokens:
            kept = max(kept, self._reserved)
        if not call.holds or call.critical:
            self._looked_for.append(call)
        compat.keep_headroom(self._scheduler, self._headroom + kept)
        self._asked = call, kept > 0

    def after_schedule(self) -> None:
        compat.keep_headroom(self._scheduler, self._headroom)
        for call in self._looked_for:
            if blocks_of(self._scheduler, call.request):
                self._has_blocks(call)
        self._looked_for.clear()
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
        self._passed.pop(call, None)
        call.passed_step = None
        self._has_blocks(call)

    def _has_blocks(self, call: Call) -> None:
        """It runs, or its blocks are being filled in another way."""
        if call in self._critical and call not in self._critical_begun:
            self._critical_begun[call], self._shared = None, None
        name = self._name(call)
        # One that was preempted is admitted again.
        if name is not None and not call.holds:
            call.holds = True
            self._running[name] += 1

    def preempted(self, call: Call) -> None:
        if call in self._critical_begun:
            del self._critical_begun[call]
            self._shared = None

    def freed(self, call: Call) -> None:
        now, request, name = perf_counter(), call.request, self._name(call)
        self._passed.pop(call, None)
        self._critical.pop(call, None)
        self.preempted(call)
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
            "reserve_ratio": self.space.share if self._reserves else 0.0,
            "reserved_blocks": float(self._reserved if self._reserves else 0),
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
        strange = self._critical_begun.keys() - self._critical.keys()
        found += [f"{call.name!r} runs as a critical call, and is none" for call in strange]
        return found
