"""What the source of an installed library says of its config classes, without importing it.

A misspelt key is answered in a fraction of a second, without torch, a device or a hub. To parse a large module takes
a tenth of that: what a module says is kept on disk, as plain data, as long as its file stays as it is.
"""

import ast
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runner import disk
from runner.embedded import cache_dir
from runner.errors import ConfigError

Key = tuple[str, str, dict[str, Any]]  # name, annotation, and what its metadata says: ``help``, ``choices``, ...

FOLLOWED = {"trl", "transformers", "peft", "accelerate", "runner"}  # packages in which bases and enums are looked for

# Classes that moved or went, and the versions that have them. Source: https://github.com/huggingface/trl/releases
HISTORY = {
    "trl.PPOConfig": "trl <1.13 had it; runner.ppo.PPOConfig (trainer=ppo) replaces it",
    "trl.experimental.ppo.PPOConfig": "trl <1.13 had it; runner.ppo.PPOConfig (trainer=ppo) replaces it",
    "trl.ORPOConfig": "since trl 0.26 it is trl.experimental.orpo.ORPOConfig",
    "trl.CPOConfig": "since trl 0.26 it is trl.experimental.cpo.CPOConfig",
    "trl.experimental.orpo.ORPOConfig": "trl >=0.26 has it, and trl 1.16 is what this was tested with",
    "trl.experimental.cpo.CPOConfig": "trl >=0.26 has it, and trl 1.16 is what this was tested with",
    "trl.experimental.kto.KTOConfig": "it is trl.KTOConfig",
}


@lru_cache(maxsize=64)
def locate(target: str) -> tuple[Path, str]:
    """Find the module in which a class is defined, by its dotted name: its file, and the name there.

    Raises:
        ConfigError: The package is not installed or has no such class; the message names the versions that do.
    """
    package, *parts, name = target.split(".")
    if (folder := _folder(package)) is None:
        raise ConfigError(f"{target} cannot be used: the package {package!r} is not installed. pip install {package}")
    module = _module_file(folder.joinpath(*parts))
    found = find_class(module, name) if module else None
    if found is None:
        from importlib.metadata import version

        hint = HISTORY.get(target, "check the name")
        raise ConfigError(f"The installed {package} {version(package)} has no {target}: {hint}.")
    return found


@lru_cache(maxsize=512)
def find_class(path: Path, name: str) -> tuple[Path, str] | None:
    """Find a class defined in a module or imported into it, following the imports."""
    said = read(path)
    if name in said["classes"]:
        return path, name
    for here, there, module, level in said["imports"]:
        file = _imported_file(path, module.split(".") if module else [], level) if here == name else None
        if file and file != path and (found := find_class(file, there)):
            return found
    return None


def lineage(path: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Yield a class and all its bases, nearest first."""
    yield path, name
    for base in read(path)["classes"][name]["bases"]:
        if found := find_class(path, base):
            yield from lineage(*found)


def keys(path: Path, name: str) -> Iterator[tuple[Path, Key]]:
    """Yield the keys of a class in the order of ``dataclasses.fields``, each with the file that names it.

    Those of a class with its own ``__init__`` are the parameters of that.
    """
    about = read(path)["classes"][name]
    for base in () if about["init"] else reversed(about["bases"]):
        if found := find_class(path, base):
            yield from keys(*found)
    for key in about["keys"]:
        yield path, key


def values(path: Path, name: str) -> tuple[str, ...]:
    """Return the texts that an enum can be; none of another class."""
    found = find_class(path, name)
    return read(found[0])["classes"][found[1]]["values"] if found else ()


@lru_cache(maxsize=128)
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a module, which is read once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=128)
def read(path: Path) -> dict[str, Any]:
    """Return what a module says of its classes and what it imports, in plain data.

    Returns:
        ``classes`` by name: ``bases``, ``init`` (it has its own), ``keys`` (without those of its bases, see ``keys``)
        and ``values``; ``imports``: name here, name there, module, level.
    """
    about = disk.state([path, Path(__file__)])
    return disk.kept(cache_dir() / "source" / path.stem, about, lambda: _describe(parse(path)))


def _describe(tree: ast.Module) -> dict[str, Any]:
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {
        "classes": {node.name: _describe_class(node) for node in tree.body if isinstance(node, ast.ClassDef)},
        "imports": [(a.asname or a.name, a.name, node.module, node.level) for node in imports for a in node.names],
    }


def _describe_class(node: ast.ClassDef) -> dict[str, Any]:
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    bases = [ast.unparse(base) for base in node.bases]
    texts = (s.value.value for s in node.body if isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant))
    return {
        "bases": [base.split(".")[-1] for base in bases],
        "init": init is not None,
        "keys": list(_parameters(init) if init else _fields(node)),
        "values": tuple(text for text in texts if isinstance(text, str)) if "Enum" in "".join(bases) else (),
    }


def _parameters(init: ast.FunctionDef) -> Iterator[Key]:
    arguments = init.args.args[1:]
    defaults = [None] * (len(arguments) - len(init.args.defaults)) + init.args.defaults
    for argument, default in zip(arguments, defaults, strict=True):
        plain = isinstance(default, ast.Constant) and isinstance(default.value, bool | int | float | str)
        implied = type(default.value).__name__ if plain else "Any"  # type: ignore[union-attr]  # it is a constant
        yield argument.arg, _text(argument.annotation) if argument.annotation else implied, {}


def _fields(node: ast.ClassDef) -> Iterator[Key]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = ast.unparse(statement.value) if statement.value else ""
            if "ClassVar" not in ast.unparse(statement.annotation) and "init=False" not in value:
                yield statement.target.id, _text(statement.annotation), _metadata(statement.value)


def _text(annotation: ast.expr) -> str:
    """Return an annotation as it is written; in quotes, what they hold."""
    quoted = isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)
    return annotation.value if quoted else ast.unparse(annotation)  # type: ignore[attr-defined]  # it is a constant


def _metadata(default: ast.expr | None) -> dict[str, Any]:
    """Return what a dataclass field's metadata says in plain values, such as its ``help`` and its ``choices``."""
    found: dict[str, Any] = {}
    for node in ast.walk(default) if default else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    with suppress(ValueError):
                        found.setdefault(str(key.value), ast.literal_eval(value))
    return found


def _module_file(base: Path) -> Path | None:
    candidates = (base.with_name(base.name + ".py"), base / "__init__.py")
    return next(filter(Path.is_file, candidates), None)


def _imported_file(path: Path, parts: list[str], level: int) -> Path | None:
    if level:
        return _module_file(path.parents[level - 1].joinpath(*parts))
    folder = _folder(parts[0]) if parts[0] in FOLLOWED else None
    return _module_file(folder.joinpath(*parts[1:])) if folder else None


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
