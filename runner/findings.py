"""What a person should know of rows and tokens before training on them, a sentence each, with the rows it is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.rows import find_repeats

# Each finding, and what it does to a check: ``fail`` ends it with exit code 2.
POLICIES = {
    **dict.fromkeys(("no_effect", "dropped", "skipped", "duplicates", "overlap", "over_length", "truncated"), "warn"),
    **dict.fromkeys(("no_supervised_token", "no_stop_token", "double_bos", "prompt_differs", "left_out"), "warn"),
    **dict.fromkeys(("reward_blind", "reward_order", "context", "few_rows", "memory", "launch", "note"), "warn"),
    **dict.fromkeys(("no_generation_markers", "disk", "trackers"), "fail"),
    **dict.fromkeys(("config", "reach", "data", "view", "model", "plan", "probe"), "fail"),  # what a section raised
}
SHOWN = 3  # rows that a finding names


@dataclass(frozen=True)
class Finding:
    """Something that was found: its name in ``POLICIES``, the text, and the rows that show it, numbered from 1."""

    name: str
    text: str
    rows: Sequence[int] = ()


def of_splits(splits: Any) -> list[Finding]:
    """Return what was left out of the splits of ``data.load_splits``, and what is there twice."""
    rows = len(splits.train)
    repeats = find_repeats(splits.train.to_list(), splits.eval.to_list() if splits.eval is not None else [])
    found = []
    for split, about in splits.report.items():
        for reason, count in ((about or {}).get("dropped") or {}).items():
            found.append(Finding("dropped", f"{split}: {count} of {about['rows_read']} rows are left out: {reason}."))
        for reason, count in ((about or {}).get("skipped") or {}).items():
            found.append(Finding("skipped", f"{split}: {count} of {about['rows_kept']} rows do not serve: {reason}."))
    if twice := repeats["duplicates"]:
        text = f"train: {len(twice)} of {rows} rows are there before, such as row {twice[0][0]} (as row {twice[0][1]})."
        found.append(Finding("duplicates", text, [number for number, _ in twice[:SHOWN]]))
    if leaks := repeats["overlap"]:
        pairs = ", ".join(f"eval row {here} asks what train row {there} asks" for here, there in leaks[:SHOWN])
        text = f"eval: {len(leaks)} rows are trained on too, so that the evaluation flatters: {pairs}."
        found.append(Finding("overlap", text, [number for number, _ in leaks[:SHOWN]]))
    return found


def of_tokens(audits: Mapping[str, Mapping[str, Any]], *, trainer: str, max_length: int | None) -> list[Finding]:
    """Return what the audits of ``tokens.fit_splits`` say."""
    limit = f"{'trainer.max_prompt_length' if trainer == 'ppo' else 'trainer.max_length'}={max_length}"
    return [one for split, audit in audits.items() for one in _of_audit(split, audit, limit)]


def _of_audit(split: str, audit: Mapping[str, Any], limit: str) -> list[Finding]:
    where, examples = f"{split}: ", audit.get("examples", {})
    found = []

    def say(name: str, share: float, text: str, example: str) -> None:
        rows = examples.get(example, [])[:SHOWN]
        more = ", ..." if len(examples.get(example, [])) > SHOWN else ""
        named = f" (row {', '.join(map(str, rows))}{more})" if rows else ""
        if share > 0:
            found.append(Finding(name, f"{where}{percent(share)} of {text}{named}.", rows))

    left = audit["dropped"] / audit["rows"]
    if audit["dropped"] == audit["over_length"]:
        say("over_length", left, f"rows are left out: over {limit}", "over_length")
    else:
        say("no_supervised_token", left, f"rows are left out: their prompt fills {limit}", "no_supervised_token")
    say("truncated", audit.get("truncated", 0), f"sequences are cut at {limit}, and do not end", "over_length")
    endless = 1 - audit.get("stop_token_in_loss", 1) - audit.get("truncated", 0)
    mute = "sequences do not end with a stop token: the model will not learn to stop"
    say("no_stop_token", endless if endless > 1e-9 else 0, mute, "no_stop_token")
    twice = "sequences start with two beginning-of-sequence tokens: the template and the tokenizer each add one"
    say("double_bos", audit["double_bos"], twice, "double_bos")
    other = "sequences have a prompt that the chat template writes otherwise when it is served"
    say("prompt_differs", audit.get("prompt_differs", 0), other, "prompt_differs")
    return found


def percent(share: float) -> str:
    """Return a share as a person says it; what is not all is never 100%, what is not nothing never 0%."""
    text = f"{100 * share:.1f}%"
    return {"100.0%": "over 99.9%", "0.0%": "under 0.1%"}.get(text, text) if 0 < share < 1 else f"{100 * share:.0f}%"
