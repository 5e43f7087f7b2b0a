"""The sizes of steps that are run once before the first request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.step_models import FlatModel
from vllm_agentserve.policy.budget import ChunkRules, StepBudget
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.step_sizes import EVERY_SIZE_TO, KernelSizes, StepSize, step_sizes


@pytest.mark.parametrize(
    ("largest", "granularity", "above"),
    [
        (40, 8, []),
        (64, 8, []),
        (100, 8, [72, 80, 88, 96, 100]),
        (300, 8, [72, 80, 88, 96, 104, 112, 120, 128, 144, 160, 176, 192, 208, 224, 240, 256, 288, 300]),
        (300, 64, [128, 192, 256, 300]),
        (90, 1, [72, 80, 88, 90]),
        (1000, 4096, [1000]),
    ],
)
def test_every_small_size_then_a_grid_then_the_largest(largest: int, granularity: int, above: list[int]) -> None:
    assert step_sizes(largest, granularity) == [*range(1, min(largest, EVERY_SIZE_TO) + 1), *above]


def test_they_are_few() -> None:
    assert len(step_sizes(2048, 8)) == 104
    assert len(step_sizes(8192, 8)) == 120


@given(
    decodes=st.integers(1, 32),
    prefill_ms=st.floats(0.0, 500.0),
    granularity=st.sampled_from([1, 8, 16, 64]),
    even=st.booleans(),
    wanted=st.integers(1, 20_000),
    phase=st.sampled_from([Phase.COLD_PREFILL, Phase.RESUME_PREFILL]),
)
def test_a_step_whose_prompt_goes_on_has_one_of_them(
    decodes: int, prefill_ms: float, granularity: int, even: bool, wanted: int, phase: Phase
) -> None:
    """Decodes beside the chunk of a cold or a returning prompt that is cut by the time it may take."""
    largest = 4096
    rules = ChunkRules(16, granularity, even=even)
    budget = StepBudget(FlatModel(), rules, prefill_ms, largest - decodes, largest, 0, decodes)
    tokens = budget.grant(phase, wanted, 0)
    if tokens < wanted:
        assert decodes + tokens in step_sizes(largest, granularity)


@pytest.mark.parametrize(
    ("sizes", "known"),
    [
        ([(4, 4), (4, 4)], [False, True]),
        ([(4, 4), (5, 4), (5, 4)], [False, False, True]),
        ([(4, 4), (5, 5), (4, 5)], [False, False, True]),
        ([(100, 0), (100, 0), (100, 1), (100, 1)], [False, True, False, True]),
        # Three are remembered of either kind, and go when they were not used for longest.
        ([(1, 1), (2, 2), (3, 3), (1, 1), (4, 4), (1, 1), (2, 2)], [False, False, False, True, False, True, False]),
        ([(1, 1), (2, 1), (3, 1), (4, 1), (4, 1)], [False, False, False, False, True]),
        # Neither decodes alone nor on the grid: it may never come again. So many requests will.
        ([(7, 0), (70, 2), (70, 2), (71, 2), (71, 71)], [True, False, True, True, False]),
        # Kernels that were made on fewer threads stay so.
        ([(2, 2), (70, 2), (70, 0)], [False, True, True]),
    ],
)
def test_sizes_whose_kernels_are_there(sizes: list[tuple[int, int]], known: list[bool]) -> None:
    kernels = KernelSizes([1, 2, 3, 4, 5, 100], 3)
    assert [kernels.use(StepSize(*size)) for size in sizes] == known
