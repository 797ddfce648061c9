"""A step of ours beside plain TRL's where there is a GPU: `python benchmarks/gpu.py`.

A model of the shape of Qwen2.5-0.5B with random weights is trained with LoRA on the same rows, in bf16 where the device
has it, by both sides in turn, each in a process of its own. A step lasts from its begin to the next one's, the work of
the device awaited; memory is the most that the device had allocated. Steps count once the guards have looked at the
first ten, up to the last three of ours, which run under a profiler, for the ten kernels that took longest. First losses
that differ by a hundredth make a comparison void.

On a machine without a GPU it runs, too, and shows nothing:
`--layers 2 --width 64 --length 32 --vocabulary 1 --steps 6`.
"""

import argparse
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

WATCHED = 11  # steps until the guards look no more
PROFILED = 3  # the last ones
JOBS = {"sft": 32, "dpo": 16, "grpo": 32}  # sequences, pairs or answers of a step
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


def main() -> None:
    """Print a row of the table for each job, and what its steps consist of."""
    asked = arguments()
    if asked.side:
        sys.stdout.write("\n" + json.dumps(measure(asked)))
        return
    print("| job | s per step: ours / TRL's | peak memory, MB: ours / TRL's |\n|---|---|---|")
    tops = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"), asked)
        for job in asked.job:
            write_rows(Path(folder, job), job, asked.length)
            found: dict[str, list[dict[str, Any]]] = {"runner": [], "trl": []}
            for turn in range(asked.runs):
                for side, results in found.items():
                    results.append(in_process(folder, job, side, f"{side}{turn}"))
            step, memory = ({s: median(one[key] for one in found[s]) for s in found} for key in ("step", "memory"))
            ratios = [f"{of['runner']:.{n}f} / {of['trl']:.{n}f} = {of['runner'] / of['trl']:.2f}"
                      for of, n in ((step, 3), (memory, 0))]  # fmt: skip
            print(f"| {job} | {' | '.join(ratios)} |", flush=True)
            first = {side: results[0]["losses"][:3] for side, results in found.items()}
            if not first["trl"] or any(abs(a - b) > 0.01 for a, b in zip(*first.values(), strict=True)):
                print(f"void: the losses differ: {first}")
            tops[job] = found["runner"][-1]["top"]
    for job, top in tops.items():
        print(f"\n{job}, ms of {PROFILED} steps:\n" + "\n".join(f"  {share:8.1f}  {name}" for name, share in top))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(JOBS), nargs="+", default=list(JOBS))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help=f"the first {WATCHED} and last {PROFILED} do not count")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, about")
    parser.add_argument("--tokenizer", help="a folder; by default the embedded model's")
    for hidden in ("--side", "--folder", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps < PROFILED + 3:
        parser.error(f"--steps {given.steps} is too few: the last {PROFILED} are profiled. Type {PROFILED + 3} or more")
    return given


def in_process(folder: str, job: str, side: str, out: str) -> dict[str, Any]:
    """Return what a side measures of itself."""
    words = [*sys.argv[1:], "--side", side, "--job", job, "--folder", folder, "--out", f"{folder}/{job}-{out}"]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{job}, {side}:\n{(done.stdout + done.stderr)[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def make_model(folder: Path, asked: argparse.Namespace) -> None:
    """Write a model with random weights and a tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from runner import embedded, models

    tokenizer = models.load_tokenizer(name_or_path=asked.tokenizer or str(embedded.materialise()))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    width = asked.width
    shape = {"hidden_size": width, "intermediate_size": 38 * width // 7, "num_hidden_layers": asked.layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 448)}
    shape |= {"vocab_size": max(asked.vocabulary, len(tokenizer)), "tie_word_embeddings": True}
    config = Qwen2Config(dtype="bfloat16", **shape, **heads)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_rows(folder: Path, job: str, length: int) -> None:
    """Write rows of about so many tokens, a third of them the answer's; a prompt alone has half as many."""
    folder.mkdir()
    draw = random.Random(0)
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(256):
            words = draw.choices("0123456789", k=length // 2)
            cut = len(words) * 2 // 3
            said = {"prompt": words[:cut], "completion": words[cut:], "chosen": words[cut:], "rejected": words[:-cut]}
            columns = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "grpo": ("prompt",)}
            turns = {
                name: [{"role": "user" if name == "prompt" else "assistant", "content": " ".join(said[name])}]
                for name in columns[job]
            }
            file.write(json.dumps(turns) + "\n")


def common(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the trainer's arguments that both sides get."""
    import torch

    from runner import hardware

    (job,) = asked.job
    has_gpu = torch.cuda.is_available()
    fields: dict[str, Any] = {
        **{"max_steps": asked.steps, "per_device_train_batch_size": JOBS[job], "learning_rate": 1e-4},
        **{"lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no"},
        **{"gradient_checkpointing": False, "bf16": has_gpu and hardware.has_bf16("cuda"), "seed": 42},
    }
    if job != "grpo":
        return {**fields, "max_length": 2 * asked.length}
    return {**fields, "max_completion_length": asked.length // 4, "num_generations": 8, "beta": 0.04}


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Train on one side; return seconds of a step, bytes at the peak, losses, and the longest operations."""
    import torch
    import transformers

    has_gpu, ours = torch.cuda.is_available(), asked.side == "runner"
    kinds = [torch.profiler.ProfilerActivity.CUDA] if has_gpu else []
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *kinds])
    began: list[float] = []
    step = transformers.Trainer.training_step

    def timed(self: Any, *inputs: Any, **more: Any) -> Any:
        if has_gpu:
            torch.cuda.synchronize()
        began.append(time.perf_counter())
        if ours and len(began) == asked.steps - PROFILED + 1:
            profiler.start()
        return step(self, *inputs, **more)

    transformers.Trainer.training_step = timed
    losses = train_ours(asked) if ours else train_trl(asked)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if ours:
        profiler.stop()
    counted = began[: asked.steps - PROFILED + 1]
    seconds = [after - before for before, after in itertools.pairwise(counted[min(WATCHED, len(counted) - 2) :])]
    top = []
    if ours:
        time_of, kind = ("self_device_time_total", "CUDA") if has_gpu else ("self_cpu_time_total", "CPU")
        events = [one for one in profiler.key_averages() if one.device_type.name == kind and not one.is_user_annotation]
        events.sort(key=lambda one: -getattr(one, time_of))
        top = [(one.key[:100], getattr(one, time_of) / 1e3) for one in events[:10]]
    peak = torch.cuda.max_memory_allocated() if has_gpu else host
    return {"step": median(seconds), "memory": peak / 2**20, "losses": losses, "top": top}


def train_ours(asked: argparse.Namespace) -> list[float]:
    """Train as `python -m runner` does; return the losses."""
    from runner import compose
    from runner.__main__ import write_run
    from runner.run import run

    (job,) = asked.job
    fields = [f"trainer.{key}={json.dumps(value)}" for key, value in common(asked).items() if key != "seed"]
    words = [f"trainer={job}", *fields, "peft=lora", f"model.name_or_path={asked.folder}/model", "model.dtype=bfloat16"]
    words += ["dataset=local", f"dataset.path={asked.folder}/{job}", "dataset.eval=null", "samples.rows=0"]
    words += [f"output_dir={asked.out}", *(["reward=length"] if job == "grpo" else [])]
    composed = compose.compose(words)
    run_dir = compose.claim(composed.run_dir)
    write_run(run_dir, composed.config, composed.choices, words)
    run(run_dir)
    logs = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [log["loss"] for log in logs if "loss" in log]


def train_trl(asked: argparse.Namespace) -> list[float]:
    """Train with TRL's own trainer; return the losses."""
    import torch
    import trl
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (job,) = asked.job
    more: dict[str, Any] = {}
    if job == "grpo":
        from runner.rewards import length

        more = {"reward_funcs": length}
    trainer = getattr(trl, f"{job.upper()}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(f"{asked.folder}/model", dtype=torch.bfloat16),
        args=getattr(trl, f"{job.upper()}Config")(output_dir=asked.out, report_to="none", **common(asked)),
        train_dataset=load_dataset("json", data_files=f"{asked.folder}/{job}/train.jsonl", split="train"),
        processing_class=AutoTokenizer.from_pretrained(f"{asked.folder}/model"),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
        **more,
    )
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    main()
