"""Faults over HTTP, on a server with lanes: long prompts, slow readers, secrets, and an engine that is killed."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lane_engine import lanes_run_here
from vllm_agentserve.bench.server import VllmServer

pytestmark = [pytest.mark.engine, lanes_run_here]
MAX_LEN = 4096
SERVE = [
    *("--dtype", "float32", "--max-model-len", str(MAX_LEN), "--max-num-seqs", "8", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(1 << 29), "--scheduler-cls", "vllm_agentserve.AgentScheduler"),
]
SETTINGS = {
    "mode": "lanes",
    "tpot_slo_ms": 40,
    "lane_min_tokens": 64,
    "policy": "plas",
    "warm_up_s": 2,
    "integrity_check_interval_s": 0,
}
SECRET = "Xyzzy-the-secret-of-the-agent"


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture(scope="module")
def before() -> set[str]:
    return shared_memory()


@pytest.fixture(scope="module")
def server(before: set[str], toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    options = [*SERVE, "--additional-config", json.dumps({"agentserve": SETTINGS})]
    with VllmServer(toy_model, options, log=tmp_path_factory.mktemp("faults") / "log") as running:
        yield running


def request(server: VllmServer, body: dict, path: str = "/v1/completions") -> urllib.request.Request:
    data = json.dumps({"model": "model"} | body).encode()
    return urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})


def post(server: VllmServer, body: dict, path: str = "/v1/completions") -> dict:
    with urllib.request.urlopen(request(server, body, path), timeout=120) as answer:
        return json.loads(answer.read())


def page(server: VllmServer) -> str:
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as answer:
        return answer.read().decode()


def test_prompts_of_maximum_length_are_served_and_longer_ones_refused(server: VllmServer) -> None:
    """With a stream beside them, so that they go through the lane."""
    stream = urllib.request.urlopen(
        request(server, {"prompt": [7] * 30, "max_tokens": 3000, "ignore_eos": True, "stream": True}), timeout=120
    )
    with stream:
        stream.readline()
        longest = [(i * 31) % 3900 + 5 for i in range(MAX_LEN - 1)]
        done = post(server, {"prompt": longest, "max_tokens": 1, "ignore_eos": True})
        assert done["usage"]["prompt_tokens"] == MAX_LEN - 1
        assert done["usage"]["completion_tokens"] == 1
        for length in (MAX_LEN + 1, 10 * MAX_LEN):
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(server, {"prompt": [5] * length, "max_tokens": 1})
            assert refused.value.code == 400
            assert str(MAX_LEN) in refused.value.read().decode()
        assert stream.readline() is not None
    assert 'agentserve_lane_requests_total{engine="0"' in page(server)


def test_a_client_that_reads_slowly_gets_everything_and_delays_nobody(server: VllmServer) -> None:
    asked = {"model": "model", "prompt": [9] * 40, "max_tokens": 400, "ignore_eos": True, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}})
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        slow.sendall((head + body).encode())
        received = slow.recv(64)
        for _ in range(3):
            done = post(server, {"prompt": [5] * 200, "max_tokens": 20, "ignore_eos": True})
            assert done["usage"]["completion_tokens"] == 20
        slow.settimeout(60)
        while part := slow.recv(1 << 16):
            received += part
    assert b'"completion_tokens":400' in received.replace(b" ", b"")
    assert b"data: [DONE]" in received


def test_neither_prompts_nor_session_ids_nor_hints_are_in_log_or_metrics(server: VllmServer) -> None:
    for hint in ({"agent_thread": SECRET}, {"agent_class": SECRET}, {"agent_parent": SECRET + "x" * 1000}):
        hinted = {"max_tokens": 8, "session_id": SECRET, "vllm_xargs": hint}
        post(server, {"prompt": SECRET * 20} | hinted)
        post(server, {"messages": [{"role": "user", "content": SECRET}]} | hinted, "/v1/chat/completions")
    time.sleep(0.5)
    assert SECRET not in page(server)
    assert SECRET not in server.log.read_text(errors="replace")


def test_the_state_of_the_idle_engine_agrees(server: VllmServer) -> None:
    """`integrity_check_interval_s` is 0 here: they were checked whenever no request was left."""
    post(server, {"prompt": [5] * 20, "max_tokens": 2})
    time.sleep(0.5)
    (line,) = [line for line in page(server).splitlines() if line.startswith("vllm:agentserve_integrity_faults_total")]
    assert line.endswith(" 0.0")
    assert "state is inconsistent" not in server.log.read_text(errors="replace")


def group(server: VllmServer) -> dict[int, str]:
    """By pid: the command lines of the server's processes."""
    listing = subprocess.run(["ps", "-eo", "sid=,pid=,stat=,comm="], text=True, capture_output=True, check=True).stdout
    fields = [line.split(None, 3) for line in listing.splitlines()]
    return {int(pid): name for sid, pid, stat, name in fields if int(sid) == server.pid and "Z" not in stat}


def test_a_killed_engine_ends_its_clients_with_an_error_and_leaves_nothing(
    server: VllmServer, before: set[str]
) -> None:
    """Runs last: it takes the module's server down, the hard way, while a stream decodes and the lane has a prompt."""
    stream = urllib.request.urlopen(
        request(server, {"prompt": [7] * 30, "max_tokens": 3000, "ignore_eos": True, "stream": True}), timeout=60
    )
    stream.readline()
    body = {"prompt": [(i * 7) % 3900 + 5 for i in range(3900)], "max_tokens": 9}
    ends: list[str] = []

    def ask() -> None:
        try:
            ends.append(json.dumps(post(server, body)))
        except OSError as error:
            ends.append(f"error {error}")

    cold = threading.Thread(target=ask)
    cold.start()
    time.sleep(0.3)
    members = group(server)
    (engine,) = [pid for pid, name in members.items() if name.startswith("VLLM::EngineCor")]
    os.kill(engine, signal.SIGKILL)
    ended = b""
    with stream:
        try:
            ended = stream.read()
        except OSError as error:
            ended = str(error).encode()
    assert b"[DONE]" not in ended or b"error" in ended
    cold.join(60)
    assert "rror" in ends[0]
    deadline = time.monotonic() + 60
    while group(server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert group(server) == {}
    with pytest.raises(OSError):  # noqa: PT011  refused, reset, or nobody there
        post(server, {"prompt": [5], "max_tokens": 1})
    server.stop()
    assert shared_memory() - before == set()
