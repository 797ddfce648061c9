"""Rows tokenized beside TRL's own preparation of them: `python benchmarks/tokenizing.py`.

Sums, or the rows of --path. Each side prepares the same rows for SFT and for DPO with the embedded model's tokenizer
and one thread, in turn; neither keeps anything from a run before, and for neither Python searches the libraries for
garbage, as it does not in a run of ours. Token ids that differ make the comparison void.

`--growth` shows how the cost of a row grows with their number and length instead: it should not.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import datasets
import trl

from runner import data, embedded, lean, models, prepared, tokens, views

JOBS = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}


def main() -> None:
    """Print a row of the table for each job and size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--path", help="a file or folder of rows, instead of sums")
    parser.add_argument("--job", choices=list(JOBS), nargs="+", default=list(JOBS))
    parser.add_argument("--growth", action="store_true")
    asked = parser.parse_args()
    datasets.disable_progress_bars()
    lean.settle()
    tokenizer = models.load_tokenizer(name_or_path=str(embedded.materialise()))
    if asked.growth:
        grow(tokenizer)
        return
    print(
        "| job | rows | ours, rows per CPU s | from the disk | TRL, rows per CPU s | ratio |\n|---|---|---|---|---|---|"
    )
    for job in asked.job:
        for count in asked.rows:
            compare(job, splits_of(job, count, asked.path), tokenizer, asked.runs)


def splits_of(job: str, count: int, path: str | None) -> data.Splits:
    """Return rows for a job."""
    source: dict[str, Any] = {"path": path, "train": f"train[:{count}]"} if path else {
        "generator": "arithmetic", "train_rows": count, "eval_rows": 10, "max_value": 999
    }  # fmt: skip
    loaded = data.load_splits(reads=views.row_kind(job), run_seed=0, eval=None, **source)
    return data.Splits(loaded.train, None, [], loaded.report)


def compare(job: str, splits: data.Splits, tokenizer: Any, runs: int) -> None:
    """Let both sides prepare the same rows in turn, and print what they took."""
    cls, config = JOBS[job]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = config(output_dir=scratch, use_cpu=True, bf16=False, max_length=None)
        bare = cls.__new__(cls)  # only what its preparation of rows reads
        bare.__dict__.update(_tokenizer=tokenizer, completion_only_loss=True, chat_template=None)
        more = (False, None) if job == "sft" else ()

        def ours() -> Any:
            fitted, _ = tokens.fit_splits(
                splits, tokenizer, reads=views.row_kind(job), max_length=None, too_long="drop", trainer=job
            )
            return prepared.choose_rows(fitted, arguments, trainer=job)[0]

        def theirs() -> Any:
            return cls._prepare_dataset(bare, splits.train, tokenizer, arguments, *more, "train")

        times: dict[str, list[float]] = {"ours": [], "again": [], "trl": []}
        for turn in range(runs):
            datasets.config.HF_DATASETS_CACHE = Path(scratch, str(turn))
            made = {}
            for side, prepare in {"ours": ours, "again": ours, "trl": theirs}.items():
                times[side].append(seconds(prepare, made, side))
            columns = made["ours"].column_names
            if any(made[side].select_columns(columns).to_list() != made["ours"].to_list() for side in ("again", "trl")):
                sys.exit(f"void: the token ids of {job} differ")
    speed = {side: len(splits.train) / median(taken) for side, taken in times.items()}
    shown = " | ".join(f"{speed[side]:,.0f}" for side in ("ours", "again", "trl"))
    print(f"| {job} | {len(splits.train):,} | {shown} | {speed['ours'] / speed['trl']:.1f} |", flush=True)


def grow(tokenizer: Any) -> None:
    """Print what a row costs, of few and many, of short and long ones."""
    print("| rows | tokens of a row | read, CPU µs a row | tokenized | from the disk |\n|---|---|---|---|---|")
    for count, words in ((1_000, 60), (10_000, 60), (100_000, 60), (1_000, 950), (1_000, 3_950)):
        with tempfile.TemporaryDirectory() as scratch:
            datasets.config.HF_DATASETS_CACHE = Path(scratch)
            file, made = Path(scratch, "rows.jsonl"), {}
            with file.open("w") as lines:
                for number in range(count):
                    answer = " ".join(str((number * word) % 10) for word in range(words // 2))
                    lines.write(json.dumps({"prompt": f"{number}", "completion": answer}) + "\n")

            def read(file: Path = file) -> data.Splits:
                return data.load_splits(reads="sft", run_seed=0, path=str(file), train="train", eval=None)

            def fit(made: dict[str, Any] = made) -> Any:
                options = {"max_length": None, "too_long": "drop", "trainer": "sft"}
                return tokens.fit_splits(made["read"], tokenizer, reads="sft", **options)

            taken = [seconds(read, made, "read"), seconds(fit, made, "fit"), seconds(fit, made, "again")]
            length = made["fit"][1]["train"]["tokens"] / count
            shown = " | ".join(f"{1e6 * one / count:.0f}" for one in taken)
            print(f"| {count:,} | {length:,.0f} | {shown} |", flush=True)


def seconds(prepare: Callable[[], Any], made: dict[str, Any], side: str) -> float:
    """Return the CPU seconds that a side takes."""
    start = time.process_time()
    made[side] = prepare()
    return time.process_time() - start


if __name__ == "__main__":
    main()
