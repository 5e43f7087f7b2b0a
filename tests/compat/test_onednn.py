"""oneDNN's kernels in vLLM's CPU build: which threads they use. `policy.step_sizes.KernelSizes` rests on it."""

import os

import pytest

from tests.support.new_python import run_code
from vllm_agentserve.bench.device import has_nvidia_driver

MULTIPLIES = """
import os, time
os.environ.update(OMP_NUM_THREADS="2", GOMP_CPU_AFFINITY=" ".join(map(str, sorted(os.sched_getaffinity(0))[:2])))
import psutil, torch, vllm._C
from vllm import _custom_ops as ops
from vllm_agentserve.vllm_compat.cpu import set_threads

layer = ops.create_onednn_mm(torch.randn(20_000, 512, dtype=torch.bfloat16).t(), 128)

def threads_of(rows, threads):
    "How many threads do at least a tenth of the work."
    set_threads(threads)
    given = torch.randn(rows, 512, dtype=torch.bfloat16)
    times = lambda: {one.id: one.user_time + one.system_time for one in psutil.Process().threads()}
    before, until = times(), time.process_time() + 1.0
    while time.process_time() < until:
        ops.onednn_mm(layer, given, None)
    return sum(time - before.get(thread, 0.0) > 0.1 for thread, time in times().items())

print([threads_of(rows, threads) for rows, threads in ORDER])
"""


@pytest.mark.skipif(
    has_nvidia_driver() or len(os.sched_getaffinity(0)) < 2, reason="needs a CPU build of vLLM and two cores"
)
@pytest.mark.parametrize(
    ("order", "threads"),
    [
        ([(8, 1), (8, 2)], [1, 1]),
        ([(8, 2), (8, 1), (8, 2)], [2, 1, 2]),
        ([(8, 1), (9, 2)], [1, 2]),
    ],
)
def test_a_kernel_never_has_more_threads_than_it_was_made_on(order: list[tuple[int, int]], threads: list[int]) -> None:
    """Where this fails, oneDNN has changed: then sizes need not come on all threads first."""
    done = run_code(MULTIPLIES.replace("ORDER", str(order)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == str(threads)
