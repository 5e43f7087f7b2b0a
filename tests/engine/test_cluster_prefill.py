"""A prefiller and a decoder of the toy model on Ray Serve: KV moves once per conversation, and answers stay those of stock."""

import concurrent.futures
import importlib.util
import os
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster_process import ClusterProcess, descendants
from tests.engine.test_cluster import BLOCK, OPTIONS, Cluster, command_of, running
from vllm_agentserve.bench.server import VllmServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: it comes with the extra `cluster`"),
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed"),
]  # fmt: skip
THRESHOLD = 500
WAIT_S = 10.0
TURNS = 3
IDLE_CORES = 0.05


def prompt_of(number: int, tokens: int) -> list[int]:
    return [(number * 97 + place * 31) % 4000 + 5 for place in range(tokens)]


def turns_of(number: int, tokens: int) -> list[list[int]]:
    prompt = prompt_of(number, tokens)
    return [[*prompt, *(5 + turn for turn in range(more) for _ in range(150))] for more in range(TURNS)]


CONVERSATIONS = {
    f"conversation {number}": turns_of(number, 900 + 60 * number if number % 3 else 200) for number in range(6)
}


@pytest.fixture(scope="module")
def expected(toy_model: Path) -> dict[str, list[str]]:
    """What stock vLLM answers."""
    stock = [*OPTIONS[: OPTIONS.index("--additional-config")]]
    del stock[(place := stock.index("--served-model-name")) : place + 2]
    with VllmServer(toy_model, stock) as server:
        alone = Cluster(server.port, server.log, ClusterProcess(server.port, server.log, 0))
        return {
            name: [alone.complete(turn, tokens=8).json["choices"][0]["text"] for turn in turns]
            for name, turns in CONVERSATIONS.items()
        }


@pytest.fixture(scope="module")
def cluster(
    expected: dict[str, list[str]], toy_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    own = ("--engines", "1", "--prefillers", "1", "--prefill-tokens", str(THRESHOLD), "--prefill-seconds", str(WAIT_S))
    with running(toy_model, tmp_path_factory.mktemp("cluster") / "log", *own) as found:
        yield found


def prefills(cluster: Cluster, outcome: str = "") -> float:
    labels = {"outcome": outcome} if outcome else {}
    return cluster.metric("agentserve_cluster_prefills_total", **labels)


def prefiller(cluster: Cluster) -> int:
    """The process of the prefiller's `vllm serve`."""
    (pid,) = (pid for name, pid in cluster.engines().items() if name != some_engine(cluster))
    return pid


def some_engine(cluster: Cluster) -> str:
    return cluster.complete([5, 6, 7]).engine


def test_kv_moves_once_per_conversation_and_answers_are_those_of_stock(
    cluster: Cluster, expected: dict[str, list[str]]
) -> None:
    def converse(name: str) -> tuple[list[str], list[int]]:
        answers = [cluster.complete(turn, tokens=8, session_id=name).json for turn in CONVERSATIONS[name]]
        cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in answers]
        return [one["choices"][0]["text"] for one in answers], cached

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = dict(zip(CONVERSATIONS, pool.map(converse, CONVERSATIONS), strict=True))
    assert {name: texts for name, (texts, _) in found.items()} == expected
    for name, (_, cached) in found.items():
        for now, before in zip(cached[1:], CONVERSATIONS[name], strict=False):
            assert now >= len(before) - 2 * BLOCK
    time.sleep(1.0)
    long = sum(len(turns[0]) >= THRESHOLD for turns in CONVERSATIONS.values())
    assert prefills(cluster) == prefills(cluster, "moved") == long
    assert cluster.metric("vllm:nixl_xfer_time_seconds_count") == long
    assert cluster.metric("vllm:nixl_num_failed_transfers_total") == 0


def test_streams_and_chats_are_prefilled_too(cluster: Cluster) -> None:
    before = prefills(cluster, "moved")
    words = " ".join(f"word {number}" for number in range(400))
    body: dict[str, Any] = {"model": "model", "max_tokens": 8, "temperature": 0, "stream": True}
    chat = body | {"messages": [{"role": "user", "content": words}], "stream_options": {"include_usage": True}}
    with cluster.open("POST", "/v1/chat/completions", chat, X_Session_ID="chat") as answer:
        events = answer.read().decode()
    assert events.endswith("data: [DONE]\n\n"), events
    with cluster.open("POST", "/v1/messages", body | {"messages": chat["messages"]}, X_Session_ID="m") as answer:
        events = answer.read().decode()
    assert "message_stop" in events, events
    time.sleep(1.0)
    assert prefills(cluster, "moved") == before + 2


def cores(pids: set[int], seconds: float = 4.0) -> float:
    """What these processes and their threads used."""

    def ticks() -> int:
        found = 0
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found += int(fields[11]) + int(fields[12])
        return found

    before = ticks()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def test_an_idle_pair_does_not_burn_a_core(cluster: Cluster) -> None:
    """NIXL's progress thread would."""
    time.sleep(3.0)
    for pid in cluster.engines().values():
        found = {one for one in descendants(pid) if "EngineCore" in command_of(one)}
        assert len(found) == 1
        assert statistics.median(cores(found) for _ in range(3)) < IDLE_CORES


def test_it_listens_on_this_machine_only(cluster: Cluster) -> None:
    """What moves KV too."""
    listening = subprocess.run(["ss", "-ltnpH"], text=True, capture_output=True, check=True).stdout
    ours, seen = {one for pid in cluster.engines().values() for one in descendants(pid)}, list[str]()
    for line in listening.splitlines():
        if ours & set(map(int, re.findall(r"pid=(\d+)", line))):
            seen.append(line)
            assert line.split()[3].startswith(("127.0.0.1:", "[::ffff:127.0.0.1]:")), line
    # Both say on a port of their own where their KV is.
    assert len(seen) >= 2, listening


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_clients_cannot_name_kv(cluster: Cluster, path: str) -> None:
    """With a connector that reads KV this would end an engine, or show one client what another one sent."""
    engines = set(cluster.engines().values())
    body: dict[str, Any] = {
        "model": "model",
        "max_tokens": 2,
        "prompt": "a",
        "messages": [{"role": "user", "content": "a"}],
    }
    for named in ({"kv_transfer_params": {"do_remote_prefill": True}}, {"vllm_xargs": {"kv_transfer_params": 0}}):
        answer = cluster.ask("POST", path, body | named)
        assert answer.status == 400, answer.body
        assert "kv_transfer_params is not allowed" in answer.json["error"]["message"]
    assert cluster.complete([5, 6, 7]).status == 200
    assert set(cluster.engines().values()) == engines


def test_new_conversations_go_on_without_the_prefiller(cluster: Cluster, expected: dict[str, list[str]]) -> None:
    pid = prefiller(cluster)
    name = next(name for name, turns in CONVERSATIONS.items() if len(turns[0]) >= THRESHOLD)
    cluster.complete(prompt_of(77, 1200), session_id="before")
    moved = prefills(cluster, "moved")
    (core,) = (one for one in descendants(pid) if "EngineCore" in command_of(one))
    os.kill(core, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    for number in range(3):
        began = time.monotonic()
        answer = cluster.complete(CONVERSATIONS[name][0], tokens=8, session_id=f"without {number}")
        assert time.monotonic() - began < WAIT_S + 10
        assert answer.status == 200, answer.body
        assert answer.json["choices"][0]["text"] == expected[name][0]
    assert cluster.complete([*prompt_of(77, 1200), 7, 8], session_id="before").status == 200
    time.sleep(1.0)
    assert prefills(cluster, "moved") == moved
    assert prefills(cluster, "failed") + prefills(cluster, "late") >= 1
