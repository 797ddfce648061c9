"""``python -m runner.freeze RUN_DIR NAME``: make a run's config a recipe, and its metrics what to expect of it."""

import argparse
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from runner import compose, manifest
from runner.config import CONF, changes, flat, group_names, put
from runner.errors import ConfigError

OWN = {"output_dir", "expect", "check_expected", "probe"}  # of each run


def main() -> None:
    """Write the recipe and say how to run it; exit code 2 where that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m runner.freeze", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("name", help="of the recipe: lower case, with underscores")
    parser.add_argument("--tolerance", type=float, default=0.05, help="share by which a metric may differ")
    parser.add_argument("--config-dir", help="your own options, as the run had them; the recipe is written there")
    given = parser.parse_args()
    try:
        path = freeze(given.run_dir, given.name, tolerance=given.tolerance, config_dir=given.config_dir)
    except ConfigError as error:
        sys.stderr.write(f"runner.freeze: {error}\n")
        sys.exit(2)
    sys.stdout.write(f"{path}\n{shlex.join(compose.command([f'experiment={given.name}'], given.config_dir))}\n")


def freeze(
    run_dir: Path, name: str, folder: Path | None = None, *, tolerance: float = 0.05, config_dir: str | None = None
) -> Path:
    """Write the shortest recipe that composes to a run's config, with the run's command and result as its header.

    Args:
        run_dir: The run.
        name: Of the recipe.
        folder: Of recipes; None: that of ``config_dir``, or of the options that come with the runner.
        tolerance: Share of a final metric by which another run's may differ (``expect``).
        config_dir: A folder of the person's own options.

    Raises:
        ConfigError: The name is taken or no name, or no recipe composes to this config.
    """
    folder = folder or Path(config_dir or CONF) / "experiment"
    path = folder / f"{name}.yaml"
    if not name.isidentifier() or not name.islower():
        raise ConfigError(f"{name} cannot name a recipe: take lower case letters, digits and underscores.")
    if taken := [one for one in (path, CONF / "experiment" / path.name) if one.exists()]:  # the latter goes before
        raise ConfigError(f"experiment={name} exists already, in {taken[0]}, and stays. Choose another name.")
    record = manifest.read(run_dir)
    wanted = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    wanted = {key: value for key, value in wanted.items() if key not in OWN}
    choices = _choices(record.get("choices") or {})
    chosen = [f"{group}={option}" for group, option in choices.items()]
    base = flat(compose.compose(chosen, config_dir=config_dir, check=False).config)
    leaves = {key: value for key, value in flat(wanted).items() if base.get(key) != value}
    if leaves.get("trainer.seed") == wanted["seed"]:
        del leaves["trainer.seed"]  # follows from the seed
    tree: dict[str, Any] = {}
    if choices:
        tree["defaults"] = [{f"override /{group}": option} for group, option in choices.items()]
    for key, value in leaves.items():
        put(tree, key, value)
    if metrics := _telling(record):
        tree["expect"] = {key: _around(value, tolerance) for key, value in metrics.items()}
    body = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
    folder.mkdir(parents=True, exist_ok=True)
    header = _header(record, shlex.join(compose.command([f"experiment={name}"], config_dir)))
    path.write_text(f"# @package _global_\n{header}{body}", encoding="utf-8")
    try:
        made = compose.compose([f"experiment={name}", compose.searchpath(folder.parent, config_dir or CONF)]).config
        if different := changes(wanted, {key: value for key, value in made.items() if key not in OWN}):
            raise ConfigError(
                f"{run_dir} cannot be frozen: no recipe can say {', '.join(different)}, such as a key or a term that "
                "was taken out on the command line."
            )
    except ConfigError:
        path.unlink()
        raise
    return path


def _choices(made: dict[str, str]) -> dict[str, str]:
    """Return the choices of a run that are not the defaults, and that a recipe can make."""
    default = compose.compose([]).choices
    return {
        group: option
        for group, option in made.items()
        if group != "experiment" and group.partition("@")[0] in group_names() and default.get(group) != option
        and option not in ("None", "null")
    }  # fmt: skip


def unexpected(config: dict[str, Any], metrics: Mapping[str, float | None]) -> list[str]:
    """Return what of a recipe's ``expect`` a run's final metrics do not meet, one sentence each."""
    found = {name: value for name, value in metrics.items() if value is not None}
    return [
        f"{name} is {found.get(name, 'missing')}, expected {low:g} to {high:g}"
        for name, (low, high) in (config.get("expect") or {}).items()
        if not low <= found.get(name, math.nan) <= high
    ]


def _around(value: float, tolerance: float) -> list[float]:
    """Return the lowest and highest value that are taken for the same."""
    reach = max(abs(value) * tolerance, 1e-3)
    digits = 3 - math.floor(math.log10(reach))
    return [round(value - reach, digits), round(value + reach, digits)]


def _telling(record: dict[str, Any]) -> dict[str, float]:
    """Return the metrics on held-out rows that say how good a model is; one that is null was no finite number."""
    clocks = ("eval_runtime", "eval_samples", "eval_steps", "eval_num_tokens")
    found = {key: value for key, value in (record.get("metrics") or {}).items() if isinstance(value, int | float)}
    return {key: value for key, value in found.items() if key.startswith("eval_") and not key.startswith(clocks)}


def _header(record: dict[str, Any], command: str) -> str:
    result = ", ".join(f"{key} {value:.4g}" for key, value in _telling(record).items())
    started = (record.get("timeline") or [{}])[0].get("time", "")[:10]
    data = ((record.get("data") or {}).get("train") or {}).get("fingerprint") or ""
    return (
        f"# Frozen from a run of {started}, which gave {result or 'no metrics'}.\n"
        f"# Train rows {data[:12] or 'unknown'}, result {(record.get('result_sha256') or 'unknown')[:12]} (sha256).\n"
        f"# {command}\n"
    )


if __name__ == "__main__":
    main()
