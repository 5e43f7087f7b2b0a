"""Orders that only a simulator can have: vLLM's own, and two that know more than an engine does."""

from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.engine import EnginePolicy, NoPrograms
from vllm_agentserve.policy.order import AdmissionKey, Urgency


class StockPolicy(EnginePolicy):
    """vLLM's own order: by arrival."""

    def key(self, call: Call) -> AdmissionKey:
        return AdmissionKey(Urgency.NORMAL, cold=True, arrival=call.number)


class ShortestLeft(NoPrograms):
    """The program with the least work left goes first, which only an oracle knows."""

    relevels = True

    def level(self, call: Call) -> int:
        return round(call.request.live.left_ms * 1000)


class FewestServed(NoPrograms):
    """The program with the fewest calls served goes first."""

    relevels = True

    def level(self, call: Call) -> int:
        return int(call.request.live.served)
