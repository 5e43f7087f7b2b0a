"""`agentserve bench` as a user meets it, against servers that emit tokens on a schedule; no engine runs here."""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.interrupts import heed_ctrl_c
from tests.support.token_server import token_server
from vllm_agentserve.bench.arms import parse_arm, parse_arms
from vllm_agentserve.bench.records import Results
from vllm_agentserve.bench.report import number
from vllm_agentserve.bench.sessions import WorkloadError

SMALL = ("--agents", "2", "--sessions", "1", "--turns", "3", "--scale", "0.02")


@pytest.mark.slow
def test_two_servers_of_somebody_else(run, tmp_path: Path) -> None:
    """The second server is three times slower; the folder holds everything, and the report says which is which."""
    slow, fast = ("--interval-s", "0.03", "--first-s", "0.06"), ("--interval-s", "0.01", "--first-s", "0.02")
    with token_server(*slow) as first, token_server(*fast) as second:
        arms = ("--url", f"slow={first}", "--url", f"fast={second}")
        more = ("--rounds", "3", "--output", "results", "--primary", "itl_p50_ms", "--slo-factor", "10")
        code, said = run("bench", "run", *SMALL, "--arms", *arms, *more)
    assert code == 0, said
    folder = tmp_path / "results"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("experiment.json", "requests.jsonl", "rounds.jsonl", "summary.json", "table.md", "report.html"),
        *("itl_cdf.png", "timeline.png", "ttft.png", "throughput.png"),
    }
    requests = Results(folder).requests()
    measured = [one for one in requests if one.part == "measured"]
    assert len(measured) == 2 * 3 * 6
    assert all(len(one.stamps_us) == one.wanted_tokens for one in measured)
    assert {one.arm for one in requests if one.part == "alone"} == {"slow"}
    order = [(one.round, one.arm) for one in Results(folder).rounds()]
    assert order == [(0, "slow"), (0, "fast"), (1, "fast"), (1, "slow"), (2, "slow"), (2, "fast")]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["comparisons"]["fast"]["itl_p50_ms"]["verdict"] == "better"
    assert summary["comparisons"]["fast"]["itl_p50_ms"]["ratio"] == pytest.approx(1 / 3, rel=0.3)
    assert summary["comparisons"]["fast"]["tokens_per_s"]["ratio"] > 1
    assert summary["arms"]["slow"]["figures"]["attained_percent"] == 100.0
    assert "18 of 18 requests had the very same token ids in all arms." in summary["notes"]
    table = (folder / "table.md").read_text()
    figure = number(summary["arms"]["slow"]["figures"]["itl_p50_ms"])
    assert f"| ITL, p50 (ms) | {figure} | " in table
    assert "scale 0.02" in table
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert base64.b64encode((folder / "ttft.png").read_bytes()).decode() in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "agentserve bench run --agents 2" in page
    assert "18 of 18 requests" in said


@pytest.mark.slow
def test_a_report_is_made_again_from_raw_data(run, tmp_path: Path) -> None:
    import gzip

    with token_server("--interval-s", "0.004", "--first-s", "0.01") as url:
        assert (
            run("bench", "run", *SMALL, "--url", url, "--rounds", "1", "--output", "r", "--workload", "mixed")[0] == 0
        )
    folder = tmp_path / "r"
    before = json.loads((folder / "summary.json").read_text())
    raw = folder / "requests.jsonl"
    (folder / "requests.jsonl.gz").write_bytes(gzip.compress(raw.read_bytes()))
    for name in ("requests.jsonl", "summary.json", "report.html", "ttft.png"):
        (folder / name).unlink()
    assert run("bench", "report", "r")[0] == 0
    assert json.loads((folder / "summary.json").read_text()) == before
    assert (folder / "report.html").exists()


@pytest.mark.slow
def test_results_are_never_written_over(run, tmp_path: Path) -> None:
    with token_server("--interval-s", "0.004") as url:
        arguments = ("bench", "run", *SMALL, "--url", url, "--rounds", "1", "--output", "r", "--slo-factor", "0")
        assert run(*arguments)[0] == 0
        code, said = run(*arguments)
    assert code == 1
    assert "r already holds results: name another folder with --output" in said


@pytest.mark.slow
def test_a_trace_is_replayed(run, tmp_path: Path) -> None:
    with token_server("--interval-s", "0.004", "--first-s", "0.01") as url:
        run("bench", "run", "--trace", "sample", "--scale", "0.1", "--url", url, "--rounds", "1", "--output", "r")
    measured = [one for one in Results(tmp_path / "r").requests() if one.part == "measured"]
    assert len(measured) == 10
    assert max(one.prompt_tokens for one in measured) == 310


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workload", "reactt"), "workload 'reactt' is unknown"),
        (("--rounds", "0"), "'0' must be a whole number from 1 to 1000"),
        (("--scale", "x"), "'x' must be a number from 0.001 to 100"),
        (("--arms", "stok"), "arm 'stok' is not known: an arm is stock"),
        (("--arms", "agentserve:tpot=3"), "agentserve has no option 'tpot'"),
        (("--arms",), "no arms to measure"),
        (("--url", "ftp://x"), "--url 'ftp://x' is not a server"),
        (("--serve", "'--x"), "cannot be split into options"),
        (("--trace", "nowhere.jsonl"), "trace nowhere.jsonl cannot be read"),
        (("--model", "./nothing"), "--model ./nothing does not exist"),
        (("--scale", "9"), "at scale 9 needs"),
        (("--workload", "field", "--scale", "1"), "use --scale 0.1"),
    ],
)
def test_wrong_arguments(run, arguments: tuple, words: str, toy_model: Path) -> None:
    code, said = run("bench", "run", *arguments)
    assert code == 2
    assert words in said


def test_the_same_server_twice_is_refused() -> None:
    with pytest.raises(WorkloadError, match="given twice: its second arm would find the first one's prompts"):
        parse_arms([], ["a=http://x:1", "b=http://x:1/"])


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("stock", ()),
        ("stock-chunk=256", ("--max-num-batched-tokens", "256")),
        ("stock-threshold=64", ("--long-prefill-token-threshold", "64")),
        ("stock:max_num_seqs=4,enforce-eager=true", ("--max-num-seqs", "4", "--enforce-eager")),
        ("block-size=16,enable-prefix-caching=false", ("--block-size", "16", "--no-enable-prefix-caching")),
        ("agentserve", ("--scheduler-cls", "vllm_agentserve.AgentScheduler")),
        (
            "agentserve-stock:tpot_slo_ms=40,serve.max-num-seqs=4",
            (
                *("--scheduler-cls", "vllm_agentserve.AgentScheduler"),
                *("--additional-config", '{"agentserve": {"mode": "stock", "tpot_slo_ms": 40}}'),
                *("--max-num-seqs", "4"),
            ),
        ),
    ],
)
def test_arms(text: str, options: tuple) -> None:
    assert parse_arm(text).options == options
    assert parse_arm(text).name == text


@pytest.mark.parametrize(
    ("text", "policy", "more"),
    [
        ("stock-offload=2", "lru", ()),
        ("stock-offload=2:arc", "arc", ()),
        ("stock-offload=0.5:arc,max-num-seqs=4", "arc", ("--max-num-seqs", "4")),
        ("stock-offload=2:max-num-seqs=4", "lru", ("--max-num-seqs", "4")),
    ],
)
@pytest.mark.parametrize("gpu", [False, True])
def test_stock_with_its_own_host_memory(
    text: str, policy: str, more: tuple, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_agentserve.bench.arms.has_nvidia_driver", lambda: gpu)
    arm = parse_arm(text)
    assert arm.name == text
    name, given, *rest = arm.options
    assert (name, tuple(rest)) == ("--kv-transfer-config", more)
    config = json.loads(given)
    assert (config["kv_connector"], config["kv_role"]) == ("OffloadingConnector", "kv_both")
    extra = config["kv_connector_extra_config"]
    gib = 0.5 if "0.5" in text else 2
    assert (extra["cpu_bytes_to_use"], extra["eviction_policy"]) == (gib * 2**30, policy)
    assert ("spec_name" in extra) is not gpu


@pytest.mark.parametrize(
    "text", ["stock-offload", "stock-offload=", "stock-offload=0", "stock-offload=x", "stock-offload=-1"]
)
def test_host_memory_of_no_size_is_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match="is no size in GiB above 0; an arm is stock"):
        parse_arm(text)


@pytest.mark.parametrize("policy", ["fifo", "program"])
def test_a_policy_that_vllm_does_not_have_is_refused(policy: str) -> None:
    with pytest.raises(WorkloadError, match=f"'{policy}' is not KEY=VALUE"):
        parse_arm(f"stock-offload=2:{policy}")


def test_an_arm_against_itself_gets_two_names() -> None:
    assert [arm.name for arm in parse_arms(["stock", "stock", "stock"], [])] == ["stock", "stock#2", "stock#3"]


def test_nobody_answers(run, tmp_path: Path) -> None:
    code, said = run("bench", "run", *SMALL, "--url", "http://127.0.0.1:9", "--rounds", "1", "--output", "r")
    assert code == 1
    assert "error: http://127.0.0.1:9 does not answer" in said
    assert "No run of any arm ended" in said


@pytest.mark.slow
def test_a_server_that_dies_keeps_what_was_measured(run, tmp_path: Path) -> None:
    """The second arm's server dies in its first round: the first arm's figures are there, and so are the tokens until then."""
    with (
        token_server("--interval-s", "0.004") as good,
        token_server("--interval-s", "0.004", "--stop-after", "30") as bad,
    ):
        arms = ("--url", f"good={good}", "--url", f"bad={bad}")
        code, said = run("bench", "run", *SMALL, "--arms", *arms, "--rounds", "2", "--output", "r", "--slo-factor", "0")
    assert code == 1
    assert "the server of arm 'bad' went away" in said
    assert "Only 1 of 4 planned runs ended" in said
    results = Results(tmp_path / "r")
    assert [(one.arm, one.error is None) for one in results.rounds()] == [("good", True), ("bad", False)]
    assert any(one.arm == "bad" and one.stamps_us for one in results.requests())
    assert (tmp_path / "r" / "report.html").exists()


@pytest.mark.slow
def test_failed_requests_are_counted_and_the_rest_goes_on(run, tmp_path: Path) -> None:
    """Answers have 4 to 7 tokens here; one server breaks off those with more than 5."""
    size = (*SMALL[:-1], "0.05")
    with (
        token_server("--interval-s", "0.004", "--fail-after", "5") as flawed,
        token_server("--interval-s", "0.004") as good,
    ):
        arms = ("--url", f"good={good}", "--url", f"flawed={flawed}")
        code, said = run("bench", "run", *size, "--seed", "1", "--arms", *arms, "--rounds", "1", "--output", "r")
    assert code == 0
    assert re.search(r"\d requests of flawed failed; their sessions ended there", said)
    requests = [one for one in Results(tmp_path / "r").requests() if one.arm == "flawed"]
    assert {one.error is None for one in requests} == {True, False}
    assert all("engine lost its way" in one.error for one in requests if one.error)


def test_a_port_in_use(run, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = run("bench", "run", *SMALL, "--arms", "stock", "--port", str(port), "--output", "r")
    assert code == 1
    assert f"port {port} is in use: choose another with --port" in said


@pytest.mark.slow
def test_caches_of_different_size_are_told(run, tmp_path: Path) -> None:
    with token_server("--interval-s", "0.004") as a, token_server("--interval-s", "0.004", "--blocks", "10") as b:
        arms = ("--url", f"a={a}", "--url", f"b={b}")
        _, said = run("bench", "run", *SMALL, "--arms", *arms, "--rounds", "1", "--output", "r", "--slo-factor", "0")
    assert "The arms have KV caches of different size, in tokens: {'a': 16000, 'b': 160}" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, kind: int) -> None:
    with token_server("--interval-s", "0.01") as first, token_server("--interval-s", "0.01") as second:
        arms = ("--url", f"a={first}", "--url", f"b={second}")
        command = [sys.executable, "-m", "vllm_agentserve.cli", "bench", "run", *SMALL, "--arms", *arms]
        process = subprocess.Popen(
            [*command, "--rounds", "50", "--output", "r", "--slo-factor", "0"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        rounds = tmp_path / "r" / "rounds.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (rounds.exists() and rounds.read_text().count("\n") >= 3):
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(kind)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "no server is left running" in said
    results = Results(tmp_path / "r")
    *ended, last = results.rounds()
    assert len(ended) >= 3
    assert all(one.error is None for one in ended)
    assert last.error == "interrupted"
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["arms"]["a"]["rounds"]
    assert "Traceback" not in said


def test_ctrl_c_reaches_what_the_tests_start_in_the_background_of_a_script() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        heed_ctrl_c()
        child = subprocess.Popen(
            [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT))"], stdout=subprocess.PIPE
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert b"default_int_handler" in child.communicate()[0]


def test_help_is_quick_and_workloads_explain_themselves(run) -> None:
    code, said = run("bench", "workloads")
    assert code == 0
    for word in ("react", "plan-execute", "coding", "field", "mixed", "--trace FILE", "AgentServe (arXiv 2603.10342)"):
        assert word in said
    light = "import sys, vllm_agentserve.cli; print([m for m in ('numpy', 'scipy', 'matplotlib') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", light], text=True).strip() == "[]"


def test_report_of_a_folder_without_results(run, tmp_path: Path) -> None:
    code, said = run("bench", "report", "nothing")
    assert code == 2
    assert "nothing holds no experiment.json" in said
