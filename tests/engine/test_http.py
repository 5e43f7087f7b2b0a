"""Over HTTP, against a real server with our flag: the example agents, options, metrics, and a clean end."""

import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text_format

from tests.support.clients import anthropic_client, openai_client
from tests.support.paths import ROOT
from tests.support.recording_proxy import RecordingProxy
from tests.support.server_pages import total
from vllm_agentserve.bench.server import ServerError, VllmServer, serving_environment
from vllm_agentserve.policy.program import identifier

SERVE = [
    *("--dtype", "float32", "--max-model-len", "8192", "--max-num-seqs", "8", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(1 << 30)),
    *("--scheduler-cls", "vllm_agentserve.AgentScheduler"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
]


@pytest.fixture(scope="module")
def server(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    os.environ["VLLM_LOG_STATS_INTERVAL"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    settings = {"tpot_slo_ms": 40, "stats_interval_ms": 50, "policy": "plas", "warm_up_s": 2}
    # Random weights may write white space for ever where a grammar lets them.
    grammars = {"backend": "xgrammar", "disable_any_whitespace": True}
    options = [*SERVE, "--structured-outputs-config", json.dumps(grammars)]
    options += ["--additional-config", json.dumps({"agentserve": settings})]
    with VllmServer(toy_model, options, log=tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def post(server: VllmServer, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        server.url + path, json.dumps({"model": "model"} | body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def metrics(server: VllmServer) -> dict[str, float]:
    """The unlabelled names of our series on /metrics with their values."""
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    ours = [line.rsplit(" ", 1) for line in lines if line.startswith("vllm:agentserve_")]
    return {name.split("{")[0].removeprefix("vllm:agentserve_"): float(value) for name, value in ours}


def settled(server: VllmServer, limit_s: float = 30.0) -> dict[str, float]:
    """The metrics once half a second changes no count: the server reports every 50 ms, and later on a busy machine."""
    deadline, last, now = time.monotonic() + limit_s, {}, metrics(server)
    while counts(now) != counts(last) and time.monotonic() < deadline:
        time.sleep(0.5)
        last, now = now, metrics(server)
    return now


def counts(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.endswith("_total")}


@pytest.mark.parametrize("example", ["openai_agent.py", "anthropic_agent.py"])
def test_example_agents_run_their_tool_loop(server: VllmServer, example: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / example), "--url", server.url, "--turns", "3"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 tool calls in 3 turns" in done.stdout


def test_an_example_without_a_server_says_so() -> None:
    command = [sys.executable, str(ROOT / "examples" / "openai_agent.py"), "--url", "http://127.0.0.1:9"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "error: http://127.0.0.1:9" in done.stderr


def test_hostile_hints_harm_nobody(server: VllmServer) -> None:
    """Any JSON in the place of hints: the request is served, or refused by vLLM itself; others notice nothing."""
    rng = random.Random(8)
    before = metrics(server)["invalid_hints_total"]
    plain = {"prompt": list(range(5, 60)), "max_tokens": 8, "temperature": 0}
    expected = post(server, "/v1/completions", plain)["choices"][0]["text"]
    names = [
        "agent_parent",
        "agent_thread",
        "agent_deadline_ms",
        "agent_class",
        "agent_",
        "agent_\x00",
        "agent_" + "x" * 9999,
    ]
    values = [
        *(
            "",
            "x" * 100_000,
            "\u202e\n\x1b[31m",
            "batch",
            "'; DROP TABLE",
            "\ud83d\ude00",
            -1,
            0,
            1e308,
            2**63,
            10**30,
            0.5,
        ),
        *(True, None, [], ["a"] * 1000, [[1]], {}, {"a": {"b": 1}}),
    ]
    answered: list[str] = []
    refused: list[int] = []
    for _ in range(40):
        hints = {rng.choice(names): rng.choice(values) for _ in range(rng.randint(1, 5))}
        body = plain | {"vllm_xargs": hints, "session_id": rng.choice(["a", None])}
        try:
            answered.append(post(server, "/v1/completions", body)["choices"][0]["text"])
        except urllib.error.HTTPError as error:
            refused.append(error.code)
    assert len(answered) > 10
    assert set(answered) == {expected}
    assert set(refused) <= {400, 422}
    assert post(server, "/v1/completions", plain)["choices"][0]["text"] == expected
    settled(server)
    assert metrics(server)["invalid_hints_total"] > before
    log = server.log.read_text(errors="replace")
    assert log.count("a hint is ignored") <= 5
    assert "x" * 100 not in log


def test_names_of_clients_reach_the_programs(server: VllmServer) -> None:
    """vLLM itself refuses an object in `vllm_xargs`; a sub-agent of Claude Code belongs to its session."""
    before = settled(server)
    plain = {"prompt": list(range(5, 60)), "max_tokens": 4, "temperature": 0}
    expected = post(server, "/v1/completions", plain)["choices"][0]["text"]
    gateway = {"vllm_xargs": {"agentic_context": {"program_id": "task-a:lead"}, "agent_class": "batch"}}
    assert post(server, "/v1/completions", plain | gateway)["choices"][0]["text"] == expected
    names = [{"X-Claude-Code-Session-Id": "s"}, {"X-Claude-Code-Session-Id": "s", "X-Claude-Code-Agent-Id": "a"}]
    message = {"model": "model", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    for headers in names:
        sent = {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(server.url + "/v1/messages", json.dumps(message).encode(), sent)
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.loads(answer.read())["type"] == "message"
    after = settled(server)
    assert after["program_explicit_requests_total"] - before.get("program_explicit_requests_total", 0) == 3
    assert identifier("claude-code:s") in program_ids(server)


def program_ids(server: VllmServer) -> set[float]:
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:agentserve_program_row_id{")}


@pytest.mark.parametrize("client", [openai_client, anthropic_client])
def test_clients_as_they_are(server: VllmServer, client: ModuleType) -> None:
    """They name no session: turns are found by what they go on from. Tools, streams and leaving in the middle work."""
    before, generated = settled(server), total(server.url, "vllm:generation_tokens_total")
    with RecordingProxy(server.url) as proxy:
        said = client.run(proxy.url)
    assert said["tool_calls"] == client.TURNS
    assert said["contexts"] == sorted(set(said["contexts"]))
    assert (said["streamed"], said["streamed_tokens"]) == (said["text"], said["tokens"])
    assert said["chunks"] > 1
    assert said["read"] == 3
    assert [sent.names for sent in proxy.generated] == [{}] * len(proxy.generated)
    assert [sent.left for sent in proxy.generated] == [False] * (len(proxy.generated) - 1) + [True]
    after = settled(server)
    assert after.get("program_explicit_requests_total", 0) == before.get("program_explicit_requests_total", 0)
    found = after["program_inferred_requests_total"] - before.get("program_inferred_requests_total", 0)
    # A model with random weights writes a tool call in tokens that no tokenizer gives for its text; words come back as they were.
    assert found >= client.TALKS
    assert total(server.url, "vllm:num_requests_running") == 0
    assert total(server.url, "vllm:generation_tokens_total") - generated < client.LONGEST


def test_the_metrics_page_is_what_parsers_expect(server: VllmServer) -> None:
    """Both formats of Prometheus, each with its own strict parser: names, types, no series twice, counters end in _total.

    Where colons are to be replaced, prometheus_client writes other names into the types than into the series, of vLLM's own too.
    """
    post(server, "/v1/completions", {"prompt": [5] * 20, "max_tokens": 5, "ignore_eos": True, "session_id": "s"})
    settled(server)
    accept = "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8"
    for path, parse in (("/metrics", text_format), ("/metrics/", openmetrics)):
        request = urllib.request.Request(server.url + path, headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=30) as answer:
            kind, page = answer.headers["Content-Type"], answer.read().decode()
        assert kind.startswith("application/openmetrics-text" if parse is openmetrics else "text/plain")
        families = [family for family in parse(page) if family.name.startswith("vllm:agentserve_")]
        assert len({family.name for family in families}) == len(families) > 50
        assert {family.type for family in families} == {"counter", "gauge", "histogram"}
        for family in families:
            assert family.documentation
            assert family.type == "counter" or not family.name.endswith("_total")
            series = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
            assert len(set(series)) == len(series)
            ends = {"counter": {"_total", "_created"}, "gauge": {""}}.get(
                family.type, {"_bucket", "_count", "_sum", "_created"}
            )
            assert {sample.name.removeprefix(family.name) for sample in family.samples} <= ends


def test_metrics_show_what_happened(server: VllmServer) -> None:
    before = metrics(server)
    prompt = [(i * 37) % 4000 for i in range(900)]
    post(server, "/v1/completions", {"prompt": prompt, "max_tokens": 30, "ignore_eos": True})
    settled(server)
    post(server, "/v1/completions", {"prompt": [*prompt, *range(40)], "max_tokens": 30, "ignore_eos": True})
    after = settled(server)
    added = {name: after[name] - before.get(name, 0.0) for name in after if name.endswith("_total")}
    assert added["cold_prefill_requests_total"] == 1
    assert added["resume_prefill_requests_total"] == 1
    assert added["cold_prefill_tokens_total"] == 900
    assert 40 <= added["resume_prefill_tokens_total"] <= 40 + 128  # what is not a full block is computed again
    assert added["decode_steps_total"] == 58
    assert after["tpot_target_seconds"] == pytest.approx(0.04)
    assert 0 < after["tpot_seconds"] < 1
    assert set(after) >= {
        "resume_budget_tokens",
        "budget_gain",
        "step_prediction_error_ratio",
        "last_prefill_chunk_tokens",
    }


def test_top_shows_the_program_of_a_session(server: VllmServer) -> None:
    session = "nobody-may-read-this"
    body = {"prompt": [(i * 31) % 4000 for i in range(100)], "max_tokens": 20, "ignore_eos": True}
    for _ in range(2):
        post(server, "/v1/completions", body | {"session_id": session})
    command = [sys.executable, "-m", "vllm_agentserve.cli", "top", "--url", server.url, "--interval", "0.1"]
    done = subprocess.run([*command, "--session", session], text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{identifier(session):06x} <")]
    assert line.split()[2:4] == ["2", "tool"]
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as answer:
        assert session not in answer.read().decode()


def test_the_periodic_log_line_has_our_part(server: VllmServer) -> None:
    post(server, "/v1/completions", {"prompt": [5] * 20, "max_tokens": 5, "ignore_eos": True})
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and "agentserve: TPOT" not in server.log.read_text():
        time.sleep(0.2)
    assert "(target 40.0 ms)" in server.log.read_text()
    assert (
        "agentserve: mode auto (for each prompt the faster of lanes and steps), synchronous scheduling, "
        in server.log.read_text()
    )


def test_a_client_that_leaves_harms_nobody(server: VllmServer) -> None:
    body = json.dumps({"model": "model", "prompt": [9] * 2000, "max_tokens": 2000, "ignore_eos": True, "stream": True})
    for _ in range(3):
        request = urllib.request.Request(
            server.url + "/v1/completions", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()
    done = post(server, "/v1/completions", {"prompt": [5] * 20, "max_tokens": 5, "ignore_eos": True})
    assert done["usage"]["completion_tokens"] == 5


WRONG: list[tuple[dict, list[str]]] = [
    ({"tpot_slo": 40}, ["agentserve has no option 'tpot_slo'", "Did you mean 'tpot_slo_ms'"]),
    ({"tpot_slo_ms": "fast"}, ["'tpot_slo_ms' = 'fast' is not allowed", "a number from 1 to 60000 ms"]),
]


@pytest.fixture(scope="module")
def refused(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The logs of servers with the options of `WRONG`, which start at the same time: they do little but import."""
    logs = [tmp_path_factory.mktemp("refused") / "log" for _ in WRONG]

    def start(options: dict, log: Path) -> str:
        failing = VllmServer(toy_model, [*SERVE, "--additional-config", json.dumps({"agentserve": options})], log=log)
        with pytest.raises(ServerError, match="ended with exit code 1 while starting"), failing:
            pass
        return log.read_text()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(start, [options for options, _ in WRONG], logs))


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_options_stop_the_start_before_the_model_is_loaded(refused: list[str], number: int) -> None:
    log = refused[number]
    for word in WRONG[number][1]:
        assert word in log
    assert "Loading safetensors" not in log


def test_a_port_in_use_is_said_at_once(server: VllmServer, toy_model: Path) -> None:
    with pytest.raises(ServerError, match=f"port {server.port} is in use: choose another"):
        VllmServer(toy_model, SERVE, port=server.port).__enter__()


def group_members(group: int) -> list[str]:
    listing = subprocess.run(["ps", "-eo", "pgid=,pid=,stat=,args="], text=True, capture_output=True, check=True).stdout
    return [line for line in listing.splitlines() if line.split()[0] == str(group) and "Z" not in line.split()[2]]


def test_shutdown_leaves_no_process(server: VllmServer) -> None:
    """Runs last: it stops the module's server."""
    group = server.pid
    assert group is not None
    assert len(group_members(group)) >= 2
    server.stop()
    assert group_members(group) == []
    assert "Traceback" not in server.tail(40)


def test_ctrl_c_of_the_demo_leaves_no_process(toy_model: Path) -> None:
    """Interrupts `agentserve demo` while its first server starts."""
    import signal

    demo = subprocess.Popen(
        [sys.executable, "-m", "vllm_agentserve.cli", "demo", "--agents", "1", "--turns", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=serving_environment(),
        start_new_session=True,
    )

    def children() -> list[str]:
        listing = subprocess.run(["ps", "-eo", "ppid=,pid=,args="], text=True, capture_output=True, check=True).stdout
        return [
            line.split()[1] for line in listing.splitlines() if line.split()[0] == str(demo.pid) and "serve" in line
        ]

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not children():
        time.sleep(0.2)
    started = children()
    assert started
    time.sleep(2)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output
    assert b"no server is left running" in output
    assert all(group_members(int(pid)) == [] for pid in started)
