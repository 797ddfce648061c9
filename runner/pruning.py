"""Trials that fall behind the others of their sweep end early: any trainer reports its objective as it logs it."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from runner import manifest
from runner.callbacks import over_ranks
from runner.errors import RunPruned
from runner.journal import STUDY, TRIAL, open_storage

logger = logging.getLogger(__name__)


class Pruning(TrainerCallback):
    """Report a metric to a sweep's journal whenever it is logged, and end training when the pruner says so.

    Args:
        journal: The sweep's journal.
        number: Of the trial.
        objective: The metric.
        pruner: ``median``, ``asha`` or ``hyperband``.
    """

    def __init__(self, journal: Path, *, number: int, objective: str, pruner: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.objective, self.pruner, self.cause = objective, pruner, ""
        self.last: dict[str, float] = {}
        self.study = optuna.load_study(study_name=STUDY, storage=open_storage(journal))
        self.trial = self.study.trials[number]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Report the objective, if it is among what is logged, and look where the trial stands."""
        numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        self.last |= numbers
        value, step = numbers.get(self.objective), state.global_step
        if value is None or step == 0 or self.cause:
            return
        behind = state.is_world_process_zero and math.isfinite(value) and self._is_behind(value, step, state.max_steps)
        if over_ranks(float(behind), largest=True):  # none may go on alone
            self.cause = (
                f"{self.objective} {value:.4g} at step {step} of {state.max_steps} is behind that of other trials"
            )
            control.should_training_stop = True

    def _is_behind(self, value: float, step: int, last: int) -> bool:
        """Report a value, and ask the pruner."""
        import optuna

        storage = self.study._storage
        storage.set_trial_intermediate_value(self.trial._trial_id, step, value)
        trial = storage.get_trial(self.trial._trial_id)
        pruner = make_pruner(self.pruner, first=min(trial.intermediate_values), last=last)
        return step < last and trial.state == optuna.trial.TrialState.RUNNING and pruner.prune(self.study, trial)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do not log, evaluate or save what was broken off."""
        if self.cause:
            control.should_log = control.should_evaluate = control.should_save = False


def make_pruner(name: str, *, first: int, last: int) -> Any:
    """Return a pruner of Optuna's.

    Args:
        name: ``median``, ``asha`` or ``hyperband``.
        first: Step of a trial's first value.
        last: Step of its end.
    """
    from optuna.pruners import HyperbandPruner, MedianPruner, SuccessiveHalvingPruner

    if name == "median":
        return MedianPruner(n_startup_trials=4)
    if name == "asha":
        return SuccessiveHalvingPruner(min_resource=max(1, first), reduction_factor=2)
    return HyperbandPruner(min_resource=max(1, first), max_resource=max(first, last), reduction_factor=3)


@contextlib.contextmanager
def reporting(trainer: Any, run_dir: Path) -> Iterator[None]:
    """Let a trial be pruned inside; any other run is left alone.

    Raises:
        RunPruned: It was, and its metrics so far are in its manifest.
    """
    about = json.loads((run_dir / TRIAL).read_text(encoding="utf-8")) if (run_dir / TRIAL).exists() else {}
    path = run_dir / about.pop("journal", "")
    callback = Pruning(path, **about) if path.is_file() else None
    if callback is None or callback.trial.state.is_finished():  # a trial that goes on after its sweep
        yield
        return
    trainer.add_callback(callback)
    yield
    if callback.cause:
        manifest.update(run_dir, metrics=callback.last)
        raise RunPruned(callback.cause)
