"""What users hand to `agentserve bench` that cannot be used: refused in words, and before a server is started."""

import gzip
import http.server
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.support.paths import ROOT
from vllm_agentserve import cli
from vllm_agentserve.bench.arms import Arm, parse_arm, parse_url_arm, split_options
from vllm_agentserve.bench.command import check_model, check_room, make_plan
from vllm_agentserve.bench.cost import read_cost
from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.endpoint import EndpointError, find_endpoint, metric_families, read_counters
from vllm_agentserve.bench.experiment import Experiment
from vllm_agentserve.bench.plan import Cell, Plan
from vllm_agentserve.bench.program_traffic import option_value
from vllm_agentserve.bench.records import Results
from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.bench.trace import TraceOptions, read_trace
from vllm_agentserve.bench.workloads import REACT

HUGE = "1" * 400
"""A whole number that no float can hold."""
NO_JSON = {"not JSON": "{", "too deep": "[" * 100_000, "too many digits": "1" * 5000}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *((text, "not JSON") for text in NO_JSON.values()),
        *(
            (f'{{"input_length": {value}}}', "'input_length' = .* is not allowed: it must be a whole number")
            for value in ("NaN", "Infinity", "1e999", HUGE)
        ),
        *(
            (f'{{"input_length": 4, "delay": {value}}}', "'delay' = .* is not allowed: it must be a number")
            for value in ("NaN", "-Infinity", "1e999", HUGE)
        ),
        ('{"input_length": 4, "timestamp": NaN}', "'timestamp' = nan is not allowed"),
    ],
    ids=lambda value: value[:50],
)
def test_a_line_of_a_trace_that_cannot_be_used_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"input_length": 4}}\n{line}\n')
    with pytest.raises(WorkloadError, match=f"line 2: {message}"):
        read_trace(path, TraceOptions(), 0)


@pytest.mark.parametrize("text", [*NO_JSON.values(), HUGE, "NaN"], ids=lambda value: value[:20])
def test_a_value_of_an_arm_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"'tpot_slo_ms' = .* is not allowed"):
        parse_arm(f"agentserve:tpot_slo_ms={text}")


@pytest.mark.parametrize("text", [*NO_JSON.values(), HUGE, "NaN"], ids=lambda value: value[:20])
def test_a_step_cost_that_is_no_number_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(f'{{"base": {text}, "sequence": 1, "context": 1, "tokens": 1, "attended": 1}}')
    with pytest.raises(WorkloadError, match=r"--step-cost .*cost\.json"):
        read_cost(path)


def small_plan() -> Plan:
    sessions = draw_sessions(REACT, WorkloadOptions(1, 1, 1, scale=0.1), 0)
    return Plan(arms=[], cells=[Cell("", lambda number: sessions, {"name": "react", "scale": "0.1"})], rounds=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *((text.encode(), "its config.json is not JSON") for text in NO_JSON.values()),
        (b"\xff\xfe", "its config.json is not JSON"),
        (b"[]", "its config.json is no JSON object"),
        (b"null", "its config.json is no JSON object"),
        (json.dumps({"text_config": {"max_position_embeddings": 8}}).encode(), "the model has 8"),
        (json.dumps({"text_config": None, "max_position_embeddings": 8}).encode(), "the model has 8"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_model_whose_config_cannot_be_used_is_refused(config: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(WorkloadError, match=message):
        check_model(str(tmp_path), small_plan())


def test_what_is_no_number_in_a_models_config_is_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": "x", "vocab_size": null}')
    check_model(str(tmp_path), small_plan())


# Addresses and servers


@pytest.mark.parametrize(
    "text",
    [
        "a=http://127.0.0.1:abc",
        "a=http://127.0.0.1:999999",
        "a=http://127.0.0.1:0",
        "a=http://[::1",
        "a=http://exa mple",
        "a=http://a\x00b",
        "a=http://:8000",
        "a=ftp://127.0.0.1",
        "=http://127.0.0.1:8000",
        "http://",
    ],
)
def test_an_address_that_cannot_be_one_is_refused_at_once(text: str) -> None:
    with pytest.raises(WorkloadError, match="is not a server: give NAME=http://HOST:PORT"):
        parse_url_arm(text)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "https://host", "http://[::1]:80/path/", "http://a.b-c:65535"]
)
def test_an_address_that_can_be_one_is_taken(url: str) -> None:
    assert parse_url_arm(f"name={url}") == Arm("name", url=url.rstrip("/"))


@pytest.fixture
def other_protocol() -> Iterator[str]:
    """The address of a server that does not speak HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1024)
                    connection.sendall(b"SSH-2.0-somebody\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


class Pages(http.server.BaseHTTPRequestHandler):
    pages: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        page = self.pages.get(self.path)
        self.send_response(404 if page is None else 200)
        self.send_header("Content-Length", str(len(page or b"")))
        self.end_headers()
        self.wfile.write(page or b"")

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The address of a server, and what it answers by path."""
    served: dict[str, bytes] = {}
    monkeypatch.setattr(Pages, "pages", served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", served
        server.shutdown()


def test_a_server_that_does_not_speak_http_is_an_error_in_words(other_protocol: str) -> None:
    with pytest.raises(EndpointError, match=r"does not answer .*is the server up, and is this its address"):
        find_endpoint(other_protocol)
    assert metric_families(other_protocol) == []


@pytest.mark.parametrize(
    "page", [b"[1]", b"{}", b'{"data": []}', b'{"data": ["x"]}', b'{"data": [null]}', b"\xff", b"[" * 100_000]
)
def test_a_server_without_models_is_an_error_in_words(page: bytes, pages: tuple[str, dict[str, bytes]]) -> None:
    url, served = pages
    served["/v1/models"] = page
    with pytest.raises(EndpointError, match="lists no model"):
        find_endpoint(url)


@pytest.mark.parametrize("page", [b"\xff\xfe 1\n", b'vllm:x{a="1" 3\n', b"vllm:x one\n"])
def test_what_a_server_says_of_itself_may_be_unreadable(page: bytes, pages: tuple[str, dict[str, bytes]]) -> None:
    url, served = pages
    served |= {"/v1/models": b'{"data": [{"id": 7, "max_model_len": "4k"}]}', "/metrics": page}
    endpoint = find_endpoint(url)
    assert (endpoint.model, endpoint.max_model_len) == ("7", None)
    assert read_counters(url) == {}


class Quiet:
    def __getattr__(self, name: str) -> object:
        return lambda *given: None


@pytest.mark.parametrize("model", [b'{"data": [{"id": "m", "max_model_len": 10}]}', b""])
def test_a_running_server_that_cannot_be_measured_is_refused_before_any_arm_runs(
    model: bytes, pages: tuple[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = pages
    served["/v1/models"] = model
    monkeypatch.setattr(Experiment, "run_arm", lambda *given: pytest.fail("no arm is to run"))
    plan = small_plan()
    arms = [Arm("stock"), Arm("other", url=url)]
    experiment = Experiment(Plan(arms=arms, cells=plan.cells, model="m", rounds=1, kv_bytes=1), tmp_path, Quiet())  # type: ignore[arg-type]
    with pytest.raises((WorkloadError, EndpointError), match=r"room for 10 tokens|lists no model"):
        experiment.run()


def test_logs_of_arms_with_long_names_have_names_that_file_systems_allow(tmp_path: Path) -> None:
    arms = [Arm("agentserve:" + "x" * 300), Arm("agentserve:" + "x" * 301), Arm("stock")]
    experiment = Experiment(Plan(arms=arms, cells=small_plan().cells, model="m", rounds=1), tmp_path, Quiet())  # type: ignore[arg-type]
    names = [experiment.log_name(arm, 0) for arm in arms]
    assert len(set(names)) == 3
    assert max(map(len, names)) < 100
    assert names[2] == "server-1-stock.log"


# Folders


@pytest.mark.parametrize("below", ["", "below", "below/further"])
def test_a_file_in_the_way_of_a_folder_of_results_is_named(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FileExistsError, match="cannot be a folder, a file is in its way: name another one with --output"
    ):
        Results.create(tmp_path / "file" / below, {})


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_a_place_that_cannot_be_a_folder_is_named_before_the_toy_model_is_made(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("vllm_agentserve.toy.write_tokenizer", lambda *given: pytest.fail("nothing is to be made"))
    assert cli.main(["toy-model", "--output", str(tmp_path / name)]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / name.partition("/")[0]) in said
    assert "name another place" in said


CELL = ROOT / "docs" / "results" / "load-control" / "2x" / "gap-0.2s"
DAMAGED = {
    "description that is no JSON": ("experiment.json", b"{", "experiment.json cannot be read"),
    "description of another kind": ("experiment.json", b"[]", "experiment.json does not say arms, rounds"),
    "empty description": ("experiment.json", b"{}", "experiment.json does not say arms, rounds"),
    "cut description": ("experiment.json", b'{"arms": [{"name": "x"}], "rounds": 1}', "does not say workload, machine"),
    "cut rounds": ("rounds.jsonl", b'{"arm": "stock", "rou', "rounds.jsonl, line 1 cannot be read"),
    "other rounds": ("rounds.jsonl", b'{"arm": "stock"}\n', "rounds.jsonl, line 1 cannot be read"),
    "cut requests": ("requests.jsonl", b'{"arm": "sto', "requests.jsonl, line 1 cannot be read"),
    "packed requests that are not": ("requests.jsonl.gz", b"zzz", "requests.jsonl.gz cannot be unpacked"),
    "cut packed requests": (
        "requests.jsonl.gz",
        gzip.compress(b"{}\n" * 99)[:-9],
        "requests.jsonl.gz cannot be unpacked",
    ),
}


@pytest.mark.parametrize("command", ["report", "table"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_of_results_is_an_error_in_words(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, content, message = DAMAGED[name]
    folder = tmp_path / "results"
    folder.mkdir()
    for path in CELL.glob("*.json*"):
        if not path.name.startswith(("summary", "requests")) or file == "rounds.jsonl":
            shutil.copy(path, folder)
    (folder / file).write_bytes(content)
    assert cli.main(["bench", command, str(folder)]) == 2
    said = capsys.readouterr().out
    assert message in said
    assert "Traceback" not in said


def test_every_folder_of_results_here_can_be_read() -> None:
    for path in (ROOT / "docs" / "results").rglob(Results.EXPERIMENT):
        assert Results(path.parent).experiment()["arms"]
        assert Results(path.parent).rounds()


# Options of servers


@pytest.mark.parametrize("text", ["--port 9000", "--port=9000", "--dtype bfloat16 --uds /tmp/x"])
def test_options_with_which_a_server_would_not_be_found_are_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"--(port 9000|uds /tmp/x) is not allowed for a server of the benchmark"):
        split_options(text)


@pytest.mark.parametrize(
    "text", ["stock:port=9000", "port=9000", "agentserve:serve.port=9000", "stock-chunk=256:port=1"]
)
def test_arms_with_which_a_server_would_not_be_found_are_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"--port \d+ is not allowed for a server of the benchmark"):
        parse_arm(text)


def test_a_value_that_is_called_port_is_no_option() -> None:
    assert split_options("--served-model-name port --seed 1") == ("--served-model-name", "port", "--seed", "1")


@pytest.mark.parametrize("value", ["\N{SUPERSCRIPT TWO}", "1" * 5000, "0", "-1", "x", ""])
def test_a_number_of_slots_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(WorkloadError, match="give a whole number above 0"):
        option_value(("--max-num-seqs", value), "--max-num-seqs", "1")


@pytest.mark.parametrize("serve", [("--max_num_seqs", "4"), ("--max_num_seqs=4",), ("--max-num_seqs", "4")])
def test_options_may_be_written_with_underscores_as_vllm_takes_them(serve: tuple[str, ...], tmp_path: Path) -> None:
    assert option_value(serve, "--max-num-seqs", "1") == "4"
    plan = Plan(arms=[Arm("stock")], cells=small_plan().cells, model="m", serve=("--max_model_len", "9000"), rounds=1)
    assert Experiment(plan, tmp_path, Quiet()).options == ("--max_model_len", "9000")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("serve", "arm", "refused"),
    [
        (("--max-model-len", "64"), (), True),
        (("--max_model_len=64",), (), True),
        ((), ("--max-model-len", "64"), True),
        (("--max-model-len", "64"), ("--max-model-len", "9000"), False),
        (("--max-model-len", "9000"), (), False),
        (("--max-model-len", "1k"), (), False),
        (("--max-model-len",), (), False),
        ((), (), False),
    ],
)
def test_too_little_room_for_the_workload_is_refused_before_a_server_is_started(
    serve: tuple[str, ...], arm: tuple[str, ...], refused: bool
) -> None:
    plan = Plan(arms=[Arm("stock", arm)], cells=small_plan().cells, model="m", serve=serve, rounds=1)
    if not refused:
        check_room(plan)
        return
    with pytest.raises(
        WorkloadError, match=r"arm 'stock' has --max-model-len 64, the workload needs \d+: use a smaller"
    ):
        check_room(plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--serve", "--max-model-len 64"), "has --max-model-len 64, the workload needs"),
        (("--serve", "--port 9000"), "is not allowed for a server of the benchmark"),
        (
            ("--trace", "sample", "--agents", "3"),
            "--agents 3 means nothing to a trace: leave it out, or choose lines of it",
        ),
        (("--trace", "sample", "--turns", "3"), "--turns 3 means nothing to a trace"),
        (("--pace", "open"), "--pace open means nothing to workload 'react': leave it out, or give a --trace"),
        (("--limit", "9"), "--limit 9 means nothing to workload 'react'"),
        (("--workload", "programs", "--speed", "2"), "--speed 2.0 means nothing to workload 'programs'"),
        (("--gap-s", "1", "1.0000001"), "are the same to six digits: leave one out"),
    ],
)
def test_what_cannot_work_is_refused_while_the_plan_is_made(arguments: tuple[str, ...], message: str) -> None:
    given: Any = cli.make_parser().parse_args(["bench", "run", "--arms", "stock", "--model", "m", *arguments])
    with pytest.raises(WorkloadError, match=message):
        make_plan(given, Quiet())  # type: ignore[arg-type]
