"""What a run will take, before it runs: its steps and tokens, and the memory of its largest moment. Pure.

Bytes are those of one process. B sequences of a forward pass, L tokens of the longest, V entries of the vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

PROCESS = 610e6  # bytes of Python and its libraries, a tokenizer and rows, before any weights; measured on a CPU
CONTEXT = 870e6  # bytes that CUDA, kernels and cuBLAS hold beside the tensors; measured on an H200, CUDA 13
VOCABULARY_TILE, TOKEN_TILE = 32_768, 4_096  # of TRL's LM head.   Source: trl 1.16, trl/kernels/chunked_logprob.py
SAVES = 0.9  # of the cost of reading a batch as it is: above it, sharing beginnings does not pay
PPO_CELLS = 1 << 26  # logits that PPO holds at a time: actor_critic.HEAD_CELLS

# Bytes of optimizer state per trained number; every other optimizer of transformers keeps Adam's two floats.
STATES = {"sgd": 0, "adafactor": 0.1, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4, "paged_lion_32bit": 4}
EIGHT_BIT = 2  # both moments, a byte each
SAMPLER_COPIES = 4  # of the next token's logits


@dataclass(frozen=True)
class Plan:
    """How long a run is.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the rows.
        sequences: read in an optimizer step.
        tokens_per_step: on average; of an online trainer prompt and the longest answer, which is a bound.
        tokens: in all.
        evaluations: before, during and after training.
        checkpoints: that are written; ``save_total_limit`` of them stay.
    """

    steps: int
    epochs: float
    sequences: int
    tokens_per_step: float
    tokens: float
    evaluations: int
    checkpoints: int


def plan_run(trainer: str, arguments: Any, *, audit: dict[str, Any], evaluates: bool) -> Plan:
    """Return how long a run is, as transformers, TRL and our PPO will count.

    Args:
        trainer: its short name, such as ``dpo``.
        arguments: of the trainer.
        audit: of the train rows, see ``tokens.fit_lengths``.
        evaluates: whether there are held-out rows.

    Source: transformers 5.23, Trainer.set_initial_training_values and DefaultFlowCallback; trl 1.16, RepeatSampler
    """
    per_epoch, sequences = _steps_per_epoch(trainer, arguments, audit)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    length = audit["tokens"] / audit["sequences"]
    if audit.get("packed") and getattr(arguments, "packing", False):
        length = audit["tokens"] / audit["packed"]
    if online := answers_prompts(arguments):
        length += arguments.max_completion_length or 0
    sides = 1 if online else audit["sequences"] / (audit["rows"] - audit["dropped"])
    return Plan(
        steps=steps,
        epochs=steps / per_epoch,
        sequences=sequences,
        tokens_per_step=sequences * sides * length,
        tokens=steps * sequences * sides * length,
        evaluations=_evaluations(arguments, steps, per_epoch) if evaluates else 0,
        checkpoints=_times(arguments.save_strategy, arguments.save_steps, steps, per_epoch),
    )


def answers_prompts(arguments: Any) -> bool:
    """Tell whether a trainer answers its prompts itself."""
    return hasattr(arguments, "steps_per_generation") or hasattr(arguments, "rollout_rows")


def _steps_per_epoch(trainer: str, arguments: Any, audit: dict[str, Any]) -> tuple[int, int]:
    """Return the optimizer steps of an epoch, and the rows or answers that each reads."""
    rows = audit["rows"] - audit["dropped"]
    micro = arguments.per_device_train_batch_size * arguments.world_size
    accumulated = arguments.gradient_accumulation_steps
    if trainer == "ppo":
        return max(1, rows // arguments.rollout_rows * arguments.steps_per_rollout), arguments.mini_batch_rows
    if hasattr(arguments, "steps_per_generation"):
        groups = arguments.generation_batch_size // arguments.num_generations
        batches = rows // groups * arguments.steps_per_generation * getattr(arguments, "num_iterations", 1)
    else:
        rows = audit["packed"] if getattr(arguments, "packing", False) else rows
        batches = rows // micro if arguments.dataloader_drop_last else math.ceil(rows / micro)
    return max(1, math.ceil(batches / accumulated)), micro * accumulated


def _times(strategy: Any, every: float | None, steps: int, per_epoch: int) -> int:
    """Count how often something is done that is also done at the end of training."""
    strategy = str(getattr(strategy, "value", strategy))
    if strategy == "steps" and every:
        return math.ceil(steps / (every if every >= 1 else math.ceil(steps * every)))
    return math.ceil(steps / per_epoch) if strategy == "epoch" else 0


def _evaluations(arguments: Any, steps: int, per_epoch: int) -> int:
    during = _times(arguments.eval_strategy, arguments.eval_steps, steps, per_epoch)
    return int(arguments.eval_on_start) + max(1, during)  # the last one is done in any case


# ---------------------------------------------------------------- memory


class Shares(NamedTuple):
    """What a process holds of the parts of a training: 1 is all, 1/8 its part of eight, 0 none (it is on the host)."""

    weights: float = 1.0
    gradients: float = 1.0
    states: float = 1.0
    gathers: bool = False  # whether weights are gathered, layer by layer, to compute with them
    resharded: bool = True  # and given back after the forward pass


@dataclass(frozen=True)
class Model:
    """What a model that is to be trained is made of; numbers, and bytes where it says so.

    Attributes:
        parameters: of policy, adapters and value function.
        trainable: those that train; their gradients and what the optimizer keeps are float32.
        by_module: of the trainable ones, by the type of module.
        weights: bytes of all of them, as loaded.
        loading: bytes that loading takes beside them and gives back.
        kept: bytes that a forward pass holds for the backward pass, by token, with what is lost between them.
        kept_checkpointed: the same where activations are recomputed: every layer's input, and one layer.
        cache: bytes of a token's keys and values.
        vocabulary: entries.
        hidden: size of a token between the layers.
        head: of the output layer where it trains; its gradient is there from the start of the backward pass.
        tied: of it where it is the embedding, too, whose gradient comes last and is added to it.
        context: tokens that the model can read; 0 where it does not say.
        unit: bytes of the largest piece that is gathered at a time where weights are split: a layer, or the embedding.
        unpacked: bytes that are lost between what is kept where quantized weights are made whole, one after the other.
        per_token: as in ``read_together``, where it reads what rows have in common once; 0 where it does not.
    """

    parameters: int
    trainable: int
    by_module: dict[str, int]
    weights: float
    loading: float
    kept: float
    kept_checkpointed: float
    cache: float
    vocabulary: int
    hidden: int
    head: int
    context: int
    tied: int = 0
    unit: float = 0
    unpacked: float = 0
    per_token: int = 0


@dataclass(frozen=True)
class Work:
    """The largest moment of a training.

    Attributes:
        trainer: its short name.
        sequences: in a forward pass that has a backward pass.
        length: tokens of the longest, to which all are padded.
        scored: tokens of these sequences that meet the output layer.
        alike: tokens that sequences and the one before begin with, again and again: of the two of a pair, of a group.
        optimizer: as in ``trainer.optim``.
        checkpointing: whether activations are recomputed.
        accumulates: whether gradients are held through several passes.
        sampled: answers that are sampled at a time, 0 for none.
        sampled_length: tokens of their prompts and the longest answer.
        copies: bytes of further models: a reference, rewards.
        graphs: passes whose activations are held at a time.
        cuda: whether it runs there, where Triton's kernels score tokens in place.
        shares: what this process holds of the model, its gradients and its optimizer's states.
    """

    trainer: str
    sequences: int
    length: float
    scored: float
    alike: tuple[int, ...] = (0,)
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = False
    accumulates: bool = False
    sampled: int = 0
    sampled_length: float = 0
    copies: float = 0
    graphs: int = 1
    cuda: bool = False
    shares: Shares = Shares()  # noqa: RUF009  a tuple


def work_of(
    trainer: str, arguments: Any, *, audit: dict[str, Any], samples: dict[str, int], held_out: int, copies: float
) -> Work:
    """Return the largest moment of a training: the longest row's batch, or the sampling of answers.

    Args:
        trainer: its short name.
        arguments: of the trainer.
        audit: of the train rows, see ``tokens.fit_lengths``.
        samples: the config's node, of answers to held-out prompts.
        held_out: rows whose prompts are answered.
        copies: bytes of further models.
    """
    batch, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    answers = min(samples["batch_size"], samples["rows"], held_out) if trainer != "reward" else 0
    sampled, sampled_length = answers, audit["prompt_tokens"]["p99"] + samples["max_new_tokens"]
    sides = 2 if trainer in ("dpo", "reward", "orpo", "cpo") else 1
    sequences, length = sides * batch, audit["longest"]
    scored = min(sequences * audit["completion_tokens"]["p90"], sequences * length)
    scored += (sequences * length - scored) / 2 if trainer == "orpo" else 0  # it learns the chosen one's prompt, too
    graphs, packed, alike = 1, getattr(arguments, "packing", False), [audit.get("common", 0)]
    apart = packed or (audit.get("truncated") and getattr(arguments, "truncation_mode", "") == "keep_end")
    if answers_prompts(arguments):
        answer = arguments.max_completion_length or 0
        length = audit["longest"] + answer
        scored = batch * answer
        if trainer == "ppo":
            many, whole = arguments.rollout_forward_batch_size, accumulated == arguments.num_mini_batches == 1
            graphs = 2 if whole and arguments.use_cpu else 1
        else:
            many = batch * arguments.steps_per_generation
            groups, rest = divmod(many, arguments.num_generations)  # parts of groups are of other processes
            alike += [audit["longest"]] * (batch // min(batch, groups + 2 * (rest > 0)) - 1)  # batches are shuffled
        sampled, sampled_length = max(sampled, many), max(sampled_length, length)
    elif sides == 2:
        alike += [2 * length - audit.get("longest_pair", 2 * length)]
    elif packed:
        length = arguments.max_length
        scored = batch * length
    return Work(
        trainer=trainer, sequences=sequences, length=length, scored=scored, copies=copies, graphs=graphs,
        optimizer=str(getattr(arguments.optim, "value", arguments.optim)), accumulates=accumulated > 1,
        checkpointing=bool(arguments.gradient_checkpointing), sampled=sampled, sampled_length=sampled_length,
        cuda=not arguments.use_cpu, alike=(0,) if apart else tuple(alike),
    )  # fmt: skip


def shape_read(rows: int, size: int, alike: Sequence[int], per_token: int) -> tuple[int, int]:
    """Return the sequences that are read, and their length, where rows of one size begin alike; see ``Work``."""
    if not per_token:
        return rows, size
    alike = (list(alike) * rows)[:rows]
    together, width = read_together([size] * rows, alike, size=size, per_token=per_token, padded=False)
    return math.ceil(rows / together), width


def read_together(length: list[int], common: list[int], *, size: int, per_token: int, padded: bool) -> tuple[int, int]:
    """Return how many rows of a batch are best read as one sequence, and the tokens of the longest; 1 where none are.

    Args:
        length: (B,), tokens of the rows.
        common: (B,), tokens that each has in common with the row before.
        size: to which the rows are padded where each is read alone.
        per_token: what a token costs beside its attention, in tokens that it attends to.
        padded: whether any row is; where none is, a token's attention skips what comes after it.
    """
    rows = len(length)
    best = (SAVES * rows * size * (per_token + size / (1 if padded else 2)), 1, size)
    for together in range(2, rows + 1):
        starts = range(0, rows, together)
        width = max(sum(length[i : i + together]) - sum(common[i + 1 : i + together]) for i in starts)
        best = min(best, (len(starts) * width * (per_token + width), together, width))
    return best[1:]


def shares(node: dict[str, Any], processes: int, *, accumulates: bool) -> Shares:
    """Return what each of some processes holds under a ``launch`` node.

    Args:
        node: the config's ``launch``.
        processes: in all.
        accumulates: whether an optimizer step takes several backward passes.

    Source: arXiv:1910.02054 (ZeRO), fig. 1; accelerate 1.15, Accelerator.no_sync, by which FSDP2 holds the gradients
    whole between the passes of a step
    """
    part = 1 / processes
    if fsdp := node.get("fsdp"):
        if fsdp.get("cpu_offload"):
            return Shares(0, 0, 0, gathers=True, resharded=fsdp.get("reshard_after_forward") is not False)
        return Shares(part, 1 if accumulates else part, part, True, fsdp.get("reshard_after_forward") is not False)
    if deepspeed := node.get("deepspeed"):
        stage = deepspeed.get("zero_stage", 2)
        weights, gradients, states = (part if stage >= least else 1.0 for least in (3, 2, 1))
        states = 0 if deepspeed.get("offload_optimizer_device") in ("cpu", "nvme") else states
        weights = 0 if deepspeed.get("offload_param_device") in ("cpu", "nvme") else weights
        return Shares(weights, gradients, states, gathers=stage >= 3)
    return Shares()


def estimate_memory(model: Model, work: Work) -> dict[str, int]:
    """Return the bytes of each part, and ``peak``, what is held at the worst moment.

    The parts are not all held at once: activations go as gradients come, and sampling happens between steps.
    """
    kept, own = model.kept_checkpointed if work.checkpointing else model.kept, work.shares
    gathered = (2 * model.unit if own.resharded else model.weights) if own.gathers else 0  # the next beside the present
    gradients = 4 * model.trainable * own.gradients
    tokens = math.prod(shape_read(work.sequences, round(work.length), work.alike, model.per_token))
    parts = {
        "process": CONTEXT if work.cuda else PROCESS,
        "weights": model.weights * own.weights + gathered,
        "gradients": gradients,
        "optimizer": _states(work.optimizer) * model.trainable * own.states,
        "activations": kept * tokens * work.graphs,
        "logits": _logits(model, work),
        "unpacked weights": model.unpacked,
        "sampling": work.sampled * (model.cache * work.sampled_length + SAMPLER_COPIES * 4 * model.vocabulary),
        "other models": work.copies,
    }
    always = parts["process"] + parts["weights"] + parts["optimizer"] + parts["other models"]
    held = gradients if work.accumulates else 4 * model.head * own.gradients
    forward = parts["activations"] + parts["logits"] + parts["unpacked weights"] + held
    trains = always + max(forward, parts["gradients"] + 4 * model.tied * own.gradients, parts["sampling"])
    peak = max(trains, parts["process"] + parts["weights"] + model.loading)
    return {name: round(size) for name, size in {**parts, "peak": peak}.items()}


def checkpoint_bytes(model: Model, optimizer: str) -> int:
    """Return the bytes of a checkpoint: what trains, and what the optimizer keeps."""
    return round((4 + _states(optimizer)) * model.trainable)


def nearest_fit(model: Model, work: Work, limit: float, *, times: int | None) -> str | None:
    """Return what to type so that a training fits into ``limit`` bytes, the cheapest first; None if nothing helps.

    Args:
        model: What trains.
        work: What a step does.
        limit: Bytes.
        times: ``gradient_accumulation_steps``; None where it follows from ``global_batch_size``.
    """
    fits = (typed for typed, one, step in _savings(model, work, times) if estimate_memory(one, step)["peak"] <= limit)
    return " ".join(f"{key}={value}" for key, value in next(fits, {}).items()) or None


def _savings(model: Model, work: Work, times: int | None) -> Iterator[tuple[dict[str, str], Model, Work]]:
    """Yield what to type to hold less and less, with what then trains and what a step then does."""
    typed: dict[str, str] = {}
    if not work.checkpointing:
        typed["trainer.gradient_checkpointing"], work = "true", replace(work, checkpointing=True)
        yield typed, model, work
    sides = 2 if work.trainer in ("dpo", "reward", "orpo", "cpo") else 1
    rows, work = work.sequences // sides, replace(work, alike=work.alike[:sides])  # answers of a group will be shuffled
    while (each := work.sequences // 2 // sides) > 0:
        work = replace(work, sequences=work.sequences // 2, scored=work.scored / 2, accumulates=True)
        typed["trainer.per_device_train_batch_size"] = str(each)
        if times:
            typed["trainer.gradient_accumulation_steps"] = str(round(times * rows / each))
        yield typed, model, work
    if model.trainable == model.parameters:
        typed["peft"], few = "lora", round(0.03 * model.parameters)
        model, work = replace(model, trainable=few, head=0), replace(work, copies=0)
        yield typed, model, work
    if work.cuda and model.weights > 1.5 * model.parameters:
        yield typed | {"quantization": "nf4"}, replace(model, weights=0.6 * model.parameters), work


def _states(optimizer: str) -> float:
    """Return the bytes that an optimizer keeps of each number."""
    if optimizer.endswith("8bit"):
        return EIGHT_BIT
    return next((size for name, size in STATES.items() if optimizer.startswith(name)), 8.0)


def _logits(model: Model, work: Work) -> float:
    """Return the bytes of what is made of the last layer's output to score tokens."""
    if work.trainer == "reward":
        return 0
    if work.trainer == "ppo":
        return 4 * min(work.scored * model.vocabulary, PPO_CELLS) * 5  # logits, gradients, what entropy is made of
    cells = min(work.scored, TOKEN_TILE) * min(model.vocabulary, VOCABULARY_TILE)
    return 4 * cells * (1.5 if work.cuda else 8)  # in plain torch: scores, scaled, shifted, and their gradients
