"""Reading one dataset: raw rows to canonical rows to what one kind of trainer reads."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from runner.arithmetic import arithmetic
from runner.errors import ConfigError
from runner.files import RowFile
from runner.formats import convert, names, produces, recognise
from runner.rows import BadRow, Row, validate
from runner.splits import Split, cut, find_splits
from runner.views import ONLINE_NAMES, refuse_unreadable, view

logger = logging.getLogger(__name__)

SHOWN_FAULTS = 5
GENERATORS = {"arithmetic": arithmetic}

Found = tuple[str, Row | BadRow]  # where a row is from, and the row or what is wrong with it


@dataclass(frozen=True)
class Part:
    """One split of one dataset.

    Attributes:
        rows: as the trainer reads them.
        canonical: with all that is known of them.
        report: for the manifest: rows read, kept and given to the trainer, those dropped by reason, format, files and
            a fingerprint of the canonical rows.
    """

    rows: list[Row]
    canonical: list[Row]
    report: dict[str, Any]


def load_source(
    reads: str,
    key: str,
    *,
    path: str | Sequence[str] | None = None,
    name: str | None = None,
    revision: str | None = None,
    train: str = "train",
    eval: str | None = None,
    format: str = "auto",
    rename: Mapping[str, str] | None = None,
    bad_rows: str = "fail",
    generator: str | None = None,
    **generator_options: Any,
) -> tuple[Part, Part | None]:
    """Read the train and eval rows of one dataset.

    Args:
        reads: what the trainer reads, see ``views.view``.
        key: where the node is in the config, for messages.
        path: hub id, file, folder or list of files, see ``splits.find_splits``.
        name: configuration of a hub dataset.
        revision: branch, tag or commit of a hub dataset.
        train: split or slice, see ``splits.cut``.
        eval: split or slice; null means no evaluation.
        format: a row function of ``formats``, or ``auto``.
        rename: columns of the files, each with the name it gets.
        bad_rows: ``fail`` names the first bad rows; ``drop`` counts them.
        generator: ``arithmetic``, instead of ``path``; its held-out rows are the split ``validation``.
        generator_options: the generator's own keys.
    """
    splits: Mapping[str, Split]
    if generator is not None:
        label, splits = generator, _generate(key, generator, path, generator_options)
        format = generator
    elif generator_options:
        raise TypeError(f"load_source() got unexpected keyword arguments {sorted(generator_options)}")
    else:
        label, splits = _find(reads, key, path, name, revision, format)
    reader = _Reader(reads, label, format, rename or {}, bad_rows)
    ranges = cut(train, splits, key=f"{key}.train")
    eval_ranges = cut(eval, splits, key=f"{key}.eval") if eval is not None else []
    shared = sum(
        max(0, min(stop, other_stop) - max(start, other_start))
        for name, start, stop in ranges
        for other, other_start, other_stop in eval_ranges
        if name == other
    )
    if shared:
        logger.warning("%s: %d rows of %s.eval=%s are trained on too.", label, shared, key, eval)
    train_part = reader.read(train, splits, ranges)
    return train_part, reader.read(eval, splits, eval_ranges) if eval is not None else None


def fingerprint(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of canonical rows, in order: the same from every file format and on every machine."""
    digest = hashlib.sha256()
    encoder = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
    for row in rows:
        known = {column: value for column, value in row.items() if value is not None}
        digest.update(encoder.encode(known).encode())
        digest.update(b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------- where the rows are


def _find(
    reads: str, key: str, path: str | Sequence[str] | None, name: str | None, revision: str | None, format_name: str
) -> tuple[str, Mapping[str, Split]]:
    """Find the splits, after refusing what can be refused before anything is read."""
    if not path:
        raise ConfigError(
            f"{key} has no path: there is nothing to read. Type {key}.path=FILE, FOLDER or hub id, or choose a dataset "
            "that has one, for example dataset=gsm8k."
        )
    label = path if isinstance(path, str) else ", ".join(path)
    if format_name not in ("auto", *names()):
        raise ConfigError(f"There is no {key}.format={format_name}. Choose auto or one of {', '.join(names())}.")
    if format_name != "auto":
        refuse_unreadable(reads, produces(format_name), dataset=label)
    return label, find_splits(path, name=name, revision=revision)


def _generate(key: str, generator: str, path: Any, options: Mapping[str, Any]) -> dict[str, Split]:
    if path:
        raise ConfigError(f"{key} has a path and a generator. Type {key}.path=null or {key}.generator=null.")
    if generator not in GENERATORS:
        raise ConfigError(f"There is no {key}.generator={generator}. Choose one of {', '.join(GENERATORS)}.")
    made = zip(("train", "validation"), GENERATORS[generator](**options), strict=True)
    return {split: Split((partial(RowFile, f"{generator} {split}", rows),)) for split, rows in made}


# ---------------------------------------------------------------- raw rows to what the trainer reads


@dataclass(frozen=True)
class _Reader:
    """How the rows of one dataset are read."""

    reads: str
    label: str
    format: str
    rename: Mapping[str, str]
    bad_rows: str

    def read(self, spec: str, splits: Mapping[str, Split], ranges: Sequence[tuple[str, int, int]]) -> Part:
        """Read a slice."""
        where = f"{self.label} {spec}"
        found = [row for name, start, stop in ranges for row in splits[name].rows(start, stop)]
        if self.rename:
            found = _rename(found, self.rename, where)
        format_name = _recognise(found, where) if self.format == "auto" else self.format
        rows, dropped = _canonical_rows(found, format_name, where, bad_rows=self.bad_rows)
        columns: set[str] = set().union(*rows)
        refuse_unreadable(self.reads, columns, dataset=self.label)
        if self.reads == "prompt" and (clash := sorted(ONLINE_NAMES & columns)):
            logger.warning("%s: no reward gets %s: online trainers use these names.", where, ", ".join(clash))
        viewed, skipped = view(self.reads, rows)
        if not viewed:
            raise ConfigError(f"{where} has no row to train on: {_counts(skipped)}. Choose another slice or trainer.")
        logger.info(
            "%s: %d of %d rows, format %s; %d to train on", where, len(rows), len(found), format_name, len(viewed)
        )
        report = {
            "split": spec,
            "format": format_name,
            "rows_read": len(found),
            "rows_kept": len(rows),
            "rows": len(viewed),
            "dropped": dict(dropped.most_common()),
            "skipped": dict(skipped),
            "fingerprint": fingerprint(rows),
            "files": [
                file.about for name in dict.fromkeys(name for name, _, _ in ranges) for file in splits[name].files
            ],
        }
        return Part(viewed, rows, report)


def _rename(found: list[Found], rename: Mapping[str, str], where: str) -> list[Found]:
    columns: set[str] = set().union(*(row for _, row in found if not isinstance(row, BadRow)))
    if absent := [theirs for theirs in rename if theirs not in columns]:
        raise ConfigError(
            f"dataset.rename cannot be done in {where}: there is no column {' or '.join(absent)}, only "
            f"{', '.join(sorted(columns))}. Type dataset.rename='{{THEIRS: OURS}}'."
        )
    if taken := sorted(set(rename.values()) & (columns - set(rename))):
        raise ConfigError(
            f"dataset.rename cannot be done in {where}: there is a column {' and '.join(taken)} already. Rename it "
            f"too: dataset.rename='{{{taken[0]}: old_{taken[0]}, ...}}'."
        )
    return [
        (origin, row if isinstance(row, BadRow) else {rename.get(name, name): value for name, value in row.items()})
        for origin, row in found
    ]


def _recognise(found: list[Found], where: str) -> str:
    rows = [row for _, row in found if not isinstance(row, BadRow)]
    if not rows:
        raise _refusal([f"{origin}: {fault}" for origin, fault in found], where, "auto", len(found), len(found))
    fullest = max(rows[:100], key=lambda row: sum(value not in (None, "", []) for value in row.values()))
    try:
        return recognise(set().union(*rows), fullest)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _canonical_rows(
    found: list[Found], format_name: str, where: str, *, bad_rows: str
) -> tuple[list[Row], Counter[str]]:
    """Convert every row, with the policy for bad ones."""
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    faults: list[str] = []
    shapes: dict[str, tuple[bool, str]] = {}
    for number, (origin, row) in enumerate(found, 1):
        try:
            rows.append(_canonical(origin, row, format_name, shapes))
        except BadRow as fault:
            faults.append(f"{origin}: {fault}")
            dropped[_reason(fault)] += 1
            if bad_rows == "fail" and len(faults) == SHOWN_FAULTS:
                raise _refusal(faults, where, format_name, number, len(found)) from fault
    if faults and (bad_rows == "fail" or not rows):
        raise _refusal(faults, where, format_name, len(found), len(found))
    if faults:
        logger.warning("%s: dropped %d of %d rows: %s", where, len(faults), len(found), _counts(dropped))
    return rows, dropped


def _canonical(origin: str, row: Row | BadRow, format_name: str, shapes: dict[str, tuple[bool, str]]) -> Row:
    """Convert a row; ``shapes`` holds for each column whether it is text, and where that was seen first."""
    if isinstance(row, BadRow):
        raise row
    if format_name in GENERATORS:
        validate(row)
    else:
        row = convert(format_name, row)
    for column in ("prompt", "completion", "chosen", "rejected"):
        if column in row:
            is_text = isinstance(row[column], str)
            first, where = shapes.setdefault(column, (is_text, origin))
            if is_text != first:
                here, there = ("text", "messages") if is_text else ("messages", "text")
                raise BadRow(column, f"is {here}, but {there} in {where}: all rows must be alike")
    return row


def _refusal(faults: list[str], where: str, format_name: str, seen: int, total: int) -> ConfigError:
    shown = "\n  ".join(faults[:SHOWN_FAULTS])
    advice = (
        "Mend them, or type dataset.bad_rows=drop to leave such rows out and count them."
        if len(faults) < seen
        else f"No row was good. Is dataset.format={format_name} right?"
    )
    return ConfigError(f"{where} has {len(faults)} bad rows in the first {seen} of {total}:\n  {shown}\n{advice}")


def _reason(fault: BadRow) -> str:
    """Make one reason of faults that differ only in a number or a sample."""
    return re.sub(r"\d+", "N", re.sub(r" \(.*\)| in \S+:\d+", "", str(fault)))


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in counter.most_common())
