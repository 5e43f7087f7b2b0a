"""Load control: holds the first calls of programs back while the contexts of those under way fill the KV cache."""

from collections.abc import Iterable, MutableMapping
from logging import Logger
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.engine import EnginePolicy
from vllm_agentserve.policy.load import LoadControl
from vllm_agentserve.policy.load_limit import Limit, Reason
from vllm_agentserve.policy.waiting import HELD, WaitingList
from vllm_agentserve.scheduler.features import Feature
from vllm_agentserve.scheduler.load_stats import count_hold, count_returning, load_report
from vllm_agentserve.vllm_compat import scheduler as compat

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

logger: Logger = init_logger("vllm.agentserve")

TELL_S = 10.0
"""What decisions are made from is logged when they change, not more often than that."""
ASK_S = 0.1
"""All held calls are asked for after so long."""

REPORT_S = 1.0
"""For a report claims are counted again after so long, sooner where others ask for them or the engine is idle."""


class LoadLog:
    """What is logged of load control: that first calls are held, and decisions that differ from the last one that was logged."""

    def __init__(self) -> None:
        self._held = False
        self._told: tuple[Reason, float] = "fits", -inf
        """The decision that was last logged, and when."""

    def held(self) -> None:
        """A first call is held."""
        if self._held:
            return
        self._held = True
        logger.info(
            "agentserve: load control holds the first calls of programs back: the contexts of those under way fill the "
            "KV cache. Further ones are only counted. `load_control=false` turns it off."
        )

    def decided(self, limit: Limit, now_s: float) -> None:
        """The limit may be another one than before."""
        reason, weighed = limit.reason, limit.weighed
        if reason == self._told[0] or now_s - self._told[1] < TELL_S:
            return
        self._told = reason, now_s
        if weighed is None or reason == "fits":
            return
        turn = weighed.turn
        logger.info(
            "agentserve: load control: %s for %.0f programs. %.2f turns per second are expected with one, %.2f without: tools "
            "take %.2f s, an answer %.2f s, new tokens of a prompt %.3f s, its context again %.3f s.",
            "a limit" if reason == "model" else "no limit",
            weighed.programs,
            weighed.limited,
            weighed.without,
            turn.gap_s,
            turn.decode_s,
            turn.read_s,
            turn.again_s,
        )


class Load(Feature):
    """Args:
    control: decides.
    scheduler: whose requests.
    policy: of their order.
    waiting: the calls that wait; those that are held are parked there.
    counts: gets `load_held_requests`, `load_hold_seconds`, and those of `scheduler/load_stats.py`.
    """

    def __init__(
        self,
        control: LoadControl,
        scheduler: "Scheduler",
        policy: EnginePolicy,
        waiting: WaitingList,
        counts: MutableMapping[str, float],
    ) -> None:
        self.control = control
        self._scheduler = scheduler
        self._policy = policy
        self._waiting = waiting
        self._counts = counts
        self._decodes = 0
        self._asked_s = self._reported_s = -inf
        self._log = LoadLog()

    def arrived(self, call: Call) -> None:
        now, owner = perf_counter(), call.owner
        assert owner is not None
        call.load = self.control.arrive(
            owner.key,
            now,
            call.request.num_prompt_tokens,
            named=owner.source == "explicit",
            can_return=compat.can_return(self._scheduler, call.request),
            batch=call.hints.batch,
            ahead=call.hints.deadline_ms is not None or call.hints.precedence > 0,
            tenant=call.tenant,
        )
        if call.key is None or compat.fetches_prompt(self._scheduler, call.request):
            # A part of a prompt that is streamed is not in the list yet. Blocks to fetch are kept by another engine meanwhile.
            return
        if self.control.may_begin(call.load, now, idle=self._idle(call)):
            if call.blocked:
                self.control.cannot_run(call.load)
        else:
            self._waiting.park({call: HELD})
            self._counts["load_held_requests"] += 1
            self._log.held()
        self._log.decided(self.control.limit, now)

    def _idle(self, but: Call | None = None) -> bool:
        """Whether the engine has nothing else to do; `but`: a waiting call that does not count. Nor do those that cannot run."""
        scheduler = self._scheduler
        return not (scheduler.running or self._waiting.any_can_run(but) or compat.waits_elsewhere(scheduler))

    def before_step(self, decodes: int, context: int) -> None:
        self._decodes = decodes
        if not self._waiting.parked:
            return
        now = perf_counter()
        if self.control.closed(now):
            return
        idle, refused = self._idle(), False
        # After a no the others are asked for now and then only: thousands may be held.
        everybody = now - self._asked_s >= ASK_S
        if everybody:
            self._asked_s = now

        def ready(call: Call) -> bool:
            nonlocal idle, refused
            load = call.load
            if refused or call.awaited is not HELD or load is None:
                return False
            if not self.control.may_begin(load, now, idle=idle):
                refused = not everybody and self.control.closed(now)
                return False
            if not compat.may_run(call.request):
                self.control.cannot_run(load)
            idle = False
            self._counts["load_hold_seconds"] += now - load.came_s
            count_hold(self._counts, call.hints.batch, now - load.came_s)
            return True

        self._waiting.release(ready)
        self._log.decided(self.control.limit, now)

    def admitted(self, call: Call) -> None:
        load, owner, cached = call.load, call.owner, call.cached_tokens or 0
        if load is None or owner is None:
            return
        # Of threads only the program's longest context is known.
        if load.program.turns and not (load.begun or owner.sub_agent or owner.thread):
            context = min(load.program.context, call.request.num_prompt_tokens)
            count_returning(self._counts, context, cached, call.host_from)
        self.control.begin(load, perf_counter(), cached, child=owner.sub_agent)

    def freed(self, call: Call) -> None:
        now, request, load, owner = perf_counter(), call.request, call.load, call.owner
        if load is None or owner is None:
            # It did not come through `add_request`.
            return
        # Clients that have read enough close the stream: that too is an answer.
        if call.cached_tokens is None or not request.num_output_tokens:
            self.control.abort(load, now)
            return
        model, context = self._policy.controller.whole.model, request.num_tokens
        alone_ms = model.decode_ms(1, context)
        self.control.end(
            load,
            now,
            request.num_tokens,
            read_s=call.computed_ms / 1000,
            read_tokens=call.computed_tokens,
            decode_s=request.num_output_tokens * alone_ms / 1000,
            beside_s=request.num_output_tokens * max(model.decode_ms(2, 2 * context) - alone_ms, 0.0) / 1000,
            whole_s=model.chunk_ms(context, 0) / 1000,
            # Where a sub-agent ends, its program goes on.
            last=call.hints.last and not owner.sub_agent,
            tool=call.hints.tool,
            child=owner.sub_agent,
        )

    def report(self) -> dict[str, float]:
        now, idle = perf_counter(), self._idle()
        # Claims of programs that have stayed away are gone only once they are counted, which takes a millisecond. An engine that
        # becomes idle makes its last report now.
        due = now - self._reported_s >= REPORT_S
        if due:
            self._reported_s = now
        counts = due or idle or self.control.count.counting
        return load_report(self.control.report(now if counts else None, at_once=idle), self._counts)

    def faults(self, calls: Iterable[Call]) -> list[str]:
        return self.control.faults({call.load for call in calls if call.load is not None})
