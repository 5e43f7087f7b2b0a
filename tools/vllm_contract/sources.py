"""A tree of Python sources, read with `ast`: what its modules and classes define, without importing any of it."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Names = dict[str, ast.AST]


@dataclass(frozen=True)
class Definition:
    """A definition and the module it stands in."""

    module: str
    node: ast.AST


class Sources:
    """Args: root: the folder that holds the packages, for example `site-packages` or an unpacked wheel."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, Names | None] = {}

    def path(self, module: str) -> Path | None:
        """The file of a module, None where there is none."""
        base = self.root.joinpath(*module.split("."))
        return next((one for one in (base / "__init__.py", base.with_suffix(".py")) if one.is_file()), None)

    def find(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Definition | None:
        """Where a name of a module is defined, through imports from other modules of the tree; None if nowhere."""
        names = self._names(module)
        if names is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        node = names.get(name)
        if isinstance(node, ast.ImportFrom):
            origin = self._origin(module, node)
            real = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            return self.find(origin, real, seen) or self._submodule(f"{origin}.{real}")
        if node is not None:
            return Definition(module, node)
        for star in (one for key, one in names.items() if key.startswith("*")):
            assert isinstance(star, ast.ImportFrom)
            if (found := self.find(self._origin(module, star), name, seen)) is not None:
                return found
        return self._submodule(f"{module}.{name}")

    def lineage(self, definition: Definition) -> list[Definition]:
        """A class and those of its bases that are in the tree, the nearest first."""
        found, todo = list[Definition](), [definition]
        while todo:
            one = todo.pop(0)
            if not isinstance(one.node, ast.ClassDef) or one in found:
                continue
            found.append(one)
            bases = [base.value if isinstance(base, ast.Subscript) else base for base in one.node.bases]
            todo += [base for base in (self._base(one.module, expression) for expression in bases) if base is not None]
        return found

    def member(self, definition: Definition, name: str) -> Definition | None:
        """A method, a class attribute, or an attribute that a method sets on `self`, of a class or of its bases."""
        for one in self.lineage(definition):
            node = defined(one.node.body).get(name) if isinstance(one.node, ast.ClassDef) else None
            node = node or next((target for target in self_targets(one.node) if target.attr == name), None)
            if node is not None:
                return Definition(one.module, node)
        return None

    def abstract(self, definition: Definition) -> set[str]:
        """The abstract methods of a class that neither it nor its bases implement."""
        seen: dict[str, bool] = {}
        for one in self.lineage(definition):
            assert isinstance(one.node, ast.ClassDef)
            for name, node in defined(one.node.body).items():
                seen.setdefault(name, isinstance(node, Function) and "abstractmethod" in decorators(node))
        return {name for name, is_abstract in seen.items() if is_abstract}

    def homes(self, name: str, member: bool) -> list[str]:
        """The modules that define a name at their top, or as a method or attribute of a class; sorted."""
        name = re.escape(name)
        top = rf"^(?:class|def|async def) {name}\b|^{name}\s*[:=]"
        inside = rf"^\s+(?:async )?def {name}\(|^\s+self\.{name}\s*[:=]|^    {name}\s*[:=]"
        pattern = re.compile(inside if member else top, re.MULTILINE)
        paths = [path for path in self.root.glob("vllm/**/*.py") if pattern.search(path.read_text(errors="replace"))]
        parts = [path.relative_to(self.root).with_suffix("").parts for path in paths]
        return sorted(".".join(one[:-1] if one[-1] == "__init__" else one) for one in parts)

    def _names(self, module: str) -> Names | None:
        if module not in self._modules:
            path = self.path(module)
            self._modules[module] = None if path is None else defined(ast.parse(path.read_text()).body)
        return self._modules[module]

    def _submodule(self, module: str) -> Definition | None:
        return Definition(module, ast.Module([], [])) if self.path(module) is not None else None

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self.path(module)
        package = module.split(".") if path is not None and path.name == "__init__.py" else module.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def _base(self, module: str, expression: ast.expr) -> Definition | None:
        if isinstance(expression, ast.Name):
            return self.find(module, expression.id)
        if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
            holder = self.find(module, expression.value.id)
            return self.find(holder.module, expression.attr) if holder is not None else None
        return None


def defined(body: Iterable[ast.stmt]) -> Names:
    """What these statements define, by name, also under `if`, `try` and `with`; the first definition counts."""
    names: Names = {}
    for node in flat(body):
        if isinstance(node, Function | ast.ClassDef):
            if not {"overload", "setter"} & decorators(node):
                names.setdefault(node.name, node)
        elif isinstance(node, ast.AnnAssign):
            for name in written(node.target):
                names.setdefault(name, node)
        elif isinstance(node, ast.Assign):
            for name in (name for target in node.targets for name in written(target)):
                names.setdefault(name, node)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names.setdefault(f"*{len(names)}" if alias.name == "*" else alias.asname or alias.name, node)
    return names


def flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "handlers", "finalbody"):
                for inner in getattr(node, part, ()):
                    yield from flat(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def written(target: ast.expr) -> list[str]:
    """The plain names that an assignment to this target sets."""
    return [one.id for one in ast.walk(target) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]


def self_targets(node: ast.AST) -> Iterator[ast.Attribute]:
    """The attributes that the methods of a class set on their first parameter."""
    for method in defined(node.body).values() if isinstance(node, ast.ClassDef) else ():
        if not isinstance(method, Function) or not method.args.args:
            continue
        own = method.args.args[0].arg
        for one in ast.walk(method):
            if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and ast.unparse(one.value) == own:
                yield one


def decorators(node: Function | ast.ClassDef) -> set[str]:
    """The last names of its decorators: `functools.cached_property` is `cached_property`."""
    calls = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
    return {ast.unparse(one).rpartition(".")[2] for one in calls}
