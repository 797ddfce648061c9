"""Auditing the tokens of rows: which rows are too long, and whether what should be learnt is in the loss.

TRL 1.16 has policies of its own for rows that are too long, without a word. SFT cuts the end, and leaves a row out when
nothing is left to learn. DPO and KTO cut the end, and leave a row out when its prompt fills ``max_length``. ORPO and
CPO cut the answer. Reward leaves the row out. GRPO and RLOO have no limit for prompts.
"""

import logging
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from heapq import nlargest
from itertools import islice, takewhile
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any

from runner.encoding import Counts, encode, spell_rows
from runner.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from runner.data import Splits

logger = logging.getLogger(__name__)

PACKED_ROWS = 1_000  # as datasets.map batches them
SHOWN_ROWS = 5
FIRST_ROWS = 2
LONGEST_ROWS, SPREAD_ROWS = 16, 50  # whose beginnings are compared: they may be a batch, they stand for all


def fit_splits(
    splits: "Splits", tokenizer: "PreTrainedTokenizerBase", **options: Any
) -> tuple["Splits", dict[str, Any]]:
    """Apply ``fit_lengths`` to the train and eval rows; return them with their token ids, and the audit of each.

    Args:
        splits: what ``data.load_splits`` gave.
        tokenizer: with the chat template and special tokens of the training.
        options: the other keywords of ``fit_lengths``.
    """
    fitted, ids, audit = {}, {}, {}
    for name, dataset in (("train", splits.train), ("eval", splits.eval)):
        if dataset is not None:
            fitted[name], ids[name], audit[name] = fit_lengths(dataset, tokenizer, name=name, **options)
    return replace(splits, ids=ids, **fitted), audit


def fit_lengths(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    reads: str,
    max_length: int | None,
    too_long: str,
    name: str,
    trainer: str = "",
) -> tuple["Dataset", "Dataset", dict[str, Any]]:
    """Apply the policy for rows over ``max_length``, and audit the tokens.

    Args:
        dataset: rows of ``data.load_splits``.
        tokenizer: with the chat template and special tokens of the training.
        reads: what the trainer reads, see ``views.view``; of ``prompt`` only the prompt is counted.
        max_length: tokens of prompt and answer, of the prompt alone for an online trainer; None means no limit.
        too_long: ``drop`` leaves rows over it out; ``fail`` refuses them; ``truncate`` leaves the cutting to the
            trainer, and leaves out only rows whose prompt fills ``max_length``.
        name: of the split, for messages.
        trainer: its name; ``reward`` and TRL's online trainers cannot truncate, ``ppo`` keeps the end of a prompt.

    Returns:
        The rows that fit; their token ids, see ``encoding.encode``; and the audit: ``rows``, ``over_length`` and
        ``dropped`` count rows; ``truncated``, ``stop_token_in_loss``, ``bos``, ``double_bos`` and ``prompt_differs``
        are shares of the sequences that are left, ``no_supervised_token`` of all rows; quantiles are of all
        sequences, whole; ``tokens`` are trained on in an epoch, in ``sequences``, the longest of ``longest``, which
        fill ``packed`` ones; the longest pair has ``longest_pair``, its prompt counted once; the longest rows and some
        of all begin with the same ``common`` tokens; ``examples`` are the first rows of each finding, numbered from
        1, and the first and the longest that are kept.

    Raises:
        ConfigError: rows are too long, none is left, the trainer cannot truncate, or the chat template refuses a row.
    """
    key = _refuse_policy(too_long, max_length, reads, trainer)
    tools = reads != "prompt" or trainer == "ppo"
    ids = encode(dataset, tokenizer, reads=reads, trainer=trainer, tools=tools, name=name)
    counted = [[Counts(**one) for one in row["counts"]] for row in ids.select_columns("counts").to_list()]
    limit = float("inf") if max_length is None else max_length
    kept, over, unlearnt = _apply(counted, limit, reads, too_long, name, key)
    longest = nlargest(LONGEST_ROWS, kept, key=lambda n: max(counts.total for counts in counted[n]))
    some = dataset.select(sorted({*longest, *kept[:: len(kept) // SPREAD_ROWS + 1]})).to_list()
    spelt = [one.ids[:max_length] for row in spell_rows(some, tokenizer, reads=reads, tools=tools) for one in row]
    audit = {
        "rows": len(counted),
        "over_length": over,
        "dropped": len(counted) - len(kept),
        "no_supervised_token": unlearnt / len(counted),
        **_shares([counted[number] for number in kept], limit, reads),
        "prompt_tokens": _quantiles(counts.prompt for row in counted for counts in row),
        "completion_tokens": _quantiles(counts.total - counts.prompt for row in counted for counts in row),
        "total_tokens": _quantiles(counts.total for row in counted for counts in row),
        "pad_is_eos": tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id,
        "common": sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*spelt, strict=False))),
        "examples": _examples(counted, set(kept), limit, reads),
    }
    _warn(name, audit, f"{key}={max_length}")
    if len(kept) == len(counted):
        return dataset, ids, audit
    return dataset.select(kept), ids.select(kept), audit


# ---------------------------------------------------------------- counts to rows that fit, and findings


def _refuse_policy(too_long: str, max_length: int | None, reads: str, trainer: str) -> str:
    """Return the key of the limit, unless the policy for rows over it cannot be kept."""
    of_trl = reads == "prompt" and trainer != "ppo"
    if too_long == "truncate" and (trainer == "reward" or of_trl):
        raise ConfigError(
            f"dataset.too_long=truncate cannot be done: TRL's {trainer or 'online'} trainer never cuts rows that are "
            f"too long. Type dataset.too_long=drop{'' if of_trl else ' or dataset.too_long=fail'}."
        )
    key = "trainer.max_prompt_length" if trainer == "ppo" else "trainer.max_length"
    if too_long == "fail" and max_length is None:
        what = "TRL's online trainers have no limit for prompts" if of_trl else f"{key} is not set"
        raise ConfigError(f"dataset.too_long=fail has no effect: {what}. Type dataset.too_long=drop.")
    return key


def _apply(
    counted: Sequence[Sequence[Counts]], limit: float, reads: str, too_long: str, name: str, key: str
) -> tuple[list[int], int, int]:
    """Return the rows that are kept, and how many are over the limit, and have a prompt that fills it."""
    over = [number for number, row in enumerate(counted) if any(counts.total > limit for counts in row)]
    if over and too_long == "fail":
        lengths = [f"row {n + 1} has {max(counts.total for counts in counted[n])}" for n in over[:SHOWN_ROWS]]
        raise ConfigError(
            f"{len(over)} of {len(counted)} {name} rows are over {key}={limit} tokens: "
            f"{', '.join(lengths)}. Raise {key}, or type dataset.too_long=drop."
        )
    unlearnt = [n for n in over if reads != "prompt" and any(counts.prompt >= limit for counts in counted[n])]
    dropped = set(over if too_long == "drop" else unlearnt)
    kept = [number for number in range(len(counted)) if number not in dropped]
    if not kept:
        shortest = min(max(counts.total for counts in row) for row in counted)
        raise ConfigError(f"No {name} row fits into {key}={limit} tokens: the shortest has {shortest}. Raise {key}.")
    return kept, len(over), len(unlearnt)


def _shares(rows: Sequence[Sequence[Counts]], limit: float, reads: str) -> dict[str, Any]:
    """Summarise the sequences that are trained on."""
    sequences = [counts for row in rows for counts in row]

    def share(of: Iterable[bool]) -> float:
        return sum(of) / len(sequences)

    learns = {
        "truncated": share(counts.total > limit for counts in sequences),
        "stop_token_in_loss": share(counts.stops and counts.total <= limit for counts in sequences),
        "prompt_differs": share(counts.differs for counts in sequences),
    }
    lengths = [int(min(counts.total, limit)) for counts in sequences]
    return {
        **(learns if reads != "prompt" else {}),
        "bos": share(counts.bos > 0 for counts in sequences),
        "double_bos": share(counts.bos > 1 for counts in sequences),
        "sequences": len(sequences),
        "tokens": sum(lengths),
        "longest": max(lengths),
        **({"packed": pack(lengths, int(limit))} if reads == "sft" and isfinite(limit) else {}),
        **({"longest_pair": max(_with_one_prompt(row, limit) for row in rows)} if reads == "preference" else {}),
    }


def _with_one_prompt(pair: Sequence[Counts], limit: float) -> int:
    """Return the tokens of a pair when its prompt is counted once."""
    return int(sum(min(counts.total, limit) for counts in pair) - min(counts.prompt for counts in pair))


def pack(lengths: Sequence[int], size: int) -> int:
    """Return how many sequences of ``size`` tokens hold these, the longest first, each where it fits best.

    TRL does so with a thousand rows at a time.   Source: trl 1.16, trl/data_utils.py, ``_pack_bfd``
    """
    filled = 0
    for start in range(0, len(lengths), PACKED_ROWS):
        room: list[int] = []  # left in each sequence, ascending
        for length in sorted(lengths[start : start + PACKED_ROWS], reverse=True):
            place = bisect_left(room, length)
            insort(room, (room.pop(place) if place < len(room) else size) - length)
        filled += len(room)
    return filled


def _examples(counted: Sequence[Sequence[Counts]], kept: set[int], limit: float, reads: str) -> dict[str, list[int]]:
    """Return the numbers of the first rows, from 1, that each finding is about."""
    signs: dict[str, Callable[[Counts], bool]] = {
        "over_length": lambda counts: counts.total > limit,
        "no_supervised_token": lambda counts: reads != "prompt" and counts.total > limit <= counts.prompt,
        "double_bos": lambda counts: counts.bos > 1,
        "prompt_differs": lambda counts: counts.differs,
        "no_stop_token": lambda counts: reads != "prompt" and not counts.stops,
    }
    found = {
        name: list(islice((n + 1 for n, row in enumerate(counted) if any(map(sign, row))), SHOWN_ROWS))
        for name, sign in signs.items()
    }
    longest = max(kept, key=lambda n: (max(counts.total for counts in counted[n]), -n))
    first = [n + 1 for n in sorted(kept)[:FIRST_ROWS]]
    return {name: rows for name, rows in found.items() if rows} | {"first": first, "longest": [longest + 1]}


def _quantiles(lengths: Iterable[int]) -> dict[str, int]:
    """Return nearest-rank quantiles: every one is the length of some sequence."""
    ordered = sorted(lengths)
    if not ordered:
        return {}
    ranks = {f"p{percent}": ceil(len(ordered) * percent / 100) - 1 for percent in (50, 90, 99)}
    return {name: ordered[rank] for name, rank in ranks.items()} | {"max": ordered[-1]}


def _warn(name: str, audit: dict[str, Any], limit: str) -> None:
    if audit["dropped"]:
        logger.warning("%s: %d of %d rows are left out: over %s tokens.", name, audit["dropped"], audit["rows"], limit)
    shares = {**audit, "endless": 1 - audit.get("stop_token_in_loss", 1) - audit.get("truncated", 0)}
    findings = {
        "truncated": "are cut at trainer.max_length, and their answers do not end",
        "prompt_differs": "have a prompt that the chat template writes otherwise alone, which is how it will be used",
        "double_bos": "start with two beginning-of-sequence tokens: template and tokenizer each add one",
        "endless": "do not end with a stop token: the model will not learn to stop",
    }
    for finding, meaning in findings.items():
        if shares.get(finding, 0) > 1e-9:
            logger.warning("%s: %.1f%% of sequences %s.", name, 100 * shares[finding], meaning)
