"""The rows of a run that is checked: what is read, what its tokens are, and what the model sees of them."""

import os
import sys
from typing import Any

from runner import data, findings, models, preview, rewards, tokens, trainers
from runner.checkup import Check, Passed, need, say
from runner.config import given
from runner.findings import Finding, percent

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
    if done.tokenizer is None:
        raise Passed("it needs rows and a tokenizer")
    evaluates = done.rows.eval is not None
    size = done.config.get("global_batch_size")
    where = done.composed.run_dir
    done.arguments, _ = trainers.build_arguments(
        done.config["trainer"], where, evaluates=evaluates, global_batch_size=size, rows=len(done.rows.train)
    )
    examples = done.audit["train"]["examples"]
    learns = preview.learns(done.trainer, done.reads, done.read[0], done.arguments)
    if learns == "assistant" and "{% generation" not in str(done.tokenizer.chat_template):
        done.add(_without_markers(done.tokenizer))
        learns = "all"
    marks = preview.COLOUR if sys.stdout.isatty() and "NO_COLOR" not in os.environ else preview.PLAIN
    how_marked = "in colour" if marks == preview.COLOUR else f"between {marks[0]} and {marks[1]}"
    say(f"  {MEANS[learns]}" + ("" if learns == "nothing" else f", {how_marked}"))
    limit = getattr(done.arguments, "max_length", None)
    shown, missing = {}, {}
    how: dict[str, Any] = {"reads": done.reads, "tools": done.reads != "prompt" or done.trainer == "ppo"}
    for number in dict.fromkeys([*examples["first"], *examples["longest"]]):
        row = done.read[number - 1]
        shown[number] = preview.mark_row(row, done.tokenizer, learns=learns, limit=limit, marks=marks, **how)
        for side, text in shown[number].items():
            say(f"  row {number}{' ' + side if side else ''}: {text}".replace("\n", "\n    "))
        if absent := preview.left_out(row, done.tokenizer, **how):
            missing[number] = absent
    for number, absent in missing.items():
        text = f"the chat template does not write all of row {number}, and the model never sees: {', '.join(absent)}."
        done.add(Finding("left_out", text, [number]))
    if differing := examples.get("prompt_differs"):
        pair = preview.differing_prompt(done.read[differing[0] - 1], done.tokenizer, reads=done.reads)
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
        done.config["reward"],
        columns=set(row),
        load_model=lambda node: (_Unread(node["name_or_path"]), None),
        allowed=allowed,
    )
    asked = preview.score_answers(row, scoring)
    for name, says in asked.items():
        told = ", ".join(f"{value} for {what}" for what, value in says.items())
        say(f"  reward {name}: {told or 'a model, which is not asked: its weights are not read'}")
        values = [value for value in says.values() if value is not None]
        if len(values) == 2 and values[0] == values[1]:
            done.add(Finding("reward_blind", f"{name} gives {values[0]} to the reference and to an empty answer.", [1]))
        elif len(values) == 2 and values[0] < values[1]:
            done.add(Finding("reward_order", f"{name} gives an empty answer more than the reference.", [1]))
    return asked


class _Unread:
    """A reward model that is not loaded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.config = type("Config", (), {"num_labels": 1})

    def requires_grad_(self, _: bool) -> None:
        """Do nothing."""

    def eval(self) -> "_Unread":
        """Return itself."""
        return self
