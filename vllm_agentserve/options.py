"""What an option is: its type, unit, default, range and meaning; how a value is checked, and how the table of all is written."""

import dataclasses
import json
import math
import types
import typing
from typing import Any

KEY = "agentserve"
"""Where the options stand in vLLM's `--additional-config`."""


class OptionError(ValueError):
    """An option has a wrong name, type or value; the message names the option, the value and what is allowed."""


def read_json(text: str) -> Any:
    """Reads JSON. Raises `ValueError` for whatever cannot be read, numbers of too many digits and too deep nesting too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def option(default: Any, unit: str, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Declares one option: `low` and `high` are inclusive bounds in `unit`."""
    return dataclasses.field(default=default, metadata={"unit": unit, "help": help, "low": low, "high": high})


def allowed(field: "dataclasses.Field[Any]") -> str:
    choices = _choices(field)
    if field.type is bool:
        return "true or false"
    if choices:
        return "one of " + ", ".join(repr(choice) for choice in choices)
    kind = "a whole number" if _whole(field) else "a number"
    unit = f" {field.metadata['unit']}" if field.metadata["unit"] else ""
    none = ", or null" if _optional(field) else ""
    return f"{kind} from {field.metadata['low']:.10g} to {field.metadata['high']:.10g}{unit}{none}"


def _choices(field: "dataclasses.Field[Any]") -> tuple[Any, ...]:
    return typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()


def _optional(field: "dataclasses.Field[Any]") -> bool:
    return isinstance(field.type, types.UnionType) and type(None) in typing.get_args(field.type)


def _whole(field: "dataclasses.Field[Any]") -> bool:
    return field.type is int or int in typing.get_args(field.type)


def checked(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Returns the value in its declared type, or raises `OptionError`."""
    wrong = OptionError(f"{KEY} option {field.name!r} = {value!r} is not allowed: it must be {allowed(field)}.")
    choices = _choices(field)
    if choices:
        if not isinstance(value, str) or value not in choices:
            raise wrong
        return value
    if field.type is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if value is None:
        if _optional(field):
            return None
        raise wrong
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise wrong
    if _whole(field) and value != int(value):
        raise wrong
    if not field.metadata["low"] <= value <= field.metadata["high"]:
        raise wrong
    return int(value) if _whole(field) else float(value)


def table_of(options: type[Any]) -> str:
    """The options of a class as a Markdown table."""
    lines = ["| option | default | allowed | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(options):
        default = field.default
        if default is None:
            default = "not set"
        elif isinstance(default, bool):
            default = "on" if default else "off"
        unit = f" {field.metadata['unit']}" if field.metadata["unit"] and field.default is not None else ""
        lines.append(f"| `{field.name}` | {default}{unit} | {allowed(field)} | {field.metadata['help']} |")
    return "\n".join(lines)
