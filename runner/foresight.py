"""What a run will hold in memory: its models, counted without their weights, and its largest moment."""

from collections.abc import Set
from dataclasses import replace
from typing import Any

from runner import adapters, estimate, hardware, models, prefix_sharing, reach, skeleton
from runner.config import build, given


def foresee_memory(
    counted: tuple[estimate.Model, dict[str, float]],
    *,
    samples: dict[str, int],
    held_out: int,
    launch: dict[str, Any],
    **shape: Any,
) -> tuple[dict[str, int], estimate.Work]:
    """Return the bytes of each part of a run and of its peak, in one process, and the work that they are of.

    Args:
        counted: What ``count_models`` gave.
        samples: The config's node, of answers to held-out prompts.
        held_out: Rows whose prompts are answered.
        launch: The config's node, of how processes share the model.
        shape: ``trainer``, ``arguments`` and ``audit``, as in ``count_models``.
    """
    (model, copies), arguments = counted, shape["arguments"]
    accumulates = arguments.gradient_accumulation_steps > 1
    shares = estimate.shares(launch, arguments.world_size, accumulates=accumulates)
    held = sum(size * (shares.weights if name == "reference" else 1) for name, size in copies.items())
    work = estimate.work_of(samples=samples, held_out=held_out, copies=held, **shape)
    recomputes = bool((launch.get("fsdp") or {}).get("activation_checkpointing"))
    work = replace(work, shares=shares, checkpointing=work.checkpointing or recomputes)
    return estimate.estimate_memory(model, work), work


def count_models(
    config: dict[str, Any],
    *,
    trainer: str,
    tokenizer: Any,
    arguments: Any,
    audit: dict[str, Any],
    absent: Set[str] = frozenset(),
) -> tuple[estimate.Model, dict[str, float]]:
    """Count the model that trains, with adapter and value function, and the bytes of the models beside it.

    Args:
        config: The run's config.
        trainer: The trainer's short name.
        tokenizer: The policy's.
        arguments: The trainer's.
        audit: Of the train rows, see ``tokens.fit_lengths``.
        absent: Keys of models that are not here, and are left out.

    Raises:
        ConfigError: A model's config cannot be read, or the adapter does not fit it.
    """
    adapter = adapters.peft_for(build(config["peft"]), trainer=trainer) if config["peft"] else None
    device = hardware.device_type(use_cpu=arguments.use_cpu)
    cast = trainer in ("orpo", "cpo") and (config["quantization"] or {}).get("load_in_8bit")  # by TRL, to float32
    frozen = bool(config["peft"] and arguments.bf16 and not cast)
    dtype = hardware.weights_dtype(config["model"].get("dtype", "auto"), frozen=frozen, device=device)
    work = estimate.work_of(trainer, arguments, audit=audit, samples=config["samples"], held_out=0, copies=0)
    alike = work.alike if trainer in prefix_sharing.TRAINERS and config.get("share_prefixes", True) else None
    kind: dict[str, Any] = {"adapter": adapter, "classifier": trainer == "reward", "dtype": dtype, "alike": alike}
    shape = {"arguments": arguments, "sequences": work.sequences, "length": max(2, round(work.length))}
    quantization = config["quantization"] or None
    policy = skeleton.count(config["model"], tokenizer=tokenizer, quantization=quantization, **kind, **shape)
    judges = reach.reward_models(config["reward"]) if estimate.answers_prompts(arguments) else {}
    judges = {key: node for key, node in judges.items() if f"{key}.name_or_path" not in absent}
    copies = _copies(policy, judges, trainer=trainer, arguments=arguments, adapted=adapter is not None)
    if trainer != "ppo":
        return policy, copies
    mode, value = config["trainer"].get("value_mode") or ("adapter" if config["peft"] else "separate"), None
    if mode == "separate":
        node = config.get("value_model") or _like_policy(judges, tokenizer) or config["model"]
        value = skeleton.count(node, tokenizer=tokenizer, quantization=None, classifier=True, **shape)
    return skeleton.with_value_function(policy, mode, value), copies


def _like_policy(judges: dict[str, Any], tokenizer: Any) -> dict[str, Any] | None:
    """Return the reward model that a value model would be copied from: one of the policy's vocabulary."""
    for node in judges.values():
        if models.load_tokenizer(**given(models.load_tokenizer, node)).get_vocab() == tokenizer.get_vocab():
            return node
    return None


def _copies(
    policy: estimate.Model, judges: dict[str, Any], *, trainer: str, arguments: Any, adapted: bool
) -> dict[str, float]:
    """Return the bytes of models beside the one that trains: a reference, rewards."""
    found: dict[str, float] = {}
    pulls = getattr(arguments, "beta", 0) if trainer != "ppo" else arguments.needs_reference
    precomputed = getattr(arguments, "precompute_ref_log_probs", False)
    if not adapted and pulls and not precomputed and trainer in ("dpo", "kto", "grpo", "rloo", "ppo"):
        found["reference"] = policy.weights
    for key, node in judges.items():
        tokenizer = models.load_tokenizer(**given(models.load_tokenizer, node))
        judge = skeleton.build(node, tokenizer=tokenizer, classifier=True)
        found[key] = 4.0 * sum(parameter.numel() for parameter in judge.parameters())
    return found
