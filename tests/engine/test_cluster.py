"""Two engines of the toy model behind one address, on Ray Serve."""

import concurrent.futures
import contextlib
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster_process import ClusterProcess, cluster_process, descendants
from tests.support.paths import ROOT
from vllm_agentserve.bench.server import free_port
from vllm_agentserve.policy.program import identifier

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: it comes with the extra `cluster`"),
]  # fmt: skip
BLOCK = 128
"""Tokens of a KV block on CPUs."""
OPTIONS = [
    *("--dtype", "float32", "--max-model-len", "8192", "--max-num-seqs", "8", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(1 << 29), "--served-model-name", "model", "--enable-prompt-tokens-details"),
    *(
        "--additional-config",
        json.dumps(
            {
                "agentserve": {
                    "policy": "plas",
                    "stats_interval_ms": 50,
                    "tpot_slo_ms": 40,
                    "mode": "time-sliced",
                    "warm_up_s": 0,
                }
            }
        ),
    ),
]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def engine(self) -> str:
        return self.headers["x-agentserve-engine"]


@dataclass
class Cluster:
    port: int
    log: Path
    process: ClusterProcess
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(
            method, path, sent, self.headers | {key.replace("_", "-"): one for key, one in headers.items()}
        )
        return connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        with self.open(method, path, body, **headers) as answer:
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def complete(self, prompt: Any, tokens: int = 4, **fields: Any) -> Answer:
        headers = fields.pop("headers", {})
        body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} | fields
        return self.ask("POST", "/v1/completions", body, **headers)

    def engines(self) -> dict[str, int]:
        """The process of each engine's `vllm serve` that lives, by the engine's name."""
        return self.process.engines()

    def metric(self, name: str, **labels: str) -> float:
        page = self.ask("GET", "/metrics").body.decode()
        lines = [line for line in page.splitlines() if line.startswith(name + "{") or line.startswith(name + " ")]
        fitting = [line for line in lines if all(f'{key}="{value}"' in line for key, value in labels.items())]
        return sum(float(line.rsplit(" ", 1)[1]) for line in fitting)


@pytest.fixture(scope="module")
def cluster(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(toy_model, tmp_path_factory.mktemp("cluster") / "log", "--engines", "2", "--ingresses", "2") as found:
        yield found


@contextlib.contextmanager
def running(model: Path, log: Path, *own: str) -> Iterator[Cluster]:
    """A cluster with these options of its own."""
    port = free_port()
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        environment.pop(name, None)
    with cluster_process(model, port, log, own, OPTIONS, environment) as process:
        yield Cluster(port, log, process)


def test_conversations_stay_where_their_context_is(cluster: Cluster) -> None:
    """Over two ingresses, whichever form their session has: headers and bodies are read alike."""

    def converse(number: int) -> tuple[set[str], list[tuple[int, int]]]:
        prompt = [(number * 97 + place * 31) % 4000 + 5 for place in range(600 + 40 * number)]
        engines, cached = set(), []
        for turn in range(4):
            session = f"conversation {number}"
            said = (
                {"headers": {"X_Session_ID": session}},
                {"session_id": session},
                {"vllm_xargs": {"session_id": session}},
                {"vllm_xargs": {"agent_session": session}},
            )[turn]
            answer = cluster.complete(prompt, **said)
            assert answer.status == 200, answer.body
            engines.add(answer.engine)
            cached.append((answer.json["usage"]["prompt_tokens_details"]["cached_tokens"], len(prompt)))
            prompt = [*prompt, *(5 + turn for _ in range(150))]
        return engines, cached

    before = cluster.metric("agentserve_cluster_moves_total")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(converse, range(8)))
    assert [len(engines) for engines, _ in found] == [1] * 8
    for _, turns in found:
        for (cached, _), (_, previous) in zip(turns[1:], turns, strict=False):
            assert cached >= previous - 2 * BLOCK
    assert len({engine for engines, _ in found for engine in engines}) == 2
    assert cluster.metric("agentserve_cluster_moves_total") == before
    assert cluster.metric("agentserve_cluster_decisions_total", reason="unreachable") == 0


def test_the_session_that_pins_is_the_one_that_the_scheduler_knows(cluster: Cluster) -> None:
    answer = cluster.complete(list(range(5, 300)), headers={"X_Session_ID": "seen by both"})
    message = {"model": "model", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    agents = [
        cluster.ask("POST", "/v1/messages", message, X_Claude_Code_Session_Id="s", X_Claude_Code_Agent_Id=agent)
        for agent in ("", "1", "1")
    ]
    assert [one.status for one in agents] == [200] * 3
    # A sub-agent begins where its session is.
    assert len({one.engine for one in agents}) == 1
    assert engine_knows(cluster, answer.engine, "seen by both")
    assert engine_knows(cluster, agents[0].engine, "claude-code:s")


def engine_knows(cluster: Cluster, engine: str, session: str, limit_s: float = 20.0) -> bool:
    """Whether the scheduler of that engine shows a program of that name."""
    start = f'vllm:agentserve_program_row_id{{replica="{engine}"'
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        page = cluster.ask("GET", "/metrics").body.decode()
        rows = {float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(start)}
        if float(identifier(session)) in rows:
            return True
        time.sleep(0.2)
    return False


def test_placement_is_on_the_page_of_metrics(cluster: Cluster) -> None:
    before = cluster.metric("agentserve_cluster_pins")
    answer = cluster.complete(list(range(5, 505)), tokens=10, session_id="counted")
    time.sleep(1.0)
    assert cluster.metric("agentserve_cluster_pins") == before + 1
    assert cluster.metric("agentserve_cluster_engine_resident_tokens", replica=answer.engine) >= 510
    assert cluster.metric("agentserve_cluster_decisions_total", reason="first") > 0
    cluster.complete(list(range(5, 505)), session_id="counted", vllm_xargs={"agent_last": True})
    time.sleep(1.0)
    assert cluster.metric("agentserve_cluster_pins") == before
    assert answer.engine in cluster.engines()


def test_a_stream_is_one_engines_stream(cluster: Cluster) -> None:
    body = {
        "model": "model",
        "prompt": [7] * 50,
        "max_tokens": 20,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    whole = cluster.complete([7] * 50, tokens=20)
    with cluster.open("POST", "/v1/completions", body, X_Session_ID="streams") as answer:
        assert answer.getheader("content-type", "").startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
    assert "".join(texts) == whole.json["choices"][0]["text"]


def direct(cluster: Cluster, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
    """What an engine answers by itself."""
    command = Path(f"/proc/{next(iter(cluster.engines().values()))}/cmdline").read_bytes().split(b"\0")
    connection = http.client.HTTPConnection("engine", timeout=120)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(command[command.index(b"--uds") + 1])
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.parametrize(
    ("method", "path", "body", "headers"),
    [
        ("POST", "/v1/completions", {"model": "other", "prompt": "a"}, {}),
        ("POST", "/v1/completions", {"model": "model", "prompt": "a", "max_tokens": -1}, {}),
        ("POST", "/v1/completions", {"model": "model", "prompt": [1] * 9000}, {}),
        ("POST", "/v1/completions", b"{no json", {}),
        ("POST", "/v1/completions", b"", {}),
        ("POST", "/v1/chat/completions", {"model": "model"}, {}),
        ("POST", "/v1/chat/completions", {"model": "model", "messages": "no list"}, {"X-Session-ID": "bad"}),
        (
            "POST",
            "/v1/messages",
            {"model": "other", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]},
            {},
        ),
        ("POST", "/v1/nowhere", {}, {}),
        ("GET", "/v1/models/model", None, {}),
        ("GET", "/v1/completions", None, {}),
        ("GET", "/version", None, {}),
    ],
)
def test_what_is_wrong_is_answered_as_by_one_engine(
    cluster: Cluster, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    answer = cluster.ask(method, path, content, **headers)
    status, expected = direct(cluster, method, path, content, cluster.headers | headers)
    assert answer.status == status
    assert without_ids(answer.body) == without_ids(expected)


def without_ids(body: bytes) -> str:
    return re.sub(r"(msg|cmpl|req)[-_][0-9a-f-]+|\"created\":\d+", "", body.decode())


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Session-ID": "x" * 20_000},
        {"X-Session-ID": "\xff\xfe\xa0"},
        {"X-Claude-Code-Session-Id": "tab\there"},
        {"X-Session-ID": ""},
        {"Session_ID": "y" * 300, "Thread-ID": "z"},
    ],
    ids=["huge", "no text", "not printable", "empty", "too long a name"],
)
def test_wrong_and_huge_names_harm_nobody(cluster: Cluster, headers: dict[str, str]) -> None:
    plain = cluster.complete([9] * 60, tokens=8)
    answer = cluster.complete([9] * 60, tokens=8, headers=headers)
    assert answer.status == 200, answer.body
    assert answer.json["choices"][0]["text"] == plain.json["choices"][0]["text"]
    assert cluster.complete([9] * 60, session_id="z" * 100_000).status == 200


def test_a_client_that_leaves_frees_its_place(cluster: Cluster) -> None:
    body = {"model": "model", "prompt": [9] * 500, "max_tokens": 7000, "ignore_eos": True, "stream": True}
    for stream in (True, False):
        answer = cluster.open("POST", "/v1/completions", body) if stream else None
        if answer is not None:
            answer.readline()
            answer.close()
        else:
            connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=2)
            connection.request("POST", "/v1/completions", json.dumps(body | {"stream": False}), cluster.headers)
            with pytest.raises(TimeoutError):
                connection.getresponse()
            connection.close()
    deadline = time.monotonic() + 30
    while cluster.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert cluster.metric("vllm:num_requests_running") == 0


def test_it_listens_on_this_machine_only(cluster: Cluster) -> None:
    """Ray's own ports too."""
    listening = subprocess.run(["ss", "-ltnpH"], text=True, capture_output=True, check=True).stdout
    ours = {pid: set[str]() for pid in descendants(cluster.process.pid)}
    for line in listening.splitlines():
        for pid in map(int, re.findall(r"pid=(\d+)", line)):
            ours.get(pid, set()).add(line.split()[3])
    assert f"127.0.0.1:{cluster.port}" in {one for found in ours.values() for one in found}
    open_to_all = {
        (Path(f"/proc/{pid}/comm").read_text().strip(), one)
        for pid, found in ours.items()
        for one in found
        if not one.startswith(("127.0.0.1:", "[::ffff:127.0.0.1]:"))
    }
    # One of each replica, which Ray gives no other address. It wants the token of this Ray.
    assert {name for name, _ in open_to_all} <= {"ray::ServeRepli"}
    for _, address in open_to_all:
        assert refused_without_a_token(int(address.rpartition(":")[2]))


def refused_without_a_token(port: int) -> bool:
    import grpc
    from ray.serve.generated.serve_pb2 import ASGIRequest
    from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            ASGIServiceStub(channel).HandleRequest(ASGIRequest(), timeout=20)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


def test_an_engines_process_in_ray_is_not_on_the_way_of_requests(cluster: Cluster) -> None:
    """An ingress of the same machine asks the engine itself: while no such process runs, answers come."""
    engines = [pid for pid in descendants(cluster.process.pid) if "ServeReplica:agentserve:engines" in command_of(pid)]
    assert len(engines) == 2
    try:
        for pid in engines:
            os.kill(pid, signal.SIGSTOP)
        assert cluster.complete([9] * 100, session_id="not on the way").status == 200
    finally:
        for pid in engines:
            os.kill(pid, signal.SIGCONT)


def test_pins_outlive_the_table(cluster: Cluster) -> None:
    """Known conversations stay, and others go somewhere; the next table is used again."""
    prompt = [8] * 100
    names = [f"beside the table {number}" for number in range(6)]
    # Each of the two ingresses gets some of these calls, and then knows the conversation.
    calls = [[cluster.complete(prompt, session_id=name).engine for _ in range(10)] for name in names]
    assert all(len(set(own)) == 1 for own in calls)
    places = [own[0] for own in calls]
    tables = [pid for pid in descendants(cluster.process.pid) if command_of(pid).startswith("ray::PinTable")]
    assert len(tables) == 1
    os.kill(tables[0], signal.SIGKILL)
    moved = sum(
        cluster.complete(prompt, session_id=name).engine != place for name, place in zip(names, places, strict=True)
    )
    assert moved == 0
    deadline = time.monotonic() + 60
    while cluster.ask("GET", "/metrics").status != 200 and time.monotonic() < deadline:
        time.sleep(0.5)
    again = cluster.complete(prompt, session_id="after the table").engine
    assert cluster.complete(prompt, session_id="after the table").engine == again
    assert cluster.metric("agentserve_cluster_pins") > 0


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("killed", ["core", "server", "process of Ray"])
def test_a_killed_engine_ends_its_streams_with_an_error_and_the_next_turn_goes_on_elsewhere(
    cluster: Cluster, killed: str
) -> None:
    wait_for_engines(cluster, 2)
    prompt = list(range(5, 400))
    other = cluster.complete(prompt, session_id=f"beside {killed} 0").engine
    names = [f"beside {killed} {number}" for number in range(20)]
    places = {name: cluster.complete(prompt, tokens=1, session_id=name).engine for name in names}
    victim = next(iter(set(places.values()) - {other}))
    broken = next(name for name, engine in places.items() if engine == victim)
    untouched = next(name for name, engine in places.items() if engine == other)
    body = {"model": "model", "prompt": prompt, "ignore_eos": True, "stream": True, "temperature": 0}
    with (
        cluster.open("POST", "/v1/completions", body | {"max_tokens": 4000, "session_id": broken}) as breaking,
        cluster.open("POST", "/v1/completions", body | {"max_tokens": 300, "session_id": untouched}) as going_on,
    ):
        assert breaking.getheader("x-agentserve-engine") == victim
        assert breaking.readline().startswith(b"data: ")
        server = pid = cluster.engines()[victim]
        if killed == "core":
            (pid,) = (one for one in descendants(pid) if "EngineCore" in command_of(one))
        elif killed != "server":
            pid = int(re.findall(r"^PPid:\s*(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0])
        os.kill(pid, signal.SIGKILL)
        rest = breaking.read().decode()
        began = time.monotonic()
        answer = cluster.complete(prompt, session_id=broken)
        took = time.monotonic() - began
        survived = going_on.read().decode()
    assert (answer.status, answer.engine) == (200, other)
    events = [line.removeprefix("data: ") for line in rest.splitlines() if line]
    assert "error" in json.loads(events[-1])
    assert "[DONE]" not in rest
    assert survived.endswith("data: [DONE]\n\n")
    assert '"error"' not in survived
    # Without the computing, which takes its time on two cores that an engine is started on.
    assert took < 20
    assert cluster.complete(prompt, session_id=broken).engine == other
    # Nothing of the engine is left behind.
    deadline = time.monotonic() + 60
    while victim in cluster.engines() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not Path(f"/proc/{server}").exists()


def wait_for_engines(cluster: Cluster, count: int, limit_s: float = 240.0) -> None:
    deadline = time.monotonic() + limit_s
    while len(cluster.engines()) < count and time.monotonic() < deadline:
        time.sleep(1.0)
    assert len(cluster.engines()) == count
    time.sleep(3.0)


@pytest.mark.timeout(400)
def test_a_wrong_option_ends_the_start_with_its_reason(toy_model: Path, cluster: Cluster) -> None:
    command = [
        sys.executable,
        "-m",
        "vllm_agentserve.cli",
        "cluster",
        "serve",
        "--engines",
        "1",
        "--port",
        str(free_port()),
    ]
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(toy_model), "--no-such-option"],
        text=True,
        capture_output=True,
        env=environment,
        timeout=380,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: the engines did not start" in done.stderr
    assert "--no-such-option" in done.stderr.partition("error: the engines did not start")[2]
