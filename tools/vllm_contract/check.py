"""What became of a symbol of the contract in a tree of vLLM's sources."""

import ast
import enum
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_contract.sources import Definition, Function, Sources, decorators, defined
from vllm_contract.symbols import REST, Symbol, Use

SHOWN = 3
"""So many modules are named where a symbol was found elsewhere."""
PROPERTIES = {"property", "cached_property"}


class Status(enum.Enum):
    PRESENT = "present"
    MOVED = "moved"
    CHANGED = "changed"
    GONE = "gone"


@dataclass(frozen=True)
class SymbolResult:
    """A symbol, its status, and what differs (empty where nothing does)."""

    symbol: Symbol
    status: Status
    detail: str = ""

    def __str__(self) -> str:
        symbol = self.symbol
        return f"{self.status.value}: {symbol.module}:{symbol.name}: {self.detail} (used in {', '.join(symbol.users)})"


@dataclass(frozen=True)
class Parameter:
    name: str
    required: bool
    keyword_only: bool = False


@dataclass(frozen=True)
class Signature:
    """Parameters but the first of a method; `more`: whether any further ones are taken."""

    parameters: tuple[Parameter, ...]
    more: bool


def check_symbols(sources: Sources, contract: Iterable[Symbol]) -> list[SymbolResult]:
    """A finding for every symbol, in their order."""
    return [check_symbol(sources, symbol) for symbol in contract]


def check_symbol(sources: Sources, symbol: Symbol) -> SymbolResult:
    owner, *members = symbol.name.split(".")
    definition = sources.find(symbol.module, owner)
    if definition is None:
        return missing(sources, symbol, owner, member=False)
    holder = definition
    for depth, name in enumerate(members):
        found = sources.member(definition, name) if depth == 0 else inner(definition, name)
        if found is None:
            return missing(sources, symbol, name, member=True)
        holder, definition = definition, found
    differs = difference(sources, symbol, definition, in_class=isinstance(holder.node, ast.ClassDef) and bool(members))
    return SymbolResult(symbol, Status.CHANGED, differs) if differs else SymbolResult(symbol, Status.PRESENT)


def missing(sources: Sources, symbol: Symbol, name: str, member: bool) -> SymbolResult:
    homes = [home for home in sources.homes(name, member) if home != symbol.module]
    if not homes:
        return SymbolResult(symbol, Status.GONE, f"nothing is called {name!r} any more")
    more = f" and {len(homes) - SHOWN} more" if len(homes) > SHOWN else ""
    return SymbolResult(symbol, Status.MOVED, f"{name!r} is now in {', '.join(homes[:SHOWN])}{more}")


def inner(definition: Definition, name: str) -> Definition | None:
    """A function inside a function."""
    nodes = (one for one in ast.walk(definition.node) if isinstance(one, Function) and one.name == name)
    return next((Definition(definition.module, one) for one in nodes), None)


def difference(sources: Sources, symbol: Symbol, definition: Definition, in_class: bool) -> str:
    """How a symbol that is there differs from what we rely on; empty if it does not."""
    node = definition.node
    if symbol.use is Use.READ:
        plain = in_class and isinstance(node, Function) and not decorators(node) & PROPERTIES
        return "it is a method, and was an attribute" if plain else ""
    if symbol.use is Use.TEXT:
        source = ast.unparse(node)
        for text in symbol.detail.splitlines():
            _, there, source = source.partition(text)
            if not there:
                return f"its source no longer holds {text!r}, or not in its place"
        return ""
    if symbol.use is Use.IMPLEMENT:
        ours = set(symbol.detail.split())
        new = sorted(sources.abstract(definition) - ours)
        return f"new abstract method {', '.join(map(repr, new))}" if new else ""
    if isinstance(node, ast.ClassDef):
        signature = constructor(sources, definition)
    elif isinstance(node, Function) and not decorators(node) & PROPERTIES:
        signature = signature_of(node, skip_first=in_class and "staticmethod" not in decorators(node))
    else:
        return "it is no function any more"
    return mismatch(symbol.detail.split(), signature, overrides=symbol.use is Use.OVERRIDE)


def mismatch(given: list[str], signature: Signature, overrides: bool) -> str:
    """How a signature differs from the parameters of a contract; see `Symbol.detail`."""
    wrong: list[str] = []
    by_position = [one for one in given if one != REST and not one.endswith("=")]
    by_name = [one[:-1] for one in given if one.endswith("=")]
    positional = [one.name for one in signature.parameters if not one.keyword_only]
    known = {one.name for one in signature.parameters}
    for number, name in enumerate(by_position):
        if number < len(positional) and positional[number] != name:
            wrong.append(f"parameter {name!r} is gone or renamed: {positional[number]!r} stands in its place")
        elif number >= len(positional) and not signature.more:
            wrong.append(f"parameter {name!r} is gone")
    wrong += [f"parameter {name!r} is gone" for name in by_name if name not in known and not signature.more]
    mentioned = {*by_position, *by_name, *positional[: len(by_position)]}
    further = [one for one in signature.parameters if one.name not in mentioned]
    if REST in given:
        return "; ".join(wrong)
    wrong += [f"new required parameter {one.name!r}" for one in further if one.required]
    if overrides:
        wrong += [f"new parameter {one.name!r}" for one in further if not one.required]
        if signature.more:
            wrong.append("it takes any further parameters")
    return "; ".join(wrong)


def signature_of(node: Function, skip_first: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    optional = len(arguments.defaults)
    found = [Parameter(one.arg, number < len(positional) - optional) for number, one in enumerate(positional)]
    found = found[1:] if skip_first else found
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(Parameter(one.arg, default is None, keyword_only=True))
    return Signature(tuple(found), arguments.vararg is not None or arguments.kwarg is not None)


def constructor(sources: Sources, definition: Definition) -> Signature:
    """How a class is made: by the nearest `__init__`, or from its fields, as dataclasses are."""
    init = sources.member(definition, "__init__")
    if init is not None and isinstance(init.node, Function):
        return signature_of(init.node, skip_first=True)
    fields: dict[str, bool] = {}
    for one in reversed(sources.lineage(definition)):
        assert isinstance(one.node, ast.ClassDef)
        for name, node in defined(one.node.body).items():
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                fields[name] = required(node.value)
    return Signature(tuple(Parameter(name, needed) for name, needed in fields.items()), False)


def required(default: ast.expr | None) -> bool:
    """Whether a field with this default has to be given."""
    if isinstance(default, ast.Call) and ast.unparse(default.func).rpartition(".")[2] in ("field", "Field"):
        return not default.args and not {"default", "default_factory", "init"} & {one.arg for one in default.keywords}
    return default is None
