"""``resume=<run dir>``: a run that ended early goes on, with the config that it had."""

import logging
import os
import platform
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runner import manifest
from runner.config import find_faults
from runner.errors import ConfigError

# Keys that cannot change what is learnt: how often something is said, kept or shown, and to whom.
HARMLESS = {
    *("output_dir", "max_seconds", "allow_code", "samples.rows", "samples.max_new_tokens", "samples.batch_size"),
    *(f"trainer.{key}" for key in ("logging_steps", "save_steps", "save_strategy", "save_total_limit", "report_to")),
    *(f"trainer.{key}" for key in ("run_name", "disable_tqdm", "push_to_hub", "hub_model_id", "hub_private_repo")),
    *(f"trainer.{key}" for key in ("hub_revision", "hub_strategy", "log_level", "dataloader_num_workers")),
}
RUN_CODE = {"allow_code", "trust_remote_code"}  # opted in by typing them, each time
LENGTHS = {"trainer.max_steps", "trainer.num_train_epochs", "trainer.total_episodes"}

logger = logging.getLogger(__name__)


def prepare(run_dir: Path, typed: dict[str, Any], *, allow_changes: bool) -> bool:
    """Check that a run can go on, and give its directory the config that it will go on with.

    Args:
        run_dir: The run's directory.
        typed: Changed keys, dotted, with their values.
        allow_changes: Whether changes may change the result.

    Returns:
        Whether there is anything left to do.

    Raises:
        ConfigError: It is no run, still runs, or the changes are wrong or would change the result.
    """
    record = manifest.read(run_dir)
    alive = record["status"] == "running" and record.get("platform", {}).get("host") == platform.node()
    if alive and record.get("process") != os.getpid() and _lives(record.get("process")):
        raise ConfigError(f"{run_dir} cannot be resumed: it is still running, as process {record['process']}.")
    path = run_dir / "config.yaml"
    before: Any = OmegaConf.load(path)
    after = OmegaConf.create(OmegaConf.to_container(before))
    for key, value in typed.items():
        OmegaConf.update(after, key, value, force_add=True)
    old, new = flat(OmegaConf.to_container(before)), flat(OmegaConf.to_container(after))
    for key in (key for key, value in old.items() if value and key.rpartition(".")[2] in RUN_CODE):
        if typed.get(key) != old[key]:
            raise ConfigError(f"{run_dir} runs code of its own: if you trust it, type {key}={_typed(old[key])} again.")
    changed = {key: [old.get(key), new.get(key)] for key in sorted(old | new) if old.get(key) != new.get(key)}
    resolved: Any = OmegaConf.to_container(after)
    if faults := find_faults(resolved, record.get("choices") or {}):
        raise ConfigError("\n".join(faults))
    constant = new.get("trainer.lr_scheduler_type") == "constant"  # the others also warm up by a share of the steps
    told = {key: pair for key, pair in changed.items() if key not in HARMLESS and not _longer(key, pair, constant)}
    if told and not allow_changes:
        listed = ", ".join(f"{key} from {a} to {b}" for key, (a, b) in told.items())
        raise ConfigError(
            f"{run_dir} cannot be resumed with {listed}: the result would be neither run's. Leave that out, start a "
            "run of its own, or type resume.allow_changes=true, which is recorded."
        )
    if record["status"] == "completed" and not any(_longer(key, pair, constant=True) for key, pair in changed.items()):
        return False
    if changed:
        temporary = path.with_name(".config.yaml")
        temporary.write_text(OmegaConf.to_yaml(after), encoding="utf-8")
        temporary.replace(path)
    resumes = [*record.get("resumes", []), {"status": record["status"], "changed": changed}]
    manifest.update(run_dir, status="resumed", resumes=resumes)
    return True


def _typed(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value).lower()


def _longer(key: str, pair: list[Any], constant: bool) -> bool:
    """Whether a change only goes on for longer, along a schedule that does not depend on the length."""
    old, new = pair
    numbers = all(isinstance(value, int | float) and value > 0 for value in pair)
    return constant and key in LENGTHS and numbers and new > old


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted path."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _lives(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True
