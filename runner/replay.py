"""``python -m runner.replay RUN_DIR``: run an experiment again, and say whether it comes out the same."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from runner import compose, manifest, reference
from runner.config import changes, find_faults, flat
from runner.errors import ConfigError, RunPreempted, RunStopped
from runner.safety import RUN_CODE, find_dangers

CLOCKS = ("seconds", "time/", "step_time", "train_runtime", "train_samples_per", "train_steps_per", "eval_runtime",
          "eval_samples_per", "eval_steps_per")  # fmt: skip
GIVEN = ("versions", "packages", "hardware.device", "hardware.cpu", "hardware.accelerators", "hardware.torch_threads",
         "chosen", "data", "weights")  # fmt: skip
WORKERS = {"trainer.dataset_num_proc", "trainer.dataloader_num_workers"}

logger = logging.getLogger(__name__)


def main() -> None:
    """Replay one run and exit with 0 if it was identical, 1 if not, 2 if it could not be replayed."""
    parser = argparse.ArgumentParser(prog="python -m runner.replay", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="a completed run")
    parser.add_argument("--output-dir", type=Path, help="where the replay goes; by default beside the run")
    parser.add_argument("keys", nargs="*", help=f"another {' or '.join(sorted(WORKERS))}, as key=number")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        difference = replay(given.run_dir, given.output_dir, **compose.read_values(given.keys))
    except (ConfigError, RunStopped, RunPreempted) as error:
        sys.stderr.write(f"runner.replay: {error}\n")
        sys.exit(2)
    sys.stdout.write(f"{difference or 'identical'}\n")
    sys.exit(1 if difference else 0)


def replay(run_dir: Path, output_dir: Path | None = None, **workers: int) -> str | None:
    """Run a completed run's config again in a new directory.

    Args:
        run_dir: The run.
        output_dir: The new directory.
        workers: Another number of processes that prepare data, by key of the config.

    Returns:
        Where metrics or weights part for the first time; None when the two are identical.

    Raises:
        ConfigError: The run is not completed, it runs code that its directory cannot opt into, or another key is to
            change.
    """
    from runner.__main__ import start, write_run

    record = manifest.read(run_dir)
    if record["status"] != "completed":
        raise ConfigError(f"{run_dir} cannot be compared with: its status is {record['status']}, not completed.")
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    if code := [key for key, value in flat(config).items() if value and key.rpartition(".")[2] in RUN_CODE]:
        raise ConfigError(f"{run_dir} cannot be replayed: {', '.join(code)} runs code that only typing it can allow.")
    if wrong := sorted(workers.keys() - WORKERS):
        raise ConfigError(
            f"A replay cannot change {', '.join(wrong)}: it would be another run. It can {sorted(WORKERS)}."
        )
    for key, number in workers.items():
        config["trainer"][key.removeprefix("trainer.")] = number
    if faults := find_dangers(config, set()) or find_faults(config, record.get("choices") or {}):
        raise ConfigError("\n".join(faults))
    config["check_expected"] = False  # it is compared with the run, not with its recipe
    again = compose.claim(output_dir or (there := run_dir.resolve()).with_name(f"{there.name}_replay"))
    write_run(again, config, record.get("choices") or {}, record.get("overrides") or [])
    before = manifest.read(again)
    for line in differences(record, before, [name for name in GIVEN if name in before]):
        logger.warning("Not as it was: %s", line)
    manifest.update(again, chosen={k: v for k, v in (record.get("chosen") or {}).items() if k == reference.FIELD})
    start(again)
    repeated = manifest.read(again)
    for line in differences(record, repeated, [name for name in GIVEN if name not in ("versions", "packages")]):
        logger.warning("Not as it was: %s", line)
    return part(run_dir, again, record, repeated)


def differences(one: Any, other: Any, names: list[str]) -> Iterator[str]:
    """Yield what two manifests say otherwise under some dotted names."""
    for key, (old, new) in changes(one, other).items():
        if any(f"{key}.".startswith(f"{name}.") for name in names):
            yield f"{key} was {old} and is {new}"


def part(one: Path, other: Path, record: Any, repeated: Any) -> str | None:
    """Return where two runs part for the first time, in metrics, then in weights; None if nowhere."""
    lines = [list(map(json.loads, (path / "metrics.jsonl").read_text().splitlines())) for path in (one, other)]
    for old, new in zip(*lines, strict=False):
        for key in sorted((old | new).keys()):
            if not key.startswith(CLOCKS) and old.get(key) != new.get(key):
                by = ""
                if isinstance(old.get(key), int | float) and isinstance(new.get(key), int | float):
                    by = f", by {abs(new[key] - old[key]):.3g}"
                return f"They part at step {old.get('step')}: {key} was {old.get(key)} and is {new.get(key)}{by}"
    if len(lines[0]) != len(lines[1]):
        return f"They part at the end: {len(lines[0])} lines of metrics, and {len(lines[1])}"
    if record.get("result_sha256") != repeated.get("result_sha256"):
        return "All metrics are the same, and the final weights are not"
    return None


if __name__ == "__main__":
    main()
