"""What a person looks at, made from run directories only: ``python -m runner.report RUN_DIR...``."""

import base64
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from runner import curves, manifest, resume
from runner.config import trainer_name
from runner.errors import ConfigError

KEY_METRICS = (  # of the end of a run, as far as the trainer logs them
    *("loss", "reward", "objective/scores", "objective/kl", "rewards/accuracies", "rewards/margins", "accuracy"),
    *("margin", "kl"),
    *("mean_token_accuracy", "completions/mean_length"),
)
PLACE = re.compile(r"--config-(dir|name)|-c[dn]\b")  # where a config has its options from


@dataclass(frozen=True)
class Run:
    """A run directory as read.

    Attributes:
        lines: of metrics.jsonl.
        evaluations: of samples.jsonl, the held-out lines of each evaluation together, in order.
    """

    path: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    evaluations: list[list[dict[str, Any]]]

    @property
    def names(self) -> dict[str, str]:
        """Trainer, model, dataset, peft: what was chosen, else what the config holds."""
        chosen = self.manifest.get("choices") or {}
        trainer, model, dataset = (self.config.get(group) or {} for group in ("trainer", "model", "dataset"))
        found = {
            "trainer": trainer_name(str(trainer.get("_target_", ""))),
            "model": str(model.get("name_or_path", "")).rstrip("/").rsplit("/", 1)[-1],
            "dataset": str(dataset.get("path") or dataset.get("generator") or "").rstrip("/").rsplit("/", 1)[-1],
            "peft": str((self.config.get("peft") or {}).get("_target_", "none")).rsplit(".", 1)[-1],
        }
        return {group: str(chosen.get(group) or name or "?") for group, name in found.items()}

    @property
    def status(self) -> str:
        """How the run stands; ``dead`` where its process ended without a word."""
        return "dead" if manifest.is_dead(self.path, self.manifest) else str(self.manifest.get("status", "?"))

    @property
    def scores(self) -> dict[str, tuple[float | None, float | None]]:
        """Means of every score of held-out answers at the first and the last evaluation."""
        if not self.evaluations:
            return {}
        first, last = self.evaluations[0], self.evaluations[-1]
        names = dict.fromkeys(name for line in [*first, *last] for name in line["scores"])
        return {name: (_mean_score(first, name), _mean_score(last, name)) for name in names}

    @property
    def model(self) -> Path:
        """Where the trained model is, if it is."""
        return self.path / "model"


def load(run_dir: str | Path) -> Run:
    """Read a run directory.

    Raises:
        ConfigError: It is none.
    """
    path = Path(run_dir)
    config = path / "config.yaml"
    return Run(
        path,
        manifest.read(path),
        (yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None) or {},
        list(read_lines(path / "metrics.jsonl")),
        _evaluations(line for line in read_lines(path / "samples.jsonl") if "rollout" not in line),
    )


def write_curves(run_dir: str | Path) -> None:
    """Write curves.png, if anything was logged."""
    run = load(run_dir)
    title = " · ".join(name for name in run.names.values() if name not in {"none", "?"})
    curves.plot(run.lines, run.path / "curves.png", title=title, scores=list(run.scores))


def write_page(run_dir: str | Path) -> None:
    """Write report.html: one file that needs no other; the curves are those of curves.png."""
    run = load(run_dir)
    image = run.path / "curves.png"
    first, last = (run.evaluations[0], run.evaluations[-1]) if run.evaluations else ([], [])
    before = {line["index"]: line for line in first}
    html = template("report.html.jinja").render(
        run=run,
        names=run.names,
        status=run.status,
        command=shlex.join(map(str, run.manifest.get("argv", []))),
        facts=[*_facts(run), *((name, f"{number(a)} -> {number(b)}") for name, a, b in ends(run))],
        image=base64.b64encode(image.read_bytes()).decode() if image.is_file() else None,
        samples=[(before.get(line["index"]), line) for line in last],
        steps=(first[0]["step"], last[0]["step"]) if last else (0, 0),
        findings={name: list(_flatten(run.manifest.get(name))) for name in ("data", "tokens")},
        about={name: list(_flatten(run.manifest.get(name))) for name in ("hardware", "versions")},
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
    )
    (run.path / "report.html").write_text(html, encoding="utf-8")


@cache
def template(name: str) -> Any:
    """Return a template of this package; what is rendered in it is escaped in HTML."""
    from jinja2 import Environment, PackageLoader

    options: Any = {"autoescape": "html" in name, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("runner", ""), **options)
    environment.filters |= {"number": number, "text": _prompt_text}
    return environment.get_template(name)


def summary(run_dir: str | Path) -> str:
    """Return the few lines that a run ends with: what it was, what it gave, where that is, what to type next."""
    run = load(run_dir)
    names, path = run.names, _shown(run.path)
    status = run.status
    with_what = "" if names["peft"] in {"none", "?"} else f" with {names['peft']}"
    lines = [f"{status}: {names['trainer']} of {names['model']} on {names['dataset']}{with_what}"]
    if cause := run.manifest.get("cause"):
        lines += [f"  cause   {cause}", f"  log     {path}/runner.log"]
    facts = dict(_facts(run))
    lines += [f"  {name:<7} {value}" for name, value in facts.items() if name in {"steps", "memory"}]
    moved = [f"{name} {number(a)} -> {number(b)}" for name, a, b in ends(run)]
    if moved:
        lines.append(f"  metrics {', '.join(moved)}")
    rows = len(run.evaluations[-1]) if run.evaluations else 0
    lines += [f"  {name} {facts[name]}, {rows} held-out prompts" for name in run.scores]
    if run.model.is_dir():
        lines.append(f"  model   {_shown(run.model)}")
    if (run.path / "report.html").is_file():
        lines.append(f"  report  {path}/report.html")
    if status == "completed":
        lines.append(f"  next    {_next_command(run)}")
    elif status in ("dead", "preempted"):
        lines.append(f"  next    {resume.command(path)}")
    return "\n".join(lines)


def main(run_dirs: Sequence[str]) -> int:
    """Write curves.png and report.html of run directories and print their summaries; 2 if one is none."""
    if not run_dirs or run_dirs[0] in {"-h", "--help"}:
        sys.stdout.write("usage: python -m runner.report RUN_DIR...\nWrites curves.png and report.html into each.\n")
        return 0 if run_dirs else 2
    for run_dir in run_dirs:
        try:
            write_curves(run_dir)
            write_page(run_dir)
            sys.stdout.write(summary(run_dir) + "\n")
        except ConfigError as fault:
            sys.stderr.write(f"{fault}\n")
            return 2
    return 0


def number(value: Any) -> str:
    """Return a number with about three digits that count; a dash for none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-" if value is None else str(value)
    if isinstance(value, int) or (abs(value) >= 100 and value == round(value)):
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


# ---- reading ----------------------------------------------------------------------------------------------


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a JSONL file; a run that was killed may have left half a line at its end."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _evaluations(lines: Iterator[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group lines by evaluation: the index begins again with each, the step may be the same in two."""
    found: list[list[dict[str, Any]]] = []
    for line in lines:
        if not found or line["index"] <= found[-1][-1]["index"]:
            found.append([])
        found[-1].append(line)
    return found


def _mean_score(lines: list[dict[str, Any]], name: str) -> float | None:
    values = [line["scores"][name] for line in lines if line["scores"].get(name) is not None]
    return sum(values) / len(values) if values else None


def ends(run: Run) -> Iterator[tuple[str, float, float]]:
    """Yield name and mean of the first and last tenth of the logs of what matters most."""
    for name in KEY_METRICS:
        values = curves.series(run.lines, name)[1]
        tenth = max(1, len(values) // 10)
        if values:
            yield name, sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        held_out = curves.series(run.lines, f"eval_{name}")[1]
        if held_out:
            yield f"eval_{name}", held_out[0], held_out[-1]


# ---- wording ----------------------------------------------------------------------------------------------


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the numbers that come first on the page."""
    for name, (before, after) in run.scores.items():
        same = len(run.evaluations) == 1
        yield name, number(after) if same else f"{number(before)} -> {number(after)}"
    steps = max((line["step"] for line in run.lines), default=0)
    if steps:
        yield "steps", f"{steps}{_time_taken(run)}"
    trainable, total = (run.manifest.get(name) for name in ("trainable_parameters", "parameters"))
    if trainable and total:
        yield "trained", f"{trainable / 1e6:.3g}M of {total / 1e6:.3g}M parameters"
    memory = run.manifest.get("peak_memory") or {}
    if memory:
        yield "memory", ", ".join(f"{value / 2**30:.1f} GiB {where}" for where, value in memory.items()) + " at most"


def _time_taken(run: Run) -> str:
    """Return in what time a run came so far, its pauses left out; nothing where it was killed, nobody knows when."""
    events = [(one["status"], datetime.fromisoformat(one["time"])) for one in run.manifest.get("timeline", [])]
    spans = [(then, end - start) for (status, start), (then, end) in pairwise(events) if status == "running"]
    if not spans or {events[-1][0], *(then for then, _ in spans)} & {"running", "resumed"}:
        return ""
    seconds = round(sum(span.total_seconds() for _, span in spans))
    minutes, seconds = divmod(seconds, 60)
    return f" in {minutes // 60} h {minutes % 60} min" if minutes >= 60 else f" in {minutes} min {seconds} s"


def _next_command(run: Run) -> str:
    """Return what naturally follows: train on the result, use it as a reward, or see how far luck carried it."""
    trainer, dataset = run.names["trainer"], run.names["dataset"]
    data = "" if dataset == "arithmetic" else " dataset=ultrafeedback"
    where = shlex.quote(str(_shown(run.model)))
    if not run.model.is_dir() or trainer not in {"sft", "reward"}:
        words = [w for w in run.manifest.get("overrides", []) if not w.startswith(("seed=", "output_dir="))]
        pairs = pairwise(["", *run.manifest.get("argv", [])])
        words += [w for before, w in pairs if PLACE.match(w) or (PLACE.match(before) and "=" not in before)]
        typed = " ".join(map(shlex.quote, words))
        return f"python -m runner -m {typed} seed=1,2,3".replace("  ", " ")
    if trainer == "reward":
        return f"python -m runner trainer=grpo{data} reward=model reward.model.name_or_path={where}"
    return f"python -m runner trainer=dpo{data} model.name_or_path={where}"


def _shown(path: Path) -> Path:
    """Return a path as short as it can be typed here."""
    here = Path.cwd()
    return path.absolute().relative_to(here) if path.absolute().is_relative_to(here) else path


def _prompt_text(prompt: Any) -> str:
    if not isinstance(prompt, list):
        return "" if prompt is None else str(prompt)
    return "\n".join(f"{turn.get('role')}: {turn.get('content') or ''}" for turn in prompt)


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and value of everything in a tree that says something."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _flatten(value, f"{prefix} / {name}" if prefix else str(name))
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for place, item in enumerate(tree):
            yield from _flatten(item, f"{prefix} / {place + 1}")
    elif isinstance(tree, list):
        if tree:
            yield prefix, ", ".join(str(item) for item in tree[:20]) + (", …" if len(tree) > 20 else "")
    elif tree is not None and tree != "":
        yield prefix, number(tree)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
