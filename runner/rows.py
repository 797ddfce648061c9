"""The canonical row: reading one from raw values, and checking it.

A canonical row is one of TRL's dataset types: ``text``; ``messages`` (and ``tools``); ``prompt`` and
``completion``; ``chosen`` and ``rejected`` (and ``prompt``); ``prompt``, ``completion`` and ``label``; or
``prompt`` alone. A message is ``{"role", "content"}``, with ``tool_calls`` where there are some.

Source: https://huggingface.co/docs/trl/dataset_formats
"""

import json
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
CANONICAL = frozenset({"text", "messages", "tools", "prompt", "completion", "chosen", "rejected", "label"})

_MESSAGE_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # what chat templates read
_LABELS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class BadRow(ValueError):  # noqa: N818 - says what was found; it is data for a count, not an error of ours
    """A row that cannot be trained on.

    Attributes:
        field: the column at fault.
        reason: what is wrong with it, as the rest of a sentence that starts with the field.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field = field
        self.reason = reason


def validate(row: Row) -> None:
    """Check that a canonical row can be trained on.

    Raises:
        BadRow: a field is missing, null, empty, only whitespace or of a wrong type; prompt and answers mix
            text and messages; a role is unknown; a prompt does not end with a user or tool message, or an
            answer with the assistant's; chosen and rejected are identical; the label is no bool.
    """
    if not {"text", "messages", "prompt", "chosen", "rejected"} & row.keys():
        raise BadRow("row", f"has none of text, messages, prompt and chosen, only {sorted(row)}")
    for one, other in (("chosen", "rejected"), ("rejected", "chosen"), ("completion", "prompt")):
        if one in row and other not in row:
            raise BadRow(other, f"is missing beside {one}")
    for field in ("text", "prompt", "completion", "chosen", "rejected", "messages"):
        if field in row:
            _check_field(row, field)
    kinds = {isinstance(row[f], str): f for f in ("prompt", "completion", "chosen", "rejected") if f in row}
    if len(kinds) == 2:
        raise BadRow(kinds[False], f"is messages, but {kinds[True]} is text: both must be the same")
    if "chosen" in row and row["chosen"] == row["rejected"]:
        raise BadRow("rejected", "is identical to chosen")
    if "completion" in row and not isinstance(row.get("label", True), bool):
        raise BadRow("label", f"is {kind(row['label'])}, not true or false")


def _check_field(row: Row, field: str) -> None:
    value = row[field]
    if field == "text" or (field != "messages" and not isinstance(value, list)):
        read_text(row, field)
        return
    if not isinstance(value, list) or not value:
        raise BadRow(field, f"is {kind(value)}, not a list of messages" if value else _absence(row, field))
    for number, message in enumerate(value):
        _check_message(message, number, field)
    roles = [message["role"] for message in value]
    if field == "prompt" and roles[-1] not in ("user", "tool"):
        raise BadRow(field, f"ends with a message of the {roles[-1]}, not of a user or tool")
    if field != "prompt" and roles[-1] != "assistant":
        raise BadRow(field, f"ends with a message of the {roles[-1]}, not of the assistant")
    if field in ("completion", "chosen", "rejected") and roles[0] != "assistant":
        raise BadRow(field, f"starts with a message of the {roles[0]}, not of the assistant")
    if field == "messages" and "user" not in roles:
        raise BadRow(field, "has no message of a user to answer")


def _check_message(message: Any, number: int, field: str) -> None:
    where = f"has at message {number}"
    if not isinstance(message, dict):
        raise BadRow(field, f"{where} {kind(message)}, not role and content")
    if message.get("role") not in ROLES:
        raise BadRow(field, f"{where} the role {message.get('role')!r}; known are {', '.join(ROLES)}")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise BadRow(field, f"{where} a content that is {kind(content)}, not text")
    may_be_empty = message.get("tool_calls") or message["role"] == "tool"  # a tool may return nothing
    if not (content and content.strip()) and not may_be_empty:
        raise BadRow(field, f"{where}, of the {message['role']}, no content")


def kind(value: Any) -> str:
    """Describe a value by its type and beginning."""
    return "null" if value is None else f"of type {type(value).__name__} ({str(value)[:40]!r})"


def _absence(row: Row, field: str) -> str:
    return "is missing" if field not in row else "is null" if row[field] is None else "is empty"


def read_text(row: Row, field: str) -> str:
    """Take a text as it is, spaces included."""
    value = row.get(field)
    if value is None:
        raise BadRow(field, _absence(row, field))
    if not isinstance(value, str):
        raise BadRow(field, f"is {kind(value)}, not text")
    if not value.strip():
        raise BadRow(field, "is only whitespace" if value else "is empty")
    return value


def read_label(row: Row) -> bool:
    """Parse ``label``: a bool, 0 or 1, or as in CSV the text true, false, yes, no, 1 or 0."""
    value = row.get("label")
    if value is None:
        raise BadRow("label", _absence(row, "label"))
    parsed = _LABELS.get(str(int(value)) if value in (0, 1) else str(value).strip().casefold())
    if parsed is None:
        raise BadRow("label", f"is {kind(value)}, not true or false")
    return parsed


def read_messages(row: Row, field: str) -> list[Message]:
    """Normalise messages.

    Arguments of tool calls become dicts (chat templates would encode a JSON string twice), the null content
    of a message with tool calls an empty text, a list of text parts one text. Keys that are null, or that
    chat templates do not read, are left out.
    """
    value = row.get(field)
    if not isinstance(value, list) or not value:
        raise BadRow(field, f"is {kind(value)}, not a list of messages" if value else _absence(row, field))
    return [_message(message, number, field) for number, message in enumerate(value)]


def _message(raw: Any, number: int, field: str) -> Message:
    _check_message({**raw, "content": "?"} if isinstance(raw, dict) else raw, number, field)
    content = raw.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise BadRow(field, f"has at message {number} a part that is not text (an image, audio)")
        content = "".join(part["text"] for part in content)
    kept = {key: raw[key] for key in _MESSAGE_KEYS if raw.get(key)}
    if "tool_calls" in kept:
        kept["tool_calls"] = [read_tool_call(call, number, field) for call in kept["tool_calls"]]
        content = content or ""
    return {"role": raw["role"], "content": content, **kept}


def read_tool_call(call: Any, number: int, field: str) -> Row:
    """Normalise a tool call, nested under ``function`` or flat."""
    inner = call.get("function") or call if isinstance(call, dict) else {}
    arguments = inner.get("arguments") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else _without_nulls(arguments)
    except ValueError:
        raise BadRow(field, f"has at message {number} a tool call whose arguments are not JSON") from None
    if not inner.get("name") or not isinstance(arguments, dict):
        raise BadRow(field, f"has at message {number} a tool call without a name or without named arguments")
    known = {"id": call["id"]} if call.get("id") else {}
    return {**known, "type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def read_tools(row: Row) -> Row:
    """Take ``tools``, a list or its JSON; nothing where there are none."""
    value = row.get("tools")
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else _without_nulls(value or [])
    except ValueError:
        raise BadRow("tools", "is text that is not JSON") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("tools", f"is {kind(value)}, not a list of tool descriptions")
    return {"tools": value} if value else {}


def find_repeats(train: Iterable[Row], held_out: Iterable[Row]) -> dict[str, list[tuple[int, int]]]:
    """Find rows that are there twice, but for case and spaces, by their numbers from 1.

    Returns:
        ``duplicates``: train rows, each with the first one that is the same. ``overlap``: held-out rows, each with the
        first train row of the same prompt, or of the same text or chat where there is no prompt.
    """
    whole: dict[str, int] = {}
    asked: dict[str, int] = {}
    found: dict[str, list[tuple[int, int]]] = {"duplicates": [], "overlap": []}
    for number, row in enumerate(train, 1):
        first = whole.setdefault(_content(row), number)
        asked.setdefault(_content(_question(row)), number)
        if first != number:
            found["duplicates"].append((number, first))
    for number, row in enumerate(held_out, 1):
        if (same := asked.get(_content(_question(row)))) is not None:
            found["overlap"].append((number, same))
    return found


def _question(row: Row) -> Any:
    """Return what a row asks: its prompt, a chat before its last turn, or else all of it."""
    if row.get("prompt") is not None:
        return row["prompt"]
    chat = row.get("messages")
    return chat[:-1] if chat and len(chat) > 1 else {k: v for k, v in row.items() if k in CANONICAL}


def _content(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).casefold()
    return "".join(text.replace("\\n", " ").replace("\\t", " ").split())


def _without_nulls(value: Any) -> Any:
    """Drop null entries of dicts, which Arrow adds where rows have different keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
