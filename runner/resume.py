"""``resume=<run dir>``: a run that ended early goes on, with the config that it had."""

import copy
import logging
import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runner import disk, manifest
from runner.config import changes, find_faults, flat, put
from runner.errors import ConfigError
from runner.safety import RUN_CODE, as_typed, find_dangers

# Keys that cannot change what is learnt: how often something is said or kept, and to whom.
HARMLESS = {
    *("output_dir", "max_seconds", "allow_code", "check_expected", "expect", "probe"),
    *("launch.node_rank", "launch.rendezvous", "launch.start_timeout"),
    *(f"trainer.{key}" for key in ("logging_steps", "save_total_limit", "report_to", "run_name", "disable_tqdm")),
    *(f"trainer.{key}" for key in ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy")),
    *(f"trainer.{key}" for key in ("log_level", "dataloader_num_workers")),
}
# These neither, as long as no checkpoint is chosen by what is kept or answered.
UNCHOSEN = {"trainer.save_steps", "trainer.save_strategy", "samples.rows", "samples.max_new_tokens",
            "samples.batch_size"}  # fmt: skip
LENGTHS = {"trainer.max_steps", "trainer.num_train_epochs", "trainer.total_episodes"}

logger = logging.getLogger(__name__)


def prepare(run_dir: Path, typed: dict[str, Any], *, allow_changes: bool, config: dict[str, Any] | None = None) -> bool:
    """Check that a run can go on, and give its directory the config that it will go on with.

    Args:
        run_dir: The run's directory.
        typed: What was typed: dotted keys with their values.
        allow_changes: Whether changes may change the result.
        config: The whole config to go on with; None: the run's own, with what was typed.

    Returns:
        Whether there is anything left to do.

    Raises:
        ConfigError: It is no run, still runs, or the changes are wrong or would change the result.
    """
    record = manifest.read(run_dir)
    _refuse_busy(run_dir, record)
    path = run_dir / "config.yaml"
    before: Any = OmegaConf.to_container(OmegaConf.load(path))
    after = {**(copy.deepcopy(before) if config is None else config), "output_dir": before["output_dir"]}
    for key, value in typed.items() if config is None else ():
        put(after, key, value)
    if faults := find_faults(after, record.get("choices") or {}):
        raise ConfigError("\n".join(faults))
    _refuse_code(run_dir, after, typed)
    changed, new = changes(before, after), flat(after)
    harmless = HARMLESS | (set() if new.get("trainer.load_best_model_at_end") else UNCHOSEN)
    if new.get("global_batch_size") and "global_batch_size" not in changed:
        harmless |= {"launch.processes", "launch.nodes"}  # which then share the same steps
    constant = new.get("trainer.lr_scheduler_type") == "constant"  # the others also warm up by a share of the steps
    harmless |= {key for key in changed if key.startswith("expect.")}
    told = {key: pair for key, pair in changed.items() if key not in harmless and not _longer(key, pair, constant)}
    if told and not allow_changes:
        listed = ", ".join(f"{key} from {a} to {b}" for key, (a, b) in told.items())
        raise ConfigError(
            f"{run_dir} cannot be resumed with {listed}: the result would be neither run's. Leave that out, start a "
            "run of its own, or type resume.allow_changes=true, which is recorded."
        )
    if record["status"] == "completed":
        if not any(_longer(key, pair, constant=True) for key, pair in changed.items()):
            return False
        if not any((run_dir / "checkpoints").glob("checkpoint-*/complete.json")):
            raise ConfigError(f"{run_dir} cannot go on for longer: it kept no complete checkpoint.")
    if changed:
        disk.write(path, OmegaConf.to_yaml(OmegaConf.create(after)))
    resumes = [*record.get("resumes", []), {"status": record["status"], "changed": changed}]
    manifest.update(run_dir, status="resumed", resumes=resumes, config_sha256=disk.digest(path))
    return True


def _refuse_busy(run_dir: Path, record: dict[str, Any]) -> None:
    """Raise where a process still runs the directory, here or, as far as can be told, elsewhere."""
    manifest.claim(run_dir).release()
    if record["status"] == "running" and not manifest.is_dead(run_dir, record):
        raise ConfigError(
            f"{run_dir} is in use: a process on {record['platform']['host']} was alive at {record['heartbeat']}. Wait "
            "for its end, or end it; two minutes after it fell silent the run can go on here."
        )


def _refuse_code(run_dir: Path, config: dict[str, Any], typed: dict[str, Any]) -> None:
    """Raise where a config runs code that was not typed now."""
    for key, value in flat(config).items():
        if value and key.rpartition(".")[2] in RUN_CODE and typed.get(key) != value:
            raise ConfigError(f"{run_dir} runs code of its own: if you trust it, type {key}={as_typed(value)} again.")
    if dangers := find_dangers(config, set(typed)):
        raise ConfigError("\n".join(dangers))


def command(run_dir: Path) -> str:
    """Return what to type to go on with a run."""
    config: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    code = [f"{k}={as_typed(v)}" for k, v in flat(config).items() if v and k.rpartition(".")[2] in RUN_CODE]
    return shlex.join(["python", "-m", "runner", f"resume={run_dir}", *code])


def _longer(key: str, pair: list[Any], constant: bool) -> bool:
    """Whether a change only goes on for longer, along a schedule that does not depend on the length."""
    old, new = pair
    numbers = all(isinstance(value, int | float) and value > 0 for value in pair)
    return constant and key in LENGTHS and numbers and new > old
