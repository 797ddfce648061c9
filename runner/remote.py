"""A trial beyond this machine: one of Hydra's launchers starts it, and a process here waits for its end.

To the sweep that process, ``lead``, is a trial like any other: it can be told to end, it can be killed, and it ends as
the trial ended. What the launcher runs, on a Ray worker or in a Slurm job, is ``follow``: one ``python -m runner`` on
the trial's directory, which both sides reach. It goes on for as long as a file there names the leader that it has.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from runner import compose, launch
from runner.config import CONF
from runner.errors import ConfigError

LEADER = "leader"  # in a trial's directory: the name of the process that waits for it
SAID = "launcher.log"  # what launcher and scheduler say; what the run says is in its own log
BEAT = 0.5  # seconds between two looks at a trial and at its leader
GRACE = 120.0  # seconds for its last checkpoint
PACKAGES = {  # hydra/launcher -> what it needs
    "joblib": "hydra-joblib-launcher",
    "ray": "hydra-ray-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
# Our presets have the names of the plugins' own and are checked by these, as is wanted.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated")


def read_launcher(overrides: list[str]) -> list[str]:
    """Return what was typed of Hydra's launcher, nothing where trials are processes of this machine.

    Raises:
        ConfigError: The launcher is not installed.
    """
    words = [text for text in overrides if text.lstrip("+").startswith(("hydra/launcher=", "hydra.launcher."))]
    chosen = [text.partition("=")[2] for text in words if text.startswith("hydra/launcher=")]
    if not chosen or chosen[-1] == "basic":
        return []
    package = PACKAGES.get(chosen[-1], "")
    if package and find_spec(f"hydra_plugins.{package.replace('-', '_')}") is None:
        extra = chosen[-1].partition("_")[0].replace("submitit", "slurm")
        raise ConfigError(f"hydra/launcher={chosen[-1]} needs {package}. Type: pip install 'runner[{extra}]'")
    return words


def open_cluster(words: list[str]) -> None:
    """Start a Ray cluster of this machine for as long as this process lives, where Ray is to be used and none is named.

    Args:
        words: ``hydra/launcher=...`` and its settings.
    """
    named = "RAY_ADDRESS" in os.environ or any("hydra.launcher.ray.init.address=" in text for text in words)
    chosen = [text for text in words if text.startswith("hydra/launcher=")][-1]
    if chosen == "hydra/launcher=ray" and not named:
        import ray

        ray.init(log_to_driver=False, include_dashboard=False)
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


# ---- on the side of the sweep ---------------------------------------------------------------------------------------


def lead(run_dir: Path, words: list[str], config_dir: str | None) -> NoReturn:
    """Launch a trial whose directory holds its config, wait for it, and end as it ended.

    Args:
        run_dir: The trial's directory.
        words: ``hydra/launcher=...`` and its settings.
        config_dir: A folder of the person's own options.
    """
    name = uuid.uuid4().hex
    (run_dir / LEADER).write_text(name)  # a job of an earlier leader that still waits in a queue will not run
    signal.signal(signal.SIGTERM, lambda *_: (run_dir / LEADER).unlink(missing_ok=True))
    code = _launch(run_dir, name, words, config_dir)
    logging.shutdown()
    if code < 0:  # the signal that killed the trial
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)  # libraries of schedulers leave threads behind


def _launch(run_dir: Path, leader: str, words: list[str], config_dir: str | None) -> int:
    """Run one job with Hydra's launcher and return the exit code of the trial; 1 where the launcher failed."""
    from hydra import initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    overrides = [*words, f"hydra.sweep.dir={compose.quoted(run_dir.parent)}", "hydra.output_subdir=null"]
    if config_dir:
        overrides.append(compose.searchpath(config_dir))
    try:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="runner"):
            hydra: Any = GlobalHydra.instance().hydra
            config = hydra.compose_config("config", overrides, run_mode=RunMode.MULTIRUN)
            context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=follow, config=config
            )
            job = [f"hydra.sweep.subdir={run_dir.name}", f"+leader='{leader}'"]
            (ended,) = launcher.launch([job], int(run_dir.name))
            return int(ended.return_value)
    except Exception as error:  # the boundary of the process; the sweep quotes the last line of the run's log
        logging.getLogger("runner").exception("The launcher failed")
        with (run_dir / "runner.log").open("a", encoding="utf-8") as file:
            file.write(f"The launcher failed: {type(error).__name__}: {error}\n")
        return 1


# ---- on the side of the trial ---------------------------------------------------------------------------------------


def follow(composed: Any) -> int:
    """Run a trial in a process of its own and return its exit code; Hydra's launchers call it.

    A signal of the scheduler lets the run save before the scheduler's own handling, which may queue it again.
    """
    from hydra.core.hydra_config import HydraConfig

    about = HydraConfig.get().runtime
    run_dir, leader = Path(about.output_dir), str(composed.leader)
    if not _is_led(run_dir, leader):
        return 128 + signal.SIGTERM
    job = {"run_dir": str(run_dir), "config": {}, "choices": {}, "overrides": [], "environment": {}, "threads": 0}
    command = [sys.executable, "-m", "runner.trials", json.dumps(job), "--leader"]

    def pass_on(number: int, frame: FrameType | None) -> None:
        _end(process)
        if callable(handler := before[number]):
            handler(number, frame)  # submitit's queues the job again after SIGUSR2, and ends this process
        while "SLURM_JOB_ID" in os.environ:  # who returns has ended; who is killed by Slurm may be queued again
            time.sleep(BEAT)
        raise SystemExit(128 + number)

    with launch.handling({signal.SIGUSR2: signal.SIG_IGN}) as before:  # it is ignored by the run's process, too
        process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=about.cwd)
        before |= {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
        signal.signal(signal.SIGUSR2, pass_on)
        try:
            while process.poll() is None:
                if not _is_led(run_dir, leader):
                    _end(process)
                time.sleep(BEAT)
        finally:
            process.kill()
    return process.returncode


def _is_led(run_dir: Path, leader: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / LEADER).read_text() == leader
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Tell a run to save and end, and see that it does; SIGTERM it may have had of the scheduler already."""
    process.send_signal(signal.SIGUSR1)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
