"""The benchmarks of others against a server of ours: they run, their sessions are recognised, and they measure what ours does."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.clients.results import Row
from tests.support.agreement import CONCURRENCY, INPUT, OUTPUT, REQUESTS, Figures, agree, ours
from tests.support.recording_proxy import RecordingProxy
from tests.support.server_pages import Programs
from tests.support.token_server import token_server
from vllm_agentserve.bench.server import VllmServer, serving_environment

pytestmark = pytest.mark.slow
TURNS = 3
Hub = tuple[str, dict[str, str]]
COMPLETIONS = ("--endpoint-type", "completions", "--request-count", str(REQUESTS))


def run(command: list[str], environment: Mapping[str, str], folder: Path) -> None:
    done = subprocess.run(
        command, env=dict(environment), cwd=folder, text=True, capture_output=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def aiperf(clients: Path, hub: Hub, url: str, folder: Path, seed: int, *options: str) -> dict[str, Any]:
    """The summary of a run of aiperf."""
    folder.mkdir()
    name, environment = hub
    command = [
        *(str(clients / "aiperf"), "profile", "--model", "model", "--tokenizer", name, "--url", url, "--streaming"),
        *("--isl", str(INPUT), "--isl-stddev", "0", "--osl", str(OUTPUT), "--osl-stddev", "0"),
        *("--concurrency", str(CONCURRENCY), "--random-seed", str(seed), "--use-server-token-count"),
        *("--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"),
        *("--artifact-dir", str(folder), "--ui", "none", *options),
    ]
    run(command, environment, folder)
    summary: dict[str, Any] = json.loads((folder / "profile_export_aiperf.json").read_text())
    assert summary["completed_request_count"]["avg"] == REQUESTS
    assert summary["output_sequence_length"]["avg"] == OUTPUT
    assert summary["request_error_rate"]["avg"] == 0
    return summary


def figures_of_aiperf(summary: dict[str, Any]) -> Figures:
    """Its inter-token latency is a request's time per output token after the first: our TPOT."""
    return {
        "ttft": summary["time_to_first_token"]["p50"],
        "tpot": summary["inter_token_latency"]["p50"],
        "itl": summary["inter_chunk_latency"]["p50"],
        "tokens_per_s": summary["output_token_throughput"]["avg"],
    }


def guidellm(
    clients: Path, hub: Hub, url: str, folder: Path, seed: int, turns: int = 1, path: str = "/v1/completions"
) -> dict[str, Any]:
    """The one benchmark of a run of guidellm."""
    folder.mkdir()
    name, environment = hub
    command = [
        *(str(clients / "guidellm"), "run", "--backend"),
        f"kind=openai_http,target={url},model=model,request_format={path}",
        *("--tokenizer", f"kind=huggingface_auto,model={name}", "--seed", f"kind=static,value={seed}", "--data"),
        f"kind=synthetic_text,prompt_tokens={INPUT},output_tokens={OUTPUT},turns={turns}",
        *("--profile", f"kind=concurrent,streams={CONCURRENCY}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--output", f"kind=json,path={folder / 'result.json'}", "--disable-console"),
    ]
    run(command, environment, folder)
    benchmark: dict[str, Any] = json.loads((folder / "result.json").read_text())["benchmarks"][0]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["errored"] == 0
    # Of requests that end with the run it may leave some out.
    assert totals["successful"] >= REQUESTS - CONCURRENCY
    return benchmark


def figures_of_guidellm(benchmark: dict[str, Any]) -> Figures:
    """Its time per output token holds the first one too; its inter-token latency is our TPOT."""
    requests = benchmark["requests"]["successful"]
    assert {one["output_tokens"] for one in requests} == {OUTPUT}
    return {
        "ttft": statistics.median(one["time_to_first_token_ms"] for one in requests),
        "tpot": statistics.median(one["inter_token_latency_ms"] for one in requests),
        "tokens_per_s": OUTPUT * len(requests) / benchmark["duration"],
    }


def agreement(found: Figures, pairs: int) -> str:
    """The ratios, for the table."""
    return ", ".join(f"{key} x{ratio:.2f}" for key, ratio in found.items()) + f" ({pairs} pairs; ours over theirs)"


SCHEDULE = ("--first-s", "0.1", "--interval-s", "0.02")


@pytest.mark.parametrize("name", ["aiperf", "guidellm"])
def test_clients_agree_on_a_schedule(clients: Path, hub: Hub, rows: list[Row], tmp_path: Path, name: str) -> None:
    """A server that sends the first token after 100 ms and then one every 20 ms: what they say can only be that."""
    with token_server(*SCHEDULE) as url:

        def theirs(seed: int) -> Figures:
            folder = tmp_path / f"{seed}"
            if name == "guidellm":
                return figures_of_guidellm(guidellm(clients, hub, url, folder, seed))
            return figures_of_aiperf(aiperf(clients, hub, url, folder, seed, *COMPLETIONS))

        ours(url, 100)
        found, pairs = agree(theirs, lambda seed: ours(url, seed))
    assert 0.9 < found["tpot"] < 1.1
    rows.append(Row(f"{name}, tokens on a schedule", "", "", agreement(found, pairs)))


@pytest.mark.usefixtures("own_cores")
def test_aiperf_measures_what_we_measure(
    server: VllmServer, clients: Path, hub: Hub, rows: list[Row], tmp_path: Path
) -> None:
    def theirs(seed: int) -> Figures:
        return figures_of_aiperf(aiperf(clients, hub, server.url, tmp_path / f"{seed}", seed, *COMPLETIONS))

    ours(server.url, 100)
    found, pairs = agree(theirs, lambda seed: ours(server.url, seed))
    rows.append(Row("aiperf, completions", "`X-Session-Affinity`", "one for each request", agreement(found, pairs)))
    assert found.keys() == {"ttft", "tpot", "itl", "tokens_per_s"}


@pytest.mark.usefixtures("own_cores")
def test_guidellm_measures_what_we_measure(
    server: VllmServer, clients: Path, hub: Hub, rows: list[Row], tmp_path: Path
) -> None:
    def theirs(seed: int) -> Figures:
        return figures_of_guidellm(guidellm(clients, hub, server.url, tmp_path / f"{seed}", seed))

    ours(server.url, 101)
    found, pairs = agree(theirs, lambda seed: ours(server.url, seed))
    rows.append(Row("guidellm, completions", "none", "one for each request", agreement(found, pairs)))
    assert found.keys() == {"ttft", "tpot", "tokens_per_s"}


CHAT = ("--endpoint-type", "chat", "--conversation-turn-mean", str(TURNS), "--conversation-turn-stddev", "0")
CONVERSATIONS = REQUESTS // TURNS


def test_conversations_of_aiperf_are_programs(
    server: VllmServer, clients: Path, hub: Hub, rows: list[Row], tmp_path: Path
) -> None:
    """Every conversation is one, with the header of its choice and with that which it always sends."""
    chat = (*CHAT, "--conversation-num", str(CONVERSATIONS))
    for seed, options in ((1, ("--session-header", "X-Session-ID")), (2, ())):
        before = Programs(server.url)
        with RecordingProxy(server.url) as proxy:
            aiperf(clients, hub, proxy.url, tmp_path / f"{seed}", seed, *chat, *options)
        counted = before.since()
        names = [json.dumps(sent.names) for sent in proxy.generated]
        assert len(names) == REQUESTS
        assert sorted(names.count(name) for name in set(names)) == [TURNS] * CONVERSATIONS
        assert counted == {"explicit": REQUESTS, "inferred": 0, "new": 0, "programs": CONVERSATIONS, "invalid": 0}
        header = "`X-Session-ID` by `--session-header`" if options else "`X-Session-Affinity`"
        rows.append(Row(f"aiperf, {TURNS} turns", header, f"{CONVERSATIONS} of {CONVERSATIONS} conversations", "runs"))


@pytest.mark.usefixtures("own_cores")
def test_aiperf_measures_turns_as_we_do(
    server: VllmServer, clients: Path, hub: Hub, rows: list[Row], tmp_path: Path
) -> None:
    """Chat prompts have a few tokens more than ours, and are written by a template."""
    chat = (*CHAT, "--conversation-num", str(CONVERSATIONS), "--session-header", "X-Session-ID")

    def theirs(seed: int) -> Figures:
        return figures_of_aiperf(aiperf(clients, hub, server.url, tmp_path / f"{seed}", seed + 10, *chat))

    ours(server.url, 102, TURNS)
    found, pairs = agree(theirs, lambda seed: ours(server.url, seed + 200, TURNS))
    rows.append(Row(f"aiperf, {TURNS} turns", "`X-Session-ID`", "", agreement(found, pairs)))


def test_conversations_of_guidellm_are_found(
    server: VllmServer, clients: Path, hub: Hub, rows: list[Row], tmp_path: Path
) -> None:
    """It names no session: later turns are found by what they go on from."""
    before = Programs(server.url)
    with RecordingProxy(server.url) as proxy:
        guidellm(clients, hub, proxy.url, tmp_path / "chat", 1, TURNS, "/v1/chat/completions")
    counted = before.since()
    assert [sent.names for sent in proxy.generated] == [{}] * len(proxy.generated)
    begun = sum(len(sent.body["messages"]) == 1 for sent in proxy.generated)
    later = len(proxy.generated) - begun
    words = f"{counted['inferred']} of {later} later turns were found"
    rows.append(Row(f"guidellm, {TURNS} turns", "none", words, "runs"))
    assert counted["explicit"] == counted["invalid"] == 0
    assert counted["inferred"] >= 0.95 * later


def test_vllm_bench_serve_runs(server: VllmServer, toy_model: Path, rows: list[Row], tmp_path: Path) -> None:
    """Its figures are compared in tests/engine/test_bench.py, with a stock server."""
    before = Programs(server.url)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "vllm"),
        *("--base-url", server.url, "--model", str(toy_model), "--served-model-name", "model", "--ignore-eos"),
        *("--dataset-name", "random", "--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT)),
        *("--num-prompts", str(REQUESTS), "--max-concurrency", str(CONCURRENCY), "--disable-tqdm"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    ]
    run(command, serving_environment(), tmp_path)
    counted = before.since()
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (REQUESTS, REQUESTS * OUTPUT)
    assert counted["explicit"] == counted["invalid"] == 0
    rows.append(Row("vllm bench serve", "none", "one for each request", "runs; figures: `tests/engine/test_bench.py`"))
