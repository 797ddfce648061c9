"""Loading the data of a run: one dataset or a mixture, to train and to evaluate on."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError
from runner.rows import CANONICAL, Row
from runner.sources import Part, fingerprint, load_source
from runner.tables import interleave, make_features, make_table

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """What a run trains and evaluates on.

    Attributes:
        held_out: the eval rows with all their columns, for samples and scores under any trainer.
        ids: of ``train`` and ``eval``, once ``tokens.fit_splits`` has made them: a row of token ids for each row.
        report: for the manifest: of ``train`` and ``eval``, in a mixture also of each of ``sources``, see
            ``sources.Part``.
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
    reads: str,
    sources: Mapping[str, Mapping[str, Any]],
    *,
    run_seed: int,
    stopping_strategy: str,
    too_long: str,
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
