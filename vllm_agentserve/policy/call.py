"""One record per request, from its arrival to its end: every part reads and writes its own fields of it.

What can be derived (tokens left, whether it waits) is derived here and nowhere else.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vllm_agentserve.policy.gateway import LONGEST_NAME
from vllm_agentserve.policy.hints import NONE, Hints
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.program import bounded

if TYPE_CHECKING:
    from vllm_agentserve.policy.claims import LoadCall
    from vllm_agentserve.policy.order import AdmissionKey
    from vllm_agentserve.policy.program import ProgramCall
    from vllm_agentserve.policy.routes import Reason


class Chunk(NamedTuple):
    """Part of a prompt that one step computes.

    Args:
        phase: `COLD_PREFILL` or `RESUME_PREFILL`.
        tokens: how many.
        context: tokens of the sequence computed before them.
    """

    phase: Phase
    tokens: int
    context: int


@dataclass(frozen=True)
class Backlog:
    """The prompts that are not computed yet, waiting and running.

    Args:
        prompts: how many.
        tokens: what is left to compute of them all.
        waited_ms: how long those that wait have waited, on average.
        crowded: whether one that waits had no place or no KV blocks since none waited; those of class batch do not count.
    """

    prompts: int = 0
    tokens: int = 0
    waited_ms: float = 0.0
    crowded: bool = False


NO_BACKLOG = Backlog()


@dataclass(frozen=True)
class Owner:
    """The program of a request, and where in it the request belongs.

    Args:
        key: of the program.
        path_ms: length of the path to the request, see `ProgramTable`; None: the program's longest.
        thread: of the program that it continues.
        end: number of the end of the call it goes on from.
        source: `explicit`: its client names it; `inferred` from its prompt; `new`: the first of a program.
        sub_agent: whether its client says that another session started it.
    """

    key: str
    path_ms: float | None = None
    thread: str | None = None
    end: int | None = None
    source: Literal["explicit", "inferred", "new"] = "explicit"
    sub_agent: bool = False

    @property
    def context(self) -> str:
        """Names what comes back by itself: a program, or a thread of one, which has a context of its own."""
        return self.key if self.thread is None else f"{self.key} thread {self.thread}"


@dataclass(slots=True)
class LaneState:
    """What the prefill lane has to do with a request.

    Args:
        reason: why the prompt goes where it goes, until it is counted; None when nobody asked.
        phase: of a prompt that was given to the lane, until a step takes it up again; else None.
        start: first token whose KV the lane writes while it has the prompt; else None.
        hashes: of the blocks it fills meanwhile.
        failed: whether a lane failed on the prompt, which steps compute then.
    """

    reason: "Reason | None" = None
    phase: Phase | None = None
    start: int | None = None
    hashes: tuple[Hashable, ...] = ()
    failed: bool = False


@dataclass(slots=True, eq=False)
class Call:
    """What is known of one request.

    Args:
        request: vLLM's, or a simulated one, with `request_id`, `session_id`, `num_tokens` and `num_computed_tokens`.
        hints: what its client said of it.
        due: when it should be finished, in s on the clock of the policy; infinite where the client did not say.

    Set by the waiting list (`policy/waiting.py`):
        number: of its arrival; negative before it has waited.
        wait_number: of its wait, on the same scale: one that left for longer than a step waits anew when it is back.
        wait_since_s: when this wait began, in s; later by the time in which it could not run.
        left_step: the step in which it last left the list.
        key: by which it is sorted while it waits; else None.
        parked: whether it waits without being offered.
        awaited: what a parked one waits for: the hash of a KV block that is being filled, or None for room in the lane.
        blocked: whether the engine passed over it when it last looked at it: it waits for a grammar, an adapter or other data.
        blocked_since_s: since when, in s; what it was the last time where it is not.
        blocked_s: how long it was before that, all times together.
        unready: whether it is blocked by something of whose end is told, such as its grammar; the engine need not look at it.
        watched: whether the list will be told when that has ended.
        overdue: whether it has been overtaken for too long; while its prompt is computed, whether it has been there for as long.
        has_waited: whether it was parked for room in the lane for as long again after it was overdue.
        waits_for_unkept: whether it waits for KV blocks that are not kept for programs; others go before it.

    Set by the policy (`policy/engine.py`):
        phase: of its prompt, decided when a step first computes part of it.
        found_resume: whether it was a resume prefill, of whatever length, when it was looked at last while it waited.
        served_as: the queue whose share of the budget it gets; None unless steps are computing its prompt.
        restored: whether its KV is there, while it is one of `EnginePolicy.restoring`.
        place: by which its prompt is ordered among others that are being computed; None unless steps are computing it.
        lost_ms: what it would lose at most by the preemption that it still has to make up for; None without one.
        owner: the program it belongs to; None where nobody asks.
        began: number of that program in the order in which programs began.
        program: its part in a program, where calls are ordered by programs.
        load: what load control knows of it; None where that is off.
        cached_tokens: tokens of its prompt that the KV cache held when it was first admitted; None before that.
        host_from: how many of them were in the cache when the others were copied back from host memory; None without copies.
        computed_tokens: tokens of its prompt that were scheduled so far, those computed again after a preemption included.
        computed_ms: what these take of the whole device, with what the steps in which it was the first prompt take anyway.
        lane: what the prefill lane has to do with it.

    Set by retention (`scheduler/features/retention.py`):
        holds: whether it is counted as one that runs: it was admitted, and has not ended.
        passed_step: the step in which it was first refused kept blocks, since it waits; else None.

    Set by the metrics of classes (`scheduler/features/classes.py`):
        arrived_s: when it came, in s; None before that.
        admitted: whether a step has taken it up once.
        answered: whether it has had its first token.
    """

    request: Any
    hints: Hints = NONE
    due: float = inf
    number: int = -1
    wait_number: int = -1
    wait_since_s: float = 0.0
    left_step: int = -1
    key: "AdmissionKey | None" = None
    parked: bool = False
    awaited: Hashable | None = None
    blocked: bool = False
    blocked_since_s: float = 0.0
    blocked_s: float = 0.0
    unready: bool = False
    watched: bool = False
    overdue: bool = False
    has_waited: bool = False
    waits_for_unkept: bool = False
    phase: Phase | None = None
    found_resume: bool = False
    served_as: Phase | None = None
    restored: bool = False
    place: "AdmissionKey | None" = None
    lost_ms: float | None = None
    owner: Owner | None = None
    began: int = 0
    program: "ProgramCall | None" = None
    load: "LoadCall | None" = None
    cached_tokens: int | None = None
    host_from: int | None = None
    computed_tokens: int = 0
    computed_ms: float = 0.0
    holds: bool = False
    passed_step: int | None = None
    lane: LaneState = field(default_factory=LaneState)
    arrived_s: float | None = None
    admitted: bool = False
    answered: bool = False
    _tenant: str | None = field(default=None, init=False, repr=False)
    _bounded_session: str | None = field(default=None, init=False, repr=False)
    """Of a session id that is too long; its hash is made once."""

    @property
    def name(self) -> str:
        """The id of the request."""
        return str(self.request.request_id)

    @property
    def tenant(self) -> str:
        """Tells apart requests of one session id that cannot share KV: cache salt and adapter; empty without either."""
        if self._tenant is None:
            adapter = getattr(self.request, "lora_request", None)
            salt, name = getattr(self.request, "cache_salt", None), adapter and adapter.lora_name
            names = (salt and bounded(salt), name and bounded(name))
            self._tenant = f"tenant {names!r} " if salt or name else ""
        return self._tenant

    @property
    def named_session(self) -> str | None:
        """The session that its client names, a hash of it where it is too long; None if it names none."""
        named: str | None = self.request.session_id if self.hints.session is None else self.hints.session
        if named is None or len(named) <= LONGEST_NAME:
            return named
        if self._bounded_session is None:
            self._bounded_session = bounded(named)
        return self._bounded_session

    @property
    def session(self) -> str | None:
        """The session that its client names, which is another one for each tenant; None if it names none."""
        named = self.named_session
        return None if named is None else f"{self.tenant}{named}"

    @property
    def critical(self) -> bool:
        """Whether KV blocks are reserved for it, and the context of its program is kept for it: not for those of class batch,
        since nobody waits for them."""
        return self.hints.critical and not self.hints.batch

    def could_not_run_s(self, now: float) -> float:
        """How long it has been blocked until `now`, all times together, in s."""
        return self.blocked_s + (now - self.blocked_since_s if self.blocked else 0.0)

    @property
    def left(self) -> int:
        """Tokens that are still to be computed before it decodes."""
        return int(self.request.num_tokens - self.request.num_computed_tokens)

    @property
    def chunk_phase(self) -> Phase:
        """Its phase, as its chunks are counted."""
        assert self.phase is not None
        return self.phase
