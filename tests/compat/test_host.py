"""The option `kv_host_gib`: what vLLM is given for it, and what it is refused for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.log_messages import log_messages
from tests.support.schedulers import make_scheduler
from vllm_agentserve.config import AgentServeConfig, OptionError
from vllm_agentserve.scheduler.vllm_hooks import VllmHooks, require_hooks
from vllm_agentserve.vllm_compat import host
from vllm_agentserve.vllm_compat.host import Host, NoHost, add_host, available_bytes, host_of
from vllm_agentserve.vllm_compat.lanes import choose_lanes
from vllm_agentserve.vllm_compat.program_cache import ProgramCachePolicy


def engine_arguments(toy_model: Path, **given: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(toy_model), **given)


def options(**given: Any) -> AgentServeConfig:
    return AgentServeConfig(**{"kv_host_gib": 0.5, "mode": "time-sliced"} | given)


def other_connector(name: str = "NixlConnector") -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(kv_connector=name, kv_role="kv_both")


def test_the_engine_gets_vllms_connector(toy_model: Path) -> None:
    arguments = engine_arguments(toy_model)
    add_host(arguments, options(kv_host_policy="arc"))
    config = arguments.kv_transfer_config
    assert (config.kv_connector, config.kv_role, config.kv_connector_module_path) == (
        "OffloadingConnector",
        "kv_both",
        None,
    )
    assert config.kv_connector_extra_config == {
        "cpu_bytes_to_use": 1 << 29,
        "eviction_policy": "arc",
        "offload_prompt_only": False,
        "spec_name": "NumpyOffloadingSpec",
        "spec_module_path": "vllm_agentserve.vllm_compat.cpu_offload",
    }
    add_host(arguments, options(kv_host_policy="arc"))
    assert arguments.kv_transfer_config is config, "a second look finds it done"


def test_on_a_gpu_vllms_own_copies_are_used() -> None:
    found = host.connector_options(2.0, "lru", on_cpu=False)
    assert found == {"cpu_bytes_to_use": 2 << 30, "eviction_policy": "lru", "offload_prompt_only": False}


def test_what_makes_room_by_programs_is_named_with_its_module() -> None:
    found = host.connector_options(2.0, "program", on_cpu=False)
    assert found["eviction_policy"] == "ProgramCachePolicy"
    assert found["cache_policy_module_path"] == "vllm_agentserve.vllm_compat.program_cache"
    scheduler: Any = make_scheduler(options={"kv_host_gib": 1.0, "kv_host_policy": "program"}, host_chunks=64)
    assert type(scheduler.host.eviction) is ProgramCachePolicy


def test_without_the_option_nothing_is_added(toy_model: Path) -> None:
    arguments = engine_arguments(toy_model)
    add_host(arguments, AgentServeConfig())
    assert arguments.kv_transfer_config is None


@pytest.mark.parametrize("value", [-1, 1e9, "2", True, float("nan"), None])
def test_a_size_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"'kv_host_gib' = .* must be a number from 0 to 65536 GiB"):
        AgentServeConfig(kv_host_gib=value)


def test_a_policy_that_vllm_does_not_have_is_refused() -> None:
    with pytest.raises(OptionError, match=r"'kv_host_policy' = 'fifo' .* one of 'program', 'lru', 'arc'"):
        AgentServeConfig(kv_host_policy="fifo")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"kv_transfer_config": other_connector},
            "names a KV connector too, NixlConnector, and vLLM runs one. Give one",
        ),
        (
            {"kv_transfer_config": lambda: other_connector("OffloadingConnector")},
            "names a KV connector too, OffloadingConnector, and vLLM runs one. Give one of the two.",
        ),
        ({"kv_offloading_size": 4.0}, "--kv-offloading-size 4 asks for host memory too. Give one of the two."),
        ({"enable_prefix_caching": False}, "prefix caching is off, .* Leave out --no-enable-prefix-caching."),
    ],
)
def test_what_does_not_go_together_is_refused(toy_model: Path, given: dict[str, Any], says: str) -> None:
    made = {name: value() if callable(value) else value for name, value in given.items()}
    arguments = engine_arguments(toy_model, **made)
    with pytest.raises(OptionError, match=f"agentserve option 'kv_host_gib' = 0.5 cannot be fulfilled: .*{says}"):
        add_host(arguments, options())


@pytest.mark.parametrize(("ranks", "needed"), [(1, "3"), (2, "6")])
def test_more_than_the_machine_has_is_refused(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, needed: str
) -> None:
    """Every engine has its own."""
    monkeypatch.setattr(host, "available_bytes", lambda: int(2.5 * 2**30))
    arguments = engine_arguments(toy_model, data_parallel_size=ranks)
    says = f"'kv_host_gib' = 3 cannot be fulfilled: {needed} GiB are needed, and 2.5 GiB of memory are available. Give less"
    with pytest.raises(OptionError, match=says):
        add_host(arguments, options(kv_host_gib=3))
    monkeypatch.setattr(host, "available_bytes", lambda: None)
    add_host(arguments, options(kv_host_gib=3))


@pytest.mark.parametrize(
    "given",
    [
        {"data_parallel_size": 4, "data_parallel_size_local": 0},
        {"data_parallel_size": 4, "data_parallel_size_local": 1},
        {"data_parallel_size": 4, "data_parallel_rank": 1},
        {"data_parallel_size": 4, "data_parallel_external_lb": True},
    ],
    ids=["all elsewhere", "one here", "a server each", "a server each, by its node"],
)
def test_engines_on_other_machines_take_no_memory_here(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 4 * 2**30)
    arguments = engine_arguments(toy_model, **given)
    add_host(arguments, options(kv_host_gib=3))
    assert arguments.kv_transfer_config.kv_connector == "OffloadingConnector"


def test_one_of_several_api_servers_does_not_count_what_the_engines_have_taken(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 2**30)
    arguments = engine_arguments(toy_model)
    arguments._api_process_count, arguments._api_process_rank = 2, -1
    with pytest.raises(OptionError, match="3 GiB are needed"):
        add_host(arguments, options(kv_host_gib=3))
    arguments._api_process_rank = 1
    add_host(arguments, options(kv_host_gib=3))
    assert arguments.kv_transfer_config.kv_connector == "OffloadingConnector"


def test_shared_memory_must_have_room_on_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(host, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(host, "available_bytes", lambda: 1 << 50)
    monkeypatch.setattr(host.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1 << 20, f_frsize=1024))
    assert host.memory_obstacle(0.9) is None
    assert "which has 1.0 GiB left. Give less, or make" in str(host.memory_obstacle(1.1))


def test_what_a_container_may_take_counts(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    for path, text in (
        ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    1000 kB\n"),
        ("sys/fs/cgroup/memory.max", "max"),
        ("sys/fs/cgroup/memory.current", "5000"),
        ("sys/fs/cgroup/memory.stat", "anon 4000\ninactive_file 1000\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert available_bytes(tmp_path) == 1000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("9000\n")
    assert available_bytes(tmp_path) == 9000 - 5000 + 1000


def test_lanes_and_host_memory_do_not_go_together(toy_model: Path) -> None:
    arguments = engine_arguments(toy_model)
    add_host(arguments, options())
    says = "host memory behind the KV cache takes a KV connector of its own, and vLLM runs one"
    assert choose_lanes(arguments, options(mode="auto", tpot_slo_ms=50)) == says
    assert arguments.kv_transfer_config.kv_connector == "OffloadingConnector"
    with pytest.raises(OptionError, match=f"'mode' = 'lanes' cannot run here: {says}. Use 'auto'"):
        choose_lanes(arguments, options(mode="lanes"))


def test_the_plugin_asks_and_says_why_it_is_time_sliced(toy_model: Path) -> None:
    with log_messages("INFO") as said:
        VllmHooks.check_engine_args(
            engine_arguments(toy_model, additional_config={"agentserve": {"kv_host_gib": 0.5, "tpot_slo_ms": 50}})
        )
    assert any("mode auto runs time-sliced: host memory behind the KV cache takes" in one for one in said)


def test_without_the_plugin_the_option_is_refused() -> None:
    with pytest.raises(OptionError, match=r"'kv_host_gib' = 0\.5 cannot be fulfilled: it is off"):
        require_hooks(options(), lanes=False, host=False, not_asked={"check_engine_args"}, reason="it is off")
    require_hooks(options(), lanes=False, host=True, not_asked={"check_engine_args"}, reason="it is off")


def test_the_scheduler_says_what_the_host_has_room_for() -> None:
    with log_messages("INFO") as said:
        scheduler: Any = make_scheduler(options={"kv_host_gib": 1.0}, num_blocks=65, host_chunks=512)
    assert any("has room for the KV of 8192 tokens, 8.0 times the KV cache" in one for one in said)
    found = host_of(scheduler)
    assert isinstance(found, Host)
    assert (found.tokens, found.used_tokens, found.token_bytes) == (8192, 0, 8.0)
    assert scheduler.host.tokens == 8192


def test_without_prefix_caching_the_log_says_that_it_is_of_no_use() -> None:
    with log_messages("WARNING") as said:
        make_scheduler(options={"kv_host_gib": 1.0}, host_chunks=64, prefix_caching=False)
    assert any("is of no use: vLLM has turned prefix caching off" in one for one in said)


def test_an_engine_without_it_has_none() -> None:
    assert type(host_of(make_scheduler(options={}))) is NoHost  # type: ignore[arg-type]
