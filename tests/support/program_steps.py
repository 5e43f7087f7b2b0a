"""One request at a time on vLLM's real scheduler: the order in which programs get their turn."""

from typing import Any

from tests.support.schedulers import Driver, make_request, make_scheduler


def started(policy: str, asynchronous: bool = False, **given: Any) -> tuple[Any, Driver]:
    options = {"policy": policy, "program_quantum_ms": 1.0} | given.pop("options", {})
    scheduler: Any = make_scheduler(asynchronous=asynchronous, options=options, **{"max_num_seqs": 1} | given)
    return scheduler, Driver(scheduler, depth=2 if asynchronous else 1)


def served(scheduler: Any, driver: Driver, limit: int = 2000) -> list[str]:
    """Runs until nobody is left; returns the order in which requests were first scheduled."""
    order: list[str] = []
    while scheduler.requests:
        assert limit > 0
        limit -= 1
        order += [name for name in driver.step() if name not in order]
    return order


def have_run(scheduler: Any, driver: Driver, *sessions: str, tokens: int = 40) -> None:
    """A call of each of these sessions, one after the other."""
    for session in sessions:
        scheduler.add_request(make_request(f"warm-{session}", 50, max_tokens=tokens, session=session))
        served(scheduler, driver)
