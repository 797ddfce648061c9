"""One SFT and one DPO job beside the TRL CLI and LLaMA-Factory: `python benchmarks/train.py`.

Same model, rows, order, seed, steps, threads (one) and LoRA; float32; no evaluation. CPU seconds are read from outside
when a side logs its first and its last step, so that none reports on itself. A comparison whose losses differ in the
first four digits is void. LLaMA-Factory gets an environment of its own, with the versions that it asks for.

`--orders FOLDER` takes the rows of a folder, at batch 8, in random order and grouped by length, both once as upstream
reads them and once with what the rows of a batch begin with read once.
"""

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

import measure
import torch

from runner.arithmetic import arithmetic
from runner.embedded import cache_dir, materialise

FACTORY = "llamafactory==0.9.5"
SEED = 42
LORA = {"r": 16, "alpha": 32}
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
PEERS = ["TRL CLI", "LLaMA-Factory"]
JOBS = {"sft": {"batch": 4, "lr": 2e-4}, "dpo": {"batch": 2, "lr": 5e-5}}


def write_rows(folder: Path, rows: list[dict], columns: list[str]) -> Path:
    """Write the rows that both sides read."""
    folder.mkdir()
    lines = [json.dumps({key: row[key] for key in columns}) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def runner_command(job: str, data: Path, out: Path, steps: int, *more: str) -> list[str]:
    """Return our command, with more overrides."""
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
        *more,
    ]


def trl_command(job: str, data: Path, out: Path, steps: int, *, checkpointing: bool) -> list[str]:
    """Return the TRL CLI's command."""
    return [
        *(str(Path(sys.executable).with_name("trl")), job, "--model_name_or_path", str(materialise())),
        *("--dataset_name", str(data), "--output_dir", str(out), "--max_steps", str(steps), "--logging_steps", "1"),
        *("--per_device_train_batch_size", str(JOBS[job]["batch"]), "--learning_rate", str(JOBS[job]["lr"])),
        *("--lr_scheduler_type", "constant", "--max_length", "512", "--dtype", "float32", "--use_cpu", "true"),
        *("--use_peft", "--lora_r", str(LORA["r"]), "--lora_alpha", str(LORA["alpha"]), "--lora_dropout", "0.0"),
        *("--lora_target_modules", "all-linear", "--bf16", "false", "--seed", str(SEED), "--save_strategy", "no"),
        *("--gradient_checkpointing", str(checkpointing).lower(), "--eval_strategy", "no", "--report_to", "none"),
    ]


def factory_command(job: str, data: Path, out: Path, steps: int, *, checkpointing: bool) -> list[str]:
    """Return LLaMA-Factory's command, with its rows and config beside ours; its environment is made on first use."""
    folder = cache_dir() / f"benchmark-{FACTORY.replace('==', '-')}"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pins = [FACTORY, f"torch=={version('torch').split('+')[0]}"]
        python = str(folder / "bin/python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
        for name in ("torchvision", "torchaudio"):  # built for CUDA, they do not fit every torch; text needs neither
            if subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False).returncode:
                subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", name], check=True)
                next(folder.glob("lib/python*/site-packages")).joinpath("torchaudio.py").touch()
        (folder / "ready").touch()
    answers = {"response": "completion"} if job == "sft" else {"chosen": "chosen", "rejected": "rejected"}
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED)).tolist()  # that of the others
    texts = [
        {"system": rows[n]["prompt"][0]["content"], "prompt": rows[n]["prompt"][-1]["content"]}
        | {key: rows[n][key][0]["content"] for key in answers.values()}
        for n in order
    ]
    (data / "texts.json").write_text(json.dumps(texts))
    about = {
        "file_name": "texts.json",
        "ranking": job == "dpo",
        "columns": {"system": "system", "prompt": "prompt", **answers},
    }
    (data / "dataset_info.json").write_text(json.dumps({"texts": about}))
    config = {
        **{"stage": job, "do_train": True, "model_name_or_path": str(materialise()), "template": "smollm2"},
        **{"dataset": "texts", "dataset_dir": str(data), "cutoff_len": 512, "output_dir": str(out)},
        **{"finetuning_type": "lora", "lora_rank": LORA["r"], "lora_alpha": LORA["alpha"], "lora_target": "all"},
        **{"lora_dropout": 0.0, "per_device_train_batch_size": JOBS[job]["batch"], "learning_rate": JOBS[job]["lr"]},
        **{"max_steps": steps, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no"},
        **{"seed": SEED, "disable_shuffling": True, "disable_gradient_checkpointing": not checkpointing},
        **{"use_cpu": True, "bf16": False, "fp16": False, "flash_attn": "sdpa"},
        **{"report_to": "none", "disable_tqdm": True, "gradient_accumulation_steps": 1, "pref_beta": 0.1},
    }
    (data / "factory.yaml").write_text(json.dumps(config))
    return [str(folder / "bin/llamafactory-cli"), "train", str(data / "factory.yaml")]


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
    parser.add_argument("--peer", choices=PEERS, nargs="+", default=PEERS)
    parser.add_argument("--checkpointing", action="store_true", help="of activations, on all sides")
    parser.add_argument("--orders", help="a file or folder of rows for SFT: compare two orders of them instead")
    parser.add_argument("--layers", type=int, default=30, help="of the model that reads them, to wait less")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.orders:
            compare_orders(Path(arguments.orders).resolve(), Path(scratch), arguments.rows, arguments.layers)
            return
        rows, _ = arithmetic(train_rows=arguments.rows, eval_rows=10, seed=0)
        for job in arguments.job:
            columns = ["prompt", "completion"] if job == "sft" else ["prompt", "chosen", "rejected"]
            data = write_rows(Path(scratch, job), rows, columns)
            compare(job, data, Path(scratch), arguments)


def compare(job: str, data: Path, scratch: Path, asked: argparse.Namespace) -> None:
    """Run all sides in turn and print the table of one job."""
    runs, steps, peers = asked.runs, asked.steps, asked.peer
    sides = ["runner", *peers]
    costs: dict[str, list[measure.Cost]] = {side: [] for side in sides}
    seen: dict[str, list[float]] = {}
    for turn in range(runs + 1):
        for side in sides:
            out = scratch / "out"
            shutil.rmtree(out, ignore_errors=True)
            if side == "runner":
                checkpointing = f"trainer.gradient_checkpointing={str(asked.checkpointing).lower()}"
                command = runner_command(job, data, out, steps, checkpointing)
            else:
                write = factory_command if side == "LLaMA-Factory" else trl_command
                command = write(job, data, out, steps, checkpointing=asked.checkpointing)
            cost = measure.run(command, env=THREADS, cwd=scratch, mark=r"'loss'|step \d+/")
            seen[side] = losses(cost.output, out)
            if turn:  # the first turn warms the disk
                costs[side].append(cost)
    for side in sides:
        if not seen[side] or seen[side] != seen["runner"]:
            print(f"void: the losses differ\nrunner {seen['runner']}\n{side} {seen[side]}")
    print(f"\n{job}: our losses {seen['runner']}\n")
    print("| | runner |" + "".join(f" {side} | ratio |" for side in peers) + "\n|---|---|" + "---|---|" * len(peers))
    step = {s: median((cost.last - cost.marked) / (steps - 1) for cost in costs[s]) for s in sides}
    figures = {
        f"CPU s in all ({steps} steps)": {s: measure.middle(costs[s], "cpu") for s in sides},
        "CPU s before the first step": {s: measure.middle(costs[s], "marked") - step[s] for s in sides},
        "CPU s per step": step,
        "peak memory, MB": {s: measure.middle(costs[s], "memory") for s in sides},
    }
    for name, of in figures.items():
        digits = 2 if "per step" in name else 1
        beside = "".join(f" {of[side]:.{digits}f} | {of['runner'] / of[side]:.2f} |" for side in peers)
        print(f"| {name} | {of['runner']:.{digits}f} |{beside}", flush=True)


def compare_orders(data: Path, scratch: Path, rows: int, layers: int) -> None:
    """Train an epoch of the same rows in both orders, shared or not, and print the tokens of a CPU second."""
    model, speed = scratch / "model", {}
    shutil.copytree(materialise(), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers, "layer_types": None}))
    for order, shares in itertools.product(("random", "group_by_length"), ("false", "true")):
        out = scratch / f"{order}-{shares}"
        more = [
            f"share_prefixes={shares}",
            f"model.name_or_path={model}",
            f"dataset.train=train[:{rows}]",
            "trainer.num_train_epochs=1",
            "trainer.per_device_train_batch_size=8",
        ]
        command = runner_command("sft", data, out, -1, *more, f"trainer.train_sampling_strategy={order}")
        cost = measure.run(command, env=THREADS, cwd=scratch, mark=r"step \d+/")
        told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        tokens = [line["num_tokens"] for line in told if "num_tokens" in line]
        speed[order, shares] = (max(tokens) - tokens[0]) / (cost.last - cost.marked)
        ratio = speed[order, shares] / speed["random", "false"]
        print(f"{order}, share_prefixes={shares}: {speed[order, shares]:.0f} tokens a CPU s, {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
