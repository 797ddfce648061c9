"""Row functions: one raw row in, one canonical row out.

Columns that are no part of a format are passed on unchanged, for rewards, unless their name belongs to
another dataset type. To add a format, write one function under ``@raw_format``; its name is the format's
name. Nothing else.
"""

import json
import re
from collections.abc import Callable, Set
from typing import Any

from runner.errors import ConfigError
from runner.rows import (
    CANONICAL,
    BadRow,
    Message,
    Row,
    kind,
    read_label,
    read_messages,
    read_text,
    read_tool_call,
    read_tools,
    validate,
)

_SHAREGPT_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "model": "assistant", "function_call": "assistant",
    "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def raw_format(
    *needs: str, yields: Set[str] = frozenset(), when: Callable[[Set[str], Row], bool] = lambda columns, row: True
) -> Callable[[Callable[[Row], Row]], Callable[[Row], Row]]:
    """Mark a row function as a format.

    Args:
        needs: columns without which rows do not look like the format.
        yields: columns that every row it returns has, if they are others.
        when: what else these columns, with this row as a sample, must be to look like it.
    """

    def mark(function: Callable[[Row], Row]) -> Callable[[Row], Row]:
        function.__dict__.update(needs=frozenset(needs), yields=frozenset(yields or needs), when=when)
        return function

    return mark


def names() -> list[str]:
    """List the formats."""
    return [name for name, value in globals().items() if hasattr(value, "yields")]


def produces(name: str) -> frozenset[str]:
    """Name the columns that every row of a format has."""
    return vars(_function(name))["yields"]


def convert(name: str, row: Row) -> Row:
    """Apply a format's row function.

    Raises:
        BadRow: the row cannot be read, or is no row to train on.
    """
    result = _function(name)(row)
    validate(result)
    return result


def recognise(columns: Set[str], row: Row) -> str:
    """Name the only format that fits.

    Args:
        columns: every column of the dataset, after renaming.
        row: a sample, best one without nulls; it tells text from messages.

    Raises:
        ConfigError: no format fits, or more than one.
    """
    formats = {name: vars(_function(name)) for name in names()}
    fitting = [name for name, mark in formats.items() if mark["needs"] <= columns and mark["when"](columns, row)]
    if len(fitting) == 1:
        return fitting[0]
    seen = f"the columns are {sorted(columns)}"
    if fitting:
        raise ConfigError(
            f"The dataset's format cannot be told: {seen}, which fit {' and '.join(fitting)}. "
            f"Choose one, for example dataset.format={fitting[0]}."
        )
    if {"prompt", "completions", "labels"} <= columns:
        raise ConfigError(
            f"These are stepwise rows (a label for every step, for process reward models): {seen}. "
            "No stable trainer reads them. Choose a dataset with prompt, completion and label (trainer=kto) "
            "or with chosen and rejected (trainer=reward)."
        )
    if _is_messages(row.get("conversations")):
        raise ConfigError(
            "The dataset's format cannot be told: conversations holds messages with role and content, which "
            "belong in messages. Type dataset.rename='{conversations: messages}'."
        )
    raise ConfigError(
        f"The dataset's format cannot be told: {seen}, which fit none of {', '.join(names())}. "
        "Name the columns as one of these does, for example dataset.rename='{question: prompt, reply: "
        "completion}', or choose a format with dataset.format=."
    )


# --- formats that are TRL's own dataset types


@raw_format("text", when=lambda columns, row: not _repeats_alpaca(columns, row))
def text(row: Row) -> Row:
    """Keep a text, all of which is learnt."""
    return {"text": read_text(row, "text"), **_rest(row)}


@raw_format("messages", when=lambda columns, row: not _repeats_chosen(columns, row))
def messages(row: Row) -> Row:
    """Keep an OpenAI conversation, with its tools.

    Source: https://platform.openai.com/docs/api-reference/chat
    """
    return {"messages": read_messages(row, "messages"), **_rest(row)}


@raw_format("prompt", "completion", when=lambda columns, row: "label" not in columns)
def prompt_completion(row: Row) -> Row:
    """Keep a prompt and a completion, both text or both messages; leading spaces of a text are part of it."""
    return {**_read(row, "prompt", "completion"), **_rest(row)}


@raw_format("prompt", "chosen", "rejected", when=lambda columns, row: not _repeats_prompt(row))
def preference(row: Row) -> Row:
    """Keep a prompt with a better and a worse answer, all text or all messages."""
    if _repeats_prompt(row):
        raise BadRow("chosen", "repeats the prompt; dataset.format=preference_implicit takes it out")
    return {**_read(row, "prompt", "chosen", "rejected"), **_rest(row)}


@raw_format(
    "chosen",
    "rejected",
    yields={"prompt", "chosen", "rejected"},
    when=lambda columns, row: isinstance(row.get("chosen"), list) and ("prompt" not in columns or _repeats_prompt(row)),
)
def preference_implicit(row: Row) -> Row:
    """Split two conversations with a common beginning into that prompt and two answers.

    A ``prompt`` column that the conversations repeat, as text or messages, is taken out.

    Source: https://huggingface.co/datasets/trl-lib/ultrafeedback_binarized
    """
    if row.get("prompt") is not None and not _repeats_prompt(row):
        raise BadRow("prompt", "is not how chosen begins; dataset.format=preference reads it as it is")
    return {**_split_pair(read_messages(row, "chosen"), read_messages(row, "rejected")), **_rest(row)}


@raw_format(
    "chosen",
    "rejected",
    when=lambda columns, row: (
        "prompt" not in columns and isinstance(row.get("chosen"), str) and not _is_transcript(row["chosen"])
    ),
)
def preference_unprompted(row: Row) -> Row:
    """Keep a better and a worse text that have no prompt, or start with it."""
    return {"chosen": read_text(row, "chosen"), "rejected": read_text(row, "rejected"), **_rest(row)}


@raw_format("prompt", "completion", "label")
def unpaired(row: Row) -> Row:
    """Keep a prompt, a completion and whether it is a good one.

    Args:
        row: ``label`` is a bool, or 0 or 1, or as in CSV the text true, false, yes, no, 1 or 0.
    """
    return {**_read(row, "prompt", "completion"), "label": read_label(row), **_rest(row)}


@raw_format("prompt", when=lambda columns, row: not columns & {"completion", "completions", "chosen", "rejected"})
def prompt_only(row: Row) -> Row:
    """Keep a prompt; every other column is for the rewards."""
    label = {"label": row["label"]} if "label" in row else {}  # a reward's, here
    return {**_read(row, "prompt"), **label, **_rest(row)}


# --- formats of well-known datasets


@raw_format("instruction", "output", yields={"prompt", "completion"})
def alpaca(row: Row) -> Row:
    """Turn an Alpaca row into a prompt and a completion.

    Args:
        row: ``instruction``, ``output`` and, optionally, ``input``; a missing, null or empty ``input`` means
            that the instruction stands alone.

    Source: https://github.com/tatsu-lab/stanford_alpaca
    """
    instruction, context = read_text(row, "instruction"), row.get("input") or ""
    if not isinstance(context, str):
        raise BadRow("input", f"is {kind(context)}, not text")
    prompt = _user(f"{instruction}\n\n{context}" if context.strip() else instruction)
    completion = _assistant(read_text(row, "output"))
    return {"prompt": [prompt], "completion": [completion], **_rest(row, "instruction", "input", "output")}


@raw_format(
    "conversations",
    yields={"messages"},
    when=lambda columns, row: not columns & {"chosen", "rejected"} and not _is_messages(row.get("conversations")),
)
def sharegpt(row: Row) -> Row:
    """Turn a ShareGPT conversation (Vicuna, LLaMA-Factory) into messages.

    Args:
        row: ``conversations`` of turns with ``from`` (human, gpt, system, function_call, observation and
            their synonyms) and ``value``; optionally ``system`` and ``tools``.

    Raises:
        BadRow: also when the conversation starts with an answer, ends without one, or one side speaks twice
            in a row: what is left of a conversation that was cut.

    Source: https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow("conversations", f"is {kind(turns)}, not a list of turns")
    chat = [{"role": "system", "content": read_text(row, "system")}] if row.get("system") else []
    for number, turn in enumerate(turns):
        message = _turn(turn, number)
        if chat and message["role"] == chat[-1]["role"] != "tool":
            raise BadRow("conversations", f"has at turn {number} the {message['role']} a second time in a row")
        chat.append(message)
    first = next((message["role"] for message in chat if message["role"] != "system"), None)
    if first != "user":
        raise BadRow("conversations", f"starts with {turns[0]['from']}, not with a person: it was cut")
    if chat[-1]["role"] != "assistant":
        raise BadRow("conversations", f"ends with {turns[-1]['from']}, not with an answer: it was cut")
    return {"messages": chat, **_rest(row, "conversations", "system")}


@raw_format("input", "target", yields={"prompt", "completion"})
def firefly(row: Row) -> Row:
    """Turn a Firefly row (``input``, ``target``) into a prompt and a completion.

    Source: https://huggingface.co/datasets/YeungNLP/firefly-train-1.1M
    """
    prompt, completion = _user(read_text(row, "input")), _assistant(read_text(row, "target"))
    return {"prompt": [prompt], "completion": [completion], **_rest(row, "input", "target")}


@raw_format(
    "chosen",
    "rejected",
    yields={"prompt", "chosen", "rejected"},
    when=lambda columns, row: "prompt" not in columns and _is_transcript(row.get("chosen")),
)
def hh(row: Row) -> Row:
    r"""Turn two transcripts (``\n\nHuman: ...\n\nAssistant: ...``) into a prompt and two answers.

    Raises:
        BadRow: also when a transcript ends with the human, or the two differ before their last turn.

    Source: https://huggingface.co/datasets/Anthropic/hh-rlhf
    """
    chosen, rejected = _transcript(row, "chosen"), _transcript(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("rejected", "is not an answer to the prompt of chosen: they differ before the last turn")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:], **_rest(row)}


@raw_format(
    "question",
    "answer",
    yields={"prompt", "completion", "answer"},
    when=lambda columns, row: "####" in str(row.get("answer")),
)
def gsm8k(row: Row) -> Row:
    """Turn a GSM8K row into a prompt, its worked solution and the final number.

    The solution is kept as written, calculator marks (``<<2*3=6>>``) and ``#### 6`` included. ``answer``
    becomes the number alone, as text without thousands separators.

    Source: https://huggingface.co/datasets/openai/gsm8k
    """
    question, solution = read_text(row, "question"), read_text(row, "answer")
    final = solution.rpartition("####")[2].strip().replace(",", "").removeprefix("$")
    if "####" not in solution or not re.fullmatch(r"-?\d+(\.\d+)?", final):
        raise BadRow("answer", "does not end in '#### ' and a number")
    pair = {"prompt": [_user(question)], "completion": [_assistant(solution)], "answer": final}
    return {**pair, **_rest(row, "question", "answer")}


# --- reading values


def _function(name: str) -> Callable[[Row], Row]:
    if name not in names():
        known = ", ".join(["auto", *names()])
        raise ConfigError(f"dataset.format={name} does not exist. Choose one of {known}.")
    return globals()[name]


def _read(row: Row, *fields: str) -> Row:
    """Take fields that are text or messages."""
    return {field: (read_messages if isinstance(row.get(field), list) else read_text)(row, field) for field in fields}


def _rest(row: Row, *used: str) -> Row:
    """Pass on the tools and the columns that nothing used."""
    return {
        **read_tools(row),
        **{name: value for name, value in row.items() if name not in used and name not in CANONICAL},
    }


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise BadRow("conversations", f"has at turn {number} no from and value")
    role, value = _SHAREGPT_ROLES.get(str(turn["from"]).lower()), turn["value"]
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        raise BadRow("conversations", f"has at turn {number} the speaker {turn['from']!r}; known are {known}")
    if not isinstance(value, str) or not (value.strip() or role == "tool"):
        raise BadRow("conversations", f"has at turn {number} of {turn['from']} no text")
    if turn["from"] != "function_call":
        return {"role": role, "content": value}
    try:
        calls = json.loads(value)
    except ValueError:
        raise BadRow("conversations", f"has at turn {number} a function_call that is not JSON") from None
    calls = calls if isinstance(calls, list) else [calls]
    return {**_assistant(""), "tool_calls": [read_tool_call(call, number, "conversations") for call in calls]}


def _transcript(row: Row, field: str) -> list[Message]:
    before, *turns = re.split(r"\n\n(Human|Assistant):", read_text(row, field))
    if before.strip() or not turns or turns[0] != "Human":
        raise BadRow(field, "does not start with '\\n\\nHuman:'")
    chat = [
        (_user if speaker == "Human" else _assistant)(value.strip())
        for speaker, value in zip(turns[::2], turns[1::2], strict=True)
    ]
    if chat[-1]["role"] == "user":
        raise BadRow(field, "ends with the human, not with an answer")
    return chat


def _split_pair(chosen: list[Message], rejected: list[Message]) -> Row:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise BadRow("rejected", "is identical to chosen")
    if not any(message["role"] == "user" for message in chosen[:shared]):
        raise BadRow("rejected", "does not start with the prompt of chosen")
    answers = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    for field, answer in answers.items():
        if not answer or answer[0]["role"] != "assistant":
            raise BadRow(field, f"has no answer of the assistant after the {shared} messages that both share")
    return {"prompt": chosen[:shared], **answers}


# --- telling look-alikes apart


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _repeats_prompt(row: Row) -> bool:
    """Tell whether chosen is a whole conversation that starts with the row's prompt, text or messages."""
    prompt, chosen = row.get("prompt"), row.get("chosen") or []
    if not prompt or not _is_messages(chosen):
        return False
    if isinstance(prompt, str):
        return prompt in [message.get("content") for message in chosen if message.get("role") == "user"]
    return chosen[: len(prompt)] == prompt


def _repeats_chosen(columns: Set[str], row: Row) -> bool:
    """Tell whether messages is the copy of chosen that HuggingFaceH4/ultrafeedback_binarized carries."""
    return {"chosen", "rejected"} <= columns and row.get("messages") == row.get("chosen")


def _repeats_alpaca(columns: Set[str], row: Row) -> bool:
    """Tell whether text is the rendered copy of the row that tatsu-lab/alpaca carries."""
    parts = {"instruction", "output"}
    return parts <= columns and all(str(row.get(part)) in str(row.get("text")) for part in parts)
