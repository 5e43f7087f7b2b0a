"""Our patches in a copy of the installed vLLM: every shim switches itself off, and everything works as before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from vllm_agentserve.vllm_compat import installed_vllm

CHECK = """
import json, sys
from pathlib import Path

import vllm
assert Path(vllm.__file__).is_relative_to(sys.argv[1]), vllm.__file__
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

from vllm_agentserve.plugin import register
from vllm_agentserve.scheduler.metrics import AgentStatLogger
from vllm_agentserve.vllm_compat import STATS_FIELD
from vllm_agentserve.vllm_compat.scheduler import CHUNK_LIMIT

said = {"field": STATS_FIELD in SchedulerStats.__dataclass_fields__}
register()
wrapped = (EngineArgs.create_engine_config, InputProcessor.process_inputs, StatLoggerManager.__init__,
    EngineArgs.from_cli_args)
said |= {"wrapped": sum(hasattr(one, "agentserve") for one in wrapped), "limit": CHUNK_LIMIT}

def make(**options):
    return LLM(sys.argv[2], dtype="float32", max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=8192,
        kv_cache_memory_bytes=1 << 28, enforce_eager=True, disable_log_stats=False,
        scheduler_cls="vllm_agentserve.AgentScheduler", additional_config={"agentserve": {"warm_up_s": 0} | options})

try:
    make(mode="tme-sliced")
except Exception as error:
    said["refused"] = str(error)
llm = make(mode="time-sliced", tpot_slo_ms=15, first_chunk_tokens=16, strict_hints=True)
said["loggers"] = sum(isinstance(one, AgentStatLogger) for one in llm.llm_engine.logger_manager.stat_loggers)
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
said["stock_limit"] = scheduler._stock_limit.__qualname__
try:
    llm.generate({"prompt_token_ids": [5] * 9}, SamplingParams(max_tokens=2, extra_args={"agent_class": "boss"}))
except Exception as error:
    said["hint"] = str(error)
engine, tokens, most = llm.llm_engine, {}, 0
parameters = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)
engine.add_request("stream", {"prompt_token_ids": [11] * 40}, parameters)
for step in range(2000):
    if step == 5:
        engine.add_request("cold", {"prompt_token_ids": [(i * 31) % 3900 + 5 for i in range(2000)]}, parameters)
    for output in engine.step():
        tokens[output.request_id] = list(output.outputs[0].token_ids)
    if step > 5 and not engine.has_unfinished_requests():
        break
said["tokens"], said["counts"] = tokens, {k: v for k, v in scheduler.counts.items() if v}
print("SAID " + json.dumps(said))
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `vllm` whose files are links to the installed one, but for those that the patches change."""
    import vllm

    place, installed = tmp_path_factory.mktemp("patched"), Path(vllm.__file__).resolve().parent
    minor = ".".join(installed_vllm().split(".")[:2])
    patches = sorted((ROOT / "patches" / minor).glob("*.patch"))
    assert len(patches) == 6
    touched = {
        Path(line[6:]) for patch in patches for line in patch.read_text().splitlines() if line.startswith("+++ b/")
    }
    folders = {parent for path in touched for parent in path.parents if parent.parts}
    for folder in sorted(folders):
        (place / folder).mkdir()
        for one in (installed.parent / folder).iterdir():
            name = folder / one.name
            if name in touched:
                (place / name).write_bytes(one.read_bytes())
            elif name not in folders and one.name != "__pycache__":
                (place / name).symlink_to(one)
    for patch in patches:
        subprocess.run(["git", "apply", str(patch)], cwd=place, check=True)
    return place


def said_by(place: Path, toy_model: Path) -> dict[str, object]:
    import os

    environment = os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", CHECK, str(place), str(toy_model)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False, cwd=place)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert lines, done.stderr[-3000:]
    return dict(json.loads(lines[0][5:]))


def test_with_every_patch_in_every_shim_is_off_and_everything_works(patched: Path, toy_model: Path) -> None:
    import vllm

    theirs = said_by(patched, toy_model)
    ours = said_by(Path(vllm.__file__).resolve().parents[1], toy_model)
    assert (theirs["field"], theirs["wrapped"], theirs["limit"]) == (True, 0, "limit_prefill_chunk")
    assert (ours["field"], ours["wrapped"], ours["limit"]) == (False, 4, "_reserve_prefill_lookahead")
    assert theirs["stock_limit"] == "Scheduler.limit_prefill_chunk"
    for said in (theirs, ours):
        assert "'mode' = 'tme-sliced' is not allowed" in str(said["refused"])
        assert "agent_class" in str(said["hint"])
        assert said["loggers"] == 1
        counts = said["counts"]
        assert isinstance(counts, dict)
        assert counts["prefill_chunks"] > 10
        assert counts["mixed_steps"] > 10
    assert theirs["tokens"] == ours["tokens"]
