"""A sweep of DPO trials beside Hydra's own and beside a shell loop of the TRL CLI: `python benchmarks/sweep.py`.

Same model, rows, steps and one thread. CPU seconds are those of a command with all its processes. What a step costs is
the difference of sweeps with many and few steps; what a trial costs beyond them, of many and few trials of few steps.
`trl dpo` in one process is its script run again and again, all imported once: what loading, TRL's constructors and
saving cost anybody, with nothing kept of a run but its weights.
The second part lets ASHA prune: it shows both tables, and how many optimizer steps each took. A pruner judges by the
first values, so these must tell: the rows are learnt in a few steps (a sum is better than no answer). Linux only.
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from train import THREADS, trl_command, write_rows

from runner.arithmetic import arithmetic
from runner.embedded import materialise

ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER: the server of the trials outlives the sweep by a moment
HYDRA = "import sys; from runner.__main__ import task; sys.argv[0] = 'runner'; task()"
BESIDE = ["hydra", "trl-once", "trl"]
TRL = """
import json, sys
from trl.scripts.dpo import main, make_parser
for words in map(json.loads, sys.argv[1:]):
    main(*make_parser().parse_args_and_config(words))
"""


def spend(commands: list[list[str]]) -> tuple[float, float]:
    """Run commands one after the other; return wall seconds, and CPU seconds of all that they started."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for command in commands:
        done = subprocess.run(command, env={**os.environ, **THREADS}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    wall = time.perf_counter() - start
    try:
        while True:
            os.wait()
    except ChildProcessError:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def keys(model: Path, data: Path, steps: int) -> list[str]:
    """Return what all trials of ours share."""
    return [
        *("trainer=dpo", f"model.name_or_path={model}", "dataset=local", f"dataset.path={data}", "dataset.eval=null"),
        *("samples.rows=0", f"trainer.max_steps={steps}", "trainer.logging_steps=1", "trainer.save_strategy=no"),
        *("trainer.per_device_train_batch_size=2", "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0"),
        *("trainer.max_length=512", "peft.r=16", "peft.lora_alpha=32", "trainer.learning_rate=5e-5"),
    ]


def swept(trials: int) -> str:
    """Return the values of beta."""
    return "trainer.beta=" + ",".join(f"{0.05 * (number + 1):.2f}" for number in range(trials))


def compare(model: Path, data: Path, folder: Path, trials: int, steps: int, runs: int, beside: list[str]) -> None:
    """Print what ours and those beside it cost, at the least of several runs."""
    few, short = max(2, trials // 4), max(1, steps // 4)

    def fresh() -> str:
        return f"hydra.sweep.dir={tempfile.mkdtemp(dir=folder)}"

    def ours(trials: int, steps: int) -> list[list[str]]:
        return [[sys.executable, "-m", "runner", "-m", *keys(model, data, steps), swept(trials), fresh()]]

    def hydras(trials: int, steps: int) -> list[list[str]]:
        words = [f"++{w}" if "." in w.partition("=")[0] else w for w in (*keys(model, data, steps), swept(trials))]
        return [[sys.executable, "-c", HYDRA, "-m", "hydra/sweeper=basic", *words, fresh()]]

    def loop(trials: int, steps: int) -> list[list[str]]:
        outs = [folder / f"trl_{steps}_{number}" for number in range(trials)]
        commands = [trl_command("dpo", data, out, steps, checkpointing=False) for out in outs]
        return [[*command, "--beta", f"{0.05 * (number + 1):.2f}"] for number, command in enumerate(commands)]

    def one_process(trials: int, steps: int) -> list[list[str]]:
        return [[sys.executable, "-c", TRL, *(json.dumps(command[2:]) for command in loop(trials, steps))]]

    ways: dict[str, Callable[[int, int], list[list[str]]]]
    ways = {"runner -m": ours}
    ways |= {"Hydra, one process": hydras} if "hydra" in beside else {}
    ways |= {"trl dpo, one process": one_process} if "trl-once" in beside else {}
    ways |= {"trl dpo, a loop": loop} if "trl" in beside else {}
    shapes = [(trials, steps), (trials, short), (few, short)]
    costs = [{name: [spend(way(*shape)) for shape in shapes] for name, way in ways.items()} for _ in range(runs)]
    found = {}
    for name in ways:
        least = [min((run[name][place] for run in costs), key=itemgetter(1)) for place in range(len(shapes))]
        (_, cpu), (_, shorter), (_, fewer) = least
        step = (cpu - shorter) / (trials * (steps - short))
        trial = (shorter - fewer) / (trials - few) - short * step
        found[name] = (*least[0], step, trial)
    print(f"{trials} DPO trials of {steps} steps   wall s   CPU s   of a step   of one more trial   ratio of CPU")
    for name, (wall, cpu, step, trial) in found.items():
        ratio = found["runner -m"][1] / cpu
        print(f"{name:<28} {wall:8.1f} {cpu:7.1f} {step:11.2f} {trial:19.2f} {ratio:14.2f}")


def prune(model: Path, data: Path, folder: Path, trials: int, steps: int) -> None:
    """Print the tables of a sweep without pruning and of one with it."""
    given = [
        *(*keys(model, data, steps)[:-1], "dataset.train=train[:-8]", "dataset.eval=train[-8:]"),
        *("trainer.eval_strategy=steps", f"trainer.eval_steps={max(1, steps // 8)}"),
        *("search=random", f"search.n_trials={trials}", "trainer.learning_rate=tag(log,interval(1e-6,3e-4))"),
    ]
    taken: dict[str, Any] = {}
    for pruner in ("none", "asha"):
        where = folder / f"pruner_{pruner}"
        command = [sys.executable, "-m", "runner", "-m", *given, f"search.pruner={pruner}", f"hydra.sweep.dir={where}"]
        wall, cpu = spend([command])
        about = json.loads((where / "sweep.json").read_text())
        rows = about["trials"]
        taken[pruner] = sum(row["steps"] for row in rows)
        print(f"\nsearch.pruner={pruner}: {taken[pruner]} steps, {wall:.1f} s, {cpu:.1f} CPU s, best {about['best']}")
        for row in rows:
            value = row["values"].get("eval_loss")
            shown = f"{value:.4f}" if value is not None else "-"
            print(f"  {row['number']:>3} {row['status']:<10} {shown:>8}  {row['steps']:>4} steps  {row['swept']}")
    print(f"\nsteps with asha / without: {taken['asha'] / taken['none']:.2f}")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--runs", type=int, default=1, help="of which the least counts")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--model", type=Path, help="folder of a model; by default the embedded one")
    parser.add_argument("--part", choices=["compare", "prune"], nargs="+", default=["compare", "prune"])
    parser.add_argument("--beside", choices=BESIDE, nargs="*", default=BESIDE)
    given = parser.parse_args()
    if given.trials < 3 or given.steps < 2:
        parser.error("at least three trials of two steps: figures are differences")
    ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), given.model or materialise()
        rows, _ = arithmetic(train_rows=given.rows, eval_rows=10, seed=0)
        data = write_rows(folder / "data", rows, ["prompt", "chosen", "rejected"])
        if "compare" in given.part:
            compare(model, data, folder, given.trials, given.steps, given.runs, given.beside)
        if "prune" in given.part:
            refusals = [{**row, "rejected": [{"role": "assistant", "content": "I cannot say."}]} for row in rows]
            data = write_rows(folder / "refusals", refusals, ["prompt", "chosen", "rejected"])
            prune(model, data, folder, 2 * given.trials, given.steps)


if __name__ == "__main__":
    main()
