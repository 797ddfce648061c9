"""A JSON Schema of the config, so that an editor completes and checks a recipe; made without importing upstream."""

import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from runner import engines, schema
from runner.config import CONF, OWNED, UPSTREAM, option_targets
from runner.errors import ConfigError

INTERPOLATION = {"type": "string", "pattern": r"\$\{"}  # which stands for a value of any type
COMMENT = re.compile(r"^  ?(\w+):.*?\s# (.+)$|^(\w+):.*?\s# (.+)$", re.MULTILINE)


def json_schema() -> dict[str, Any]:
    """Return the schema of a recipe or a composed config.

    A group whose option is an upstream class allows the fields of any such class that an option names; where
    ``_target_`` is given, those of that class.
    """
    own = {
        "model": _closed(schema.own_fields(schema.Model), "model"),
        **{name: _closed(schema.own_fields(schema.GROUPS[name]), None) for name in ("samples", "search")},
        "launch": _launch(),
        "dataset": _dataset(),
        "reward": _reward(),
    }
    classes = {group: _classes(group) for group in UPSTREAM}
    root = _closed(schema.own_fields(schema.Root), None)
    root["properties"] |= {name: {"$ref": f"#/$defs/{name}"} for name in [*own, *UPSTREAM]}
    root["properties"]["value_model"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/model"}]}
    root["properties"]["defaults"] = {"type": "array", "description": "Hydra's list of the options that are chosen"}
    root["properties"]["hydra"] = {"type": "object", "description": "Hydra's own config"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "runner: a recipe or a composed config",
        **root,
        "$defs": {
            **own,
            **{group: _choice(found) for group, found in classes.items()},
            **{target: closed for found in classes.values() for target, closed in found.items()},
        },
    }


def _classes(group: str) -> dict[str, Any]:
    """Return the schema of every upstream class that an option of a group names."""
    found: dict[str, Any] = {}
    for target in dict.fromkeys(option_targets(group).values()):
        with suppress(ConfigError):  # the installed library lacks it: the option cannot be chosen either
            fields = {k: field for k, field in schema.upstream_fields(target).items() if f"{group}.{k}" not in OWNED}
            found[target] = _closed(fields, group)
            found[target]["properties"]["_target_"] = {"const": target}
    return found


def _choice(targets: Iterable[str]) -> dict[str, Any]:
    """Return a schema of one of some classes: the one that ``_target_`` names, or any."""
    named = [
        {"if": {"properties": {"_target_": {"const": target}}}, "then": {"$ref": f"#/$defs/{target}"}}
        for target in targets
    ]
    return {
        "type": "object",
        "properties": {"_target_": {"enum": list(targets)}},
        "if": {"required": ["_target_"]},
        "then": {"allOf": named},
        "else": {"anyOf": [{"$ref": f"#/$defs/{target}"} for target in targets]},
    }


def _launch() -> dict[str, Any]:
    closed = _closed(schema.own_fields(schema.Launch), "launch")
    for name, target in engines.PLUGINS.items():
        plugin = _closed(schema.upstream_fields(target), "launch")
        closed["properties"][name] = {"anyOf": [{"type": "null"}, plugin]}
    return closed


def _dataset() -> dict[str, Any]:
    closed = _closed(schema.own_fields(schema.Dataset) | schema.keyword_fields("arithmetic"), "dataset")
    closed["properties"]["sources"] = {"type": "object", "additionalProperties": {"$ref": "#/$defs/dataset"}}
    return closed


def _reward() -> dict[str, Any]:
    """Return the reward node: our functions' options, or anything for a function of the person's own."""
    closed = _closed(schema.own_fields(schema.Reward) | schema.keyword_fields("rewards"), "reward")
    closed["properties"]["terms"] = {"type": "object", "additionalProperties": {"$ref": "#/$defs/reward"}}
    closed["properties"]["model"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/model"}]}
    foreign = {"type": "object", "required": ["function"], "properties": {"function": {"pattern": r"\."}}}
    return {"anyOf": [closed, foreign]}


def _closed(fields: dict[str, schema.Field], group: str | None) -> dict[str, Any]:
    """Return the schema of an object that has these keys, some or all, and no others."""
    notes = _comments(group)
    return {
        "type": "object",
        "properties": {name: _property(field, notes.get(name, "")) for name, field in fields.items()},
        "additionalProperties": False,
    }


def _property(field: schema.Field, note: str) -> dict[str, Any]:
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    try:
        kind = TypeAdapter(field.type).json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError):
        kind = {}
    if field.choices and field.text == "str":
        kind = {"enum": field.choices}
    text = " ".join(" | ".join(filter(None, (field.doc, note))).split())
    found = {"anyOf": [*(kind.get("anyOf") or [kind]), INTERPOLATION]} if kind else {}
    return found | {"description": f"{text} ({field.text})" if text else field.text}


@cache
def _comments(group: str | None) -> dict[str, str]:
    """Return what the option files say of their keys, or ``config.yaml`` of its own."""
    paths = [CONF / "config.yaml"] if group is None else sorted((CONF / group).glob("*.yaml"))
    found: dict[str, str] = {}
    for path in paths:
        for inner, inner_text, name, text in COMMENT.findall(path.read_text("utf-8")):
            found.setdefault(inner or name, inner_text or text)
    return found
