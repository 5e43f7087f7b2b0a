"""What a symbol of the contract is: a part of vLLM, how this package relies on it, and where."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

REST = "..."


class Use(enum.Enum):
    READ = "read"
    """It is there; as an attribute of a class, it is no method."""
    CALL = "call"
    """We call it: what we pass is there, and nothing else is required."""
    OVERRIDE = "override"
    """vLLM calls ours in its place: it has the parameters of ours, and no others."""
    IMPLEMENT = "implement"
    """Our class derives from it: it has no abstract method that ours does not define."""
    TEXT = "text"
    """A function whose source, as `ast.unparse` writes it, holds some texts in this order."""


@dataclass(frozen=True)
class Symbol:
    """A part of vLLM.

    Args:
        module: where we import it from.
        name: in that module; of a class's member, `Class.member`.
        use: how we rely on it.
        users: our modules that do, below `vllm_agentserve/`.
        detail: parameters, `name` by position, `name=` by keyword, `...` for whatever else is passed on; or names of methods;
            or texts, one per line.
    """

    module: str
    name: str
    use: Use
    users: tuple[str, ...]
    detail: str = ""


def exports(module: str, users: str, names: str) -> Iterator[Symbol]:
    """Names that are imported, or looked up in the module."""
    return (Symbol(module, name, Use.READ, tuple(users.split())) for name in names.split())


def reads(owner: str, users: str, names: str) -> Iterator[Symbol]:
    """Attributes of the class `module:Class`."""
    module, _, cls = owner.partition(":")
    return (Symbol(module, f"{cls}.{name}", Use.READ, tuple(users.split())) for name in names.split())


def calls(owner: str, users: str, **functions: str) -> Iterator[Symbol]:
    """Functions of a module, or methods of `module:Class`, with what we pass; a class is called to make one."""
    return _functions(Use.CALL, owner, users, functions)


def overrides(owner: str, users: str, **functions: str) -> Iterator[Symbol]:
    """Methods that ours stand in for, with the parameters of ours."""
    return _functions(Use.OVERRIDE, owner, users, functions)


def _functions(use: Use, owner: str, users: str, functions: dict[str, str]) -> Iterator[Symbol]:
    module, _, cls = owner.partition(":")
    for name, parameters in functions.items():
        yield Symbol(module, f"{cls}.{name}" if cls else name, use, tuple(users.split()), parameters)


def implements(owner: str, users: str, methods: str) -> Iterator[Symbol]:
    module, _, cls = owner.partition(":")
    yield Symbol(module, cls, Use.IMPLEMENT, tuple(users.split()), methods)


def says(owner: str, users: str, *texts: str) -> Iterator[Symbol]:
    """Texts of a function `module:name`."""
    module, _, name = owner.partition(":")
    return (Symbol(module, name, Use.TEXT, tuple(users.split()), text) for text in texts)
