"""Options: typed, bounded, and rejected with the field, the value and what is allowed."""

import dataclasses

import pytest

from tests.support.paths import ROOT
from vllm_agentserve.config import AgentServeConfig, OptionError, option_table


def test_defaults_without_our_key() -> None:
    assert AgentServeConfig.from_additional_config({"other": 1}) == AgentServeConfig()
    assert AgentServeConfig.from_additional_config(None) == AgentServeConfig()


def test_values_are_taken_in_their_type() -> None:
    config = AgentServeConfig.from_additional_config({"agentserve": {"tpot_slo_ms": 40, "max_bypass_steps": 8.0}})
    assert (config.tpot_slo_ms, config.max_bypass_steps) == (40.0, 8)
    assert isinstance(config.tpot_slo_ms, float)
    assert isinstance(config.max_bypass_steps, int)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tpot_slo": 40}, ["'tpot_slo'", "Did you mean 'tpot_slo_ms'", "prefill_floor_tokens"]),
        ({"tpot_slo_ms": "40"}, ["'tpot_slo_ms' = '40'", "a number from 1 to 60000 ms, or null"]),
        ({"tpot_slo_ms": 0}, ["'tpot_slo_ms' = 0", "from 1 to 60000 ms"]),
        ({"tpot_slo_ms": True}, ["'tpot_slo_ms' = True", "a number"]),
        ({"tpot_slo_ms": float("nan")}, ["'tpot_slo_ms' = nan", "a number"]),
        ({"tpot_factor": None}, ["'tpot_factor' = None", "a number from 1.1 to 1000 x"]),
        ({"prefill_floor_tokens": 1.5}, ["'prefill_floor_tokens' = 1.5", "a whole number from 1 to 65536 tokens"]),
        ({"mode": "fast"}, ["'mode' = 'fast'", "'auto', 'time-sliced', 'lanes', 'stock'"]),
        ({"mode": ["auto"]}, ["'mode' = ['auto']", "one of"]),
        ({3: 4}, ["no option 3"]),
        ("tpot_slo_ms=40", ["must be an object of options", "'tpot_slo_ms=40'"]),
        (None, ["must be an object of options", "None"]),
    ],
)
def test_wrong_options_name_field_value_and_remedy(given: object, words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        AgentServeConfig.from_additional_config({"agentserve": given})
    for word in words:
        assert word in str(caught.value)


def test_every_option_has_a_default_in_its_own_range() -> None:
    for field in dataclasses.fields(AgentServeConfig):
        assert field.metadata["help"].endswith(".")
    AgentServeConfig()


def test_the_documented_table_is_the_generated_one() -> None:
    assert option_table() in (ROOT / "docs" / "options.md").read_text()
