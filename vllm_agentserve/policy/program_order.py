"""Programs in the order of waiting calls: whose each call is, what it is charged, and the level at which it waits."""

from collections.abc import Callable, Iterable, MutableMapping, Sequence

from vllm_agentserve.policy.call import Call, Chunk
from vllm_agentserve.policy.engine import NoPrograms
from vllm_agentserve.policy.preemption import PreemptionAccount
from vllm_agentserve.policy.programs import ProgramTable


class ProgramOrder(NoPrograms):
    """Calls wait by what their programs have received.

    Args:
        table: of the programs.
        prompt_ms: what so many tokens over so many computed ones cost, in ms.
        account: of the work that preempted calls lose.
        counts: gets `program_explicit_requests` and its like.
        alternates: whether steps decode parts of the running calls in turns, as with pipeline parallelism.
    """

    relevels = True

    def __init__(
        self,
        table: ProgramTable,
        prompt_ms: Callable[[int, int], float],
        account: PreemptionAccount,
        counts: MutableMapping[str, float],
        alternates: bool = False,
    ) -> None:
        self.table = table
        self.account = account
        self.prompt_ms = prompt_ms
        self._counts = counts
        self._alternates = alternates

    def arrives(self, call: Call, now: float) -> None:
        owner = call.owner
        assert owner is not None
        self._counts[f"program_{owner.source}_requests"] += 1
        self.table.arrive(call, owner.key, owner.path_ms, now, owner.thread, owner.end)

    def waits(self, call: Call, now: float) -> None:
        # One that was in the prefill lane and is back waits again.
        self.table.pauses(call, now)
        self.table.update_level(call, now)

    def level(self, call: Call) -> int:
        return self.table.standing(call)

    def runs(self, call: Call, computed: int) -> None:
        tokens = call.request.num_tokens - computed
        if self.account.settle(call, self.prompt_ms(tokens, computed)):
            self._counts["program_preempted_tokens"] += tokens

    def computes(self, call: Call, chunk: Chunk, cost_ms: float, now: float) -> None:
        self.table.prefills(call, call.request.num_prompt_tokens, chunk, now)
        self.table.charge(call, cost_ms)

    def decodes(self, call: Call) -> None:
        self.table.decodes(call)

    def suspends(self, call: Call, now: float) -> None:
        self.table.suspends(call, now)

    def continues(self, call: Call, now: float) -> None:
        self.table.continues(call, now)

    def stepped(self, sequences: int, step_ms: float, chunks: Sequence[Chunk]) -> None:
        """What the chunks took of the step is charged to their calls already.

        All calls that decode now share the rest, also those that this step did not have: with steps in flight, and where steps
        alternate, they are not the same, and what is charged must add up to what the step took.
        """
        self.account.serve(step_ms)
        decoding = self.table.decoding
        if not decoding or not (sequences or self._alternates):
            return
        rest_ms = step_ms - sum(self.prompt_ms(chunk.tokens, chunk.context) for chunk in chunks) if sequences else 0.0
        share = min(sequences / decoding, 1.0) if self._alternates else 1.0
        self.table.advance(max(rest_ms, 0.0) / decoding, step_ms, share)

    def ends(self, call: Call, now: float) -> tuple[float, int]:
        self.account.settle(call, 0.0)
        ended = self.table.finish(call, now)
        return (ended[1], self.table.ended) if ended is not None else (0.0, 0)

    def faults(self, calls: Iterable[Call]) -> list[str]:
        return self.table.faults(calls)
