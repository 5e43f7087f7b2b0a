"""Host memory behind the KV cache: contexts that the cache has dropped are copied back instead of being computed again."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

from vllm_agentserve.kv.host import HostTier
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.engine import EnginePolicy
from vllm_agentserve.policy.waiting import WaitingList
from vllm_agentserve.scheduler.features import Feature
from vllm_agentserve.vllm_compat import scheduler as compat
from vllm_agentserve.vllm_compat.host import Host

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


class HostMemory(Feature):
    """vLLM's connector decides what is copied, and copies. Here its loads get what every admission gets: a place, and the room
    beside blocks that are kept for programs.

    Args:
        host: what the connector keeps.
        tier: the same for who decides; learns how long copies take.
        scheduler: whose requests.
        policy: of its calls.
        calls: by id of the request.
        counts: gets `host_restored_requests` and `host_stored_tokens`.
        others: the features that are asked before vLLM looks for KV blocks.
    """

    def __init__(
        self,
        host: Host,
        tier: HostTier,
        scheduler: "Scheduler",
        policy: EnginePolicy,
        calls: Mapping[str, Call],
        counts: MutableMapping[str, float],
        others: Sequence[Feature],
    ) -> None:
        self.host = host
        self.tier = tier
        self._scheduler = scheduler
        self._policy = policy
        self._calls = calls
        self._counts = counts
        self._others = others
        self._asked: list[Call] = []
        """In this step."""
        self._tokens: dict[str, int] = {}
        """Those that are being copied back, by id of the request: it may end before they are there."""
        host.follow(self.asked_to_restore, self.moved)

    def asked_to_restore(self, request: "Request", cached: int, tokens: int) -> bool:
        """Whether a waiting request gets KV blocks, so that `tokens` tokens after its `cached` ones are copied back into them."""
        policy, call = self._policy, self._calls.get(request.request_id)
        if call is None:
            return True
        waiting = policy.waiting
        if isinstance(waiting, WaitingList) and self._free_places(call) < 1:
            # It would hold blocks while it waits for a place. So would those behind it.
            waiting.closed = True
            return False
        for feature in self._others:
            feature.asked(call, cached + tokens, tokens)
        policy.restores(call)
        self._asked.append(call)
        self._tokens[call.name] = tokens
        if call.cached_tokens is None:
            call.host_from = cached
        return True

    def _free_places(self, call: Call) -> int:
        """Places that are neither taken nor meant for other calls that come back."""
        meant = sum(compat.has_loaded(other.request) for other in self._policy.restoring if other is not call)
        return compat.free_places(self._scheduler) - meant

    def after_schedule(self) -> None:
        for call in self._asked:
            if compat.has_loaded(call.request):
                self._counts["host_restored_requests"] += 1
            else:
                # There were no blocks for it.
                self._tokens.pop(call.name, None)
                if call.cached_tokens is None:
                    call.host_from = None
        self._asked.clear()
        self._forget_others()

    def _forget_others(self) -> None:
        """Those that run, and those that have no blocks, are not restored."""
        restoring = self._policy.restoring
        for call in [call for call in restoring if not compat.has_loaded(call.request)]:
            del restoring[call]

    def moved(self, names: set[str], seconds: float, stored_bytes: int) -> None:
        """Copies have ended: back to these requests, in so many seconds of copying; and so many bytes to the host."""
        self.tier.restored(sum(self._tokens.pop(name, 0) for name in names), seconds)
        for name in names:
            call = self._calls.get(name)
            if call is not None:
                self._policy.is_restored(call)
        if stored_bytes:
            self._counts["host_stored_tokens"] += round(stored_bytes / self.host.token_bytes)

    def before_reset(self) -> None:
        # The blocks of those that have ended meanwhile are held until their copies are there.
        if self._tokens:
            raise RuntimeError(
                f"the KV of {len(self._tokens)} prompts is being copied back from host memory, so the prefix cache cannot be "
                "reset now. Try again in a moment."
            )
        if self.host.takes_back:
            # Those that have their copies and wait for a step give their blocks back, as running ones do.
            compat.take_back(self._scheduler, set())
            self._forget_others()

    def report(self) -> dict[str, float]:
        return {
            "host_pool_tokens": float(self.host.tokens),
            "host_used_tokens": float(self.host.used_tokens),
            "host_restoring_requests": float(len(self._policy.restoring)),
            "host_restore_tokens_per_second": self.tier.tokens_per_s or 0.0,
        }

    def faults(self, calls: Iterable[Call]) -> list[str]:
        return [
            f"{call.name!r} is being restored, and is not among those that hold blocks and wait"
            for call in self._policy.restoring
            if not compat.has_loaded(call.request)
        ]
