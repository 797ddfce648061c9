"""One SFT and one DPO job beside the TRL CLI: `python benchmarks/train.py`.

Same model, rows, order, seed, steps, threads (one) and LoRA; float32; no evaluation. CPU seconds are read from outside
when a side logs its first and its last step, so that neither reports on itself. A comparison whose losses differ in the
first four digits is void.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

import measure

from runner.arithmetic import arithmetic
from runner.embedded import materialise

LORA = {"r": 16, "alpha": 32}
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
JOBS = {"sft": {"batch": 4, "lr": 2e-4}, "dpo": {"batch": 2, "lr": 5e-5}}


def write_rows(folder: Path, rows: list[dict], columns: list[str]) -> Path:
    """Write the rows that both sides read."""
    folder.mkdir()
    lines = [json.dumps({key: row[key] for key in columns}) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def runner_command(job: str, data: Path, out: Path, steps: int) -> list[str]:
    """Return our command."""
    return [
        *(
            sys.executable,
            "-m",
            "runner",
            f"trainer={job}",
            "dataset=local",
            f"dataset.path={data}",
            "dataset.eval=null",
        ),
        *("samples.rows=0", f"output_dir={out}", f"trainer.max_steps={steps}", "trainer.logging_steps=1"),
        *(f"trainer.per_device_train_batch_size={JOBS[job]['batch']}", f"trainer.learning_rate={JOBS[job]['lr']}"),
        *("trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.max_length=512"),
        *(f"peft.r={LORA['r']}", f"peft.lora_alpha={LORA['alpha']}", "trainer.save_strategy=no"),
    ]


def trl_command(job: str, data: Path, out: Path, steps: int, *, checkpointing: bool) -> list[str]:
    """Return the TRL CLI's command."""
    return [
        *(str(Path(sys.executable).with_name("trl")), job, "--model_name_or_path", str(materialise())),
        *("--dataset_name", str(data), "--output_dir", str(out), "--max_steps", str(steps), "--logging_steps", "1"),
        *("--per_device_train_batch_size", str(JOBS[job]["batch"]), "--learning_rate", str(JOBS[job]["lr"])),
        *("--lr_scheduler_type", "constant", "--max_length", "512", "--dtype", "float32", "--use_cpu", "true"),
        *("--use_peft", "--lora_r", str(LORA["r"]), "--lora_alpha", str(LORA["alpha"]), "--lora_dropout", "0.0"),
        *("--lora_target_modules", "all-linear", "--bf16", "false", "--seed", "42", "--save_strategy", "no"),
        *("--gradient_checkpointing", str(checkpointing).lower(), "--eval_strategy", "no", "--report_to", "none"),
    ]


def losses(output: str, out: Path) -> list[float]:
    """Return the loss of every step to four digits, which is what TRL prints."""
    if (out / "metrics.jsonl").exists():
        logs = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [float(f"{log['loss']:.4g}") for log in logs if "loss" in log]
    return [float(f"{float(x):.4g}") for x in re.findall(r"'loss': '?([\d.eE+-]+)", output)]


def main() -> None:
    """Print one table per job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--job", choices=list(JOBS), nargs="+", default=list(JOBS))
    arguments = parser.parse_args()
    rows, _ = arithmetic(train_rows=arguments.rows, eval_rows=10, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        for job in arguments.job:
            columns = ["prompt", "completion"] if job == "sft" else ["prompt", "chosen", "rejected"]
            data = write_rows(Path(scratch, job), rows, columns)
            compare(job, data, Path(scratch), arguments.runs, arguments.steps)


def compare(job: str, data: Path, scratch: Path, runs: int, steps: int) -> None:
    """Run both sides in turn and print the table of one job."""
    sides = ["runner", "trl", "trl, its defaults"]
    costs: dict[str, list[measure.Cost]] = {side: [] for side in sides}
    seen: dict[str, list[float]] = {}
    for turn in range(runs + 1):
        for side in sides:
            out = scratch / "out"
            shutil.rmtree(out, ignore_errors=True)
            command = (
                runner_command(job, data, out, steps)
                if side == "runner"
                else trl_command(job, data, out, steps, checkpointing=side != "trl")
            )
            cost = measure.run(command, env=THREADS, cwd=scratch, mark=r"'loss'|step \d+/")
            seen[side] = losses(cost.output, out)
            if turn:  # the first turn warms the disk
                costs[side].append(cost)
    if not seen["runner"] or seen["runner"] != seen["trl"]:
        sys.exit(f"void: the losses differ\nrunner {seen['runner']}\ntrl    {seen['trl']}")
    print(f"\n{job}: losses of both sides {seen['runner']}\n")
    print("| | runner | TRL CLI | ratio | TRL CLI, its defaults | ratio |\n|---|---|---|---|---|---|")
    step = {s: median((cost.last - cost.marked) / (steps - 1) for cost in costs[s]) for s in sides}
    figures = {
        f"CPU s in all ({steps} steps)": {s: measure.middle(costs[s], "cpu") for s in sides},
        "CPU s before the first step": {s: measure.middle(costs[s], "marked") - step[s] for s in sides},
        "CPU s per step": step,
        "peak memory, MB": {s: measure.middle(costs[s], "memory") for s in sides},
    }
    for name, of in figures.items():
        ours, theirs, stock = (of[side] for side in sides)
        digits = 2 if "per step" in name else 1
        shown = [f"{value:.{digits}f}" for value in (ours, theirs, stock)]
        print(f"| {name} | {shown[0]} | {shown[1]} | {ours / theirs:.2f} | {shown[2]} | {ours / stock:.2f} |")


if __name__ == "__main__":
    main()
