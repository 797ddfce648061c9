"""``python -m runner -m``: trials one after the other or side by side, a journal, and a table at the end."""

import contextlib
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra

from runner import compose, journal, launch, leaderboard, manifest, remote, search, trials
from runner.errors import ConfigError
from runner.leaderboard import Row, say
from runner.search import Plan
from runner.trials import Job, Trial

BEAT = 1.0  # seconds between two looks at running trials

logger = logging.getLogger(__name__)


def main(hydra: Any, arguments: list[str]) -> None:
    """Run the sweep that ``search.prepare`` has read, from inside Hydra; an exit code other than 0 ends the process.

    Args:
        hydra: Hydra's own config, which says where the sweep goes and where options are.
        arguments: The overrides that were typed.
    """
    directory = Path(hydra.sweep.dir)
    GlobalHydra.instance().clear()  # trials are composed as runs are, which begins afresh
    try:
        plan = search.prepared.pop()
        of_trials = [text for text in plan.fixed if text.lstrip("+~").startswith("hydra.job.env_set")]
        code = run(plan, directory, [*arguments, *plan.launcher, *of_trials])
    except ConfigError as error:
        sys.stderr.write(f"runner: {error}\n")
        code = 2
    if code:
        sys.exit(code)


def run(plan: Plan, directory: Path, arguments: list[str]) -> int:
    """Run all trials of a sweep that are not done yet and return the exit code.

    Raises:
        ConfigError: Another sweep has the directory, or runs in it now.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{directory} is in use: a sweep runs in it. Wait for its end, or end it.") from None
    for name, value in plan.base.environment.items():
        if all(one.environment.get(name) == value for one in plan.composed.values()):
            os.environ[name] = value  # the server of trials reads it as it imports
    try:
        return Sweep(plan, directory, arguments).run()
    finally:
        lock.release()


class Sweep:
    """One sweep, from the first trial to the table.

    Args:
        plan: What is tried.
        directory: Where; this process holds its lock.
        arguments: What was typed, for the command that goes on with it.
    """

    def __init__(self, plan: Plan, directory: Path, arguments: list[str]) -> None:
        self.plan, self.directory, self.arguments = plan, directory, arguments
        self.places = None if plan.launcher else trials.devices(plan.search.gpus_per_trial, plan.search.n_jobs)
        resumed = plan.search.resume is not None
        self.study = journal.open_study(directory, plan.identity(), plan.directions, resumed=resumed)
        self.began, self.running = time.monotonic(), list[Trial]()
        self.left = [t.number for t in self.study.trials if not t.state.is_finished()]  # by a sweep that was killed
        self.free = list(range(plan.search.n_jobs))
        self.ended_now = 0
        self.told, self.fault, self.code = 0, "", 1  # how it ends, if a signal told it to; why it ends itself, and how

    def run(self) -> int:
        """Run all trials and return the exit code."""
        search, elsewhere = self.plan.search, self.plan.launcher
        if elsewhere:
            remote.open_cluster(elsewhere)
        modules = ["runner.__main__", "runner.remote"] if elsewhere else [*trials.PRELOAD, *self.plan.trainers]
        with launch.handling(dict.fromkeys(launch.SIGNALS, self.handle)):
            trials.warm(modules, None if elsewhere else self.plan.left_out)
            say(f"{self.plan.trials} trials (search={search.sampler}) in {self.directory}")
            if self.left:
                say(f"Going on with trial{'s' * (len(self.left) > 1)} {', '.join(map(str, self.left))}")
            try:
                while self.fill() or self.running:
                    self.look()
            finally:
                for trial in self.running:
                    trial.kill()
            return self.close()

    # ---- trials ---------------------------------------------------------------------------------------------------

    def fill(self) -> bool:
        """Start trials where there is room; returns whether any is running."""
        while self.free and not self.told and not self.fault:
            if self.left:
                number = self.left.pop(0)
            elif len(self.study.get_trials(deepcopy=False)) < self.plan.trials and not self.late():
                number = journal.begin(self.study, self.plan)
            else:
                break
            self.start(number)
        return bool(self.running)

    def late(self) -> bool:
        """Whether no further trial may begin."""
        limit = self.plan.search.timeout
        return limit is not None and time.monotonic() - self.began > limit

    def start(self, number: int) -> None:
        """Start one trial, or go on with it where it was left."""
        run_dir = self.directory / str(number)
        point = self.point(number)
        run_dir.mkdir(exist_ok=True)
        known = (run_dir / manifest.FILE).exists()
        if known and (ending := self.find_user(run_dir)):
            self.settle(number, ending, 0.0)
            return
        record = manifest.read(run_dir) if known else {}
        if record.get("status") in ("completed", "failed", "pruned"):  # it ended as the sweep was killed
            self.settle(number, trials.judge(run_dir, 0, "", None), 0.0)
            return
        overrides = [*self.plan.fixed, *point]
        try:
            checked = self.plan.composed.get(tuple(point))
            composed = checked or compose.compose([*overrides, *self.plan.own], **self.plan.where)
        except ConfigError as error:
            self.settle(number, ("failed", str(error)), 0.0)
            return
        if self.plan.search.pruner != "none":
            about = {"journal": f"../{journal.JOURNAL}", "number": number}
            about |= {"objective": self.plan.objectives[0], "pruner": self.plan.search.pruner}
            (run_dir / journal.TRIAL).write_text(json.dumps(about), encoding="utf-8")
        slot, own = self.free.pop(0), bool(self.plan.search.gpus_per_trial) or trials.takes_one_device(composed.config)
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(self.places[slot])} if self.places and own else {}
        environment = composed.environment | devices
        shown = [text.removeprefix("++") for text in overrides]
        count = launch.threads(self.plan.search.n_jobs)
        words = [f"++hydra.job.env_set.{key}={compose.quoted(value)}" for key, value in environment.items()]
        launcher = (*self.plan.launcher, *words) if self.plan.launcher else ()
        job = Job(str(run_dir), composed.config, composed.choices, shown, environment, count, launcher, self.plan.where)
        trial = Trial(number, slot, job, seconds=self.plan.search.trial_timeout)
        stored = self.study.get_trials(deepcopy=False)[number]
        self.study._storage.set_trial_user_attr(stored._trial_id, "status", "running")
        self.begin(trial)

    def begin(self, trial: Trial) -> None:
        """Let a trial run, for the first time or again."""
        trial.start()
        self.running.append(trial)
        if self.told and not trial.stopped:  # as it started
            trial.stop("preempted")

    def find_user(self, run_dir: Path) -> tuple[str, str] | None:
        """Return how a trial ends whose directory is not to be had; wait for what outlives its end by a moment."""
        until = time.monotonic() + 2 * trials.GRACE + remote.GRACE * bool(self.plan.launcher)
        while True:
            with contextlib.suppress(ConfigError):
                manifest.claim(run_dir).release()
                return None
            if self.told or time.monotonic() > until:
                return "preempted" if self.told else "killed", "its directory is still in use by its last process"
            for trial in self.running:
                trial.tend()
            time.sleep(BEAT / 5)

    def look(self) -> None:
        """Wait a moment, and deal with what has happened."""
        for trial in trials.wait_any(self.running, BEAT):
            self.running.remove(trial)
            ending = trial.ending()
            if ending[0] == "killed" and not self.told and trial.tries <= self.plan.search.retries:
                say(f"trial {trial.number} was killed ({ending[1]}): it is tried again")
                if not (user := self.find_user(Path(trial.job.run_dir))):
                    self.begin(trial)
                    continue
                ending = user
            self.free = sorted([*self.free, trial.slot])
            self.settle(trial.number, ending, time.monotonic() - trial.began)
        for trial in self.running:
            trial.tend()
        self.show_bar()

    def settle(self, number: int, ending: tuple[str, str], seconds: float) -> None:
        """Write down how a trial ended, and say so."""
        import optuna

        status, cause = ending
        plan, state = self.plan, optuna.trial.TrialState
        values, steps, logged = leaderboard.last_values(self.directory / str(number), plan.objectives)
        numbers = [values[name] for name in plan.objectives]
        if status == "completed" and any(name not in logged for name in plan.objectives) and plan.search.objective:
            missing = [name for name in plan.objectives if name not in logged]
            status, cause = "failed", f"the run logs no {', '.join(missing)}"
            self.fault, self.code = f"{cause}, which is search.objective. It logs {', '.join(logged)}.", 2
        elif (
            status == "completed" and plan.search.objective and any(v is None or not math.isfinite(v) for v in numbers)
        ):
            status, cause = "diverged", "the objective is not a finite number"
        if status not in ("completed", "pruned"):
            values = dict.fromkeys(values)  # of a run that was broken off, nothing can be compared
        trial = self.study.get_trials(deepcopy=False)[number]
        storage = self.study._storage
        about = {"status": status, "cause": cause, "values": values, "steps": steps}
        about["seconds"] = trial.user_attrs.get("seconds", 0.0) + seconds
        for key, value in about.items():
            storage.set_trial_user_attr(trial._trial_id, key, value)
        self.ended_now += 1
        if status == "completed":
            self.study.tell(number, [0.0 if value is None else value for value in numbers])
        elif status != "preempted":
            self.study.tell(number, state=state.PRUNED if status == "pruned" else state.FAIL)
            self.look_at_failures()
        self.write()
        self.say_ended(number, status, cause, values)

    def look_at_failures(self) -> None:
        """End a sweep whose first trials all fail of the same cause."""
        limit = self.plan.search.stop_after_failures
        rows = [row for row in self.rows() if row.status != "running"]
        causes = {(row.status, row.cause) for row in rows}
        if limit and len(rows) >= limit and len(causes) == 1 and rows[0].failed and not self.fault:
            self.fault = f"the first {len(rows)} trials failed of the same cause: {rows[0].cause}"

    # ---- what is seen -----------------------------------------------------------------------------------------------

    def point(self, number: int) -> list[str]:
        """Return the overrides of a trial's own."""
        params = self.study.get_trials(deepcopy=False)[number].params
        return [axis.text(params[axis.name]) for axis in self.plan.axes]

    def rows(self) -> list[Row]:
        """Return all trials that were begun."""
        rows, begun = [], {"status": "running", "cause": "", "values": {}, "steps": 0, "seconds": 0.0}
        for trial in self.study.get_trials(deepcopy=False):
            about: Any = {key: trial.user_attrs.get(key, value) for key, value in begun.items()}
            rows.append(Row(trial.number, swept=trial.params, directory=self.directory / str(trial.number), **about))
        return rows

    def ranked(self) -> list[Row]:
        """Return all trials that were begun, the best first."""
        return leaderboard.rank(self.rows(), self.plan.objectives, self.plan.directions)

    def write(self, **more: Any) -> None:
        """Write sweep.json and leaderboard.csv as things stand."""
        best = leaderboard.front(self.rows(), self.plan.objectives, self.plan.directions)
        about = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "sampler": self.plan.search.sampler,
            "objectives": dict(zip(self.plan.objectives, self.plan.directions, strict=True)),
            "swept": {axis.name: str(axis) for axis in self.plan.axes},
            "wanted": self.plan.trials,
            "best": [row.number for row in best],
        }
        leaderboard.write(self.directory, self.ranked(), {**about, **more})

    def say_ended(self, number: int, status: str, cause: str, values: dict[str, Any]) -> None:
        """Say one line of a trial that has ended."""
        self.clear_bar()
        told = "  ".join(f"{name} {leaderboard.number(value)}" for name, value in values.items() if value is not None)
        point = " ".join(text.lstrip("+") for text in self.point(number))
        say(f"trial {number} {status}  {told}  {point}{'  ' + cause.splitlines()[0] if cause else ''}")
        if not sys.stdout.isatty():
            say(self.bar())

    def bar(self) -> str:
        """Return how far the sweep is: a bar, counts by status, and the time left."""
        rows, total = self.rows(), self.plan.trials
        done = sum(row.status not in ("running", "preempted") for row in rows)
        spent = time.monotonic() - self.began
        left = f", {leaderboard.clock(spent / self.ended_now * (total - done))} left" if self.ended_now else ""
        filled = round(20 * done / total) if total else 20
        return f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{total}; {leaderboard.counts(rows)}{left}"

    def show_bar(self) -> None:
        """Refresh the bar, on a terminal."""
        if sys.stdout.isatty():
            sys.stdout.write(f"\r\x1b[K{self.bar()}")
            sys.stdout.flush()

    def clear_bar(self) -> None:
        """Take the bar away."""
        if sys.stdout.isatty():
            sys.stdout.write("\r\x1b[K")

    # ---- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> int:
        """Write and show the table, and return the exit code."""
        self.clear_bar()
        plan, rows = self.plan, self.ranked()
        weights = leaderboard.importances(self.study, rows, plan.objectives[0])
        self.write(importances=weights if isinstance(weights, dict) else None, ended=self.fault or None)
        say("\n" + leaderboard.table(rows, plan.objectives))
        failures = sum(row.failed for row in rows)
        say(f"\n{leaderboard.counts(rows)} (failures: {failures})")
        best = leaderboard.front(rows, plan.objectives, plan.directions)
        for row in best:
            say(f"{'best' if len(best) == 1 else 'on the front'}: trial {row.number}")
            words = [text.removeprefix("++") for text in (*plan.fixed, *self.point(row.number))]
            say("  " + shlex.join(compose.command(words, **plan.where)))
        if isinstance(weights, dict):
            say("matters: " + ", ".join(f"{key} {share:.2f}" for key, share in weights.items()))
        else:
            say(weights)
        if best and (why := leaderboard.write_best(self.directory, best[0], plan.where.get("config_dir"))):
            say(f"best.yaml cannot be written: {why}")
        say(f"{self.directory}: leaderboard.csv, sweep.json{', best.yaml' * bool(best)}")
        if self.fault:
            say(f"runner: the sweep ends: {self.fault}")
            return self.code
        unfinished = [row for row in rows if row.status in ("running", "preempted")]
        if unfinished or self.told or len(rows) < plan.trials:
            words = [text for text in self.arguments if not text.lstrip("+").startswith("search.resume")]
            words = [text.removeprefix("++") for text in words]
            words = ["-m", *words, f"search.resume={self.directory}"]
            say("go on with: " + shlex.join(compose.command(words, **plan.where)))
        if self.told and plan.launcher:
            say("jobs that still wait in a scheduler's queue end by themselves as they begin")
        return self.told or int(failures == len(rows) or (failures > 0 and plan.search.fail == "any"))

    # ---- signals ----------------------------------------------------------------------------------------------------

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Tell all trials to end with a checkpoint, or, the second time, end them and the sweep at once."""
        again, self.told = self.told, 130 if number == signal.SIGINT else 143
        if again:
            raise SystemExit(self.told)
        for trial in self.running:
            trial.stop("preempted")
