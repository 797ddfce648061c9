"""What the source of a trainer says of it, without importing it: where it is, what it logs, which words it knows."""

import ast
import difflib
import itertools
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from runner import schema


def find(target: str) -> tuple[str, Path]:
    """Return module and file of the trainer that belongs to a config class, which stands beside it or with it."""
    config, _ = schema.locate(target)
    path = config.with_name(config.name.replace("_config", "_trainer"))
    package = len(path.parts) - path.parts[::-1].index(target.partition(".")[0]) - 1
    return ".".join([*path.parts[package:-1], path.stem]), path


@lru_cache(maxsize=16)
def metrics(target: str) -> tuple[set[str], list[str]]:
    """Return the words that may be names of metrics, and patterns of those that are put together."""
    files = [find(target)[1]]
    files += [Path(__file__).with_name(f"{name}.py") for name in ("rollout", "rl_math") if target.startswith("runner.")]
    names, patterns = set(), []
    for node in itertools.chain.from_iterable(ast.walk(ast.parse(file.read_text("utf-8"))) for file in files):
        if isinstance(node, ast.Constant) and re.fullmatch(r"[a-z]\w*(/\w+)*", str(node.value)):
            names.add(str(node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = [re.escape(str(v.value)) if isinstance(v, ast.Constant) else ".*" for v in node.values]
            if re.fullmatch(r"[\w/.*\\]*/[\w/.*\\]*", "".join(parts)):
                patterns.append("".join(parts))
    return names, patterns


def find_unknown(trainer: dict[str, Any]) -> list[str]:
    """Name the words that a trainer does not know, in the fields that it compares with words; it would do so late.

    Args:
        trainer: The config node.
    """
    target, found = trainer["_target_"], []
    own = schema.upstream_fields(target).keys() - schema.upstream_fields("transformers.TrainingArguments").keys()
    for key in sorted(own & trainer.keys()):
        for word in trainer[key] if isinstance(trainer[key], list) else [trainer[key]]:
            known = sorted(_compared(target, key)) if isinstance(word, str) else []
            if len(known) > 1 and word not in known and not _is_quoted(target, word):
                near = "".join(f"did you mean {one}? " for one in difflib.get_close_matches(word, known, 1))
                found.append(
                    f"trainer.{key}={word} is nothing that {target} knows: {near}It can be {', '.join(known)}."
                )
    return found


@lru_cache(maxsize=16)
def _compared(target: str, key: str) -> set[str]:
    """Return the words that a trainer compares a field with."""
    found: set[Any] = set()
    for node in ast.walk(ast.parse(find(target)[1].read_text("utf-8"))):
        if isinstance(node, ast.Compare) and ast.unparse(node.left).rpartition(".")[2] == key:
            found |= {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
    return {word for word in found if isinstance(word, str)}


def _is_quoted(target: str, word: str) -> bool:
    """Return whether a trainer or its config names a word: it may be known all the same."""
    text = "".join(file.read_text("utf-8") for file in (find(target)[1], schema.locate(target)[0]))
    return re.search(rf"[`'\"]{re.escape(word)}[`'\"]", text) is not None
