"""vLLM's own scheduler tests with our class, and those of its KV cache with our queue of free blocks: none that pass with
stock's are lost.

The tests come from vLLM's source distribution, fetched by name when this test runs; without an index it says skipped.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from vllm_agentserve.vllm_compat import installed_vllm

CORE = ["tests/v1/core/test_scheduler.py", "tests/v1/core/test_async_scheduler.py"]
CACHE = ["tests/v1/core/test_prefix_caching.py", "tests/v1/core/test_kv_cache_utils.py"]
# The tests name this model of the hub and read its configuration only.
OPT_125M = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "word_embed_proj_dim": 768,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "torch_dtype": "float16",
}


def fetch_source(version: str, folder: Path) -> Path | None:
    """Fetches vLLM's source distribution with pip; returns the archive, None where there is no index to reach.

    pip looks into a source distribution it downloads, so the tools vLLM's build names must be there: they go into a
    folder of their own, and nothing is built.
    """
    tools = folder / "tools"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    needed = ["setuptools", "setuptools_scm", "setuptools_rust", "wheel", "packaging", "jinja2"]
    install = subprocess.run([*pip, "install", "--target", str(tools), *needed], capture_output=True, check=False)
    if install.returncode != 0:
        return None
    environment = os.environ | {
        "PYTHONPATH": str(tools),
        "VLLM_TARGET_DEVICE": "empty",
        "VLLM_VERSION_OVERRIDE": version,
    }
    command = [*pip, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(folder)]
    done = subprocess.run([*command, f"vllm=={version}"], capture_output=True, env=environment, check=False)
    return next(folder.glob("vllm-*.tar.gz"), None) if done.returncode == 0 else None


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vLLM's `tests` package and nothing else of vLLM."""
    version = str(installed_vllm()).split("+")[0]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_agentserve"
    cache.mkdir(parents=True, exist_ok=True)
    archive = next(cache.glob(f"vllm-{version}.tar.gz"), None)
    if archive is None:
        fetched = fetch_source(version, tmp_path_factory.mktemp("source"))
        if fetched is None:
            pytest.skip(f"the source distribution of vLLM {version} cannot be fetched here")
        archive = fetched.replace(cache / fetched.name)
    folder = tmp_path_factory.mktemp("suite")
    with tarfile.open(archive) as source:
        members = [m for m in source.getmembers() if re.match(r"[^/]+/tests/", m.name)]
        source.extractall(folder, members, filter="data")
    return next(folder.iterdir())


def start(suite: Path, arm: str, tests: list[str]) -> subprocess.Popen[bytes]:
    """Starts these tests with the given arm's classes; what they say goes into a file of the arm's name."""
    model = suite / "opt-125m"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(OPT_125M))
    redirect = suite / "redirect.json"
    redirect.write_text(json.dumps({"facebook/opt-125m": str(model)}))
    environment = os.environ | {
        "AGENTSERVE_SUITE": arm,
        "PYTHONPATH": os.pathsep.join(map(str, (suite, ROOT / "tests" / "support", ROOT))),
        "VLLM_MODEL_REDIRECT_PATH": str(redirect),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts="]
    with (suite / arm).open("wb") as said:
        return subprocess.Popen(
            [*command, "-p", "stock_suite_plugin", *tests],
            cwd=suite,
            env=environment,
            stdout=said,
            stderr=subprocess.DEVNULL,
        )


def passed(suite: Path, arms: tuple[str, str], tests: list[str]) -> list[set[bytes]]:
    """Which of these tests pass with each arm's classes; both arms run at the same time."""
    running = [start(suite, arm, tests) for arm in arms]
    try:
        for one in running:
            one.wait()
    finally:
        for one in running:
            one.kill()
    return [set(re.findall(rb"^PASSED (\S+)", (suite / arm).read_bytes(), re.MULTILINE)) for arm in arms]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_none_of_vllms_own_scheduler_tests_is_lost(suite: Path) -> None:
    stock, ours = passed(suite, ("stock", "ours"), CORE)
    assert len(stock) >= 170
    assert stock - ours == set()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_none_of_vllms_own_cache_tests_is_lost(suite: Path) -> None:
    stock, ours = passed(suite, ("stock", "retaining"), CACHE)
    assert len(stock) >= 100
    assert stock - ours == set()
