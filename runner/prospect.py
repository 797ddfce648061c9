"""The model, the length and the memory of a run that is checked; and a first step, where it is asked for."""

import copy
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from runner import console, engines, estimate, foresight, hardware, manifest, reach, trainers
from runner.callbacks import duration
from runner.checkup import Check, Passed, need, say, size, table
from runner.findings import Finding, percent


def check_model(done: Check) -> dict[str, Any]:
    """Count the model, its adapter and its value function on the meta device."""
    need(done, "model.", "value_model.")
    if done.arguments is None:
        raise Passed("it needs rows and a tokenizer")
    for key in reach.reward_models(done.config["reward"]) if done.reads == "prompt" else ():
        if f"{key}.name_or_path" in done.absent:
            say(f"  {key} is not counted: it is not here")
    done.model, done.copies = foresight.count_models(
        done.config, tokenizer=done.tokenizer, absent=done.absent, **_shape(done)
    )
    found = done.model
    share = found.trainable / found.parameters
    table({
        "parameters": f"{found.parameters:,}, weights {size(found.weights)}",
        "trainable": f"{found.trainable:,}, {percent(share)}",
        **{f"  {module}": f"{count:,}" for module, count in found.by_module.items()},
        **{name: size(held) for name, held in done.copies.items()},
    })  # fmt: skip
    longest = done.audit["train"]["longest"] + (getattr(done.arguments, "max_completion_length", None) or 0)
    if found.context and longest > found.context:
        text = f"sequences of {longest} tokens are longer than the model's context of {found.context}."
        done.add(Finding("context", text))
    return {**asdict(found), "further_models": done.copies}


def _shape(done: Check) -> dict[str, Any]:
    return {"trainer": done.trainer, "arguments": done.arguments, "audit": done.audit["train"]}


def check_plan(done: Check) -> dict[str, Any]:
    """Count steps, tokens, evaluations and checkpoints."""
    if done.arguments is None:
        raise Passed("it needs rows and a tokenizer")
    arguments, train = done.arguments, done.audit["train"]
    prompts = train["rows"] - train["dropped"]
    trainers.refuse(arguments, prompts=prompts, adapted=bool(done.config["peft"]))
    plan = done.plan = estimate.plan_run(done.trainer, arguments, audit=train, evaluates=done.rows.eval is not None)
    online = done.reads == "prompt"
    most = "at most " if online else ""
    what = "answers" if online else "packed sequences" if getattr(arguments, "packing", False) else "rows"
    limit = done.config["trainer"].get("save_total_limit")
    stay = plan.checkpoints if limit is None else min(limit, plan.checkpoints)
    engine = engines.chosen(done.config["launch"])
    held = estimate.checkpoint_bytes(done.model, arguments.optim) if done.model else 0
    each = f", {size(held)} each" if held else ""
    table({
        "processes": f"{done.processes}" + (f", which split the model ({engine})" if engine else ""),
        "steps": f"{plan.steps} optimizer steps, {plan.epochs:.3g} epochs",
        "per step": f"{plan.sequences} {what}, {most}{plan.tokens_per_step:,.0f} tokens on average",
        "in all": f"{most}{plan.tokens:,.0f} tokens",
        "evaluations": plan.evaluations,
        "checkpoints": f"{plan.checkpoints}, of which {stay} stay{each}",
    })  # fmt: skip
    if plan.sequences > prompts and not online:
        text = f"a step reads {plan.sequences} rows and there are {prompts}: an epoch is one step."
        done.add(Finding("few_rows", text))
    free, wanted = done.facts.get("reach", {}).get("free_bytes"), (stay + 1) * held  # one more, before the oldest goes
    if free is not None and wanted > free:
        text = f"{stay + 1} checkpoints take {size(wanted)} in {done.composed.run_dir}, and {size(free)} are free. "
        text += "Type another output_dir=..., or a smaller trainer.save_total_limit=..."
        done.add(Finding("disk", text))
    return {**asdict(plan), "checkpoint_bytes": held}


def check_memory(done: Check) -> dict[str, Any]:
    """Estimate what one process holds at its worst moment, and whether the device has it."""
    if done.model is None or done.plan is None:
        raise Passed("it needs rows, a tokenizer and the model's config")
    device = hardware.device_type(use_cpu=done.arguments.use_cpu)
    answered = {"samples": done.config["samples"], "held_out": len(done.rows.held_out), "launch": done.config["launch"]}
    parts, work = foresight.foresee_memory((done.model, done.copies), **answered, **_shape(done))
    table({name: size(held) for name, held in parts.items() if held and name != "peak"})
    there = hardware.memory_bytes(device)
    say(f"  peak of a process, about {size(parts['peak'])}" + (f" of {size(there)} ({device})" if there else ""))
    if there and parts["peak"] > there:
        times = None if done.config.get("global_batch_size") else done.arguments.gradient_accumulation_steps
        change = estimate.nearest_fit(done.model, work, there, times=times)
        less = "Choose a smaller model, or shorter rows (trainer.max_length)."
        hint = f"This would fit: {change}" if change else less
        text = f"a process needs about {size(parts['peak'])}, and {device} has {size(there)}. {hint}"
        done.add(Finding("memory", text))
    return {**parts, "device": device, "device_bytes": there}


def probe(done: Check) -> dict[str, Any]:
    """Take optimizer steps on the longest rows and one evaluation step, with the weights.

    Of each two, of PPO two rollouts, the second is timed: the first also pays for what is done once.
    """
    console.quieten()
    if done.plan is None or done.failed:
        raise Passed("there is something to correct first")
    if engines.chosen(done.config["launch"]):
        raise Passed("it takes its step in one process, and this model is split over several")
    config, plan = copy.deepcopy(done.config), done.plan
    steps = getattr(done.arguments, "steps_per_rollout", 1)
    config["trainer"] |= {
        **{"save_strategy": "no", "eval_strategy": "no", "report_to": "none", "max_steps": 2 * steps},
        **dict.fromkeys(("eval_on_start", "push_to_hub", "load_best_model_at_end"), False),
        **{"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None},
        "gradient_accumulation_steps": done.arguments.gradient_accumulation_steps,
        **({"total_episodes": None} if done.trainer == "ppo" else {}),
    }
    rows = _longest(done, plan.sequences)
    if (held_out := done.rows.eval) is not None:
        held_out = held_out.select(range(min(len(held_out), done.arguments.per_device_eval_batch_size)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        arguments, _ = trainers.build_arguments(config["trainer"], folder, evaluates=held_out is not None)
        online = done.reads == "prompt"
        scoring = trainers.load_rewards(config, columns=set(rows.column_names), online=online)
        model, adapter = trainers.load_model(done.trainer, done.tokenizer, config, arguments)
        parts = {"adapter": adapter, "arguments": arguments, "tokenizer": done.tokenizer, "scoring": scoring}
        trainer = trainers.build_trainer(config, model=model, train=rows, held_out=held_out, run_dir=folder, **parts)
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.train()
        step, evaluation = (clock.ends[-1] - clock.ends[steps - 1]) / steps, 0.0
        for _ in range(2 if held_out is not None else 0):
            start = time.monotonic()
            trainer.evaluate()
            evaluation = time.monotonic() - start
    held = manifest.peak_memory()
    peak = held.get("device") or held.get("host", 0)
    whole = plan.steps * step
    table({
        "a step": f"{step:.2f} s, on the longest rows",
        "an evaluation step": f"{evaluation:.2f} s" if held_out is not None else "none",
        "peak": f"{size(peak)}, estimated {size(done.facts['memory']['peak'])}",
        "the whole": f"at most about {duration(whole)}, without evaluations",
    })  # fmt: skip
    return {"step_seconds": step, "evaluation_seconds": evaluation, "peak_bytes": peak, "training_seconds": whole}


class _Clock(TrainerCallback):
    """Notes when optimizer steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.ends.append(time.monotonic())


def _longest(done: Check, count: int) -> Any:
    """Return as many of the longest rows as a step reads, or a rollout of PPO."""
    count = getattr(done.arguments, "rollout_rows", count)
    counted = done.rows.ids["train"].select_columns("counts").to_list()
    order = sorted(range(len(counted)), key=lambda row: -max(one["total"] for one in counted[row]["counts"]))
    return done.rows.train.select(order[:count])
