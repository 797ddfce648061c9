"""Rows to ``datasets.Dataset`` without loss: Arrow fills keys that differ from row to row with null."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner.rows import Row

if TYPE_CHECKING:
    from datasets import Dataset, Features

CHUNK_ROWS = 10_000  # Arrow holds at most 2 GiB of text in one array


def make_features(rows: Sequence[Row]) -> "Features":
    """Choose a type for every column of any row.

    Messages that have only role and content become structs. Everything else with dicts in it, and columns of
    mixed types, are kept as JSON, which ``datasets`` decodes to just what was there. ``tools`` are JSON text,
    which TRL decodes.
    """
    from datasets import Features

    columns = dict.fromkeys(column for row in rows for column in row)
    return Features({column: _feature(column, [row.get(column) for row in rows]) for column in columns})


def make_table(rows: Sequence[Row], features: "Features") -> "Dataset":
    """Make a dataset in memory; a column that a row lacks is null."""
    from datasets import Dataset, concatenate_datasets

    chunks = (rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS))
    columns = (
        {name: [_encode(name, row.get(name), kind) for row in chunk] for name, kind in features.items()}
        for chunk in chunks
    )
    return concatenate_datasets([Dataset.from_dict(chunk, features=features) for chunk in columns])


def interleave(
    tables: Mapping[str, "Dataset"], weights: Mapping[str, float], *, seed: int, stopping_strategy: str
) -> tuple["Dataset", dict[str, int]]:
    """Draw rows at random from several datasets by weight; also count the rows drawn from each."""
    from datasets import Dataset, interleave_datasets

    total = sum(weights.values())
    probabilities = [weights[name] / total for name in tables]
    options: dict[str, Any] = {"seed": seed, "probabilities": probabilities, "stopping_strategy": stopping_strategy}
    marks = [Dataset.from_dict({"source": [name] * len(table)}) for name, table in tables.items()]
    drawn = Counter(interleave_datasets(marks, **options)["source"])  # the same draws, so a count of them
    return interleave_datasets(list(tables.values()), **options), {name: drawn[name] for name in tables}


def _feature(column: str, values: list[Any]) -> Any:
    import pyarrow as pa
    from datasets import Features, Json, List, Value

    present = [value for value in values if value is not None]
    if column == "tools" or not present or all(isinstance(value, str) for value in present):
        return Value("string")
    if all(_is_plain_chat(value) for value in present):
        return List({"role": Value("string"), "content": Value("string")})
    if all(isinstance(value, list) and all(isinstance(item, dict) for item in value) for value in present):
        return List(Json())
    if any(_holds_dict(value) for value in present):
        return Json()
    try:
        return Features.from_arrow_schema(pa.schema({column: pa.array(present).type}))[column]
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # types that differ from row to row
        return Json()


def _encode(column: str, value: Any, kind: Any) -> Any:
    """Write JSON ourselves: ``datasets`` rounds floats to ten digits, and reads the text "12" as a number."""
    from datasets import Json, List

    if column == "chat_template_kwargs" and value is None:
        value = {}  # TRL unpacks it
    if value is None:
        return None
    if isinstance(kind, Json) or (column == "tools" and not isinstance(value, str)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(kind, List) and isinstance(kind.feature, Json):
        return [json.dumps(item, ensure_ascii=False) for item in value]
    return value


def _is_plain_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and item.keys() == {"role", "content"} for item in value)
        and all(isinstance(text, str) for item in value for text in item.values())
    )


def _holds_dict(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_holds_dict, value)))
