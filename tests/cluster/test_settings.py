"""Settings of a cluster: what is allowed, what engines get, and the command line."""

import json
import socket
from typing import Any

import pytest

from tests.support.new_python import run_code
from vllm_agentserve import cli
from vllm_agentserve.cluster.arguments import POLICIES
from vllm_agentserve.cluster.command import execute, settings_of
from vllm_agentserve.cluster.settings import START_TIMEOUT_S, ClusterSettings, SettingsError
from vllm_agentserve.policy.placement import Policy


def test_settings_survive_a_file() -> None:
    settings = ClusterSettings("model", ("--max-model-len", "8192"), engines=3, policy="sticky")
    assert ClusterSettings.from_mapping(settings.mapping()) == settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "model = None"),
        ({"model": ""}, "model = ''"),
        ({"model": "m", "engine": 2}, "there is no setting 'engine'"),
        ({"model": "m", "engines": 0}, "engines = 0"),
        ({"model": "m", "engines": True}, "engines = True"),
        ({"model": "m", "engines": "2"}, "engines = '2'"),
        ({"model": "m", "ingresses": 2000}, "ingresses = 2000"),
        ({"model": "m", "prefillers": -1}, "prefillers = -1"),
        ({"model": "m", "prefill_tokens": 0.5}, "prefill_tokens = 0.5"),
        ({"model": "m", "prefill_seconds": 0}, "prefill_seconds = 0"),
        (
            {"model": "m", "prefillers": 1, "options": ["--kv-transfer-config", "{}"]},
            "--kv-transfer-config cannot be given with prefillers",
        ),
        (
            {"model": "m", "prefillers": 1, "options": ["--kv-transfer-config.kv_connector", "OffloadingConnector"]},
            "--kv-transfer-config.kv-connector cannot be given with prefillers",
        ),
        (
            {
                "model": "m",
                "prefillers": 1,
                "options": ["--additional-config", '{"agentserve": {"kv_host_gib": 1}}'],
            },
            "kv_host_gib cannot be given with prefillers",
        ),
        (
            {"model": "m", "prefillers": 1, "options": ["--kv_offloading_size=4"]},
            "--kv-offloading-size cannot be given with prefillers",
        ),
        ({"model": "m", "policy": "best"}, "policy = 'best'"),
        ({"model": "m", "bound": 0.5}, "bound = 0.5"),
        ({"model": "m", "bound": None}, "bound"),
        ({"model": "m", "pin_seconds": 0}, "pin_seconds = 0"),
        (
            {"model": "m", "start_timeout_s": 0},
            "start_timeout_s = 0 is not allowed: it must be a number from 1 to 86400",
        ),
        ({"model": "m", "start_timeout_s": float("nan")}, "start_timeout_s = nan"),
        ({"model": "m", "start_timeout_s": "60"}, "start_timeout_s = '60'"),
        ({"model": "m", "options": "--max-model-len 8192"}, "options = "),
        ({"model": "m", "options": ["--port", "1"]}, "--port cannot be given"),
        ({"model": "m", "options": ["--port=1"]}, "--port cannot be given"),
        ({"model": "m", "options": ["--ssl_keyfile", "k"]}, "--ssl-keyfile cannot be given"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        ClusterSettings.from_mapping(given)
    assert words in str(refused.value)


@pytest.mark.parametrize("options", [(), ("--scheduler-cls", "vllm_agentserve.AgentScheduler")])
def test_engines_get_our_scheduler(options: tuple[str, ...]) -> None:
    found = ClusterSettings("m", options)
    assert found.engine_options()[:2] == ["--scheduler-cls", "vllm_agentserve.AgentScheduler"]
    assert found.engine_options().count("--scheduler-cls") == 1
    assert found.client_names


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler"), False),
        (("--additional-config", '{"agentserve": {"client_names": false}}'), False),
        (("--additional-config", '{"agentserve": {"client_names": true}}'), True),
        (("--additional-config", '{"other": 1}'), True),
        (("--additional-config", "["), True),
    ],
)
def test_ingresses_read_names_as_their_engines_do(options: tuple[str, ...], names: bool) -> None:
    assert ClusterSettings("m", options).client_names is names


def test_engines_that_move_kv_compute_again_what_did_not_come() -> None:
    options = ClusterSettings("m", prefillers=1).engine_options()
    given = json.loads(options[options.index("--kv-transfer-config") + 1])
    assert (given["kv_connector"], given["kv_load_failure_policy"]) == ("NixlConnector", "recompute")
    assert "--kv-transfer-config" not in ClusterSettings("m").engine_options()


def test_all_policies_can_be_chosen() -> None:
    assert set(POLICIES) == set(Policy.__args__)  # type: ignore[attr-defined]


def test_the_time_to_start_can_be_set() -> None:
    for more, wanted in (([], START_TIMEOUT_S), (["--start-timeout", "60"], 60.0)):
        found = cli.make_parser().parse_args(["cluster", "serve", *more, "model"])
        assert settings_of(found).start_timeout_s == wanted
        assert found.options == []


def test_whatever_follows_the_model_is_for_the_engines() -> None:
    line = ["cluster", "serve", "--engines", "3", "model", "--max-model-len", "8192", "--enforce-eager"]
    found = cli.make_parser().parse_args(line)
    assert (found.engines, found.model) == (3, "model")
    assert found.options == ["--max-model-len", "8192", "--enforce-eager"]
    assert (found.host, found.port) == ("127.0.0.1", 8000)


@pytest.mark.parametrize("line", [[], ["serve"], ["serve", "--engines", "0", "m"], ["serve", "--policy", "x", "m"]])
def test_a_wrong_command_line_is_refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["cluster", *line])
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_port_in_use_is_said_before_ray_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = cli.make_parser().parse_args(["cluster", "serve", "--port", str(port), "model"])
        assert execute(arguments) == 1
    assert f"port {port} is in use" in capsys.readouterr().err


def test_a_wrong_setting_is_said_before_ray_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = cli.make_parser().parse_args(["cluster", "serve", "model", "--uds", "/tmp/x"])
    assert execute(arguments) == 2
    assert capsys.readouterr().err.startswith("error: --uds cannot be given to engines of a cluster")


def test_settings_and_ingress_need_no_ray() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from vllm_agentserve.cluster import arguments, caller, chooser, engine, ingress, load, merged, relay, settings, table"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr
