"""What the source of a trainer says of it, without importing it: where it is, what it logs, which words it knows."""

import ast
import difflib
import itertools
import re
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runner import schema, source

VERSIONS = ("1.16",)  # minor versions of TRL whose source was read and whose losses were compared


def knows_trl() -> bool:
    """Tell whether the source of the installed TRL was read, and its private parts are what we take them for."""
    return version("trl").rsplit(".", 1)[0] in VERSIONS


def find(target: str) -> tuple[str, Path]:
    """Return module and file of the trainer that belongs to a config class, which stands beside it or with it."""
    config, _ = source.locate(target)
    path = config.with_name(config.name.replace("_config", "_trainer"))
    package = len(path.parts) - path.parts[::-1].index(target.partition(".")[0]) - 1
    return ".".join([*path.parts[package:-1], path.stem]), path


@lru_cache(maxsize=16)
def metrics(target: str) -> tuple[set[str], list[str]]:
    """Return the words that may be names of metrics, and patterns of those that are put together."""
    files = [find(target)[1]]
    files += [Path(__file__).with_name(f"{name}.py") for name in ("rollout", "rl_math") if target.startswith("runner.")]
    names, patterns = set(), []
    for node in itertools.chain.from_iterable(ast.walk(source.parse(file)) for file in files):
        if isinstance(node, ast.Constant) and re.fullmatch(r"[a-z]\w*(/\w+)*", str(node.value)):
            names.add(str(node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = [re.escape(str(v.value)) if isinstance(v, ast.Constant) else ".*" for v in node.values]
            if re.fullmatch(r"[\w/.*\\]*/[\w/.*\\]*", "".join(parts)):
                patterns.append("".join(parts))
    return names, patterns


def find_unknown(trainer: dict[str, Any]) -> list[str]:
    """Name the words that a trainer does not know, in fields for which it knows several; it would say so late.

    It knows the choices that its config class names, or the words that its source compares the field with; a word that
    stands elsewhere in the source may be known, too.

    Args:
        trainer: The config node.
    """
    target = trainer["_target_"]
    own = schema.upstream_fields(target).keys() - schema.upstream_fields("transformers.TrainingArguments").keys()
    typed = {key: trainer[key] for key in sorted(own & trainer.keys())}
    words = [(key, word) for key, value in typed.items() for word in (value if isinstance(value, list) else [value])]
    return [fault for key, word in words if isinstance(word, str) and (fault := _fault(target, key, word))]


def _fault(target: str, key: str, word: str) -> str | None:
    """Say that a trainer does not know a word, unless it does or may."""
    choices, compared = schema.upstream_fields(target)[key].choices, sorted(_compared(target).get(key, ()))
    known = choices or compared
    if word in known or (not choices and (len(compared) < 2 or _is_quoted(target, word))):
        return None
    near = "".join(f"did you mean {one}? " for one in difflib.get_close_matches(word, known, 1))
    what = f"It can be {', '.join(choices)}." if choices else f"Its source names {', '.join(compared)}."
    return f"trainer.{key}={word} is nothing that {target} knows: {near}{what}"


@lru_cache(maxsize=16)
def _compared(target: str) -> dict[str, set[str]]:
    """Return the words that a trainer compares names with, by name."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(source.parse(find(target)[1])):
        if isinstance(node, ast.Compare):
            values = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
            words = {value for value in values if isinstance(value, str)}
            found.setdefault(ast.unparse(node.left).rpartition(".")[2], set()).update(words)
    return found


def _is_quoted(target: str, word: str) -> bool:
    """Return whether the source of a trainer or of its config has a word in quotes."""
    text = "".join(file.read_text("utf-8") for file in (find(target)[1], source.locate(target)[0]))
    return re.search(rf"[`'\"]{re.escape(word)}[`'\"]", text) is not None
