"""The arguments of vLLM that `agentserve doctor` is given: whether vLLM takes them, and whether two lanes fit them."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_agentserve.doctor_gpu import Finding, Level
from vllm_agentserve.options import read_json
from vllm_agentserve.vllm_compat import cuda, lanes

EXAMPLE = json.dumps({"offload_group_size": 8})


class EngineArgumentsError(ValueError):
    """vLLM does not take these arguments."""


class EngineMissingError(EngineArgumentsError):
    """vLLM cannot be asked: it is missing, or cannot be imported."""


@dataclass(frozen=True)
class EngineArguments:
    """What was found of them.

    Attributes:
        obstacle: why two lanes cannot run with them on any device; None if they can, or none were given.
        gpu_obstacle: the same of a GPU, from the major part of its compute capability.
    """

    obstacle: str | None
    gpu_obstacle: Callable[[int], str | None]


def engine_arguments(text: str, model: str | None) -> EngineArguments:
    """Reads a JSON object of vLLM's `EngineArgs`, as `vllm serve` takes them, with underscores. Imports vLLM where there are any.

    Without a folder with the model, what only the model decides is left out.

    Raises:
        EngineArgumentsError: it is no such object.
        EngineMissingError: there are arguments, and vLLM cannot be imported.
    """
    try:
        given = read_json(text)
    except ValueError as error:
        raise EngineArgumentsError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise EngineArgumentsError(f"{text!r} is no object")
    if not given:
        return EngineArguments(None, lambda capability: None)
    try:
        from vllm.engine.arg_utils import EngineArgs
    except Exception as error:  # whatever is wrong with an installation
        raise EngineMissingError(f"not checked, because vLLM cannot be imported: {error}") from error

    # Where no model is named, vLLM would take one of its own from the network; a folder without one stands for it.
    given = {"model": model or os.curdir, **given}
    try:
        arguments = EngineArgs(**given)
        known = (Path(arguments.model) / "config.json").is_file()
        loaded: Any = arguments.create_model_config() if known else None
        obstacle = lanes.arguments_obstacle(arguments)
        if obstacle is None and known:
            obstacle = lanes.model_obstacle(loaded)
    except Exception as error:  # vLLM and pydantic raise of every kind
        raise EngineArgumentsError(f"vLLM does not take {text}: {error}") from error
    shown = loaded or SimpleNamespace(
        quantization=arguments.quantization, is_moe=False, enable_sleep_mode=arguments.enable_sleep_mode
    )
    return EngineArguments(obstacle, lambda capability: cuda.arguments_obstacle(arguments, shown, capability))


def check_engine(text: str, model: str | None) -> Finding | None:
    """A finding where vLLM does not take the arguments, or cannot be asked."""
    try:
        engine_arguments(text, model)
    except EngineMissingError as error:
        return Finding("engine arguments", Level.NOTE, str(error), "mend the installation of vLLM first")
    except EngineArgumentsError as error:
        return Finding("engine arguments", Level.PROBLEM, str(error), f"give a JSON object, for example {EXAMPLE}")
    return None
