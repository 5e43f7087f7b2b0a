"""A server of ours for the clients of others, and the environment in which these are installed. `make client-check` runs them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients.results import Row, table
from tests.support.clients.hub_cache import make_hub_cache
from tests.support.paths import ROOT
from vllm_agentserve.bench.server import VllmServer

SERVE = [
    *("--dtype", "bfloat16", "--max-model-len", "8192", "--max-num-seqs", "8", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(1 << 30)),
    *("--scheduler-cls", "vllm_agentserve.AgentScheduler"),
    *("--additional-config", json.dumps({"agentserve": {"policy": "plas", "stats_interval_ms": 50}})),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
]


@pytest.fixture(scope="session")
def clients() -> Path:
    """The folder with the clients' programs; skips where `make client-check` has not named it."""
    folder = os.environ.get("AGENTSERVE_CLIENTS")
    if not folder:
        pytest.skip("`make client-check` runs the clients of others")
    return Path(folder).resolve() / "bin"


@pytest.fixture(scope="session")
def hub(clients: Path, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """The toy model's name in a cache of a model hub, and an environment in which it is found there without a network."""
    home = tmp_path_factory.mktemp("hub")
    name = make_hub_cache(toy_model, home)
    return name, os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """This process, and those that it starts meanwhile, run on these cores only; all of them where there are none of these."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


CORES = sorted(os.sched_getaffinity(0))
SERVER_CORES, CLIENT_CORES = set(CORES[: len(CORES) // 2]), set(CORES[len(CORES) // 2 :])


@pytest.fixture(scope="session")
def server(clients: Path, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """Its cores are its own, so that a client that computes much does not slow it down."""
    with on_cores(SERVER_CORES):
        running = VllmServer(toy_model, SERVE, log=tmp_path_factory.mktemp("server") / "log").__enter__()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def own_cores() -> Iterator[None]:
    """This test and its clients leave the server's cores alone."""
    with on_cores(CLIENT_CORES):
        yield


@pytest.fixture(scope="session")
def rows(clients: Path) -> Iterator[list[Row]]:
    """What every client did; the table of it is printed at the end, and written into bench-results/."""
    found: list[Row] = []
    yield found
    folder = ROOT / "bench-results" / "clients"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table(found))
    print(f"\n{table(found)}\n{folder / 'table.md'}")
