"""The rows of a run that is checked: what is read, what its tokens are, and what the model sees of them."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from runner import data, findings, models, rewards, tokens, trainers
from runner.checkup import Check, Passed, need, say
from runner.config import given
from runner.encoding import Spelt, spell_rows
from runner.errors import ConfigError, RunStopped
from runner.findings import Finding, percent

COLOUR, PLAIN = ("\033[7;32m", "\033[0m"), ("[[", "]]")
SHOWN = 1_200  # characters of a sequence, its start and its end
SIDES = {"preference": ("chosen", "rejected")}
MEANS = {
    "answer": "learnt: the answers", "all": "learnt: every token", "assistant": "learnt: what the assistant says",
    "end": "scored: the last token", "nothing": "a prompt, to be answered",
}  # fmt: skip


def check_data(done: Check) -> dict[str, Any]:
    """Read the rows and audit their tokens."""
    need(done, "dataset.")
    loaded = data.load_splits(reads=done.reads, run_seed=done.config["seed"], **done.config["dataset"])
    for split, about in loaded.report.items():
        if about and "fingerprint" in about:
            say(f"  {split}  {about.get('rows_kept', about['rows'])} rows, {about.get('format', 'mixture')}, "
                f"fingerprint {about['fingerprint'][:12]}")  # fmt: skip
    done.add(*findings.of_splits(loaded))
    facts = {"report": loaded.report}
    done.rows, done.read = loaded, loaded.train
    if "model.name_or_path" in done.absent or "model.tokenizer_name_or_path" in done.absent:
        say("  tokens are not counted: the tokenizer is not here")
        return facts
    done.tokenizer = models.load_tokenizer(**given(models.load_tokenizer, done.config["model"]))
    trainer = done.config["trainer"]
    limit = trainer.get("max_length") or trainer.get("max_prompt_length")
    policy = done.config["dataset"].get("too_long", "drop")
    done.rows, done.audit = tokens.fit_splits(
        loaded, done.tokenizer, reads=done.reads, max_length=limit, too_long=policy, trainer=done.trainer
    )
    _say_audit(done)
    done.add(*findings.of_tokens(done.audit, trainer=done.trainer, max_length=limit))
    return {**facts, "tokens": done.audit}


def _say_audit(done: Check) -> None:
    kinds = ["prompt"] if done.reads == "prompt" else ["prompt", "completion", "total"]
    for split, audit in done.audit.items():
        say(f"  {split}  {audit['rows'] - audit['dropped']} rows to use, {audit['tokens']} tokens")
        for kind in kinds:
            lengths = audit[f"{kind}_tokens"]
            if lengths.get("max"):
                say(f"    {kind:<10}  half {lengths['p50']}, 90% {lengths['p90']}, longest {lengths['max']} tokens")
        if done.reads != "prompt":
            say(f"    stop token in the loss of {percent(audit['stop_token_in_loss'])}, "
                f"BOS before {percent(audit['bos'])}, cut {percent(audit['truncated'])}")  # fmt: skip
    node, train = done.config["trainer"], done.audit["train"]
    if node.get("packing") and train.get("packed"):
        share = train["tokens"] / (train["packed"] * node["max_length"])
        say(f"  packed into {train['packed']} sequences of {node['max_length']}, {percent(share)} full")


def check_view(done: Check) -> dict[str, Any]:
    """Show the first rows and the longest as the model sees them, and what rewards say."""
    if done.tokenizer is None or "train" not in done.audit:
        raise Passed("it needs rows and a tokenizer")
    done.arguments, _ = trainers.build_arguments(
        done.config["trainer"], done.composed.run_dir, evaluates=done.rows.eval is not None, planned=done.processes,
        global_batch_size=done.config.get("global_batch_size"), launch=done.config["launch"], rows=len(done.rows.train),
    )  # fmt: skip
    examples = done.audit["train"]["examples"]
    learns = find_learnt(done.trainer, done.reads, done.read[0], done.arguments)
    if learns == "assistant" and "{% generation" not in str(done.tokenizer.chat_template):
        done.add(_without_markers(done.tokenizer))
        learns = "all"
    marks = COLOUR if sys.stdout.isatty() and "NO_COLOR" not in os.environ else PLAIN
    how_marked = "in colour" if marks == COLOUR else f"between {marks[0]} and {marks[1]}"
    say(f"  {MEANS[learns]}" + ("" if learns == "nothing" else f", {how_marked}"))
    limit = getattr(done.arguments, "max_length", None)
    shown: dict[int, dict[str, str]] = {}
    missing = {}
    tools = done.reads != "prompt" or done.trainer == "ppo"  # whether the trainer tells the template of them
    for number in dict.fromkeys([*examples["first"], *examples["longest"]]):
        row, shown[number] = done.read[number - 1], {}
        spelt = spell_rows([dict(row)], done.tokenizer, reads=done.reads, tools=tools)[0]
        for side, one in zip(SIDES.get(done.reads, ("",)), spelt, strict=False):
            text = _marked(one, _learnt(one, row, done.tokenizer, learns), done.tokenizer, limit, marks)
            shown[number][side] = text
            say(f"  row {number}{' ' + side if side else ''}: {text}".replace("\n", "\n    "))
        if absent := left_out(row, spelt, done.reads):
            missing[number] = absent
    for number, absent in missing.items():
        text = f"the chat template does not write all of row {number}, and the model never sees: {', '.join(absent)}."
        done.add(Finding("left_out", text, [number]))
    if differing := examples.get("prompt_differs"):
        pair = differing_prompt(done.read[differing[0] - 1], done.tokenizer, reads=done.reads)
        served, trained = pair or ("", "")
        say(f"  the prompt of row {differing[0]} is served as ...{served!r}, and trained on as ...{trained!r}")
    return {"learns": learns, "rows": shown, "rewards": _ask_rewards(done) if done.reads == "prompt" else {}}


def _without_markers(tokenizer: Any) -> Finding:
    from trl.chat_template_utils import get_training_chat_template

    try:
        get_training_chat_template(tokenizer)
        text = "TRL takes one of its own that has them, which may not be what the model is served with"
    except ValueError:
        text = "TRL knows none in its place, and the run would end. Type model.chat_template=FILE.jinja with them, or "
        text += "trainer.assistant_only_loss=false"
    return Finding(
        "no_generation_markers",
        "trainer.assistant_only_loss=true reads {% generation %} marks in the chat template, which has none: "
        + f"{text}.",
    )


def _ask_rewards(done: Check) -> dict[str, Any]:
    """Say what each reward makes of the right answer to the first row, and of an empty one."""
    row = done.rows.train[0]
    say(f"  columns that rewards get: {', '.join(name for name in row if name != 'prompt') or 'none'}")
    allowed = [*done.config["allow_code"], *os.environ.get("RUNNER_ALLOW_CODE", "").split(",")]
    scoring = rewards.build_rewards(
        done.config["reward"], columns=set(row), load_model=lambda _: (_Unread(), None), allowed=allowed
    )
    asked = score_answers(row, scoring)
    for name, says in asked.items():
        told = ", ".join(f"{value} for {what}" for what, value in says.items())
        say(f"  reward {name}: {told or 'a model, which is not asked: its weights are not read'}")
        values = [value for value in says.values() if value is not None]
        if len(values) == 2 and values[0] == values[1]:
            done.add(Finding("reward_blind", f"{name} gives {values[0]} to the reference and to an empty answer.", [1]))
        elif len(values) == 2 and values[0] < values[1]:
            done.add(Finding("reward_order", f"{name} gives an empty answer more than the reference.", [1]))
    return asked


class _Unread(nn.Module):
    """A reward model that is not loaded."""

    config = SimpleNamespace(num_labels=1)


# ---------------------------------------------------------------- rows as the model sees them


def find_learnt(trainer: str, reads: str, row: Mapping[str, Any], arguments: Any) -> str:
    """Return which tokens of its rows a trainer learns.

    Returns:
        ``answer``; ``all``; ``assistant``, what the template marks as the assistant's; ``end``, where a score is read;
        or ``nothing``, of a prompt.
    """
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
    """Return a sequence, decoded from its tokens, with what is learnt between marks and the rest over a limit cut."""
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


def left_out(row: Mapping[str, Any], spelt: Sequence[Spelt], reads: str) -> list[str]:
    """Return what of a chat its template does not write: contents, names of tools and of tools that are called."""
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
