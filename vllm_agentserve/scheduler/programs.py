"""Programs as the scheduler sees them: which request belongs to which, and what it is charged."""

from time import monotonic
from typing import TYPE_CHECKING

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.families import Families
from vllm_agentserve.policy.hints import Hints
from vllm_agentserve.policy.lineage import Lineage
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.preemption import PreemptionAccount
from vllm_agentserve.policy.programs import ProgramTable
from vllm_agentserve.scheduler.stats import StatsCollector

if TYPE_CHECKING:
    from vllm.v1.request import Request


class ProgramTracker:
    """Told of every request from its arrival to its end.

    A request with a session id belongs to the program of that name, or to that of the session that its client says started it
    (`agent_parent`). Without one it belongs to the program of the request
    whose prompt and answer its own prompt begins with (`Lineage`), and else is the first of a new program.

    Args:
        options: policy, levels, and when a call is promoted.
        controller: prices prompts.
        stats: counts programs told and inferred.
        block_size: tokens per KV block.
        alternates: whether steps decode parts of the running calls in turns, as with pipeline parallelism.
    """

    def __init__(
        self,
        options: AgentServeConfig,
        controller: BudgetController,
        stats: StatsCollector,
        block_size: int,
        alternates: bool = False,
    ) -> None:
        assert options.policy != "fcfs"
        self.table = ProgramTable(
            options.policy,
            options.program_levels,
            options.program_quantum_ms,
            options.program_promote_ratio,
            options.program_ttl_s,
        )
        self._lineage = Lineage(block_size)
        self._families = Families()
        self.account: PreemptionAccount | None = None
        """Set where calls may be preempted: it counts all service."""
        self._alternates = alternates
        self._controller = controller
        self._stats = stats

    def arrives(self, request: "Request", hints: Hints) -> None:
        found = self._lineage.find(request.block_hashes, request.prompt_token_ids or ())
        thread, end = hints.thread, None
        if request.session_id is not None or hints.parent is not None:
            # Who only names its parent is one of its threads, like a sub-agent with a session of its own.
            session = request.session_id if request.session_id is not None else hints.parent
            root = self._families.root(session or "", hints.parent)
            thread = thread or (session if root != session else None)
            key, path = f"session {root}", None
            self._stats.counts["program_explicit_requests"] += 1
        elif found is not None:
            key, path = found.program, None
            self._stats.counts["program_inferred_requests"] += 1
        else:
            key, path = f"request {request.request_id}", 0.0
            self._stats.counts["program_new_requests"] += 1
        if found is not None and found.program == key:
            path, end = found.path_ms, found.end
        self.table.arrive(request.request_id, key, path, monotonic(), thread, end)

    def level(self, request_id: str) -> int:
        """The level of a request in the queue; one that was in the prefill lane and is back waits again."""
        now = monotonic()
        self.table.pauses(request_id, now)
        return self.table.level(request_id, now)

    def yielded(self, request_id: str) -> bool:
        """Whether a request gave up its place to another: it waits at its level, not in front as other preempted ones."""
        return self.account is not None and request_id in self.account

    def runs(self, request: "Request", computed: int) -> None:
        """A request is admitted with so many of its tokens computed; one that had given up its place lost the others."""
        tokens = request.num_tokens - computed
        if self.account is not None and self.account.settle(request.request_id, self.prompt_ms(tokens, computed)):
            self._stats.counts["program_preempted_tokens"] += tokens

    def prompt_ms(self, tokens: int, context: int) -> float:
        """What so many tokens over `context` computed ones cost."""
        return self._controller.whole.model.chunk_ms(tokens, context, first=False)

    def computes(self, request: "Request", phase: Phase, tokens: int, context: int) -> None:
        """A chunk of the prompt is scheduled: tokens over `context` computed ones."""
        table, request_id = self.table, request.request_id
        resume, now = phase is Phase.RESUME_PREFILL, monotonic()
        table.prefills(request_id, resume, request.num_prompt_tokens, context, tokens, now)
        table.charge(request_id, self.prompt_ms(tokens, context))

    def stepped(self, sequences: int, step_ms: float, chunks: list[tuple[Phase, int, int]] | None) -> None:
        """A step with so many decodes took so long; what its chunks took of it is charged to them already.

        All calls that decode now share the rest, also those that this step did not have: with steps in flight, and where steps
        alternate, they are not the same, and what is charged must add up to what the step took.
        """
        if self.account is not None:
            self.account.serve(step_ms)
        decoding = self.table.decoding
        if not decoding or not (sequences or self._alternates):
            return
        rest_ms = step_ms if sequences else 0.0
        for _, tokens, context in chunks or ():
            rest_ms -= self.prompt_ms(tokens, context)
        part = min(sequences / decoding, 1.0) if self._alternates else 1.0
        self.table.advance(max(rest_ms, 0.0) / decoding, step_ms, part)

    def ends(self, request: "Request") -> None:
        """The request is finished or aborted; its answer may be gone on from."""
        if self.account is not None:
            self.account.settle(request.request_id, 0.0)
        ended = self.table.finish(request.request_id, monotonic())
        if ended is not None and request.num_output_tokens:
            hashes, tokens, prompt_tokens = request.block_hashes, request.all_token_ids, request.num_prompt_tokens
            self._lineage.remember(*ended, hashes, tokens, prompt_tokens, self.table.ended)
