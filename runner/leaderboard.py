"""What a sweep leaves: sweep.json, leaderboard.csv, best.yaml, and a table on the terminal."""

import csv
import io
import json
import math
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import disk, manifest
from runner.errors import ConfigError
from runner.freeze import freeze
from runner.report import number, read_lines

ENOUGH = 4  # completed trials, before anything is said of how much a key matters
WIDE = 60  # characters of a cause in the table


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        swept: Its values, by key.
        values: Of the objectives, by name; None where it has none.
        seconds: That it ran, all its tries together.
    """

    number: int
    status: str
    cause: str
    swept: dict[str, Any]
    values: dict[str, float | None]
    steps: int
    seconds: float
    directory: Path

    @property
    def failed(self) -> bool:
        """Whether something went wrong."""
        return self.status not in ("completed", "pruned", "preempted", "running")


def last_values(run_dir: Path, names: list[str]) -> tuple[dict[str, float | None], int, list[str]]:
    """Read a run's objectives, as they were at its end, its steps, and the names of all that it logs."""
    found: dict[str, Any] = {}
    for line in read_lines(run_dir / "metrics.jsonl"):
        found |= line
    steps = int(found.get("step") or 0)
    if (run_dir / manifest.FILE).exists():
        found |= manifest.read(run_dir).get("metrics") or {}
    return {name: found.get(name) for name in names}, steps, sorted(found)


def rank(rows: list[Row], objectives: list[str], directions: list[str]) -> list[Row]:
    """Return rows from best to worst: completed ones by their objectives, then pruned ones, then the others."""
    order, aims = ["completed", "pruned", "running", "preempted"], dict(zip(objectives, directions, strict=True))

    def merit(row: Row) -> tuple[Any, ...]:
        place = order.index(row.status) if row.status in order else len(order)
        return place, sum(_dominates(other, row, aims) for other in rows), _costs(row, aims), row.number

    return sorted(rows, key=merit)


def front(rows: list[Row], objectives: list[str], directions: list[str]) -> list[Row]:
    """Return the completed trials than which none is better in all objectives: one, or a Pareto front."""
    aims = dict(zip(objectives, directions, strict=True))
    ranked = [row for row in rank(rows, objectives, directions) if _scored(row, aims)]
    best = [row for row in ranked if not any(_dominates(other, row, aims) for other in ranked)]
    return best if len(objectives) > 1 else best[:1]


def _scored(row: Row, aims: dict[str, str]) -> bool:
    return row.status == "completed" and all(row.values.get(name) is not None for name in aims)


def _costs(row: Row, aims: dict[str, str]) -> list[float]:
    """Return a row's objectives so that less is better, and none at all worst."""
    values = [(row.values.get(name), 1 if aim == "minimize" else -1) for name, aim in aims.items()]
    return [math.inf if value is None else sign * value for value, sign in values]


def _dominates(one: Row, other: Row, aims: dict[str, str]) -> bool:
    pairs = list(zip(_costs(one, aims), _costs(other, aims), strict=True))
    better = all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
    return better and _scored(one, aims) and _scored(other, aims)


def table(rows: list[Row], objectives: list[str]) -> str:
    """Lay ranked rows out in columns."""
    keys = list(dict.fromkeys(key for row in rows for key in row.swept))
    cells = [["rank", "status", *objectives, *keys, "steps", "time", "directory", "cause"]]
    for place, row in enumerate(rows, 1):
        values = [number(row.values.get(name)) for name in objectives]
        swept = [number(v) if isinstance(v, float) else str(v) for v in map(row.swept.get, keys)]
        ranked = [str(place) if row.status == "completed" else "-", row.status]
        cause = row.cause.replace("\n", " ")
        cause = cause if len(cause) <= WIDE else cause[: WIDE - 3] + "..."
        cells.append([*ranked, *values, *swept, str(row.steps), clock(row.seconds), row.directory.name, cause])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def counts(rows: list[Row]) -> str:
    """Say how many trials ended how: ``8 trials: 6 completed, 2 failed``."""
    seen = Counter(row.status for row in rows)
    return f"{len(rows)} trial{'s' * (len(rows) != 1)}: " + (", ".join(f"{n} {s}" for s, n in seen.items()) or "none")


def write(directory: Path, rows: list[Row], about: dict[str, Any]) -> None:
    """Write sweep.json and leaderboard.csv, each at once.

    Args:
        directory: Of the sweep.
        rows: Ranked.
        about: What sweep.json says of the sweep as a whole.
    """
    trials = [{**vars(row), "directory": row.directory.name} for row in rows]
    disk.write(directory / "sweep.json", json.dumps({**about, "trials": trials}, indent=2, ensure_ascii=False) + "\n")
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row.swept))
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["rank", "number", "status", *names, *keys, "steps", "seconds", "directory", "cause"])
    for place, row in enumerate(rows, 1):
        told = [row.values.get(n) for n in names] + [row.swept.get(k) for k in keys]
        end = [row.steps, round(row.seconds, 1), row.directory.name, row.cause]
        lines.writerow([place if row.status == "completed" else "", row.number, row.status, *told, *end])
    disk.write(directory / "leaderboard.csv", text.getvalue())


def write_best(directory: Path, best: Row, config_dir: str | None) -> str | None:
    """Write best.yaml, a recipe that composes to the best trial's config; return why not, if it cannot be."""
    name = "best_of_a_sweep"  # a recipe that was named best may be there already
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        try:
            path = freeze(best.directory, name, Path(folder) / "experiment", config_dir=config_dir)
            text = path.read_text(encoding="utf-8").replace(name, "best")
        except ConfigError as error:
            return str(error)
    disk.write(directory / "best.yaml", text)
    return None


def importances(study: Any, rows: list[Row], objective: str) -> dict[str, float] | str:
    """Return each swept key's share in how the first objective differs, or why that cannot be said."""
    import optuna

    values = [row.values[objective] for row in rows if row.status == "completed" and row.values[objective] is not None]
    if len(values) < ENOUGH:
        return f"{len(values)} completed trials are too few to say how much a key matters, which takes {ENOUGH}"
    if len(set(values)) == 1:
        return f"{objective} is the same in all trials"
    sign = 1 if study.directions[0] == optuna.study.StudyDirection.MINIMIZE else -1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(study, target=lambda trial: sign * trial.values[0])
    except (RuntimeError, ValueError, ImportError) as error:
        return f"how much each key matters cannot be said: {error}"
    if len(found) > 1 and len(set(found.values())) == 1:  # what is returned where the trials tell nothing
        return "the trials do not tell which key matters: try more of them"
    return found


def say(text: str) -> None:
    """Write a line to the terminal."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def clock(seconds: float) -> str:
    """Return a duration as a clock shows it: ``0:08``, ``2:05:00``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
