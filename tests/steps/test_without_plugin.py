"""An engine whose vLLM has not loaded our plugin: what needs it stops the start, for the rest there is a warning."""

import logging
from typing import Any

import pytest

from tests.support.schedulers import make_scheduler
from vllm_agentserve import doctor
from vllm_agentserve.config import OptionError
from vllm_agentserve.doctor_gpu import Level
from vllm_agentserve.scheduler.log_messages import HOOKS
from vllm_agentserve.vllm_compat import hooks

OTHERS = "some,others"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own methods, as they are before the plugin is loaded."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.metrics.loggers import StatLoggerManager

    monkeypatch.setenv("VLLM_PLUGINS", OTHERS)
    replaced = ((EngineArgs, "create_engine_config"), (EngineArgs, "from_cli_args"), (InputProcessor, "process_inputs"))
    for owner, name in replaced:
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(StatLoggerManager, "__init__", lambda *args, **kwargs: None)
    monkeypatch.setattr(hooks, "asked_upstream", lambda name: False)


@pytest.mark.parametrize("options", [{"strict_hints": True}, {"mode": "lanes"}], ids=str)
def test_what_needs_the_plugin_stops_the_start(without: None, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"option '{next(iter(options))}' = .*'{OTHERS}' leaves out 'agentserve'"):
        make_scheduler(options=options)


@pytest.mark.parametrize("options", [{}, {"mode": "time-sliced"}], ids=str)
def test_for_the_rest_there_is_a_warning(
    without: None, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    make_scheduler(options=options)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [OTHERS in line for line in said if "agentserve" in line] == [True]
    assert all(any(text in line for line in said) for text in HOOKS.values())


def test_a_lane_that_is_there_needs_no_plugin(without: None) -> None:
    make_scheduler(options={"mode": "lanes"}, lanes=True)


@pytest.mark.parametrize(("named", "level"), [(OTHERS, Level.PROBLEM), ("", Level.PROBLEM), ("x,agentserve", Level.OK)])
def test_doctor_reads_the_variable(monkeypatch: pytest.MonkeyPatch, named: str, level: Level) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", named)
    finding = doctor.check_plugin()
    assert finding.level is level
    assert ("VLLM_PLUGINS" in finding.found) == (level is Level.PROBLEM)
