"""The journal of a sweep: what was tried and how it ended, kept by Optuna, and what to try next.

What is tried next hangs on the seed, the number of the trial and the trials before it alone, and a trial enters the
journal in one piece: so a sweep that was killed and goes on tries what it would have tried.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from runner.errors import ConfigError

JOURNAL = "study.journal"
STUDY = "sweep"
TRIAL = "trial.json"  # in a trial's directory: where it is compared with others while it runs
IDENTITY = "identity"  # user attribute of the study
STATE = "state"  # user attribute of a trial: what the sampler keeps beside the trials


def open_storage(path: Path) -> Any:
    """Open a journal, which several processes may append to, also on a shared file system."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(path)))


def open_study(directory: Path, identity: dict[str, Any], directions: list[Any], *, resumed: bool) -> Any:
    """Open the study of a sweep that this process alone runs.

    Args:
        directory: Of the sweep.
        identity: What may not change when it goes on, by name.
        directions: Of the objectives.
        resumed: Whether the sweep goes on.

    Raises:
        ConfigError: It is another sweep's, or it cannot be read.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = directory / JOURNAL
    if path.exists() and not resumed:
        raise ConfigError(f"{directory} holds a sweep already: type search.resume={directory} to go on with it.")
    _heal(path)
    try:
        study = optuna.create_study(
            study_name=STUDY, storage=open_storage(path), directions=directions, load_if_exists=True
        )
    except (ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Restore it, or begin a new sweep.") from error
    identity = json.loads(json.dumps(identity))
    before = study.user_attrs.get(IDENTITY)
    if before is None:
        study.set_user_attr(IDENTITY, identity)
    elif before != identity:
        told = [
            f"{key} was {before.get(key)} and is {identity.get(key)}"
            for key in [*identity, *(key for key in before if key not in identity)]
            if before.get(key) != identity.get(key)
        ]
        raise ConfigError(f"{directory} cannot go on as another sweep: {'; '.join(told)}. Type what was typed.")
    return study


def _heal(path: Path) -> None:
    """Take away what a kill in the middle of a write leaves: half a line, and a lock."""
    if not path.exists():
        return
    whole = path.read_bytes()
    if not whole.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)
    path.with_name(path.name + ".lock").unlink(missing_ok=True)


def begin(study: Any, plan: Any) -> int:
    """Choose what to try next, write it to the journal as a running trial, and return its number."""
    import optuna

    number = len(study.get_trials(deepcopy=False))
    distributions = {axis.name: _distribution(axis) for axis in plan.axes}
    state: dict[str, Any] = {}
    system: dict[str, Any] = {}
    if plan.search.sampler == "grid":
        distributions = {axis.name: optuna.distributions.CategoricalDistribution(axis.values) for axis in plan.axes}
        params = {axis.name: value for axis, value in zip(plan.axes, plan.grid[number], strict=True)}
    else:
        params, state, system = _propose(study, plan, number, distributions)
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=params,
            distributions=distributions,
            user_attrs={STATE: state} if state else {},
            system_attrs=system,
        )
    )
    return number


def _propose(study: Any, plan: Any, number: int, distributions: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Ask a sampler in memory; returns parameters, and what it keeps with the study and with the trial."""
    import optuna

    before = study.get_trials(deepcopy=False)
    memory = optuna.create_study(directions=study.directions, sampler=_sampler(plan.search, number))
    memory.add_trials(before)
    for key, value in (before[-1].user_attrs.get(STATE) or {} if before else {}).items():
        memory._storage.set_study_system_attr(memory._study_id, key, value)
    asked = memory.ask(distributions)
    found = memory.get_trials(deepcopy=False)[-1]
    return asked.params, memory._storage.get_study_system_attrs(memory._study_id), found.system_attrs


def _sampler(search: Any, number: int) -> Any:
    import numpy as np
    import optuna
    from optuna import samplers

    seed = int(np.random.SeedSequence([search.seed, number]).generate_state(1)[0])
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if search.sampler == "tpe":
        return samplers.TPESampler(seed=seed, constant_liar=search.n_jobs > 1)
    if search.sampler == "cmaes":
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    if search.sampler == "gp":
        return samplers.GPSampler(seed=seed)
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        return samplers.QMCSampler(scramble=True, seed=search.seed, warn_independent_sampling=False)


def _distribution(axis: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values is None:
        whole = isinstance(axis.low, int) and isinstance(axis.high, int)
        return (IntDistribution if whole else FloatDistribution)(axis.low, axis.high, log=axis.log)
    if axis.step:
        return IntDistribution(axis.low, axis.high, step=axis.step)
    return CategoricalDistribution(axis.values)
