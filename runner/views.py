"""What each kind of trainer reads, taken from canonical rows. Pure."""

from collections import Counter
from collections.abc import Iterable, Set

from runner.errors import ConfigError
from runner.rows import Row

_SHARED = ("tools", "chat_template_kwargs")  # TRL hands both to the chat template
ONLINE_NAMES = frozenset(  # TRL 1.16 fills or reads these itself, and fails or overwrites
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments",
     "environment", "image", "images"}
)  # fmt: skip

_KINDS = {"sft": "sft", "kto": "unpaired"}
_KINDS |= dict.fromkeys(("dpo", "reward", "orpo", "cpo"), "preference")
_KINDS |= dict.fromkeys(("grpo", "rloo", "ppo"), "prompt")

# For each kind of trainer, the columns that do: one of these sets.
READABLE: dict[str, tuple[frozenset[str], ...]] = {
    "sft": (
        frozenset({"prompt", "completion"}),
        frozenset({"messages"}),
        frozenset({"text"}),
        frozenset({"chosen", "rejected"}),
    ),
    "preference": (frozenset({"chosen", "rejected"}),),
    "unpaired": (frozenset({"prompt", "completion", "label"}), frozenset({"prompt", "chosen", "rejected"})),
    "prompt": (frozenset({"prompt"}), frozenset({"messages"})),
    "any": (frozenset(),),
}
_EXAMPLES = {"sft": "tldr", "preference": "ultrafeedback", "unpaired": "ultrafeedback", "prompt": "gsm8k"}


def row_kind(trainer: str) -> str:
    """Return what a trainer reads, a key of ``READABLE``; ``any`` for a trainer that is not known here."""
    return _KINDS.get(trainer, "any")


def refuse_unreadable(reads: str, columns: Set[str], *, dataset: str, trainer: str | None = None) -> None:
    """Check that rows with these columns can serve a kind of trainer.

    Args:
        reads: a key of ``READABLE``.
        columns: of canonical rows, or ``formats.produces(...)`` before any row is read.
        dataset: its name, for the message.
        trainer: its name, for the message.

    Raises:
        ConfigError: they cannot.
    """
    if any(needed <= columns for needed in READABLE[reads]):
        return
    trainer = trainer or " or ".join(name for name, kind in _KINDS.items() if kind == reads)
    lacking = [sorted(needed - columns) for needed in READABLE[reads]]
    raise ConfigError(
        f"trainer={trainer} cannot read dataset={dataset}: rows lack {' or '.join(map(str, lacking))}, have "
        f"{sorted(columns)}. Choose a dataset with {' or '.join(str(sorted(n)) for n in READABLE[reads])}, for "
        f"example dataset={_EXAMPLES[reads]}, or another trainer."
    )


def view(reads: str, rows: Iterable[Row]) -> tuple[list[Row], Counter[str]]:
    """Take from canonical rows what a kind of trainer reads.

    Args:
        reads: ``sft``: prompt and completion, messages or text; of preferences the chosen side, of rows with a
            label the good ones. ``preference``: (prompt), chosen, rejected. ``unpaired``: prompt, completion,
            label; preferences become two rows. ``prompt``: the prompt, of messages the turns before the last
            answer, and every other column for the rewards. ``any``: the rows as they are.
        rows: canonical, all with the same columns.

    Returns:
        The rows, and how many were left out, by reason.
    """
    all_rows, skipped = list(rows), Counter[str]()
    if reads == "sft":
        good = [row for row in all_rows if row.get("label", True)]
        skipped["label is false"] = len(all_rows) - len(good)
        return [_learnt(row) for row in good], +skipped
    if reads == "preference":
        return [_pick(row, "prompt", "chosen", "rejected", "margin") for row in all_rows], skipped
    if reads == "unpaired":
        return _unpaired(all_rows), skipped
    if reads == "prompt":
        return [_asked(row) for row in all_rows], skipped
    return all_rows, skipped


def _learnt(row: Row) -> Row:
    if "completion" in row or "chosen" not in row:
        return _pick(row, "prompt", "completion", "messages", "text")
    return {**_pick(row, "prompt"), "completion": row["chosen"]} if "prompt" in row else {"text": row["chosen"]}


def _unpaired(rows: list[Row]) -> list[Row]:
    """Keep or make rows with a label.

    All chosen answers come before all rejected ones, as in TRL's unpairing: its KL estimate pairs a prompt with
    the completion of its neighbour, which must belong to another prompt.
    """
    labelled = [_pick(row, "prompt", "completion", "label") for row in rows if "label" in row]
    pairs = [row for row in rows if "label" not in row]
    return [
        *labelled,
        *({**_pick(row, "prompt"), "completion": row["chosen"], "label": True} for row in pairs),
        *({**_pick(row, "prompt"), "completion": row["rejected"], "label": False} for row in pairs),
    ]


def _asked(row: Row) -> Row:
    """Return the prompt and what rewards may want; an answer to imitate is called ``reference``.

    TRL keeps a column ``completion`` from the reward functions, and a completion that is labelled bad is no
    reference.
    """
    asked = {key: value for key, value in row.items() if key not in {*ONLINE_NAMES, "messages", "completion"}}
    if "prompt" in row:
        answer = row.get("completion") if row.get("label", True) else None
    else:
        turns = len(row["messages"])
        while row["messages"][turns - 1]["role"] == "assistant":
            turns -= 1
        asked["prompt"], answer = row["messages"][:turns], row["messages"][turns:]
    if answer is not None:
        asked.setdefault("reference", answer)
    return {"prompt": asked.pop("prompt"), **asked}


def _pick(row: Row, *names: str) -> Row:
    return {name: row[name] for name in (*names, *_SHARED) if name in row}
