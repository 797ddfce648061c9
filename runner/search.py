"""What a sweep is to try: read from Hydra's grammar, and checked before the first trial."""

import difflib
import itertools
import re
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runner import compose, launch, lean, remote, schema, trainer_source
from runner.compose import Composed
from runner.config import flat, option_names
from runner.errors import ConfigError
from runner.journal import JOURNAL
from runner.safety import RUN_CODE, as_typed

NEEDS = {"cmaes": ("cmaes", "scipy"), "gp": ("scipy",), "qmc": ("scipy",)}
# What every trainer of transformers logs, beside the names in its own source.
LOGGED = {"loss", "grad_norm", "learning_rate", "train_loss", "runtime", "samples_per_second", "steps_per_second"}
LOGGED |= {"epoch", "num_tokens", "mean_token_accuracy", "entropy", "accuracy", "margin", "reward", "reward_std", "kl"}
# What of Hydra's own a sweep takes, beside the environment of its trials.
OF_HYDRA = ("hydra/launcher=", "hydra.launcher.", "hydra.sweep.dir=")
# What may be another when a sweep goes on.
BEYOND = {"resume", "n_trials", "timeout", "n_jobs", "gpus_per_trial", "trial_timeout", "retries",
          "stop_after_failures", "fail"}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """One swept key: its values as they are typed, or the ends of an interval.

    Attributes:
        key: As typed, with the package where an option of a group is swept.
        values: None for an interval.
        low: Lowest value of an interval, or of whole numbers.
        high: Highest value.
        step: Between whole numbers; 0 where the order of values means nothing.
        log: Whether an interval is cut by its logarithm.
    """

    key: str
    values: tuple[str, ...] | None = None
    low: float = 0
    high: float = 0
    step: int = 0
    log: bool = False

    @property
    def name(self) -> str:
        """The key as it stands in the config."""
        return self.key.lstrip("+")

    def text(self, value: Any) -> str:
        """Return the override that gives this key a value."""
        return f"{self.key}={value}"

    def __str__(self) -> str:
        if self.values is not None:
            return ",".join(self.values)
        ends = f"interval({self.low!r},{self.high!r})"
        return f"tag(log,{ends})" if self.log else ends


@dataclass(frozen=True)
class Plan:
    """A checked sweep.

    Attributes:
        search: Its settings.
        axes: What is swept, in the order of the command.
        fixed: The overrides of every trial.
        own: What was typed of the search.
        composed: The combinations that were composed to check them, by the overrides that are their own.
        trainers: Modules of the trainers that are used.
        left_out: Modules that no trial can ask for; see ``lean.left_out``.
        launcher: What was typed of a launcher that starts trials elsewhere; empty: they are processes of this machine.
        where: Options of ``compose.compose``.
    """

    search: schema.Search
    axes: list[Axis]
    fixed: list[str]
    own: list[str]
    composed: dict[tuple[str, ...], Composed]
    trainers: list[str]
    left_out: str
    launcher: list[str]
    where: dict[str, Any]

    @property
    def base(self) -> Composed:
        """The first combination, composed."""
        return next(iter(self.composed.values()))

    @property
    def objectives(self) -> list[str]:
        """The metrics that trials are compared by."""
        named = self.search.objective
        return named if isinstance(named, list) else [named or "eval_loss"]

    @property
    def directions(self) -> list[str]:
        """Of the objectives: ``minimize`` or ``maximize``."""
        named = self.search.direction or "minimize"
        return list(named) if isinstance(named, list) else [named] * len(self.objectives)

    @property
    def grid(self) -> list[tuple[str, ...]]:
        """Every combination, in Hydra's order."""
        return list(itertools.product(*(axis.values or () for axis in self.axes)))

    @property
    def trials(self) -> int:
        """How many trials there are to be."""
        if self.search.sampler == "grid":
            return len(self.grid[: self.search.n_trials])
        return self.search.n_trials or 0

    def identity(self) -> dict[str, Any]:
        """Return what may not change when a sweep goes on, by name."""
        kept = {f"search.{key}": value for key, value in asdict(self.search).items() if key not in BEYOND}
        kept["search.direction"] = self.search.direction or "minimize"
        kept["swept keys"] = [axis.name for axis in self.axes]
        swept = {axis.name: str(axis) for axis in self.axes}
        own = {key: value for key, value in self.base.config.items() if key not in ("search", "output_dir")}
        return {**flat(own), **kept, **swept}


prepared: list[Plan] = []  # what ``prepare`` has read, for the sweep that Hydra starts after it


def read(overrides: list[str], **where: Any) -> Plan:
    """Read and check a sweep.

    Args:
        overrides: As typed, with what is said of the search.
        where: ``config_dir`` and ``config_name``.

    Raises:
        ConfigError: Nothing is swept, or one of the trials or the search itself cannot be.
    """
    rest, own, hydra = [], [], []
    for text, parsed in zip(overrides, compose.parse(overrides), strict=True):
        key = str(parsed.key_or_group)
        special = key == "search" or key.startswith("search.")
        if parsed.is_sweep_override() and (special or key.startswith("hydra") or key == "output_dir"):
            raise ConfigError(f"{text} cannot be swept: it is no part of a trial. Sweep keys of the run.")
        if special:
            own.append(text)
        elif key.startswith("hydra") and not key.startswith("hydra.job.env_set"):
            hydra.append(text)
        else:
            rest.append((text, parsed))
    plain = [text for text, parsed in rest if not parsed.is_sweep_override()]
    first = compose.compose([*plain, *own, *hydra], check=False, **where)
    if idle := [text for text in hydra if not text.lstrip("+~").startswith(OF_HYDRA)]:
        raise ConfigError(
            f"{', '.join(idle)} has no effect in a sweep, which takes these keys of Hydra's: hydra/launcher, "
            "hydra.launcher.*, hydra.sweep.dir and hydra.job.env_set.*"
        )
    if first.choices.get("search") in (None, "None", "null"):
        own = ["search=grid", *(text for text in own if not text.startswith("search="))]
    launcher = remote.read_launcher(hydra)
    node = first.config.get("search") or {}
    if node.get("resume") and not any(text.lstrip("+").startswith("search.resume=") for text in own):
        raise ConfigError("search.resume is refused from a file: type search.resume=... yourself.")
    axes, fixed = _split([*_params(node.get("params") or {}), *rest])
    if not axes:
        raise ConfigError(
            "There is nothing to sweep: no key has several values. Type for example seed=1,2,3 or "
            "'trainer.learning_rate=tag(log,interval(1e-6,1e-4))', or leave out -m for one run."
        )
    composed = {tuple(cell): _check(cell, fixed, own, where, here=not launcher) for cell in corners(axes)}
    cells = list(composed.values())
    search = schema.Search(**cells[0].config["search"])
    modules = sorted({trainer_source.find(cell.config["trainer"]["_target_"])[0] for cell in cells})
    left_out = lean.left_out(*(cell.config for cell in cells))
    plan = Plan(search, axes, fixed, own, composed, modules, left_out, launcher, where)
    _refuse(plan, cells)
    return plan


def prepare(overrides: list[str], **where: Any) -> list[str]:
    """Check a sweep, and return what Hydra is to be told beside what was typed.

    Raises:
        ConfigError: It cannot be.
    """
    if any(text.startswith("output_dir=") for text in overrides):
        raise ConfigError("output_dir has no effect in a sweep, whose trials need one each: type hydra.sweep.dir=...")
    prepared[:] = [read(overrides, **where)]
    going_on = prepared[0].search.resume
    if going_on is None:
        return []
    if any(text.startswith("hydra.sweep.dir=") for text in overrides):
        raise ConfigError("search.resume names the directory of the sweep: leave out hydra.sweep.dir.")
    if not (Path(going_on) / JOURNAL).exists():
        raise ConfigError(f"search.resume={going_on} holds no sweep: it has no {JOURNAL}.")
    return [f"hydra.sweep.dir={compose.quoted(going_on)}"]


def corners(axes: list[Axis]) -> list[list[str]]:
    """Return override lists in which each value, and each end of an interval, occurs once, the others at their first.

    These few stand for the whole product when a sweep is checked before its first trial.
    """
    columns = [[a.text(v) for v in (a.values if a.values is not None else (a.low, a.high))] for a in axes]
    first = [column[0] for column in columns]
    found = [first]
    for place, column in enumerate(columns):
        found += [[*first[:place], text, *first[place + 1 :]] for text in column[1:]]
    return found


def _params(params: dict[str, Any]) -> list[tuple[str, Any]]:
    """Read the swept keys of a file, which may not do what only a typed word can."""
    texts = [f"{key}={value}" for key, value in params.items()]
    pairs = list(zip(texts, compose.parse(texts), strict=True))
    for text, parsed in pairs:
        key = str(parsed.key_or_group)
        if key.rpartition(".")[2] in RUN_CODE or key.startswith(("hydra", "search")) or key == "output_dir":
            raise ConfigError(f"search.params: {text} is refused from a file. Type {key}=... if you want it.")
    return pairs


def _split(pairs: list[tuple[str, Any]]) -> tuple[list[Axis], list[str]]:
    """Return what is swept and what is fixed; of a key that is given twice, the last word counts."""
    found: dict[str, Axis | str] = {}
    for text, parsed in pairs:
        name = parsed.get_key_element().lstrip("+~")
        found[name] = _axis(text, parsed) if parsed.is_sweep_override() else text
    axes = [one for one in found.values() if isinstance(one, Axis)]
    return axes, [one for one in found.values() if isinstance(one, str)]


def _axis(text: str, parsed: Any) -> Axis:
    from hydra.core.override_parser.types import Glob, IntervalSweep, RangeSweep

    key, value = parsed.get_key_element(), parsed.value()
    if getattr(value, "shuffle", False):
        raise ConfigError(f"{text} cannot be swept: shuffle() draws another order every time. Type search=random.")
    if isinstance(value, IntervalSweep):
        low, high, log = value.start or 0, value.end or 0, "log" in value.tags
        if not low < high or (log and low <= 0):
            raise ConfigError(f"{text}: an interval goes from low to high{', above 0 with tag(log, ...)' * log}.")
        return Axis(key, low=low, high=high, log=log)
    globbed = isinstance(value, Glob)
    values = tuple(value.filter(option_names(parsed.key_or_group)) if globbed else parsed.sweep_string_iterator())
    if not values:
        raise ConfigError(f"{text} has no values.")
    whole = isinstance(value, RangeSweep) and all(re.fullmatch(r"-?\d+", one) for one in values)
    if whole and len(values) > 1 and (step := int(values[1]) - int(values[0])) > 0:
        return Axis(key, values, low=int(values[0]), high=int(values[-1]), step=step)
    return Axis(key, values)


def _check(cell: list[str], fixed: list[str], own: list[str], where: dict[str, Any], *, here: bool) -> Composed:
    """Compose a trial; one that is to run here is refused what this machine lacks."""
    try:
        composed = compose.compose([*fixed, *cell, *own], **where)
        if here:
            launch.refuse(composed.config)
        return composed
    except ConfigError as error:
        hint = " In an interval, whole numbers are written int(interval(1,64))." if "takes int" in str(error) else ""
        raise ConfigError(f"The trial {' '.join(cell)} cannot be: {error}{hint}") from error


def _refuse(plan: Plan, cells: list[Composed]) -> None:
    """Raise for settings that contradict each other, or the runs that they are for."""
    search, faults = plan.search, []
    intervals = [axis for axis in plan.axes if axis.values is None]
    if search.sampler == "grid" and intervals:
        faults.append(
            f"search=grid cannot try all values of {intervals[0].name}={intervals[0]}: type search=tpe, or values."
        )
    if search.sampler != "grid" and not search.n_trials:
        faults.append(f"search.n_trials must be given with search={search.sampler}: type search.n_trials=20.")
    if missing := [name for name in NEEDS.get(search.sampler, ()) if find_spec(name) is None]:
        faults.append(
            f"search={search.sampler} needs {' and '.join(missing)}: pip install 'runner[search]', or type search=tpe."
        )
    if len(plan.directions) != len(plan.objectives):
        faults.append(f"search.direction has {len(plan.directions)} directions for {len(plan.objectives)} objectives.")
    if len(plan.objectives) > 1 and (search.pruner != "none" or search.sampler == "cmaes"):
        what = f"search.pruner={search.pruner}" if search.pruner != "none" else "search=cmaes"
        faults.append(f"{what} compares trials by one objective, found {len(plan.objectives)}.")
    if plan.launcher and search.gpus_per_trial:
        faults.append(
            "search.gpus_per_trial shares out the devices of this machine. With a launcher its scheduler does: type "
            "hydra.launcher.gpus_per_node=1 (Slurm) or hydra.launcher.ray.remote.num_gpus=1 (Ray)."
        )
    faults += [
        f"launch.processes={wanted} needs a GPU for each process, and search.gpus_per_trial={search.gpus_per_trial} "
        f"gives a trial so many: type launch.processes=auto, or search.gpus_per_trial={wanted}."
        for node, trainer in ((cell.config["launch"], cell.config["trainer"]) for cell in cells)
        if isinstance(wanted := node.get("processes"), int) and not trainer.get("use_cpu")
        if wanted > (search.gpus_per_trial or wanted)
    ]
    if plan.base.config.get("probe"):
        faults.append("probe=true looks at one run: leave it out of a sweep, or check one trial before.")
    not_logged = [_objective_fault(name, cell) for cell in cells for name in plan.objectives if search.objective]
    faults += filter(None, not_logged)
    better = ["minimize" if name.endswith(("loss", "kl")) else "maximize" for name in plan.objectives]
    if search.direction is None and "maximize" in better and not any(not_logged):
        faults.append(
            f"search.direction must be given to search for the best {' and '.join(plan.objectives)}: type "
            f"search.direction={as_typed(better) if len(better) > 1 else better[0]}, or the other way."
        )
    if search.pruner != "none" and all(name.startswith("eval_") for name in plan.objectives):
        faults += [
            f"search.pruner={search.pruner} has nothing to compare: {plan.objectives[0]} is computed after training "
            "only. Type trainer.eval_strategy=steps trainer.eval_steps=..."
            for cell in cells
            if cell.config["trainer"].get("eval_strategy", "no") == "no"
        ]
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))


# ---- what a run logs ----------------------------------------------------------------------------------------------


def _objective_fault(name: str, cell: Composed) -> str | None:
    """Return why a run cannot log a metric, as far as that can be known before it runs."""
    trainer, base = cell.choices.get("trainer", "?"), name.removeprefix("eval_")
    held_out = cell.config["dataset"].get("eval") or cell.config["dataset"].get("sources")
    if base != name and not held_out:
        return f"search.objective={name} needs held-out rows, and dataset.eval is null: type dataset.eval=..."
    reward = cell.config["reward"]
    scores = {str(reward.get("function")).rpartition(".")[2], *(reward.get("terms") or {})} - {"None"}
    names, patterns = trainer_source.metrics(cell.config["trainer"]["_target_"])
    if base in names | scores | LOGGED or any(re.fullmatch(pattern, base) for pattern in patterns):
        return None
    prefix = name[: len(name) - len(base)]
    near = difflib.get_close_matches(base, sorted(names | scores | LOGGED), 1, 0.6)
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    return (
        f"search.objective={name} is nothing that trainer={trainer} logs: {hint}metrics.jsonl of a run has all names."
    )
