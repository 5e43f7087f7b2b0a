"""Faults that need no server: queues of ten thousand, clocks that leap, a full disk. Nothing is lost."""

import ast
import importlib
import itertools
import pkgutil
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.calls import call_of
from tests.support.paths import ROOT
from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve import scheduler

PACKAGE = ROOT / "vllm_agentserve"


def finish_all(driver: Driver, limit: int) -> int:
    """Steps until nobody is left; returns how many steps that took."""
    for step in range(limit):
        if not driver.scheduler.requests and not driver.in_flight:
            return step
        driver.step()
    raise AssertionError(f"{len(driver.scheduler.requests)} requests are left after {limit} steps")


@pytest.mark.parametrize("requests", [1_500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["fcfs", "plas", "atlas"])
def test_thousands_of_queued_requests_are_all_served(policy: str, requests: int) -> None:
    engine = make_scheduler(options={"mode": "time-sliced", "tpot_slo_ms": 40, "policy": policy}, max_num_seqs=64)
    for number in range(requests):
        engine.add_request(make_request(f"r{number}", 20 + number % 7, max_tokens=2, session=f"s{number % 900}"))
    assert engine.integrity.faults() == []
    driver = Driver(engine)
    for _ in range(40):
        driver.step()
    assert engine.integrity.faults() == []
    finish_all(driver, 60_000)
    assert engine.integrity.faults() == []
    assert engine.get_num_unfinished_requests() == 0


@pytest.mark.parametrize("leap_s", [3600.0 * 24 * 30, -5.0, 0.0])
@pytest.mark.parametrize("policy", ["fcfs", "plas"])
def test_a_clock_that_leaps_or_stands_still_stops_nobody(
    leap_s: float, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every clock of ours leaps at every look: forward as after a suspension, backward as none should, or not at all."""
    ticks = itertools.count(1)

    def clock() -> float:
        return 1e6 + next(ticks) * leap_s

    replaced = set()
    for found in pkgutil.walk_packages(scheduler.__path__, f"{scheduler.__name__}."):
        module = importlib.import_module(found.name)
        for name in {"perf_counter", "monotonic"} & vars(module).keys():
            monkeypatch.setattr(module, name, clock)
            replaced.add(found.name.rpartition(".")[2])
    assert {"scheduler", "build"} <= replaced
    engine = make_scheduler(options={"mode": "time-sliced", "tpot_slo_ms": 40, "policy": policy}, max_num_seqs=4)
    for number in range(24):
        hints = {"agent_deadline_ms": 100} if number % 3 else None
        engine.add_request(make_request(f"r{number}", 30 * (1 + number % 9), max_tokens=5, hints=hints))
    finish_all(Driver(engine), 5000)
    assert engine.integrity.faults() == []


def test_the_wall_clock_decides_nothing() -> None:
    """An administrator, or NTP, sets it; only clocks that run on are asked where something is decided."""
    for path in [
        file for part in ("policy", "scheduler", "lanes", "vllm_compat") for file in (PACKAGE / part).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("time.time", "datetime.now", "datetime.utcnow"), (
                    f"{path}:{node.lineno}"
                )
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert "time" not in [alias.name for alias in node.names], f"{path}:{node.lineno}"


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_nothing_that_was_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(ROOT / "docs" / "results" / "bench-react-plas", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".gz", ".jsonl")}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_agentserve.cli", "bench", "report", str(folder)],
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert done.returncode == 1
    assert ": File too large. What was measured until then is kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_a_queue_that_lost_its_order_is_found() -> None:
    """The check above has teeth."""
    engine: Any = make_scheduler(options={"mode": "time-sliced"})
    for number in range(3):
        engine.add_request(make_request(f"r{number}", 600))
    entries = engine.engine_policy.waiting._line.entries
    entries.append((engine.calls["r0"].key, 99, call_of("ghost")))
    entries.reverse()
    found = engine.integrity.faults()
    assert "the queue is not in order" in found
    assert "the queue remembers 'ghost', which is gone" in found
