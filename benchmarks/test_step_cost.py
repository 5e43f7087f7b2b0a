"""What AgentScheduler adds to a schedule() + update_from_output() pair of vLLM's own scheduler, without a model.

    make bench-cost

Stock and ours alternate step by step in one process, so that both see the same machine; the figure is the ratio of the
medians. pytest-benchmark prints each arm's own distribution.
"""

import statistics

import pytest
from schedulers import Driver, make_request, make_scheduler

STEPS = 3000


def steady(ours: bool, running: int, asynchronous: bool) -> Driver:
    """An engine with that many decodes and nothing else."""
    scheduler = make_scheduler(
        ours, asynchronous, max_num_seqs=max(running, 8), max_num_batched_tokens=8192, num_blocks=200_000
    )
    for number in range(running):
        scheduler.add_request(make_request(f"r{number}", 64, max_tokens=16_000))
    driver = Driver(scheduler, depth=2 if asynchronous else 1)
    while any(request.num_output_tokens < 8 for request in scheduler.running) or not scheduler.running:
        driver.step()
    return driver


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("running", [8, 64, 256])
def test_added_cost(running: int, asynchronous: bool, record_property) -> None:
    arms = {"stock": steady(False, running, asynchronous), "ours": steady(True, running, asynchronous)}
    for driver in arms.values():
        driver.took.clear()
    for step in range(STEPS):
        for name in ("stock", "ours") if step % 2 else ("ours", "stock"):
            arms[name].step()
    stock, ours = (statistics.median(arms[name].took) * 1e6 for name in ("stock", "ours"))
    print(
        f"\n{running:4d} running, {'async' if asynchronous else 'sync'}: stock {stock:7.1f} us, ours {ours:7.1f} us, "
        f"added {ours - stock:5.1f} us = {(ours / stock - 1) * 100:+.1f} %"
    )
    record_property("added_percent", (ours / stock - 1) * 100)


@pytest.mark.parametrize("running", [8, 64, 256])
@pytest.mark.parametrize("arm", ["stock", "ours"])
def test_step(benchmark, arm: str, running: int) -> None:
    driver = steady(arm == "ours", running, asynchronous=False)
    benchmark.pedantic(driver.step, rounds=1000, warmup_rounds=100)
