"""Our scheduler with a pinned controller: chunks cost 0.1 ms per token, steps without prefill nothing.

The target is 10 ms. So a step beside decodes has room for 100 prompt tokens.
"""

from typing import Any

from vllm.v1.request import Request

from tests.support.schedulers import Driver, make_request, make_scheduler
from tests.support.step_models import FlatModel
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.phase import Phase


class PinnedModel(FlatModel):
    """FlatModel that does not learn."""

    def decode_ms(self, sequences: int, context: int) -> float:
        return 0.0

    def learn_decode(self, *_: Any) -> None:
        pass

    def learn_prefill(self, *_: Any) -> float:
        return 0.0


class PinnedController(BudgetController):
    """A controller whose clock stands still: every step takes exactly nothing."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.whole.model = PinnedModel()

    def observe(self, *_: Any, **__: Any) -> None:
        pass


def pinned(asynchronous: bool = False, options: dict[str, Any] | None = None, **given: Any) -> tuple[Any, Driver]:
    given = {
        "options": {"tpot_slo_ms": 10, "first_chunk_tokens": 4096, "chunk_granularity_tokens": 1, **(options or {})}
    } | given
    scheduler = make_scheduler(asynchronous=asynchronous, controller=PinnedController, **given)
    return scheduler, Driver(scheduler, depth=2 if asynchronous else 1)


def phases(scheduler: Any) -> dict[str, Phase]:
    """What every running sequence is tagged before the next step."""
    tags = {request.request_id: Phase.DECODE for request in scheduler.running}
    return tags | {call.name: call.chunk_phase for call in scheduler.engine_policy.prefilling}


def context_of(request: Request) -> list[int]:
    return list(request.all_token_ids)


def finish(scheduler: Any, driver: Driver, name: str) -> None:
    """Steps until a request is through."""
    for _ in range(500):
        if name not in scheduler.requests:
            return
        driver.step()
    raise AssertionError(f"{name} did not finish")


def waiting(scheduler: Any) -> list[str]:
    return [request.request_id for request in scheduler.waiting]


def with_cached_contexts(scheduler: Any, driver: Driver, *lengths: int) -> list[list[int]]:
    """Runs prompts of these lengths through, so that their blocks are cached, and returns them."""
    contexts = []
    for number, length in enumerate(lengths):
        request = make_request(f"warm-{number}", length, max_tokens=1)
        contexts.append(context_of(request))
        scheduler.add_request(request)
        finish(scheduler, driver, request.request_id)
    return contexts
