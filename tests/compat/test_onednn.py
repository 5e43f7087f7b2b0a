"""oneDNN's kernels in vLLM's CPU build: which threads they use. `policy.step_sizes.KernelSizes` rests on it."""

import os

import pytest

from tests.support.new_python import run_code
from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.policy.step_sizes import KERNELS_PER_LAYER

MULTIPLIES = """
import os, time
os.environ.update(OMP_NUM_THREADS="2", GOMP_CPU_AFFINITY=" ".join(map(str, sorted(os.sched_getaffinity(0))[:2])))
import psutil, torch, vllm._C
from vllm_agentserve.vllm_compat.cpu import set_threads

from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm_agentserve.vllm_compat.cpu import kernels_kept

layer = torch.nn.Linear(512, 20_000, bias=False, dtype=torch.bfloat16)
with torch.no_grad(), kernels_kept(KEPT):
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)

def threads_of(rows, threads):
    "How many threads do at least a tenth of the work."
    set_threads(threads)
    given = torch.randn(rows, 512, dtype=torch.bfloat16)
    times = lambda: {one.id: one.user_time + one.system_time for one in psutil.Process().threads()}
    before, until = times(), time.process_time() + 1.0
    while time.process_time() < until:
        layer.cpu_linear(given, None, None)
    return sum(time - before.get(thread, 0.0) > 0.1 for thread, time in times().items())

set_threads(2)
for rows in range(1, BEFORE):
    layer.cpu_linear(torch.randn(rows, 512, dtype=torch.bfloat16), None, None)
print([threads_of(rows, threads) for rows, threads in ORDER])
"""


@pytest.mark.skipif(
    has_nvidia_driver() or len(os.sched_getaffinity(0)) < 2, reason="needs a CPU build of vLLM and two cores"
)
@pytest.mark.parametrize(
    ("kept", "before", "order", "threads"),
    [
        (0, 0, [(8, 1), (8, 2)], [1, 1]),
        (0, 0, [(8, 2), (8, 1), (8, 2)], [2, 1, 2]),
        (0, 0, [(8, 1), (9, 2)], [1, 2]),
        # vLLM's layers keep kernels of 32 sizes, and drop those that were not used for longest.
        (0, 105, [(8, 1), (8, 2)], [1, 1]),
        (KERNELS_PER_LAYER, 105, [(8, 1), (8, 2)], [1, 2]),
    ],
)
def test_a_kernel_never_has_more_threads_than_it_was_made_on(
    kept: int, before: int, order: list[tuple[int, int]], threads: list[int]
) -> None:
    """Where this fails, oneDNN has changed: then sizes need not come on all threads first."""
    code = MULTIPLIES.replace("ORDER", str(order)).replace("KEPT", str(kept)).replace("BEFORE", str(before))
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == str(threads)
