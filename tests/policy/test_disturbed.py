"""The controller with engines unlike the one it was tuned on: fast, slow and hostile step times, and what it costs afterwards."""

import math
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.calls import cold
from vllm_agentserve.policy.budget import ChunkRules, StepBudget, TrustRegion
from vllm_agentserve.policy.call import Backlog
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.latency import StepModel
from vllm_agentserve.policy.phase import Phase

COLD, RESUME = Phase.COLD_PREFILL, Phase.RESUME_PREFILL


@dataclass(frozen=True)
class Engine:
    """Step times in ms: of the weights, per sequence, per thousand tokens of context and of prompt, of both; of mixing."""

    base: float
    sequence: float
    context: float
    tokens: float
    attended: float = 0.0
    mixing: float = 0.0

    def ms(self, sequences: int, context: int, chunks: list[tuple[int, int]]) -> float:
        prompts = sum(self.tokens * p / 1000 + self.attended * p * (c + p / 2) / 1e6 for p, c in chunks)
        total = self.base + self.sequence * sequences + self.context * context / 1000
        return total + prompts + (self.mixing if chunks else 0.0)


GPU = Engine(8.0, 0.01, 0.001, 20.0, 0.2)
LAUNCHED = Engine(5.0, 0.05, 0.0005, 12.0, 0.3, 22.0)
"""A 7B model on a large GPU: decode steps are CUDA graphs, and a step with a chunk launches its kernels one by one."""
ENGINES = {
    "tiny": Engine(0.45, 0.002, 0.0005, 8.0, 0.05, 0.05),
    "gpu": GPU,
    "large": Engine(280.0, 0.5, 0.1, 600.0, 10.0, 5.0),
    "cpu": Engine(5.0, 0.0, 0.48, 50.0, 31.0, 1.0),
}


class Runner:
    """Reads prompts one after the other beside a number of streams."""

    def __init__(
        self, engine: Engine, seed: int = 0, noise: float = 0.03, prompt: int = 20_000, **limits: float
    ) -> None:
        self.engine, self.noise, self.prompt = engine, noise, prompt
        self.rng = random.Random(seed)
        self.controller = BudgetController(BudgetLimits(**limits))  # type: ignore[arg-type]
        self.done = 0

    def quiet(self, steps: int, sequences: int, factor: float = 1.0) -> None:
        for _ in range(steps):
            took = self.engine.ms(sequences, sequences * 2000, []) * self.rng.uniform(1 - self.noise, 1 + self.noise)
            self.controller.observe(took * factor, took * factor, sequences, sequences * 2000, None)

    def mixed(self, steps: int, sequences: int, factor: float = 1.0, backlog: Backlog | None = None) -> list[int]:
        """Steps with a chunk of a cold prompt each; returns their lengths."""
        lengths, context = [], sequences * 2000
        for _ in range(steps):
            budget = self.controller.plan(
                sequences, context, max(8192 - sequences, 1), colds=True, backlog=backlog or Backlog()
            )
            tokens = budget.grant(COLD, self.prompt - self.done, self.done)
            took = self.engine.ms(sequences, context, [(tokens, self.done)])
            took *= factor * self.rng.uniform(1 - self.noise, 1 + self.noise)
            self.controller.observe(took, took, sequences, context, budget.granted, budget=budget)
            self.done = (self.done + tokens) % self.prompt
            lengths.append(tokens)
        return lengths


@pytest.mark.parametrize("granularity", [8, 16, 24, 32, 64, 128, 500])
@pytest.mark.parametrize("sequences", [1, 4, 64, 100, 220, 245, 256, 300, 1000])
def test_chunks_grow_beside_every_number_of_streams(sequences: int, granularity: int) -> None:
    """Steps of 10 to 20 ms of 50: chunks have to grow to where the time is used, whatever sizes steps are rounded to."""
    runner = Runner(GPU, tpot_slo_ms=50.0, chunk_granularity_tokens=granularity)
    runner.quiet(100, sequences)
    lengths = runner.mixed(200, sequences)
    took = GPU.ms(sequences, sequences * 2000, [(max(lengths[-10:]), 10_000)])
    assert took > 0.5 * 50.0


def test_no_number_of_streams_keeps_chunks_at_the_floor() -> None:
    stuck = []
    for sequences in range(1, 1025, 7):
        runner = Runner(GPU, tpot_slo_ms=50.0, noise=0.0)
        runner.quiet(20, sequences)
        if runner.mixed(40, sequences)[-1] <= 24:
            stuck.append(sequences)
    assert stuck == []


@pytest.mark.parametrize("sequences", [8, 64, 220, 256])
@pytest.mark.parametrize("factor", [100.0, 0.01])
@pytest.mark.parametrize("name", ENGINES)
def test_one_step_of_another_length_costs_little(name: str, sequences: int, factor: float) -> None:
    """A step a hundred times longer or shorter than it should be: twenty steps later chunks are as long as before."""
    engine = ENGINES[name]
    runner = Runner(engine, tpot_slo_ms=max(5 * engine.ms(sequences, sequences * 2000, []), 1.0), prompt=100_000)
    runner.quiet(100, sequences)
    runner.mixed(200, sequences)
    runner.done = 0
    before = runner.mixed(20, sequences)
    runner.mixed(1, sequences, factor)
    runner.mixed(20, sequences)
    runner.done = 0
    after = runner.mixed(20, sequences)
    assert sum(after) >= 0.6 * sum(before)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(ENGINES)),
    slo=st.one_of(st.none(), st.floats(1.2, 20.0)),
    sequences=st.integers(1, 512),
    disturbances=st.lists(
        st.tuples(st.one_of(st.floats(0.0, 1.0), st.floats(1.0, 200.0)), st.integers(1, 120)), max_size=4
    ),
    backlog=st.builds(Backlog, st.integers(0, 64), st.integers(0, 200_000), st.floats(0.0, 1e5)),
    seed=st.integers(0, 1000),
)
@example("cpu", None, 512, [(0.0, 1), (0.0, 54), (0.0, 57)], Backlog(), 0)
def test_whatever_steps_take_the_budget_comes_back(
    name: str,
    slo: float | None,
    sequences: int,
    disturbances: list[tuple[float, int]],
    backlog: Backlog,
    seed: int,
) -> None:
    """Steps of any length for a while, then as the engine is again: no exception, no number that is none, and from the
    fiftieth step on no chunk at the floor where an engine that knows itself would read twice as much."""
    engine = ENGINES[name]
    quiet_ms = engine.ms(sequences, sequences * 2000, [])
    limits = {} if slo is None else {"tpot_slo_ms": max(slo * quiet_ms, 1.0)}
    runner = Runner(engine, seed, **limits)
    runner.quiet(30, sequences)
    for factor, steps in disturbances:
        runner.quiet(steps // 3, sequences, factor)
        runner.mixed(steps, sequences, factor, backlog)
    for _ in range(3):
        runner.mixed(17, sequences)
        runner.quiet(8, sequences)
    controller = runner.controller
    model = controller.whole.model
    assert all(math.isfinite(weight) for weight in (*model._decode.weights, *model._prefill.weights))
    assert math.isfinite(model.error)
    assert math.isfinite(controller.gain)
    lengths = runner.mixed(20, sequences)
    target = controller.target_ms
    rate = engine.tokens / 1000 + engine.attended * runner.prompt / 1e6
    fits = (0.4 * target - quiet_ms - engine.mixing) / rate
    if fits > 4 * controller.limits.prefill_floor_tokens:
        assert max(lengths) > controller.limits.prefill_floor_tokens
    assert controller.prefill_rate(256, 512_000, 2000, 0) > 0.0  # type: ignore[operator]
    assert controller.prefill_rate(1, 1_000_000, 2000, 0) > 0.0  # type: ignore[operator]


def test_a_resume_budget_comes_back_once_steps_are_in_time() -> None:
    made = BudgetController(BudgetLimits(tpot_slo_ms=40.0))
    for _ in range(30):
        made._feedback(80.0)
    assert made.resume_tokens == 32
    for _ in range(10):
        made._feedback(39.0)  # between the thresholds
    assert 2 * made.resume_tokens >= 256


def test_far_below_the_target_time_for_prefill_comes_back_quickly() -> None:
    made = BudgetController(BudgetLimits(tpot_slo_ms=40.0))
    for _ in range(30):
        made._feedback(80.0)
    assert made.gain == pytest.approx(0.4)
    steps = 0
    while made.gain < 0.9:
        made._feedback(40.0 * made.gain)
        steps += made.CONTROL_STEPS
    assert steps <= 112


def test_a_region_shrinks_by_one_half_at_most() -> None:
    region = TrustRegion(32)
    region._tokens, region._attended = 1000.0, 1e7
    region.tried_beside_decodes([(COLD, 900, 1000)], ratio=100.0)
    assert region._tokens == pytest.approx(500.0)


def test_a_region_is_judged_by_what_it_allowed() -> None:
    """1000 streams: steps are rounded to 128 tokens, so that of 60 allowed ones the floor of 16 is left."""
    rules = ChunkRules(16, 128)
    budget = StepBudget(StepModel(), rules, 1000.0, 4096, 256, 0, 1000)
    assert budget.grant(COLD, 5000, 0) > 0
    budget = StepBudget(StepModel(), rules, 1000.0, 4096, 256, 0, 1000, trust=TrustRegion(32))
    assert budget.grant(COLD, 5000, 0) == 24  # 31 tokens allowed, 1024 in all
    budget = StepBudget(StepModel(), rules, 1000.0, 4096, 256, 0, 900, trust=TrustRegion(64))
    assert budget.grant(COLD, 5000, 0) == 16
    assert budget.allowed([(COLD, 16, 0)]) == [(COLD, 63, 0)]
    assert budget.allowed([(COLD, 8, 0)]) == [(COLD, 32, 0)], "half of what was granted ran"


@pytest.mark.parametrize("seed", range(20))
def test_far_from_what_was_seen_no_step_takes_nothing(seed: int) -> None:
    """Forty quiet steps of one to four streams with noise of a tenth: a step of 256 streams, or over a million tokens."""
    rng, model = random.Random(seed), StepModel()
    shortest = math.inf
    for _ in range(40):
        sequences = rng.choice([1, 2, 3, 4])
        context = sequences * rng.randint(500, 4000)
        took = (8 + 0.03 * sequences + 0.005 * context / 1000) * rng.lognormvariate(0, 0.1)
        shortest = min(shortest, took)
        model.learn_decode(sequences, context, took)
    assert model.decode_ms(4, 1_000_000) >= shortest
    assert model.decode_ms(256, 512_000) >= shortest
    assert model.decode_ms(1, 1000) == pytest.approx(8.0, rel=0.2)


@pytest.mark.parametrize("ms", [5.0, 0.3, 0.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_one_short_step_teaches_little(ms: float, mixed: bool) -> None:
    runner = Runner(Engine(8.4, 0.0, 0.0, 50.0, 1.0, 2.0), tpot_slo_ms=40.0, prompt=8000)
    runner.quiet(100, 8)
    runner.mixed(300, 8)
    model = runner.controller.whole.model
    before = model.decode_ms(8, 16_000), model.step_ms(8, 16_000, [cold(256, 2000)])
    if mixed:
        runner.controller.observe(ms, ms, 8, 16_000, [(COLD, 400, 2000)])
    else:
        runner.controller.observe(ms, ms, 8, 16_000, None)
    after = model.decode_ms(8, 16_000), model.step_ms(8, 16_000, [cold(256, 2000)])
    assert after == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("sequences", [1, 4, 32])
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_at_a_constant_number_of_streams_another_pace_is_learned(sequences: int, factor: float) -> None:
    runner = Runner(Engine(10.0, 0.2, 0.5, 50.0))
    runner.quiet(5000, sequences)
    runner.quiet(60, sequences, factor)
    now = runner.controller.whole.model.decode_ms(sequences, sequences * 2000)
    assert now == pytest.approx(factor * runner.engine.ms(sequences, sequences * 2000, []), rel=0.1)


@pytest.mark.parametrize("backlog", [Backlog(), Backlog(1, 1100), Backlog(3, 3300, 100.0)])
@pytest.mark.parametrize("mixing", [15.0, 20.0, 25.0, 40.0])
@pytest.mark.parametrize(("slo", "useful"), [(None, 0.35), (20.0, 0.15)])
def test_chunks_are_long_enough_to_be_worth_their_step(
    backlog: Backlog, mixing: float, slo: float | None, useful: float
) -> None:
    """Mixing alone takes nearly as long as the target, or longer. Short chunks make streams no faster, and prompts wait for ever:
    they had shrunk to the floor, and the time given to prefill with them."""
    limits = {} if slo is None else {"tpot_slo_ms": slo}
    runner = Runner(replace(LAUNCHED, mixing=mixing), noise=0.05, **limits)
    for _ in range(6):
        runner.quiet(20, 8)
        lengths = runner.mixed(100, 8, backlog=backlog)
    tokens_ms = LAUNCHED.tokens * sum(lengths) / len(lengths) / 1000
    assert tokens_ms > useful * (tokens_ms + mixing)
    # And so is a tool result: in a step that takes so long anyway, 32 tokens of it would be nothing.
    assert runner.controller.resume_tokens >= 800
    predicted = runner.controller.whole.model.step_ms(8, 16_000, [cold(1100, 0)])
    assert predicted == pytest.approx(runner.engine.ms(8, 16_000, [(1100, 0)]), rel=0.2)


@pytest.mark.parametrize("slo", [40.0, None])
def test_what_mixing_takes_is_not_learned_from_a_machine_that_is_slow_now_and_then(slo: float | None) -> None:
    """Chunks of long prompts are all as long as each other, and what a slow machine took for them looked like mixing. So steps
    were made longer, to be worth that, and stayed so for ever: 68 ms where 40 ms were asked for."""
    engine = Engine(18.0, 0.2, 0.0, 50.0, 2.0, 5.0)
    limits = {} if slo is None else {"tpot_slo_ms": slo}
    runner = Runner(engine, noise=0.05, prompt=4000, **limits)
    runner.quiet(50, 10)
    for _ in range(25):
        lengths = runner.mixed(90, 10)
        runner.mixed(10, 10, 4.0)
    usual = sorted(lengths)[len(lengths) // 2]
    assert engine.ms(10, 20_000, [(usual, 2000)]) < 1.15 * (slo or 100.0)
    assert usual > 100


def test_of_many_steps_that_are_worth_mixing_one_shows_what_that_takes() -> None:
    runner = Runner(LAUNCHED, tpot_slo_ms=20.0)
    runner.quiet(50, 8)
    runner.mixed(200, 8)
    lengths = runner.mixed(10 * BudgetController.PROBE_STEPS, 8)
    assert 9 <= sum(tokens <= StepModel.SHORT_TOKENS for tokens in lengths) <= 11
    assert runner.controller.whole.model.mixing_ms() == pytest.approx(22.0, rel=0.15)
