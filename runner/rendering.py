"""Rows to text: a prompt and its answer joined, or what the chat template makes of them."""

import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError
from runner.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Content = str | list[dict[str, Any]]  # text or messages
MARKS = re.compile(r"({%[-+]?\s*)(end)?generation(?=\s*[-+]?%})")  # of a template, around what a model is to learn


def is_chat(row: Row, reads: str) -> bool:
    """Tell whether a row is of messages."""
    return any(isinstance(part, list) for pair in sequences_of(row, reads)[:1] for part in pair)


def sequences_of(row: Row, reads: str) -> list[tuple[Content | None, Content | None]]:
    """Split a row into the sequences that are trained on, each of a prompt and an answer."""
    prompt = row.get("prompt")
    if reads != "prompt":
        for columns in (("completion",), ("chosen", "rejected"), ("messages",), ("text",)):
            if all(row.get(column) is not None for column in columns):
                return [(prompt, row[column]) for column in columns]
    return [] if prompt is None else [(prompt, None)]


def join(prompt: Any, answer: Any, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """Return a text prompt and the whole text."""
    prompt = prompt or ""
    if answer is None:
        return prompt, prompt
    end = "" if answer.endswith(tokenizer.eos_token) else tokenizer.eos_token
    return prompt, prompt + answer + end


def render(
    rows: Sequence[Row],
    pairs: Sequence[tuple[int, Any, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    first_row: int,
    *,
    tools: bool,
) -> list[tuple[str, str]]:
    """Return each chat's prompt and the whole chat, as the chat template writes them; a row's prompt is written once.

    Rows that tell the template the same beside their chats are written together.

    Args:
        rows: all of messages.
        pairs: the sequences of the rows: number of the row, prompt and answer.
        tokenizer: with the chat template.
        first_row: number of the first row, for messages.
        tools: whether a row's tools and variables are told to the template.

    Raises:
        ConfigError: there is no chat template, or it refuses a row.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ConfigError(
            "Rows of messages need a chat template, and the tokenizer has none. Type model.chat_template=FILE.jinja."
        )

    def told(pair: tuple[int, Any, Any]) -> dict[str, Any]:
        row = rows[pair[0]]
        named = row.get("tools") if tools else None
        more = (row.get("chat_template_kwargs") if tools else None) or {}
        return {"tools": json.loads(named) if isinstance(named, str) else named, **more}

    written: list[tuple[str, str]] = []
    for options, group in groupby(pairs, told):
        alike = list(group)
        try:
            written += _write(alike, tokenizer, options)
        except (TemplateError, TypeError) as error:
            for _, alone in groupby(alike, lambda pair: pair[0]) if alike[0][0] != alike[-1][0] else ():
                render(rows, list(alone), tokenizer, first_row, tools=tools)  # to find the row
            raise ConfigError(
                f"The chat template refuses row {first_row + alike[0][0]}: {error}. Leave such rows out, or choose "
                "another template with model.chat_template=FILE.jinja."
            ) from error
    return written


def _write(
    pairs: Sequence[tuple[int, Any, Any]], tokenizer: "PreTrainedTokenizerBase", options: dict[str, Any]
) -> list[tuple[str, str]]:
    template: Any = tokenizer.chat_template  # by name where there are several
    if isinstance(template, str) and MARKS.search(template):  # as a plain block it makes the same text, and no calls
        options = {"chat_template": MARKS.sub(r"\1\2with", template), **options}

    def write(chats: list[Any], **more: bool) -> list[str]:
        return tokenizer.apply_chat_template(chats, tokenize=False, **options, **more) if chats else []  # type: ignore

    prompts = {number: prompt for number, prompt, _ in pairs if prompt}
    before = dict(zip(prompts, write(list(prompts.values()), add_generation_prompt=True), strict=True))
    whole = iter(write([(prompt or []) + answer for _, prompt, answer in pairs if answer is not None]))
    return [
        (before.get(number, ""), before.get(number, "") if answer is None else next(whole))
        for number, _, answer in pairs
    ]


def stop_tokens(tokenizer: "PreTrainedTokenizerBase", *, of_chat: bool) -> set[int]:
    """Return the tokens that end a text, or a turn in the chat template."""
    stops = {tokenizer.eos_token_id}
    if of_chat:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\u2042"}]
        end = str(tokenizer.apply_chat_template(probe, tokenize=False)).rpartition("\u2042")[2].strip()
        stops |= set(tokenizer(end, add_special_tokens=False)["input_ids"][:1])
    return stops
