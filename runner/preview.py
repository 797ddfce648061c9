"""What the model sees: rows as tokens, with those that are learnt marked, and what rewards say of answers."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from runner.encoding import Spelt, spell_rows
from runner.errors import ConfigError, RunStopped

COLOUR, PLAIN = ("\033[7;32m", "\033[0m"), ("[[", "]]")
SHOWN = 1_200  # characters of a sequence, its start and its end
SIDES = {"preference": ("chosen", "rejected")}


def mark_row(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    reads: str,
    learns: str,
    limit: int | None,
    marks: tuple[str, str],
    tools: bool = True,
) -> dict[str, str]:
    """Return the sequences of a row, decoded from their tokens, with what is learnt between marks.

    Args:
        row: as the trainer reads it.
        tokenizer: the policy's.
        reads: what the trainer reads.
        learns: ``answer``; ``all``; ``assistant``, what the template marks as the assistant's; ``end``, where a score
            is read; or ``nothing``, of a prompt.
        limit: tokens that are kept; the rest is shown as cut off.
        marks: before and after what is learnt.
        tools: whether the trainer tells the template of them.
    """
    spelt = spell_rows([dict(row)], tokenizer, reads=reads, tools=tools)[0]
    names = SIDES.get(reads, ("",))
    return {
        name: _marked(one, _learnt(one, row, tokenizer, learns), tokenizer, limit, marks)
        for name, one in zip(names, spelt, strict=False)
    }


def learns(trainer: str, reads: str, row: Mapping[str, Any], arguments: Any) -> str:
    """Return which tokens of its rows a trainer learns, see ``mark_row``."""
    if reads == "prompt":
        return "nothing"
    if trainer == "reward":
        return "end"
    if trainer != "sft":
        return "answer"
    if arguments.assistant_only_loss:
        return "assistant"
    only = arguments.completion_only_loss
    return "answer" if "completion" in row and only is not False else "all"


def _learnt(one: Spelt, row: Mapping[str, Any], tokenizer: Any, learns: str) -> list[bool]:
    if learns == "assistant":
        chat = row.get("messages") or [*(row.get("prompt") or []), *(row.get("completion") or [])]
        tools = row.get("tools")
        encoded = tokenizer.apply_chat_template(
            chat,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return [bool(mask) for mask in encoded["assistant_masks"]]
    count = len(one.ids)
    first = {"answer": one.prompt, "all": 0, "end": count - 1}.get(learns, count)
    return [place >= first for place in range(count)]


def _marked(one: Spelt, learnt: Sequence[bool], tokenizer: Any, limit: int | None, marks: tuple[str, str]) -> str:
    ids, kept = one.ids, len(one.ids) if limit is None else min(limit, len(one.ids))
    pieces, start = [], 0
    for place in range(1, kept + 1):
        if place == kept or learnt[place] != learnt[start]:
            text = shorten(tokenizer.decode(ids[start:place]))
            pieces.append(f"{marks[0]}{text}{marks[1]}" if learnt[start] else text)
            start = place
    cut = len(ids) - kept
    return "".join(pieces) + (f" ... ({cut} tokens are cut off)" if cut else "")


def shorten(text: str, limit: int = SHOWN) -> str:
    """Return a text, or its start and end with the number of characters between."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ...({len(text) - 2 * half} characters)... {text[-half:]}"


def differing_prompt(row: Mapping[str, Any], tokenizer: Any, *, reads: str) -> tuple[str, str] | None:
    """Return how a prompt goes on as it is served and as it is trained on, from where they differ; None if nowhere."""
    for one in spell_rows([dict(row)], tokenizer, reads=reads)[0]:
        if not one.text.startswith(one.prompt_text):
            pairs = zip(one.text, one.prompt_text, strict=False)
            same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(one.text))
            same = max(0, same - 20)
            return one.prompt_text[same : same + 80], one.text[same : same + 80]
    return None


def left_out(row: Mapping[str, Any], tokenizer: Any, *, reads: str, tools: bool = True) -> list[str]:
    """Return what of a chat its template does not write: contents, names of tools and of tools that are called."""
    spelt = spell_rows([dict(row)], tokenizer, reads=reads, tools=tools)[0]
    text = "\n".join(one.text for one in spelt)
    told = row.get("tools") or []
    parts = [
        (tool.get("function") or tool).get("name") for tool in (json.loads(told) if isinstance(told, str) else told)
    ]
    for column in ("prompt", "messages", *(("completion", "chosen", "rejected") if reads != "prompt" else ())):
        for message in row.get(column) or [] if isinstance(row.get(column), list) else []:
            parts.append((message.get("content") or "").strip())
            parts += [call["function"]["name"] for call in message.get("tool_calls") or []]
    return list(dict.fromkeys(shorten(part, 60) for part in parts if part and part not in text))


def score_answers(row: Mapping[str, Any], scoring: Any) -> dict[str, dict[str, Any]]:
    """Return what each reward function says of a row's right answer and of an empty one; a model is not asked.

    Raises:
        ConfigError: a reward fails.
    """
    prompt = row["prompt"]
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    answer = row.get("reference", row.get("answer"))
    answer = answer[0] if isinstance(answer, list) and answer and isinstance(answer[0], str) else answer
    answers = {"the reference": answer, "an empty answer": ""}
    found: dict[str, dict[str, Any]] = {}
    for function in scoring.functions:
        if not hasattr(function, "takes"):
            found[type(function).__name__] = {}
            continue
        says = {}
        for name, text in answers.items():
            if text is not None:
                text = text if isinstance(text, str | list) else str(text)
                chat = isinstance(prompt, list) and isinstance(text, str)
                completion = [{"role": "assistant", "content": text}] if chat else text
                try:
                    says[name] = function(completions=[completion], prompts=[prompt], **columns)[0]
                except RunStopped as error:
                    raise ConfigError(f"On {name} of the first row: {error}") from error
        found[function.__name__] = says
    return found


def differences(mine: Mapping[str, Any], files: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the keys whose value is not the one of the option files, with both values."""
    return [
        (key, mine.get(key, "-"), files.get(key, "-"))
        for key in sorted({*mine, *files})
        if mine.get(key, "-") != files.get(key, "-")
    ]


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint at the nearest of some words, or a list of all."""
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"it can be {', '.join(known)}."
