"""Runs that are killed, filled up and resumed until they are done: `python benchmarks/faults.py`.

Every run is a process of its own, forked from one that has imported everything, on tiny random models, with dropout.
It is killed up to three times, then left alone, and must end with the weights and metrics of a run that was never
interrupted. How it is interrupted takes turns:

- SIGKILL at a random moment of the time that the whole run takes;
- SIGKILL while a checkpoint is being written;
- SIGTERM at a random moment, which lets the step end and saves;
- a disk that is full at a random moment (a small tmpfs, which needs root; else it is left out, and that is said).

`--ranks` runs two processes each (launch=ddp), and kills a random one of them at a random moment of the training.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

TRAINERS = ["sft", "dpo", "grpo", "reward", "kto", "rloo", "ppo"]
WAYS = ["SIGKILL, any moment", "SIGKILL, in a save", "SIGTERM, any moment", "full disk"]
RANKS = "SIGKILL of one of two ranks, any moment"
KILLED = 5  # exit code of a run that lost a rank
STEPS = 8
ROOM = 48 << 20  # bytes of the small disk


# ---- runs ---------------------------------------------------------------------------------------------------------


def begin(trainer: str, model: Path, run_dir: Path, way: str) -> None:
    """Make the directory of a run."""
    from test_run import BATCH, SMALL, extras

    from runner import compose
    from runner.__main__ import write_run

    composed = compose.compose(
        [
            *(f"trainer={trainer}", f"model.name_or_path={model}", *SMALL, *BATCH, *extras(trainer)),
            *(f"trainer.max_steps={STEPS}", "trainer.logging_steps=3", "trainer.learning_rate=1e-2"),
            *("trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.save_total_limit=2"),
            *("trainer.eval_strategy=steps", "trainer.eval_steps=4", "peft.lora_dropout=0.1", f"output_dir={run_dir}"),
            *(["launch=ddp", "launch.processes=2"] if way == RANKS else []),
        ]
    )
    run_dir.mkdir(parents=True)
    write_run(run_dir, composed.config, composed.choices, [])


def fork(run_dir: Path) -> int:
    """Start, or go on with, a run in a process of its own and return its number."""
    if number := os.fork():
        return number
    code = 1
    try:
        with (run_dir.parent / f"{run_dir.name}.log").open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = _run(run_dir)
    finally:
        os._exit(code)


def _run(run_dir: Path) -> int:
    import logging
    import traceback

    from runner import launch, manifest, resume
    from runner.errors import RunPreempted, RunStopped
    from runner.run import run

    logging.basicConfig(level=logging.INFO, force=True)
    try:
        if manifest.read(run_dir)["status"] == "created" or resume.prepare(run_dir, {}, allow_changes=False):
            node = read_launch(run_dir)
            launch.launch(run_dir, node) if launch.is_needed(node) else run(run_dir)
    except (RunPreempted, SystemExit) as ended:  # the latter outside of training
        return int(ended.code or 0)
    except RunStopped as ended:
        return 3 if "disk full" in str(ended) else KILLED if "was killed by SIGKILL" in str(ended) else 1
    except BaseException:  # noqa: BLE001  a child of a fork must not return into its parent's code
        with contextlib.suppress(OSError):  # the log is on the same full disk
            traceback.print_exc()
            sys.stderr.flush()
        return 4 if "No space left" in traceback.format_exc() else 1
    return 0


def read_launch(run_dir: Path) -> dict[str, Any]:
    """Return what a run's config says of its processes."""
    import yaml

    return yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["launch"]


def result(run_dir: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the digest of a run's weights, and its metrics without what clocks say."""
    from runner.replay import CLOCKS

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    told = [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in lines]
    return json.loads((run_dir / "manifest.json").read_text())["result_sha256"], told


# ---- faults -------------------------------------------------------------------------------------------------------


def wait(process: int) -> int:
    """Return the exit code of a process; that of a killed one is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def ended(process: int, seconds: float, sign: Any = lambda: False) -> bool:
    """Wait until a process ends, a time is over or there is a sign; tell whether it ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not sign():
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        time.sleep(0.001)
    return False


def writes(run_dir: Path) -> bool:
    """Tell whether a checkpoint is being written."""
    newest = max((run_dir / "checkpoints").glob("checkpoint-*"), key=lambda path: path.stat().st_ctime, default=None)
    return newest is not None and not (newest / "complete.json").exists()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Make a folder a disk of its own, of ``ROOM`` bytes."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def interrupt(way: str, run_dir: Path, seconds: float, chance: random.Random) -> str | None:
    """Go on with a run and interrupt it once; return how it ended, or None if it came to its end.

    Args:
        way: One of ``WAYS``.
        run_dir: The run.
        seconds: What a whole run takes, or the training of one in several processes.
        chance: Random numbers.
    """
    for path in (run_dir / "ranks").glob("*.*"):  # of an earlier start
        path.unlink()
    process, moment = fork(run_dir), chance.uniform(0, seconds)
    if way == RANKS:
        found = ended(process, 300, lambda: len([*(run_dir / "ranks").glob("*.begun")]) == 2) or ended(process, moment)
        with contextlib.suppress(ProcessLookupError):  # it is over already
            if not found:
                os.kill(int((run_dir / "ranks" / f"{chance.randrange(2)}.pid").read_text()), signal.SIGKILL)
        code = wait(process)
        return {0: None, KILLED: "killed"}.get(code, f"failed with {code}: {last_line(run_dir)}")
    if way == "full disk":
        ended(process, moment)
        ballast = run_dir.parent / "ballast"
        free = shutil.disk_usage(run_dir).free
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            file.write(bytes(max(0, free - chance.randrange(1 << 20))))
        code = wait(process)
        ballast.unlink()
        return None if code == 0 else "stopped: disk full" if code in (3, 4) else f"failed: {last_line(run_dir)}"
    if way == "SIGKILL, in a save":
        found = ended(process, 10 * seconds, lambda: writes(run_dir))
        found = found or ended(process, chance.uniform(0, 0.03))
    else:
        found = ended(process, moment)
    if not found:
        os.kill(process, signal.SIGTERM if "SIGTERM" in way else signal.SIGKILL)
    code = wait(process)
    known = {0: None, -9: "killed", 143: "preempted", -15: "preempted"}  # -15: before it could heed it
    return known.get(code, f"failed with {code}: {last_line(run_dir)}")


def last_line(run_dir: Path) -> str:
    """Return the last line that a run said."""
    return run_dir.with_name(f"{run_dir.name}.log").read_text(encoding="utf-8").splitlines()[-1]


def campaign(lane: int, given: Any, model: Path, folder: Path) -> list[dict[str, Any]]:
    """Run this lane's share of the runs and return what became of each."""
    whole: dict[str, tuple[Any, float]] = {}
    found = []
    for number in range(lane, given.runs, given.lanes):
        way, trainer = given.ways[number % len(given.ways)], TRAINERS[number // len(given.ways) % len(TRAINERS)]
        if trainer not in whole:
            run_dir = folder / f"{trainer}-{lane}"
            begin(trainer, model, run_dir, way)
            start = time.time()
            assert wait(fork(run_dir)) == 0, f"see {run_dir}.log"
            took = time.time() - start
            if way == RANKS:
                begun, saved = (max(path.stat().st_mtime for path in run_dir.glob(pattern))
                                for pattern in ("ranks/*.begun", "checkpoints/*/complete.json"))  # fmt: skip
                took = saved - begun
            whole[trainer] = result(run_dir), took
        expected, seconds = whole[trainer]
        chance, place, ends = random.Random(number), folder / f"{number}", []
        with small_disk(place) if way == "full disk" else contextlib.nullcontext():
            run_dir = place / "run"
            while not ends:  # one that was over before its moment came is begun anew
                shutil.rmtree(run_dir, ignore_errors=True)
                begin(trainer, model, run_dir, way)
                while len(ends) < given.kills and (how := interrupt(way, run_dir, seconds, chance)):
                    ends.append(how)
            code = wait(fork(run_dir)) if len(ends) == given.kills else 0
            same = code == 0 and result(run_dir) == expected
            log = (place / "run.log").read_text()
            found.append({"trainer": trainer, "way": way, "ends": ends, "same": same})
            found[-1] |= {"from": log.count("Going on from /"), "damaged": log.count("cannot be used")}
            if not same:
                shutil.copytree(place, folder / f"{number}-parted")
        shutil.rmtree(place)
        sys.stderr.write(f"{number + 1}: {found[-1]}\n")
    return found


def show(found: list[dict[str, Any]]) -> None:
    """Print what became of the runs, by the way they were interrupted."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for one in found:
        rows[one["way"]].update(
            {"runs": 1, "interrupted": len(one["ends"]), "resumed": one["from"], "unfinished": one["damaged"]}
        )
        rows[one["way"]].update({"same": one["same"], "failed": sum("failed" in end for end in one["ends"])})
    total: Counter[str] = sum(rows.values(), Counter())
    columns = ["runs", "interrupted", "resumed", "unfinished", "failed", "same"]
    heads = ["runs", "interruptions", "went on from a checkpoint", "unfinished checkpoints passed over",
             "failed otherwise", "ended as if uninterrupted"]  # fmt: skip
    sys.stdout.write(f"| | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}\n")
    for name, row in [*rows.items(), ("all", total)]:
        sys.stdout.write(f"| {name} | {' | '.join(str(row[column]) for column in columns)} |\n")


def main() -> None:
    """Run all lanes and print the table; exit code 1 if any run parted from its uninterrupted twin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time")
    parser.add_argument("--kills", type=int, default=3, help="interruptions of a run, at most")
    parser.add_argument("--ranks", action="store_true", help="runs of two processes")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    given = parser.parse_args()
    given.ways = [RANKS] if given.ranks else given.ways
    if WAYS[-1] in given.ways and not (os.geteuid() == 0 and sys.platform == "linux"):
        given.ways = [way for way in given.ways if way != WAYS[-1]]
        sys.stderr.write("The full disk is left out: a small disk can only be mounted by root, on Linux.\n")
    import torch
    import trl  # noqa: F401  so that no run has to import it
    from tiny import save_tiny

    from runner import ppo, run  # noqa: F401  nor these

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    model, lanes = save_tiny(folder / "model"), []
    for lane in range(given.lanes):
        if not (process := os.fork()):
            code = 1
            try:
                found = campaign(lane, given, model, folder)
                (folder / f"lane{lane}.json").write_text(json.dumps(found))
                code = 0
            finally:
                os._exit(code)
        lanes.append(process)
    if any([wait(process) for process in lanes]):  # noqa: C419  all are waited for
        sys.exit(f"A lane failed, see above and {folder}")
    found = [one for lane in range(given.lanes) for one in json.loads((folder / f"lane{lane}.json").read_text())]
    show(found)
    if not all(one["same"] for one in found):
        sys.exit(f"Runs parted; they are kept in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
