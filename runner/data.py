"""Loading the data of a run: one dataset or a mixture, raw rows to canonical rows to what its trainer reads."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from runner.arithmetic import arithmetic
from runner.errors import ConfigError
from runner.files import RowFile
from runner.formats import convert, names, produces, recognise
from runner.rows import CANONICAL, BadRow, Row, validate
from runner.splits import Split, cut, find_splits
from runner.tables import interleave, make_features, make_table
from runner.views import ONLINE_NAMES, refuse_unreadable, view

if TYPE_CHECKING:
    from datasets import Dataset, Features

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


@dataclass(frozen=True)
class Splits:
    """What a run trains and evaluates on.

    Attributes:
        held_out: the eval rows with all their columns, for samples and scores under any trainer.
        ids: of ``train`` and ``eval``, once ``tokens.fit_splits`` has made them: a row of token ids for each row.
        report: for the manifest: of ``train`` and ``eval``, in a mixture also of each of ``sources``, see
            ``Part``.
    """

    train: "Dataset"
    eval: "Dataset | None"
    held_out: list[Row]
    report: dict[str, Any]
    ids: dict[str, "Dataset"] = field(default_factory=dict)


def load_splits(
    *,
    reads: str,
    run_seed: int,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    stopping_strategy: str = "first_exhausted",
    too_long: str = "drop",
    weight: float = 1.0,
    **source: Any,
) -> Splits:
    """Load what a run trains and evaluates on. A whole ``dataset`` node can be passed.

    Args:
        reads: what the trainer reads, see ``views.view``.
        run_seed: of the order in which sources are mixed; a generator has a seed of its own.
        sources: several datasets to mix, each a node like this one. Train rows are drawn at random by weight,
            eval rows follow each other.
        stopping_strategy: of mixing: ``first_exhausted``, or ``all_exhausted`` (short sources are repeated).
        too_long: not used here: ``tokens.fit_lengths`` applies it to the whole.
        weight: not used here: the share of a source in a mixture.
        source: the keys of ``load_source``, instead of ``sources``.

    Raises:
        ConfigError: there is nothing to read, or nothing that the trainer can read, or rows are bad.
    """
    if sources:
        if given := [key for key, value in source.items() if value]:
            raise ConfigError(
                f"dataset.{given[0]} has no effect beside dataset.sources: type dataset.sources.NAME.{given[0]}=, of "
                f"{' or '.join(sources)}."
            )
        return _mix(reads, sources, run_seed=run_seed, stopping_strategy=stopping_strategy, too_long=too_long)
    if sources is not None and not (source.get("path") or source.get("generator")):
        raise ConfigError(
            "dataset.sources is empty: there is nothing to mix. Type +dataset@dataset.sources.a=gsm8k "
            "+dataset@dataset.sources.b=alpaca dataset.sources.b.weight=0.3."
        )
    train, evaluation = load_source(reads, "dataset", **source)
    parts = {"train": train} | ({"eval": evaluation} if evaluation else {})
    _refuse_mixed_shapes(parts)
    features = make_features([row for part in parts.values() for row in part.rows])
    return Splits(
        train=make_table(train.rows, features),
        eval=make_table(evaluation.rows, features) if evaluation else None,
        held_out=evaluation.canonical if evaluation else [],
        report={name: part.report for name, part in parts.items()},
    )


def _mix(
    reads: str, sources: Mapping[str, Mapping[str, Any]], *, run_seed: int, stopping_strategy: str, too_long: str
) -> Splits:
    weights: dict[str, float] = {}
    loaded: dict[str, tuple[Part, Part | None]] = {}
    for name, node in sources.items():
        rest = dict(node)
        weights[name] = rest.pop("weight", 1.0)
        if weights[name] <= 0:
            raise ConfigError(f"dataset.sources.{name}.weight={weights[name]} draws no row. Type a number above 0.")
        if rest.pop("too_long", too_long) != too_long:
            raise ConfigError(
                f"dataset.sources.{name}.too_long has no effect: type dataset.too_long=, for all sources."
            )
        if rest.pop("sources", None):
            raise ConfigError(f"dataset.sources.{name} has sources itself: list them all in dataset.sources.")
        loaded[name] = load_source(reads, f"dataset.sources.{name}", **rest)
    trains = {name: train for name, (train, _) in loaded.items()}
    evals = {name: evaluation for name, (_, evaluation) in loaded.items() if evaluation}
    _refuse_mixed_shapes(trains | {f"{name} eval": part for name, part in evals.items()})
    eval_rows = [row for part in evals.values() for row in part.rows]
    features = make_features([*(row for part in trains.values() for row in part.rows), *eval_rows])
    features = _common(features, reads, trains)
    tables = {name: make_table(part.rows, features) for name, part in trains.items()}
    train, drawn = interleave(tables, weights, seed=run_seed, stopping_strategy=stopping_strategy)
    logger.info("mixture: %d rows: %s", len(train), ", ".join(f"{name} {count}" for name, count in drawn.items()))
    report = {
        "train": {"rows": len(train), "fingerprint": _combined(trains)},
        "eval": {"rows": len(eval_rows), "fingerprint": _combined(evals)} if evals else None,
        "sources": {
            name: {
                "weight": weights[name],
                "rows_drawn": drawn[name],
                "train": part.report,
                "eval": evals[name].report if name in evals else None,
            }
            for name, part in trains.items()
        },
    }
    evaluation = make_table(eval_rows, features) if eval_rows else None
    return Splits(train, evaluation, [row for part in evals.values() for row in part.canonical], report)


def _combined(parts: Mapping[str, Part]) -> str:
    return fingerprint({"source": name, "rows": part.report["fingerprint"]} for name, part in parts.items())


def _refuse_mixed_shapes(parts: Mapping[str, Part]) -> None:
    """Refuse text beside messages: a trainer looks at the first row, and takes the others to be alike."""
    shapes = {
        name: {column: "text" if isinstance(value, str) else "messages" for column, value in part.rows[0].items()}
        for name, part in parts.items()
    }
    for column in ("prompt", "completion", "chosen", "rejected"):
        found = {name: shape[column] for name, shape in shapes.items() if column in shape}
        if len(set(found.values())) > 1:
            raise ConfigError(
                f"Text and messages cannot be in one run: {column} is "
                f"{', '.join(f'{kind} in {name}' for name, kind in found.items())}. Choose datasets of one kind, or "
                "write the texts as messages: [{role: user, content: ...}]."
            )


def _common(features: "Features", reads: str, parts: Mapping[str, Part]) -> "Features":
    """Keep the columns that every source has, and those that templates read; refuse sources of different types."""
    columns = {name: set().union(*part.rows) for name, part in parts.items()}
    read = {"prompt"} if reads == "prompt" else CANONICAL - {"tools"}
    types = {name: sorted(found & read) for name, found in columns.items()}
    if len(set(map(tuple, types.values()))) > 1:
        raise ConfigError(
            f"The sources cannot be mixed: the trainer would read {'; '.join(f'{t} in {n}' for n, t in types.items())}"
            ". Choose sources of one type, or give the columns the same names with dataset.sources.NAME.rename."
        )
    kept = set.intersection(*columns.values()) | {"tools", "chat_template_kwargs"}
    if left_out := sorted(set(features) - kept):
        logger.warning("mixture: columns %s are left out: not every source has them.", ", ".join(left_out))
    return type(features)({name: kind for name, kind in features.items() if name in kept})


# ---------------------------------------------------------------- one dataset


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
    else:
        label, splits = _find(reads, key, path, name, revision, format, **generator_options)  # which takes none
    read = partial(_read, splits, reads=reads, label=label, format_name=format, rename=rename, bad_rows=bad_rows)
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
    return read(train, ranges), read(eval, eval_ranges) if eval is not None else None


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


def _read(
    splits: Mapping[str, Split],
    spec: str,
    ranges: Sequence[tuple[str, int, int]],
    *,
    reads: str,
    label: str,
    format_name: str,
    rename: Mapping[str, str] | None,
    bad_rows: str,
) -> Part:
    """Read a slice."""
    where = f"{label} {spec}"
    found = [row for name, start, stop in ranges for row in splits[name].rows(start, stop)]
    if rename and any(not isinstance(row, BadRow) for _, row in found):
        found = _rename(found, rename, where)
    if format_name == "auto":
        format_name = _recognise(found, where)
    rows, dropped = _canonical_rows(found, format_name, where, bad_rows=bad_rows)
    columns: set[str] = set().union(*rows)
    refuse_unreadable(reads, columns, dataset=label)
    if reads == "prompt" and (clash := sorted(ONLINE_NAMES & columns)):
        logger.warning("%s: no reward gets %s: online trainers use these names.", where, ", ".join(clash))
    viewed, skipped = view(reads, rows)
    if not viewed:
        raise ConfigError(f"{where} has no row to train on: {_counts(skipped)}. Choose another slice or trainer.")
    logger.info("%s: %d of %d rows, format %s; %d to train on", where, len(rows), len(found), format_name, len(viewed))
    report = {
        "split": spec,
        "format": format_name,
        "rows_read": len(found),
        "rows_kept": len(rows),
        "rows": len(viewed),
        "dropped": dict(dropped.most_common()),
        "skipped": dict(skipped),
        "fingerprint": fingerprint(rows),
        "files": [file.about for name in dict.fromkeys(name for name, _, _ in ranges) for file in splits[name].files],
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
