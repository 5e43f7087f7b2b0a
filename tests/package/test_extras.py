"""What is installed with an extra only: which command needs it, what it says when it is missing, what needs nothing."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

from tests.support.new_python import run_code
from tests.support.paths import ROOT
from vllm_agentserve import cli
from vllm_agentserve.extras import EXTRAS
from vllm_agentserve.extras import VLLM as VLLM_MODULES

PACKAGE = ROOT / "vllm_agentserve"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"pynvml"}
"""Imported where it is there; what needs it goes on without."""
VLLM = {"vllm", "torch", "triton"}
COMMANDS = [
    (("top", "--once"), "cli"),
    (("bench", "workloads"), "bench"),
    (("bench", "run"), "bench"),
    (("bench", "report", "nowhere"), "bench"),
    (("bench", "table", "nowhere"), "bench"),
    (("demo",), "bench"),
]


def canonical(requirement: str) -> str:
    """The name of a distribution as pip compares it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


@cache
def third_party(path: Path) -> frozenset[str]:
    """The modules of others that a file imports, also late."""
    return frozenset(imported_from_others(path))


def imported_from_others(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for name in {name.split(".")[0] for name in names}:
            if name not in sys.stdlib_module_names and name != PACKAGE.name:
                yield name


def of_a_command_with_an_extra(path: Path) -> bool:
    room = path.relative_to(PACKAGE).parts[0]
    return room in ("bench", "cluster", "simulator", "cli.py") or room.startswith("top")


@cache
def providers() -> Mapping[str, list[str]]:
    """By module: the distributions that bring it. All that is installed is read for this."""
    return packages_distributions()


def distributions(modules: set[str]) -> set[str]:
    known = providers()
    # Ray comes with an extra that is not installed everywhere.
    return {canonical(name) for module in modules for name in (["ray"] if module == "ray" else known[module])}


def test_the_base_install_requires_nothing() -> None:
    assert PROJECT["dependencies"] == []


def test_what_is_outside_of_the_commands_imports_only_what_vllm_requires() -> None:
    vllm = {canonical(one) for name in providers()["vllm"] for one in requires(name) or ()}
    for path in PACKAGE.rglob("*.py"):
        if of_a_command_with_an_extra(path):
            continue
        for name in set(third_party(path)) - VLLM - OPTIONAL:
            assert distributions({name}) <= vllm, f"{path} imports {name}"


@pytest.mark.parametrize(
    ("extra", "files"),
    [("cli", "top*.py"), ("bench", "bench/*.py"), ("bench", "cli.py"), ("cluster", "cluster/*.py")],
    ids=["top", "bench", "cli", "cluster"],
)
def test_an_extra_brings_what_its_commands_import(extra: str, files: str) -> None:
    imported = {name for path in PACKAGE.glob(files) for name in third_party(path)} - VLLM
    assert imported - OPTIONAL <= set(EXTRAS[extra])
    named = {canonical(one) for one in PROJECT["optional-dependencies"][extra]}
    assert distributions(imported) <= named
    assert distributions(set(EXTRAS[extra])) == named - {"nvidia-ml-py"}


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [(arguments, module, extra) for arguments, extra in COMMANDS for module in EXTRAS[extra]],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_command_names_what_is_missing(
    arguments: tuple[str, ...],
    module: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr()
    expected = f"error: agentserve {arguments[0]} needs {module}: pip install 'vllm-agentserve[{extra}]'\n"
    assert (said.out, said.err) == ("", expected)


def test_a_cluster_names_ray_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    assert cli.main(["cluster", "serve", "model"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: agentserve cluster needs ray: pip install 'vllm-agentserve[cluster]'\n")


def test_all_that_is_missing_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in EXTRAS["cli"]:
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    assert cli.main(["top"]) == 2
    assert "needs prometheus_client, rich: pip install 'vllm-agentserve[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["bench", "run", "--help"], ["top", "--help"], ["doctor", "--help"]]
)
def test_help_needs_no_extra_and_no_vllm(arguments: list[str]) -> None:
    hidden = sorted({"vllm", "torch"}.union(*EXTRAS.values()))
    code = f"import sys; sys.modules |= dict.fromkeys({hidden!r}); from vllm_agentserve import cli; cli.main({arguments!r})"
    done = run_code(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "agentserve" in done.stdout


def test_the_doctor_needs_no_extra() -> None:
    """It says that vLLM is missing, which an environment without one should hear."""
    hidden = sorted({"vllm", "torch"}.union(*EXTRAS.values()))
    code = (
        f"import sys; sys.modules |= dict.fromkeys({hidden!r}); from vllm_agentserve import cli, vllm_compat\n"
        "vllm_compat.installed_vllm = lambda: None\n"
        "sys.exit(cli.main(['doctor']))"
    )
    done = run_code(code)
    assert (done.returncode, done.stderr) == (1, "")
    assert "[problem] vLLM: vLLM is not installed" in done.stdout


@pytest.mark.parametrize("command", ["gpu-check", "toy-model"])
def test_what_vllm_brings_is_named_too(command: str, tmp_path: Path) -> None:
    arguments = [command, "--output", str(tmp_path / "new")]
    code = (
        f"import sys; sys.modules['numpy'] = None; from vllm_agentserve import cli; sys.exit(cli.main({arguments!r}))"
    )
    done = run_code(code)
    words = f"error: agentserve {command} needs numpy, which vLLM brings: install vLLM beside this package\n"
    assert (done.returncode, done.stderr) == (2, words)


@pytest.mark.parametrize(
    ("command", "module", "said"),
    [
        ("doctor", "vllm", ", which vLLM brings: install vLLM beside this package"),
        ("doctor", "torch.cuda", ", which vLLM brings: install vLLM beside this package"),
        ("toy-model", "safetensors.numpy", ", which vLLM brings: install vLLM beside this package"),
        ("gpu-check", "msgspec", ", which vLLM brings: install vLLM beside this package"),
        ("bench", "msgspec", ": pip install 'vllm-agentserve[bench]'"),
        ("bench", "numpy", ": pip install 'vllm-agentserve[bench]'"),
        ("bench", "scipy.stats", ": pip install 'vllm-agentserve[bench]'"),
        ("bench", "vllm", ", which vLLM brings: install vLLM beside this package"),
        ("top", "prometheus_client.parser", ": pip install 'vllm-agentserve[cli]'"),
        ("doctor", "rich.console", ": pip install 'vllm-agentserve[cli]'"),
        ("gpu-check", "matplotlib", ": pip install 'vllm-agentserve[bench]'"),
        # Nothing that can be installed is known to bring these.
        ("doctor", "vllm_agentserve.no_such_part", None),
        ("doctor", "vllm_agentserve", None),
        ("doctor", "cbor2", None),
        ("doctor", "somebody.else", None),
        ("bench", "vllm.no_such_part", None),
        ("doctor", "", None),
    ],
)
def test_a_module_that_is_missing_while_a_command_runs_is_named_with_what_brings_it(
    command: str, module: str, said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: object) -> int:
        if said is not None:
            monkeypatch.setitem(sys.modules, module.partition(".")[0], None)  # type: ignore[arg-type]
        raise ModuleNotFoundError(f"No module named {module!r}", name=module or None)

    own = cli.COMMANDS[command]
    monkeypatch.setitem(cli.COMMANDS, command, cli.Command(fails, own.extra))
    arguments = [command, *(["workloads"] if command == "bench" else [])]
    if said is None:
        with pytest.raises(ModuleNotFoundError, match="No module named"):
            cli.main(arguments)
        return
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"error: agentserve {command} needs {module}{said}\n"


def test_what_brings_a_module_is_known_of_all_that_the_package_imports() -> None:
    outside: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        found = set(third_party(path)) - OPTIONAL
        assert found <= {*VLLM_MODULES}.union(*EXTRAS.values()), path
        if not of_a_command_with_an_extra(path):
            outside |= found
    assert outside == set(VLLM_MODULES)


def test_the_gpu_check_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["gpu-check", "--help"])
    assert ended.value.code == 0
    assert "--budget-s" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "{doctor,top,bench,demo,cluster,gpu-check,toy-model}" in capsys.readouterr().out
