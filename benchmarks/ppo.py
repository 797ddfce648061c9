"""PPO beside the last PPOTrainer of TRL (1.12): `python benchmarks/ppo.py`.

The same policy, reward model, prompts, batch, tokens, passes and LoRA, in float32 on one thread; every completion has
all its tokens on both sides. TRL runs in an environment of its own, made on first use. Sides take turns; a side is a
process per turn; its first rollout is not counted. CPU seconds are per rollout, by phase.

"trl, default" trains a LoRA policy and a whole value model, "trl, best" a LoRA value model that is wrapped by hand.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

BATCH, TOKENS, PASSES, SEED = 4, 32, 2, 42
LORA = {"r": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
OURS = {"adapter": "adapter", "shared": "shared", "separate": "separate"}
SIDES = [*OURS, "trl, default", "trl, best"]
PHASES = ["generate", "reward", "policy", "reference", "value", "optimise"]
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
QUESTIONS = [
    "Name three colours of the rainbow.",
    "Why is the sky blue? Answer in one short sentence that a child of five would understand.",
    "Write the opening line of a story about a lighthouse keeper who finds a letter in a bottle, and keep it calm.",
    "What is 17 plus 26?",
    "My train leaves at ten past nine, the walk to the station takes a quarter of an hour, and I want to buy a coffee "
    "on the way, which takes five minutes. When do I have to leave the house at the latest, and why?",
    "Give a synonym of 'happy'.",
    "Explain what a hash map is to someone who knows arrays but has never heard of hashing before.",
    "Summarise the following in one sentence: The committee met on Tuesday to discuss the budget of the library. After "
    "two hours it agreed to buy new chairs for the reading room, to keep the opening hours as they are, and to ask the "
    "city for money to mend the roof, which has been leaking since the storms of last winter.",
]


# ---- one side, in a process of its own --------------------------------------------------------------------------


class Clock:
    """CPU seconds of this process by phase and by rollout."""

    def __init__(self) -> None:
        self.rollouts: list[dict[str, float]] = []
        self.phases: dict[str, float] = defaultdict(float)
        self.start = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to a phase."""
        start = time.process_time()
        yield
        self.phases[name] += time.process_time() - start

    def wrap(self, function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name(*args)):
                return function(*args, **kwargs)

        return timed

    def tick(self) -> None:
        """End a rollout."""
        now = time.process_time()
        self.rollouts.append({**self.phases, "total": now - self.start})
        self.phases.clear()
        self.start = now


def worker(side: str, model: str, reward: str, steps: int, even: bool) -> None:
    """Train one side and print what it took."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    parts = {
        "tokenizer": tokenizer,
        "policy": AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        "reward": AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32),
        "peft": LoraConfig(task_type="CAUSAL_LM", **LORA),
        "prompts": [tokenizer.decode(ids) for ids in questions(tokenizer, even)],
        "rows": BATCH * max(steps, 2),
    }
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        common = {
            "output_dir": out,
            "per_device_train_batch_size": BATCH,
            "num_ppo_epochs": PASSES,
            "learning_rate": 1e-6,
            "seed": SEED,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        (run_ours if side in OURS else run_trl)(side, parts, common, steps, clock)
    counted = clock.rollouts[1:]
    mean = {
        key: sum(one.get(key, 0.0) for one in counted) / len(counted) for key in {k for one in counted for k in one}
    }
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    print(json.dumps({"cpu": mean, "memory": memory}))


def questions(tokenizer: Any, even: bool) -> list[list[int]]:
    """Return prompts as token ids, all of 32 tokens if they shall be even."""
    ids = [tokenizer(question)["input_ids"] for question in QUESTIONS]
    return [(one * 5)[:32] for one in ids] if even else ids


def run_ours(side: str, parts: dict[str, Any], common: dict[str, Any], steps: int, clock: Clock) -> None:
    """Train with our trainer; its own seconds per phase become CPU seconds."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from runner import rollout
    from runner.ppo import PPOConfig, PPOTrainer

    class Ticks(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                clock.phases.update({phase: logs.get(f"time/{phase}", 0.0) for phase in PHASES})
                clock.tick()

    rollout.clock = time.process_time
    prompts = (parts["prompts"] * parts["rows"])[: parts["rows"]]
    trainer = PPOTrainer(
        model=parts["policy"],
        args=PPOConfig(
            **common,
            value_mode=OURS[side],
            max_steps=steps * PASSES,
            max_completion_length=TOKENS,
            generation_kwargs={"min_new_tokens": TOKENS},
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        reward_funcs=parts["reward"],
        reward_processing_classes=parts["tokenizer"],
        processing_class=parts["tokenizer"],
        peft_config=parts["peft"],
        callbacks=[Ticks()],
    )
    clock.start = time.process_time()
    trainer.train()


def run_trl(side: str, parts: dict[str, Any], common: dict[str, Any], steps: int, clock: Clock) -> None:
    """Train with TRL's trainer, its functions timed; what no function accounts for is optimising."""
    import copy

    import torch
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.phases["optimise"] = time.process_time() - clock.start - sum(clock.phases.values())
            clock.tick()

    value = copy.deepcopy(parts["reward"])
    if side == "trl, best":
        value = inject_adapter_in_model(LoraConfig(**LORA), value)
        for name, parameter in value.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith("score"))
    reward, tokenizer = parts["reward"], parts["tokenizer"]
    timed = ppo_trainer.batch_generation
    ppo_trainer.batch_generation = clock.wrap(timed, lambda *args: "generate")
    timed = ppo_trainer.get_reward
    ppo_trainer.get_reward = clock.wrap(timed, lambda model, *args: "reward" if model is reward else "value")
    plain = ppo_trainer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return plain(*args, **kwargs)
        with clock.phase("reference"):
            return plain(*args, **kwargs)

    ppo_trainer.forward = forward
    ids = [tokenizer(prompt)["input_ids"] for prompt in parts["prompts"]]
    rows = Dataset.from_dict({"input_ids": (ids * parts["rows"])[: parts["rows"]]})
    tokenizer.padding_side = "left"
    trainer = PPOTrainer(
        args=PPOConfig(
            **common,
            total_episodes=steps * BATCH,
            response_length=TOKENS,
            temperature=1.0,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
        ),
        processing_class=tokenizer,
        model=parts["policy"],
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=parts["peft"],
        callbacks=[Ticks()],
    )
    clock.start = time.process_time()
    trainer.train()


# ---- all sides in turn ------------------------------------------------------------------------------------------


def trl_python() -> str:
    """Return the interpreter of an environment with TRL 1.12, made on first use."""
    from runner.embedded import cache_dir

    folder = cache_dir() / "benchmark-trl-1.12"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pins = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "peft", "accelerate")]
        pins += ["trl==1.12.0", f"datasets=={version('datasets')}"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True)
        (folder / "ready").touch()
    return str(python)


def make_reward_model(model: Path, folder: Path) -> Path:
    """Write a sequence classifier with one label on the model's layers, its head random."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(SEED)
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32).save_pretrained(folder)
    return folder


def main() -> None:
    """Run all sides in turn and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="rollouts of a turn; the first is not counted")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--even", action="store_true", help="prompts of one length: nothing to win by less padding")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        side, model, reward, steps = given.worker
        worker(side, model, reward, int(steps), given.even)
        return
    from runner.embedded import materialise

    found: dict[str, list[dict[str, Any]]] = {side: [] for side in given.sides}
    with tempfile.TemporaryDirectory() as scratch:
        model, trl = materialise(), trl_python()
        reward = make_reward_model(model, Path(scratch) / "reward")
        for _ in range(given.turns):
            for side in given.sides:
                command = [sys.executable if side in OURS else trl, str(Path(__file__).resolve())]
                command += [*(["--even"] if given.even else []), "--worker"]
                command += [side, str(model), str(reward), str(given.steps)]
                root = Path(__file__).resolve().parent.parent
                environment = {**os.environ, **THREADS, "PYTHONPATH": str(root)}
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                if done.returncode:
                    sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
    show(found)


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print medians over the turns, and ratios."""
    middle = {
        side: {key: median(one["cpu"].get(key, 0.0) for one in turns) for key in [*PHASES, "total"]}
        | {"memory": median(one["memory"] for one in turns)}
        for side, turns in found.items()
    }
    columns = [*PHASES, "total"]
    print(f"\n| CPU s per rollout | {' | '.join(columns)} | tokens per CPU s | peak MB |")
    print("|" + "---|" * (len(columns) + 3))
    for side, of in middle.items():
        numbers = " | ".join(f"{of[key]:.2f}" for key in columns)
        print(f"| {side} | {numbers} | {BATCH * TOKENS / of['total']:.1f} | {of['memory']:.0f} |")
    for theirs in ("trl, default", "trl, best"):
        for ours in OURS:
            if theirs in middle and ours in middle:
                cpu, memory = (middle[ours][key] / middle[theirs][key] for key in ("total", "memory"))
                print(f"{ours} / {theirs}: {cpu:.2f} of the CPU time, {memory:.2f} of the memory")


if __name__ == "__main__":
    main()
