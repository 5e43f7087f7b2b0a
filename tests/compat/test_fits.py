"""What vLLM promises of prompts and the KV cache: each that it takes fits, since an engine where one might not does not start."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from tests.support.schedulers import BLOCK, Driver, make_request, make_scheduler

LONGEST = 16384
"""`max_model_len` of the schedulers."""


def planned(config: Any, specs: list[dict[str, Any]], memory: list[int]) -> Any:
    """vLLM's plan of the KV cache, one part a worker."""
    if find_spec("vllm.v1.core.kv_cache_planning") is None:  # vLLM 0.32
        from vllm.v1.core import kv_cache_utils

        return kv_cache_utils.get_kv_cache_configs(config, specs, memory)
    from vllm.v1.core import kv_cache_planning as planning

    return planning.get_kv_cache_configs(config, specs, memory, planning.get_global_kv_cache_groups(config, specs))


def configured(blocks: int) -> Any:
    """The KV cache of an engine with so many blocks, as vLLM plans it at its start."""
    config = make_scheduler().vllm_config
    config.cache_config.num_gpu_blocks_override = blocks
    config.cache_config.kv_cache_layout = next(iter(KVCacheLayout)).name
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return planned(config, [{"layer": spec}], [1 << 30])[0]


def test_an_engine_that_could_not_hold_the_longest_prompt_does_not_start() -> None:
    with pytest.raises(ValueError, match=r"estimated maximum model length is 304"):
        configured(20)
    with pytest.raises(ValueError, match=r"estimated maximum model length is 16368"):
        configured(LONGEST // BLOCK)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_longest_prompt_runs_in_the_smallest_engine_and_those_behind_it_too(asynchronous: bool) -> None:
    blocks = configured(LONGEST // BLOCK + 1).num_blocks
    scheduler: Any = make_scheduler(asynchronous=asynchronous, num_blocks=blocks)
    driver = Driver(scheduler, depth=2 if asynchronous else 1)
    scheduler.add_request(make_request("longest", LONGEST - 1, max_tokens=1))
    scheduler.add_request(make_request("behind", 100, max_tokens=5))
    for _ in range(1000):
        driver.step()
        if not scheduler.requests:
            break
    assert not scheduler.requests
