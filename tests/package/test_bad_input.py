"""What commands are given that is no JSON, no number, or of another kind: an error in words, never a traceback."""

import argparse
from typing import Any

import pytest
from rich.console import Console

from vllm_agentserve import cli
from vllm_agentserve.config import AgentServeConfig, OptionError
from vllm_agentserve.doctor import check_allocator, check_lanes, check_options
from vllm_agentserve.doctor_engine import check_engine
from vllm_agentserve.doctor_gpu import Level
from vllm_agentserve.options import read_json
from vllm_agentserve.top_scrape import parse
from vllm_agentserve.top_table import picture

HUGE = 10**400
"""A whole number that no float can hold."""
NO_JSON = {"not JSON": "{", "too deep": "[" * 100_000, "too many digits": "1" * 5000}


@pytest.mark.parametrize("name", NO_JSON)
def test_json_that_cannot_be_read_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_json(NO_JSON[name])


@pytest.mark.parametrize("name", NO_JSON)
def test_options_of_doctor_and_demo_that_are_no_json_are_named(name: str) -> None:
    text = NO_JSON[name]
    found = check_options(text)
    assert found.level is Level.PROBLEM
    assert "is not JSON" in found.found
    assert check_lanes(text, None) is None
    of_engine = check_engine(text, None)
    assert of_engine is not None
    assert "is not JSON" in of_engine.found
    with pytest.raises(argparse.ArgumentTypeError, match="is not JSON"):
        cli.options_argument(text)


@pytest.mark.parametrize("value", [HUGE, -HUGE, float("nan"), float("inf"), -float("inf")])
def test_an_option_that_no_float_can_hold_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"'tpot_slo_ms' = .* is not allowed"):
        AgentServeConfig.from_mapping({"tpot_slo_ms": value})


@pytest.mark.parametrize(
    "text",
    [
        '{"tensor_parallel_size": "2"}',
        '{"tensor_parallel_size": null}',
        '{"kv_transfer_config": "x"}',
        '{"kv_transfer_config": {"kv_connector": "x"}}',
    ],
)
def test_arguments_of_vllm_of_another_kind_are_refused(text: str) -> None:
    found = check_engine(text, None)
    assert found is not None
    assert found.level is Level.PROBLEM
    assert found.found.startswith(f"vLLM does not take {text}: ")
    assert check_lanes('{"mode": "lanes"}', None, text) is None


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        ('vllm:agentserve_program_waiting_requests{level="x"} 1', "waiting by level: none"),
        ("vllm:agentserve_tpot_seconds 0.5", "TPOT 500.0 ms  p95 -"),
    ],
)
def test_top_shows_what_it_knows_of_a_page_that_lacks_parts(page: str, shown: str) -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(picture(parse(page, 0.0)))
    assert shown in captured.get()


@pytest.mark.parametrize(
    ("maps", "level", "says", "remedy"),
    [
        ("7f00 r-xp /usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4.5.10\n", Level.OK, "tcmalloc", ""),
        ("7f00 r-xp /usr/lib/libjemalloc.so.2\n", Level.OK, "jemalloc", ""),
        ("7f00 r-xp /usr/lib/libc.so.6\n", Level.NOTE, "glibc's, which keeps freed memory", "LD_PRELOAD=libtcmalloc"),
        (
            "7f00 r-xp /srv/jemalloc-1/.venv/bin/python3.11\n",
            Level.NOTE,
            "glibc's, which keeps",
            "LD_PRELOAD=libtcmalloc",
        ),
    ],
)
def test_the_memory_allocator_is_named(
    monkeypatch: pytest.MonkeyPatch, maps: str, level: Level, says: str, remedy: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = check_allocator(maps)
    assert found is not None
    assert (found.level, found.subject) == (level, "memory allocator")
    assert found.found.startswith(says)
    assert remedy in found.remedy
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert check_allocator(maps) is None
