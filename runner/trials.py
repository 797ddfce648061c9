"""Trials as processes of their own, forked from a server that has imported the libraries: a fork, not twelve seconds.

The server is Python's own (``multiprocessing``, start method ``forkserver``). It touches no device and computes
nothing, so that a fork of it begins without a device context and without threads. bitsandbytes opens the devices where
there are any as it is imported: a trial that may need it then begins afresh, in an interpreter of its own.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import yaml

from runner import compose, hardware, launch, lean, manifest, remote
from runner.errors import MEMORY, ConfigError

PRELOAD = ["runner.__main__", "runner.run", "runner.freeze", "trl", "peft", "datasets", "optuna", "pydantic",
           "matplotlib.figure", "matplotlib.backends.backend_agg", "runner.rehearsal"]  # fmt: skip
LOG = "runner.log"
GRACE = 30.0  # seconds from the wish that a trial should end to its kill
warmed: list[Any] = []  # what the server was started with
DIVERGED = re.compile(r"(is|are) not finite|is (nan|inf|-inf) at step", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """What the process of a trial needs to know; plain data.

    Attributes:
        run_dir: The trial's directory; it exists.
        config: Resolved.
        choices: The option of each group.
        overrides: Those of the trial.
        environment: Variables of the trial's own, such as the devices that it may see.
        threads: That it computes with; 0: as many as the place it runs in gives it.
        launcher: What was typed of the launcher that is to start it elsewhere; empty: it runs in this process.
        where: ``compose.places``: where the person's own options are.
    """

    run_dir: str
    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]
    environment: dict[str, str]
    threads: int
    launcher: tuple[str, ...] = ()
    where: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trial:
    """A running trial.

    Attributes:
        number: In its sweep.
        slot: Which of the places for parallel trials it holds.
        seconds: That it may take; None: any.
        tries: How often it was started.
        stopped: Why it was told to end, if it was: ``timeout`` or ``preempted``.
    """

    number: int
    slot: int
    job: Job
    seconds: float | None = None
    process: Any = None
    tries: int = 0
    stopped: str = ""
    began: float = 0.0
    started: float = 0.0  # the last time
    told: float = 0.0

    def start(self) -> None:
        """Fork its process, from a new server where the last one is gone."""
        if warmed:
            warm(*warmed)
        self.process = _context().Process(target=work, args=(self.job,), name=f"trial {self.number}")
        self.process.start()  # waits for the server, whose imports are not the trial's time
        self.tries, self.started = self.tries + 1, time.monotonic()
        self.began = self.began or self.started

    def stop(self, why: str) -> None:
        """Tell it to save and end; a second time, end it at once."""
        if self.stopped:
            self.kill()
            return
        self.stopped, self.told = why, time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and its own processes at once."""
        if self.job.launcher:
            (Path(self.job.run_dir) / remote.LEADER).unlink(missing_ok=True)  # so that it ends elsewhere, too
        for end in (os.killpg, os.kill):  # it leads a group, unless it has not got so far
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end(self.process.pid, signal.SIGKILL)

    def tend(self) -> None:
        """Stop it when its time is over, and kill it when it does not heed."""
        now, waits = time.monotonic(), bool(self.job.launcher) and self.waits()
        if waits:
            self.started = now
        if self.stopped and (waits or now - self.told > GRACE + remote.GRACE * bool(self.job.launcher)):
            self.kill()
        elif not self.stopped and self.seconds and now - self.started > self.seconds:
            self.stop("timeout")

    def waits(self) -> bool:
        """Whether it has not begun to run, as in a scheduler's queue."""
        run_dir = Path(self.job.run_dir)
        queued = ("created", "resumed", "preempted")
        return not (run_dir / manifest.FILE).exists() or manifest.read(run_dir)["status"] in queued

    def ending(self) -> tuple[str, str]:
        """Return status and cause of a trial that has ended, and clean up after it."""
        self.process.join()
        if self.process.exitcode:
            self.kill()  # what is left of its group
        return judge(Path(self.job.run_dir), self.process.exitcode, self.stopped, self.seconds)


def wait_any(trials: list[Trial], seconds: float) -> list[Trial]:
    """Return the trials that have ended, after some seconds at the latest."""
    ready = wait([trial.process.sentinel for trial in trials], timeout=seconds)
    return [trial for trial in trials if trial.process.sentinel in ready]


def judge(run_dir: Path, code: int, stopped: str, seconds: float | None) -> tuple[str, str]:
    """Return how a trial ended, and why, from its manifest and its exit code.

    Returns:
        ``completed``, ``pruned``, ``preempted``, ``failed``, ``killed``, ``out of memory``, ``timed out`` or
        ``diverged``; the cause is empty where there is nothing to say.
    """
    record = manifest.read(run_dir) if (run_dir / manifest.FILE).exists() else {}
    status, cause = record.get("status"), record.get("cause") or ""
    if status in ("completed", "pruned"):
        return status, cause or "; ".join(record.get("unexpected") or [])
    if stopped == "timeout":
        return "timed out", f"after {seconds:g} s (search.trial_timeout)"
    if status == "preempted" or stopped:
        return "preempted", cause
    if code < 0:
        name = signal.Signals(-code).name
        return "killed", f"by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    if status != "failed":  # it left without a word
        cause = f"it left with exit code {code}, after: {_last_line(run_dir / LOG)}"
        return ("failed" if status in (None, "created") else "killed"), cause
    kind = "out of memory" if MEMORY.search(cause) else "diverged" if DIVERGED.search(cause) else "failed"
    return kind, cause


def devices(per_trial: int | None, slots: int) -> list[list[str]] | None:
    """Share out the machine's devices; None where every trial sees all.

    Args:
        per_trial: That each has to itself; None: trials side by side see one each, which some may share.
        slots: Trials side by side.

    Raises:
        ConfigError: There are too few.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")  # empty, or -1: they are hidden
    every = [str(i) for i in range(hardware.installed_gpus())] if named is None else named.split(",")
    found = [one for one in every if one not in ("", "-1")]
    if per_trial is None:
        return [[found[slot % len(found)]] for slot in range(slots)] if slots > 1 and found else None
    if per_trial * slots > len(found):
        raise ConfigError(
            f"search.gpus_per_trial={per_trial} with search.n_jobs={slots} needs {per_trial * slots} devices, found "
            f"{len(found)}. Type search.n_jobs={len(found) // per_trial or 1}, or leave search.gpus_per_trial out."
        )
    return [found[slot * per_trial : (slot + 1) * per_trial] for slot in range(slots)]


def takes_one_device(config: dict[str, Any]) -> bool:
    """Tell whether a run is one process, which names no second device."""
    one = config["trainer"].get("reward_device") in (None, "cpu", "cuda", "cuda:0")
    return one and (config.get("launch") or {}).get("processes", 1) == 1


def _context() -> Any:
    """Return the way to start processes; the server is started with the first of them."""
    server = "forkserver" in multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if server else "spawn")


def warm(modules: list[str], left_out: str | None) -> None:
    """Start the server without waiting for it, so that it imports while the first trial is prepared.

    What tells this process to end, from the keyboard or by its group, is not for the server: it ends with the sweep.

    Args:
        modules: What it imports.
        left_out: Modules that no trial can ask for; None: trials run elsewhere, in the environment of this process.
    """
    context = _context()
    if context.get_start_method() != "forkserver":
        return
    warmed[:] = modules, left_out
    context.set_forkserver_preload(modules)
    from multiprocessing import forkserver, resource_tracker

    # libraries read these as they are imported; asking for devices must not open one
    given = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    given = {**given, lean.VARIABLE: left_out} if left_out is not None else {}
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"  # of what a killed trial could not give back
    given["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    before = {key: os.environ.get(key) for key in given}
    os.environ.update(given)
    resource_tracker.ensure_running()  # it unblocks signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, launch.SIGNALS)  # what a process is started with, it keeps
    try:
        forkserver.ensure_running()
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


# ---- in the process of a trial ------------------------------------------------------------------------------------


def work(job: Job, leader: Any = None) -> None:
    """Do what ``python -m runner`` does for one run, in this process, with all that is said going to the run's log.

    Args:
        job: The run.
        leader: Ready to be read once the process has ended that this one is not to outlive.
    """
    for number in launch.SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # until the run heeds them
    with contextlib.suppress(OSError, AttributeError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, launch.SIGNALS)  # which the server blocks
        os.setsid()  # an interrupt from the keyboard is for the sweep, which passes it on
    os.environ.update(job.environment)
    run_dir = Path(job.run_dir)
    with (run_dir / (remote.SAID if job.launcher else LOG)).open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    if leader is None and (parent := multiprocessing.parent_process()) is not None:
        leader = parent.sentinel
    if leader is not None:
        threading.Thread(target=_outlive, args=(leader,), daemon=True).start()
    from runner.__main__ import go_on, write_run

    try:
        if not (run_dir / manifest.FILE).exists():
            (run_dir / "config.yaml").unlink(missing_ok=True)
            typed = compose.command(job.overrides, **job.where)
            write_run(run_dir, job.config, job.choices, job.overrides, typed)
        if job.launcher:
            remote.lead(run_dir, list(job.launcher), job.where.get("config_dir"))
        _take_place(run_dir)
        if job.threads:
            _prepare_torch(job)
        code = go_on(run_dir, terminal=False)
    except ConfigError as error:
        sys.exit(str(error))
    except Exception:  # the boundary of the process: the manifest has it, and the log without its secrets
        logging.getLogger("runner").exception("The run failed")
        code = 1
    sys.exit(code)


def _take_place(run_dir: Path) -> None:
    """Be one of a trial's machines, or of its ranks, where its Slurm step has several tasks."""
    node = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["launch"]
    launch.adopt_tasks(node)
    if rank := launch.place(node).rank:
        os.environ["RANK"] = str(rank)  # only the first writes the manifest
        launch.meet(node, None)


def _prepare_torch(job: Job) -> None:
    """See that a device can be used here, and how many threads compute."""
    import torch

    if torch.cuda._is_in_bad_fork() and hardware.has_driver():
        # a library has opened the device in the server: begin afresh
        os.dup2(multiprocessing.parent_process().sentinel, 0)  # type: ignore[union-attr]  # of the sweep, to end with it
        os.execv(sys.executable, [sys.executable, "-m", "runner.trials", json.dumps(asdict(job)), "--leader"])
    torch.set_num_threads(job.threads)
    launch.shared[:] = [job.threads]


def _outlive(leader: Any) -> None:
    """End with the sweep, however it ends: with a checkpoint, or without one when that takes too long."""
    wait([leader])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def _last_line(path: Path) -> str:
    """Return the last line of a log that says something."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), f"nothing in {path}")


if __name__ == "__main__":
    work(Job(**json.loads(sys.argv[1])), leader=sys.stdin if "--leader" in sys.argv else None)
