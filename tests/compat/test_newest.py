"""The newest vLLM of the window, run: its Python sources in front of the installed CPU build.

Compiled kernels stay those of the installed version. Step tables, lanes and the tests of vLLM's parts need none. One engine shows
what vLLM's own Python code makes of our scheduler.
"""

import os
import re
import subprocess
import sys

import pytest

from tests.support.compat_tool import NEWEST, compat
from tests.support.paths import ROOT
from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.vllm_compat import SUPPORTED, installed_vllm

WITHOUT_ENGINE = ("tests/steps", "tests/compat", "tests/lanes", "--ignore=tests/compat/test_ray_contract.py")
"""Ray's parts do not change with vLLM, and where Ray is not installed their test is skipped."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(has_nvidia_driver(), reason=f"vLLM {NEWEST} runs here on the kernels of a CPU build only"),
]


@pytest.fixture(scope="module")
def sources() -> None:
    """Fetches the sources, so that the runs find them there."""
    assert NEWEST.startswith("{}.{}.".format(*SUPPORTED[-1]))
    if str(installed_vllm()).startswith(NEWEST):
        pytest.skip(f"vLLM {NEWEST} is the installed one, which all other tests run with")
    try:
        compat.fetched_sources(NEWEST)
    except compat.FetchError as error:
        if os.environ.get("GITHUB_ACTIONS"):
            pytest.fail(f"not run with the newest supported vLLM: {error}")
        pytest.skip(f"NOT RUN WITH THE NEWEST SUPPORTED VLLM: {error}")


def passed(*arguments: str, **environment: str) -> int:
    """How many of these tests pass with the newest vLLM; fails when one does not."""
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--timeout",
        "1100",
        "--tb",
        "short",
        "--show-capture",
        "no",
        *arguments,
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "with_vllm_sources.py"), NEWEST, *tests],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        text=True,
        capture_output=True,
        check=False,
    )
    said = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, said
    assert re.search(rf"^vLLM {re.escape(NEWEST)}\+cpu, sources of {re.escape(NEWEST)}$", done.stdout, re.MULTILINE), (
        said
    )
    last = done.stdout.splitlines()[-1]
    assert "skipped" not in last, said
    (number,) = re.findall(r"(\d+) passed", last)
    return int(number)


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("sources")
def test_step_tables_lanes_and_fakes_hold() -> None:
    assert passed("-m", "not engine and not slow", *WITHOUT_ENGINE) >= 660


@pytest.mark.engine
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("sources")
def test_an_engine_gives_stocks_answers() -> None:
    """A small mix of requests, time-sliced, beside the same under vLLM's own scheduler."""
    assert passed("tests/engine/test_time_sliced.py", "-k", "answers_equal_stock", AGENTSERVE_MIX="24") == 1
