"""Modules of the packages to remote code: flat files that transformers loads from a checkpoint's folder.

Remote code may import its neighbours as `from .name import ...` and in no other way, and transformers finds those
imports by a regular expression that reads docstrings too. The packages import each other absolutely
(`from configuration_mats.configuration_mats import MatsConfig`); here these imports are rewritten, and whatever cannot
be rewritten is an error with its file and line.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

DISTRIBUTION = "mats"
# What a checkpoint's configuration names; everything else is found by following imports from here.
ENTRY_MODULES = (
    "configuration_mats.configuration_mats",
    "modeling_mats.modeling_mats",
    "processing_mats.processing_mats",
    "processing_mats.pipeline_mats",
)
FLATTENED_PACKAGES = ("configuration_mats", "modeling_mats", "processing_mats")
# Ours as well, but no part of a published model.
OTHER_PACKAGES = ("evaluation", "hub_cards", "mats_cli", "tests", "training")


class RemoteCodeError(ValueError):
    """A module cannot become remote code."""

    def __init__(self, path: Path, line: int, problem: str):
        super().__init__(f"{path}:{line}: {problem}")


def find_packages() -> dict[str, Path]:
    """Folders of the packages whose modules become remote code, found without importing them."""
    return {name: Path(find_spec(name).submodule_search_locations[0]) for name in FLATTENED_PACKAGES}


def flatten_modules(entry_modules: Iterable[str], packages: Mapping[str, Path]) -> dict[str, str]:
    """Follows the imports from the entry modules and flattens all that is found.

    Args:
        entry_modules (iterable of `str`): Names such as `"modeling_mats.modeling_mats"`.
        packages (mapping of `str` to `Path`): Folder of each package.

    Returns:
        `dict[str, str]`: source by file name, sorted by name.

    Raises:
        RemoteCodeError: an import that cannot be flattened, or two modules of one name.
    """
    sources: dict[str, str] = {}
    origins: dict[str, Path] = {}
    waiting = [(name, None, 0) for name in entry_modules]
    while waiting:
        name, importer, line = waiting.pop(0)
        package, _, module = name.partition(".")
        path = packages[package] / f"{module}.py"
        if not path.is_file():
            raise RemoteCodeError(importer or path, line, f"{name} is no module file; expected {path}.")
        if path.name in origins:
            if origins[path.name] != path:
                raise RemoteCodeError(
                    importer or path, line, f"{path} and {origins[path.name]} cannot both be {path.name} in one folder."
                )
            continue
        origins[path.name] = path
        sources[path.name], imported = flatten_source(path.read_text(encoding="utf-8"), path, packages)
        waiting += [(found, path, line) for found, line in imported.items()]
    return dict(sorted(sources.items()))


def flatten_source(source: str, path: Path, packages: Iterable[str]) -> tuple[str, dict[str, int]]:
    """Rewrites one module's imports of its sisters: `from package.module import x` to `from .module import x`.

    Returns:
        The new source, and the modules that it imports with the line of each.
    """
    # Bytes, because the columns of a syntax tree count them.
    lines = source.encode().splitlines(keepends=True)
    imported: dict[str, int] = {}
    flattened: set[str] = set()
    for node in ast.walk(ast.parse(source, str(path))):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or not _is_ours(node, packages, path):
            continue
        module = node.module.partition(".")[2]
        imported.setdefault(node.module, node.lineno)
        flattened.add(module)
        line = lines[node.lineno - 1]
        statement = re.sub(
            rb"^from\s+" + re.escape(node.module).encode(), f"from .{module}".encode(), line[node.col_offset :]
        )
        if statement == line[node.col_offset :]:
            raise RemoteCodeError(path, node.lineno, "this import is written over several lines; put its names last.")
        lines[node.lineno - 1] = line[: node.col_offset] + statement
    result = b"".join(lines).decode()
    _check_regular_expression(result, flattened, path)
    return result, imported


def _is_ours(node: ast.Import | ast.ImportFrom, packages: Iterable[str], path: Path) -> bool:
    """Whether an import is to be rewritten. One of ours that cannot be raises `RemoteCodeError`."""
    ours = {*packages, *OTHER_PACKAGES}
    if isinstance(node, ast.Import):
        for name in (alias.name for alias in node.names):
            if name.partition(".")[0] in ours:
                raise RemoteCodeError(
                    path, node.lineno, f"`import {name}` cannot be flattened; use `from package.module import name`."
                )
        return False
    if node.level:
        relative = "." * node.level + (node.module or "")
        raise RemoteCodeError(
            path, node.lineno, f"`from {relative} import` is relative; use `from package.module import name`."
        )
    package, *modules = node.module.split(".")
    if package not in ours:
        return False
    if package not in packages:
        raise RemoteCodeError(path, node.lineno, f"{package} is no part of a published model; move what is needed.")
    if len(modules) != 1:
        raise RemoteCodeError(
            path,
            node.lineno,
            f"`from {node.module} import` cannot be flattened; use `from package.module import name`.",
        )
    if any(alias.name == "*" for alias in node.names):
        raise RemoteCodeError(path, node.lineno, f"`from {node.module} import *` hides its names; import them by name.")
    return True


def _check_regular_expression(source: str, flattened: set[str], path: Path) -> None:
    """transformers must find the imports that are there and no others, say in a docstring."""
    for pattern in (r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+\.(\S+)\s+import"):
        for match in re.finditer(pattern, source, flags=re.MULTILINE):
            if match.group(1) not in flattened:
                line = source.count("\n", 0, match.start(1)) + 1
                raise RemoteCodeError(path, line, f"transformers would take {match.group().strip()!r} for an import.")


def requirements_of(sources: Mapping[str, str], optional: Iterable[str] = ()) -> list[str]:
    """What pip must install for remote code, with the version floors of this package's own dependencies.

    Imports inside `try` are optional, for transformers as well, and left out unless `optional` names them.
    """
    needed = set(optional).union(*(_required_imports(ast.parse(source, name)) for name, source in sources.items()))
    needed -= set(sys.stdlib_module_names)
    declared = {re.match(r"[\w.-]+", line).group().replace("-", "_"): line for line in _dependencies()}
    if unknown := sorted(needed - declared.keys()):
        raise ValueError(f"Remote code imports {', '.join(unknown)}, which pyproject.toml does not depend on.")
    return [declared[package] for package in sorted(needed)]


def _dependencies() -> list[str]:
    """This package's own, from a checkout if this is one: the metadata of an editable installation lags behind it."""
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    if pyproject.is_file():
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [line for line in requires(DISTRIBUTION) or () if "extra ==" not in line]


def _required_imports(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Try):
        return set()
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return set() if node.level else {node.module.partition(".")[0]}
    return set().union(*map(_required_imports, ast.iter_child_nodes(node)))


__all__ = ["ENTRY_MODULES", "RemoteCodeError", "find_packages", "flatten_modules", "flatten_source", "requirements_of"]
