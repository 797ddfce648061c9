"""``python -m runner``: compose, check, make the run directory, then run. Exit code 2: something to correct."""

import logging
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from omegaconf import DictConfig, OmegaConf

from runner import compose, console, lean, resume
from runner.config import CONF, find_idle, find_secrets, group_names, option_names
from runner.errors import ConfigError, RunPreempted, RunPruned, RunStopped
from runner.redaction import Scrubbing

log = logging.getLogger("runner")

typed = ["python", "-m", "runner", *sys.argv[1:]]  # before anything is rewritten

HELP = """Post-train a language model from a config.

  python -m runner trainer=dpo model=qwen0.5b          choose an option of a group
  python -m runner trainer.learning_rate=1e-5          set a key: every field of the trainer's class is one
  python -m runner experiment=grpo_sums                run a recipe
  python -m runner -m trainer.beta=0.05,0.1,0.5        sweep
  python -m runner resume=RUN_DIR                      go on with a run
  python -m runner.check ...                           say what a run would be like, without running it

Also .replay, .freeze and .report RUN_DIR. Hydra's options: --cfg job, --config-dir FOLDER and those of --hydra-help.

Groups and their options:
"""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def task(composed: DictConfig) -> None:
    """Run one job in the directory that Hydra made for it."""
    from hydra.core.hydra_config import HydraConfig

    about = HydraConfig.get()
    run_dir = Path(about.runtime.output_dir)
    config: Any = OmegaConf.to_container(composed, resolve=True)
    choices = {k: str(v) for k, v in about.runtime.choices.items() if not k.startswith("hydra/")}
    for handler in logging.getLogger().handlers:
        handler.addFilter(Scrubbing())
    try:
        write_run(run_dir, config, choices, [text.removeprefix("++") for text in about.overrides.task])
    except ConfigError as error:
        log.error("%s", error)
        sys.exit(console.exit_code(error))
    if code := follow(run_dir):
        sys.exit(code)


def write_run(
    run_dir: Path, config: dict[str, Any], choices: dict[str, str], overrides: list[str], argv: list[str] | None = None
) -> None:
    """Write what a run reads (``config.yaml``) and what it begins with (its manifest).

    What a sweep tries is no part of its runs: a trial is the run that it would be alone.

    Raises:
        ConfigError: The directory holds a run.
    """
    from runner import manifest

    config = {**{k: v for k, v in config.items() if k != "search"}, "output_dir": str(run_dir)}
    choices = {k: v for k, v in choices.items() if k != "search"}
    try:
        with (run_dir / "config.yaml").open("x", encoding="utf-8") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(config)))
    except FileExistsError:
        raise ConfigError(
            f"{run_dir} holds a run already, and none is overwritten. Type another output_dir=..."
        ) from None
    idle = find_idle(config, {text.lstrip("+~").partition("=")[0] for text in overrides})
    for text in idle:
        log.warning("%s", text)
    manifest.create(run_dir, argv=argv or typed, choices=choices, overrides=overrides, no_effect=idle)


def start(run_dir: Path, here: dict[str, Any] | None = None) -> None:
    """Run one directory in this process, or in several, and compare its metrics with what its recipe expects.

    Args:
        run_dir: The run's directory.
        here: What the config's ``launch`` is on this machine; None: what the directory says.
    """
    from runner import freeze, launch, manifest

    config: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    config["launch"] = here or config.get("launch") or {}
    lean.begin(lean.left_out(config))
    with launch.leading(config["launch"]):
        launch.refuse(config)
    if launch.is_needed(config["launch"]):
        metrics = launch.launch(run_dir, config["launch"])
    else:
        console.quieten()
        from runner.run import run

        lean.settle()
        if launch.is_led() and manifest.rank() == 0:
            launch.agree(run_dir)  # the others have asked for it
        metrics = run(run_dir)
    if config.get("check_expected") and manifest.rank() == 0:
        faults = freeze.unexpected(config, metrics)
        manifest.update(run_dir, unexpected=faults)
        if faults:
            raise RunStopped("The run is completed, and not as expected: " + "; ".join(faults))
        log.info("All metrics are as expected: %s", ", ".join(config["expect"]))


def main() -> None:
    """Read the command line, refuse what cannot work, and hand the rest to Hydra."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # no network call that nobody asked for
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # of a model's .bin files, on the hub
    if any(argument.startswith(("-sc", "--shell", "--hydra-help", "--version")) for argument in sys.argv[1:]):
        task()
        return
    try:
        if (arguments := compose.parse_arguments(without_resume(sys.argv[1:]))).help:
            sys.stdout.write(help_page(arguments))
            return
        node = find_launch(sys.argv[1:])
        if (led := led_to(sys.argv[1:], node)) is not None:
            sys.exit(go_on(*led))
        from runner import launch

        with launch.leading(node):
            run_dir = find_resumed(sys.argv[1:])
            if run_dir is None:
                sys.argv[1:] = prepare(without_resume(sys.argv[1:]), again="resume=auto" in sys.argv[1:])
        if run_dir is not None:
            sys.exit(go_on(run_dir))
    except (ConfigError, RunStopped) as error:
        sys.stderr.write(f"runner: {error}\n")
        sys.exit(console.exit_code(error))
    lean.settle()
    Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]  # composes, to look whether hydra.mode is set
    task()


def help_page(arguments: Namespace) -> str:
    """Return what ``--help`` shows: the groups, and the config that the rest of the command line composes.

    Hydra's own takes a second to list the groups.
    """
    parsed = zip(arguments.overrides, compose.parse(arguments.overrides), strict=True)
    overrides = [text for text, one in parsed if not one.is_sweep_override()]
    config = compose.compose(overrides, check=bool(overrides), **compose.places(arguments)).config
    folders = [CONF, Path(arguments.config_dir or CONF)]
    options = {group: {name for folder in folders for name in option_names(group, folder)} for group in group_names()}
    groups = "".join(f"  {group}: {', '.join(sorted(names))}\n" for group, names in options.items())
    return f"{HELP}{groups}\nThe config:\n\n{OmegaConf.to_yaml(OmegaConf.create(config))}"


def led_to(argv: list[str], node: dict[str, Any]) -> tuple[Path, dict[str, Any] | None] | None:
    """Return the directory that another process or machine makes, where this one is not the first of a run.

    Args:
        argv: The command line.
        node: What ``launch`` is on this machine.

    Returns:
        The directory, and ``node``, for ``start``; None for the first.

    Raises:
        ConfigError: The launcher has lost processes, or the first process was refused.
        RunStopped: The first process is not to be found, or failed.
    """
    from runner import launch, manifest

    launch.refuse_lost()
    launch.adopt_tasks(node)
    if launch.is_led():
        if compose.parse_arguments(without_resume(argv)).multirun:
            raise ConfigError("A sweep starts the processes of its trials itself: start it once, without a launcher.")
        return (launch.agree(None), None) if manifest.rank() else None
    if rank := launch.place(node).rank:
        os.environ["RANK"] = str(rank)  # only the first writes the manifest
        return launch.meet(node, None), node
    return None


def find_launch(argv: list[str]) -> dict[str, Any]:
    """Return the ``launch`` node of a command line, or of the run that it resumes; empty where none is needed."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "LOCAL_RANK" in os.environ or (tasks == 1 and not any("launch" in word for word in argv)):
        return {}
    arguments = compose.parse_arguments(without_resume(argv))
    if arguments.multirun or arguments.cfg or arguments.info:
        return {}
    named = [word.partition("=")[2] for word in argv if word.startswith("resume=")]
    if named and named != ["auto"] and (path := Path(named[-1]) / "config.yaml").is_file():
        node = (OmegaConf.to_container(OmegaConf.load(path)) or {}).get("launch") or {}  # type: ignore[union-attr]
        typed = compose.read_values(arguments.overrides)
        return node | {key.partition(".")[2]: v for key, v in typed.items() if key.startswith("launch.")}
    return compose.compose(arguments.overrides, **compose.places(arguments)).config["launch"]


def find_resumed(argv: list[str]) -> Path | None:
    """Return the run directory that ``resume=`` names, its config changed as typed; None where a run begins.

    ``resume=auto`` goes on with the run of the config's own ``output_dir``, or begins it.

    Raises:
        ConfigError: There is nothing to resume, or it cannot be.
    """
    named = [word.partition("=")[2] for word in argv if word.startswith("resume=")]
    allow = [word.partition("=")[2] for word in argv if word.startswith("resume.allow_changes=")]
    if not named:
        if allow:
            raise ConfigError("resume.allow_changes has no effect without resume=<run directory>.")
        return None
    arguments = compose.parse_arguments(without_resume(argv))
    if arguments.multirun or arguments.cfg or len(named) > 1:
        raise ConfigError("resume= goes on with one run: leave out -m and --cfg, and name one directory.")
    if allow and allow[-1].lower() not in ("true", "false"):
        raise ConfigError(f"resume.allow_changes takes true or false, found {allow[-1]!r}.")
    options: dict[str, Any] = {"allow_changes": bool(allow) and allow[-1].lower() == "true"}
    typed = compose.read_values(arguments.overrides, groups=named == ["auto"])
    run_dir = Path(named[0])
    if named == ["auto"]:
        if "output_dir" not in typed:
            raise ConfigError("resume=auto needs the directory that the run has every time: type output_dir=...")
        composed = compose.compose(arguments.overrides, **compose.places(arguments))
        options["config"], run_dir = composed.config, composed.run_dir
        if not (run_dir / "manifest.json").exists():
            return None
    if resume.prepare(run_dir, typed, **options):
        return run_dir
    if named != ["auto"]:
        raise ConfigError(f"{run_dir} is completed: there is nothing to resume. Its result is in {run_dir / 'model'}.")
    sys.stderr.write(f"runner: {run_dir} is completed already\n")
    sys.exit(0)  # what starts a job again until it is done need not know


def without_resume(argv: list[str]) -> list[str]:
    """Return a command line without its words on resuming, which are no keys of the config."""
    return [word for word in argv if not word.startswith(("resume=", "resume.allow_changes="))]


def go_on(run_dir: Path, here: dict[str, Any] | None = None, *, terminal: bool = True) -> int:
    """Run a directory outside of Hydra, with its log, and return the exit code; ``here`` is as in ``start``."""
    from runner import manifest

    console.set_up_logs(None if manifest.rank() else run_dir, terminal=terminal)
    return follow(run_dir, here)


def follow(run_dir: Path, here: dict[str, Any] | None = None) -> int:
    """Run a directory, log how it ended and return the exit code; ``here`` is as in ``start``."""
    try:
        start(run_dir, here)
    except RunPreempted as error:
        log.warning("The run ended early: %s. Go on with: %s", error, resume.command(run_dir))
        return error.code
    except RunPruned as error:
        log.info("The trial was ended: %s", error)
    except (ConfigError, RunStopped) as error:
        log.error("%s", error)
        return console.exit_code(error)
    return 0


def prepare(argv: list[str], *, again: bool = False) -> list[str]:
    """Check a command line and return it as Hydra should see it.

    Args:
        argv: The words after the program's name.
        again: Whether the run begins in a directory that is there already, but holds no run.

    Raises:
        ConfigError: All faults found.
    """
    arguments = compose.parse_arguments(argv)
    only_shown = arguments.cfg or arguments.info
    if only_shown and not arguments.overrides:
        return argv  # the defaults, which the tests check
    where = compose.places(arguments)
    options = [text for text in argv if text not in arguments.overrides]
    overrides = compose.rewrite_overrides(arguments.overrides)
    for word in arguments.overrides:  # for the run, for Hydra, or the first of its key: they are all written
        if secrets := find_secrets(dict([word.lstrip("+~").partition("=")[::2]])):
            raise ConfigError(secrets[0])
    if arguments.multirun:
        from runner import search

        return options + overrides + search.prepare(arguments.overrides, **where)
    checked = compose.compose(arguments.overrides, **where)
    if "search" in checked.config and not only_shown:
        raise ConfigError("search has no effect on one run: type -m for a sweep, or search=null.")
    if not only_shown:
        from runner import launch

        launch.refuse(checked.config)
        if checked.config.get("probe"):
            probe(argv)
        begun = again and checked.run_dir.is_dir()
        (checked.run_dir / "config.yaml").unlink(missing_ok=True) if begun else None
        run_dir = checked.run_dir if begun else compose.claim(checked.run_dir)
        overrides.append(f"hydra.run.dir={compose.quoted(run_dir)}")
    return options + overrides


def probe(argv: list[str]) -> None:
    """Check a run with one step on its longest rows, in a process of its own: it may run out of memory.

    Raises:
        ConfigError: It found something to correct, or did not come to its end; or others wait for this process.
    """
    from runner import launch

    if launch.is_led():
        raise ConfigError(
            "probe=true cannot be done where a launcher started this process as one of several: they would wait. Type "
            "python -m runner.check ... check.probe=true before, and leave it out here."
        )
    done = subprocess.run([sys.executable, "-m", "runner.check", *argv, "check.probe=true"], check=False)
    if done.returncode:
        killed = f"it was ended by signal {-done.returncode}, as by a lack of memory"
        why = "see above" if done.returncode > 0 else killed
        raise ConfigError(f"The probe did not succeed: {why}. Correct that, or type probe=false to train all the same.")


if __name__ == "__main__":
    main()
