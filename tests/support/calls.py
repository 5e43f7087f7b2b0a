"""Calls for the tests of the policy, which need no vLLM request."""

from types import SimpleNamespace
from typing import Any

from vllm_agentserve.policy.call import Call, Chunk
from vllm_agentserve.policy.hints import Hints
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.preemption import HORIZON_MS, PreemptionAccount


def cold(tokens: int, context: int) -> Chunk:
    """A chunk of a cold prefill."""
    return Chunk(Phase.COLD_PREFILL, tokens, context)


def call_of(name: str, tokens: int = 100, computed: int = 0, session: str | None = None, **hints: Any) -> Call:
    request = SimpleNamespace(
        request_id=name, session_id=session, num_tokens=tokens, num_prompt_tokens=tokens, num_computed_tokens=computed
    )
    return Call(request, Hints(**hints))


class NamedAccount(PreemptionAccount):
    """A preemption account that is told names instead of calls."""

    def __init__(self, share: float, horizon_ms: float = HORIZON_MS) -> None:
        super().__init__(share, horizon_ms)
        self.calls: dict[str, Call] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.calls and self.calls[name].lost_ms is not None

    def preempt(self, name: Any, worst_ms: float) -> None:
        super().preempt(self.calls.setdefault(name, call_of(name)), worst_ms)

    def settle(self, name: Any, ms: float) -> bool:
        call = name if isinstance(name, Call) else self.calls.get(name)
        return call is not None and super().settle(call, ms)
