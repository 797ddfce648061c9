"""The memory that a check foresees beside what a run takes: `python benchmarks/memory.py`.

Short runs of the embedded model on sums, each in a process of its own, whose peak is what the system counted. Answers
that are sampled are all as long as they may be, because that is what the check reckons with.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import measure

TRAINERS = {
    "sft": ["trainer.per_device_train_batch_size=16"],
    "dpo": ["trainer.per_device_train_batch_size=8"],
    "grpo": ["trainer.per_device_train_batch_size=16", "trainer.generation_kwargs={min_new_tokens:32}"],
    "ppo": ["trainer.per_device_train_batch_size=16", "trainer.generation_kwargs={min_new_tokens:32}"],
}
SETUPS = {
    "full": ["peft=none", "trainer.learning_rate=1e-6"],
    "lora": ["peft=lora"],
    "lora+nf4": ["peft=lora", "quantization=nf4"],
}
COMMON = ["dataset.train_rows=64", "dataset.eval=null", "trainer.max_steps=2", "trainer.save_strategy=no"]
THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Print a row of the table for every cell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trainer", choices=list(TRAINERS), nargs="+", default=list(TRAINERS))
    parser.add_argument("--setup", choices=list(SETUPS), nargs="+", default=list(SETUPS))
    asked = parser.parse_args()
    print("| trainer | weights | estimate, MB | measured, MB | ratio |\n|---|---|---|---|---|")
    for trainer in asked.trainer:
        for setup in asked.setup:
            estimate, found = cell([f"trainer={trainer}", *TRAINERS[trainer], *SETUPS[setup], *COMMON])
            row = f"| {trainer} | {setup} | {estimate / 1e6:.0f} | {found / 1e6:.0f} | {estimate / found:.2f} |"
            print(row, flush=True)


def cell(overrides: list[str]) -> tuple[float, float]:
    """Return the bytes that a check foresees, and those that the run took."""
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch, "check.json")
        measure.run([sys.executable, "-m", "runner.check", *overrides, f"check.json={told}"], env=THREADS)
        out = Path(scratch, "run")
        cost = measure.run([sys.executable, "-m", "runner", *overrides, f"output_dir={out}"], env=THREADS)
        return json.loads(told.read_text())["memory"]["peak"], cost.memory * 2**20


if __name__ == "__main__":
    main()
