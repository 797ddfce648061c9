"""From a config to TRL's trainer: its arguments for this hardware, its model, and the parts that it asks for."""

import dataclasses
import importlib
import inspect
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerState, get_scheduler, set_seed

from runner import (
    adapters,
    callbacks,
    engines,
    evaluation,
    hardware,
    lm_head,
    models,
    prepared,
    reference,
    rewards,
    trainer_source,
)
from runner.batching import refuse_leaks
from runner.config import accumulation, build, given, trainer_name
from runner.errors import ConfigError, RunPreempted, RunStopped
from runner.prefix_sharing import share_prefixes

TENSORBOARD_DIR = os.environ.get("TENSORBOARD_LOGGING_DIR")  # where the person wants all runs

logger = logging.getLogger(__name__)


def build_arguments(
    node: dict[str, Any],
    run_dir: Path,
    *,
    evaluates: bool,
    resumed: bool = False,
    global_batch_size: int | None = None,
    launch: dict[str, Any] | None = None,
    planned: int | None = None,
    rows: int | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Build a trainer's arguments; what the config leaves open is chosen for the hardware.

    Args:
        node: The trainer's config, its ``_target_`` included.
        run_dir: Where checkpoints and trackers' files go.
        evaluates: Whether there are held-out rows.
        resumed: Whether training goes on from a checkpoint.
        global_batch_size: Sequences of an optimizer step, over all processes; None: what the config's numbers make.
        launch: The config's ``launch``.
        planned: Processes to count with where none of them runs; the arguments then serve to plan only.
        rows: To train on; with them reference log-probabilities are computed in advance where that pays.

    Returns:
        The arguments, and the fields that were chosen here.

    Raises:
        ConfigError: The trainer's config class refuses its values.
    """
    chosen: dict[str, Any] = dict(hardware.trainer_defaults(node))
    processes = planned or int(os.environ.get("WORLD_SIZE", "1"))
    if global_batch_size:
        steps = accumulation(global_batch_size, node, processes)
        if steps is None:
            raise ConfigError(
                f"global_batch_size={global_batch_size} cannot be made by {processes} processes with "
                f"trainer.per_device_train_batch_size={node.get('per_device_train_batch_size', 8)}: choose another."
            )
        chosen["gradient_accumulation_steps"] = steps
    fixed = _fixed_fields(node, run_dir, evaluates=evaluates, resumed=resumed)
    if not TENSORBOARD_DIR:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir / "tensorboard")
    launch = launch or {}
    split, counted = ({}, {"world_size": planned}) if planned else (launch, {})
    arguments = build(node, **{**chosen, **fixed, **engines.fields(split)}, class_fields=counted)
    engines.tell(arguments, split)
    if not node.get("use_cpu") and (idle := hardware.idle_gpus()):
        logger.warning("%s", idle)
    if arguments.n_gpu > 1:  # which transformers would wrap into DataParallel, and TRL refuses
        if processes == 1:
            logger.warning("1 of %d GPUs trains. Type launch=ddp to use all of them.", arguments.n_gpu)
        arguments._n_gpu = 1
    if arguments.world_size != processes:
        raise ConfigError(f"{processes} processes were started and {arguments.world_size} would train together.")
    alone = not engines.chosen(launch) and launch.get("nodes", 1) == 1
    one_disk = alone if planned else processes == int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return arguments, chosen | reference.choose(arguments, node, rows=rows, run_dir=run_dir, one_disk=one_disk)


def _fixed_fields(node: dict[str, Any], run_dir: Path, *, evaluates: bool, resumed: bool) -> dict[str, Any]:
    """Return the fields that a run directory asks for, whatever the config says."""
    fixed: dict[str, Any] = {
        "output_dir": str(run_dir / "checkpoints"),
        "disable_tqdm": node.get("disable_tqdm", True),  # one plain line per log instead of a bar
        "logging_nan_inf_filter": node.get("logging_nan_inf_filter", False),  # a guard must see what is not finite
        "run_name": node.get("run_name") or run_dir.name,
        "save_total_limit": None,  # checkpoints.Checkpoints keeps to it, counting complete ones only
    }
    if resumed:
        fixed["eval_on_start"] = False  # the run has begun
    if node.get("push_to_hub"):  # at the end, from model/; see push
        default = {"hub_model_id": run_dir.name, "hub_strategy": "end"}
        fixed |= {key: node.get(key) or value for key, value in default.items()}
    if not evaluates:
        logger.info("There are no held-out rows: nothing is evaluated")
        fixed |= {"eval_strategy": "no", "eval_on_start": False}
    return fixed


def refuse(arguments: Any, **found: Any) -> None:
    """Refuse, before weights load, a schedule that cannot be made, and what a trainer of ours says it cannot train.

    Raises:
        ConfigError: All faults.
    """
    faults = arguments.find_faults(**found) if hasattr(arguments, "find_faults") else []
    kind, keys = arguments.lr_scheduler_type.value, arguments.lr_scheduler_kwargs
    try:
        get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], arguments.learning_rate), 0, 10**9, keys)
    except (TypeError, ValueError) as error:
        why = str(error).rpartition("() ")[2]
        faults.append(f"trainer.lr_scheduler_type={kind} cannot go with trainer.lr_scheduler_kwargs={keys}: {why}.")
    if faults:
        raise ConfigError(" ".join(faults))


def load_model(name: str, tokenizer: Any, config: dict[str, Any], arguments: Any) -> tuple[Any, Any]:
    """Load what a trainer trains: a policy, or a classifier with one score for reward modelling.

    Returns:
        The model, quantized if the config says so, and the adapter's config or None.

    Raises:
        ConfigError: It cannot be loaded, or the adapter does not fit it.
    """
    set_seed(config["trainer"]["seed"])  # of new weights, such as a score head
    adapter = adapters.peft_for(build(config["peft"]), trainer=name) if config["peft"] else None
    quantization = None
    if node := config["quantization"]:
        quantization = build({**node, **hardware.quantization_defaults(node, use_cpu=arguments.use_cpu)})
    load = models.load_classifier if name == "reward" else models.load_policy
    model = load(
        tokenizer=tokenizer,
        quantization=quantization,
        adapter=adapter is not None and bool(arguments.bf16),
        **given(models.load, config["model"]),
    )
    if adapter:
        adapters.check_adapter(model, adapter)
    return model, adapter


def build_trainer(
    config: dict[str, Any], *, model: Any, adapter: Any, arguments: Any, tokenizer: Any, train: Any, held_out: Any,
    scoring: rewards.Rewards, run_dir: Path,
) -> Any:  # fmt: skip
    """Build the trainer, giving it just those parts that its constructor asks for.

    Args:
        config: The run's config.
        model: The model to train.
        adapter: The adapter's config, or None for all weights.
        arguments: The trainer's arguments.
        tokenizer: The model's tokenizer.
        train: Rows to train on, or their token ids.
        held_out: Rows to evaluate on, or None.
        scoring: What ``load_rewards`` gave, for trainers that optimise it.
        run_dir: Where metrics go.

    Raises:
        ConfigError: The trainer refuses what it was given.
    """
    cls = prepared.prepared(trainer_class(config["trainer"]["_target_"]))
    parts = _parts(cls, config, adapter, arguments, tokenizer, scoring)
    lm_head.compact_lm_head()
    loaded = [model, parts.get("ref_model")] if config.get("share_prefixes", True) else []
    sharing = share_prefixes(loaded, arguments, adapter, trainer=trainer_name(config["trainer"]["_target_"]))
    written = [callbacks.MetricsWriter(run_dir), callbacks.RolloutSamples(run_dir)]
    try:
        trainer = cls(
            model=model,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[*written, callbacks.Guards(), callbacks.Progress()],
            **parts,
        )
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{cls.__name__} refuses this config: {error}") from error
    engines.verify(trainer, config.get("launch") or {})
    refuse_leaks(trainer)
    lm_head.compact_pairs(trainer)
    if (adapter or arguments.fp16) and getattr(arguments.deepspeed_plugin, "zero_stage", 0) != 3:  # it wants one dtype
        adapters.keep_float32(trainer.model)
    if hasattr(arguments, "steps_per_generation"):
        # TRL samples without autocast, in another precision than it scores in, and some adapters cannot do without
        trainer.model.generate = trainer.accelerator.autocast()(trainer.model.generate)
    trainer.prefix_sharing = sharing
    trainer.remove_callback(PrinterCallback)  # Progress says it in one line
    return trainer


def trainer_class(target: str) -> Any:
    """Return the trainer that belongs to a config class: ``trl.DPOConfig`` gives ``trl.DPOTrainer``."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the option's header says that it is experimental
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name.removesuffix("Config") + "Trainer")


def _parts(
    cls: Any, config: dict[str, Any], adapter: Any, arguments: Any, tokenizer: Any, scoring: rewards.Rewards
) -> dict[str, Any]:
    """Return what a trainer's constructor asks for beside model, arguments and rows; some goes into the arguments."""
    asked = inspect.signature(cls.__init__).parameters
    parts: dict[str, Any] = {"peft_config": adapter} if adapter else {}
    if "reward_funcs" in asked:
        parts |= {"reward_funcs": scoring.functions, "reward_processing_classes": scoring.tokenizers}
        arguments.reward_weights = scoring.weights
    needs_reference = getattr(arguments, "needs_reference", not getattr(arguments, "precompute_ref_log_probs", False))
    reloads = "reward_funcs" in asked or ("ref_model" in asked and arguments.fsdp)
    if "ref_model" in asked and not adapter and needs_reference:
        parts["ref_model"], _ = load_model(trainer_name(config["trainer"]["_target_"]), tokenizer, config, arguments)
    elif not adapter and getattr(arguments, "beta", None) and reloads:  # a reference, which must be what the policy was
        same = ("revision", "trust_remote_code")
        arguments.model_init_kwargs = {key: value for key in same if (value := config["model"].get(key))} or None
    if config.get("value_model"):
        parts["value_model"] = _load_value_model(config["value_model"], tokenizer)
    return parts


def _load_value_model(node: dict[str, Any], tokenizer: Any) -> Any:
    """Load the model of a value function, which reads the policy's token ids.

    Raises:
        ConfigError: It cannot be loaded, or its tokenizer is another.
    """
    own = models.load_tokenizer(**given(models.load_tokenizer, node)).get_vocab()
    special = set(tokenizer.all_special_tokens)
    foreign = [token for token, number in tokenizer.get_vocab().items() if own.get(token) != number]
    if foreign := [token for token in foreign if token not in special]:
        raise ConfigError(
            f"value_model.name_or_path={node['name_or_path']} cannot read what the policy writes: {len(foreign)} "
            f"tokens, such as {foreign[0]!r}, are not the same in its vocabulary. Choose a model of the policy's "
            "family, or leave value_model out: trainer.value_mode=separate then begins as the policy."
        )
    return models.load_classifier(tokenizer=tokenizer, **given(models.load, node))


def load_rewards(config: dict[str, Any], *, columns: set[str], online: bool) -> rewards.Rewards:
    """Load what an online trainer optimises and what held-out answers are scored with.

    Args:
        config: The run's config.
        columns: Those of the rows that will be scored.
        online: Whether the trainer optimises rewards. Another one only scores its answers, where that is possible.

    Raises:
        ConfigError: An online trainer's reward cannot be built from these columns.
    """

    def load(node: dict[str, Any]) -> tuple[Any, Any]:
        if not online:
            raise ConfigError("a reward model scores only the answers of trainers that optimise it")
        tokenizer = models.load_tokenizer(**given(models.load_tokenizer, node))
        options = given(models.load, node)
        model = models.load_classifier(tokenizer=tokenizer, scores=True, adapter=True, **options)
        untrained.extend([node["name_or_path"]] if model.new_head else [])
        return model, tokenizer

    set_seed(config["trainer"]["seed"])  # of a head that is new
    untrained: list[str] = []
    allowed = [*config["allow_code"], *os.environ.get("RUNNER_ALLOW_CODE", "").split(",")]
    try:
        found = rewards.build_rewards(config["reward"], columns=columns, load_model=load, allowed=allowed)
        return dataclasses.replace(found, untrained=untrained)
    except ConfigError as error:
        if online:
            raise
        logger.info("Held-out answers are not scored: %s", error)
        return rewards.Rewards()


def add_samples(
    trainer: Any, held_out: list[Any], scoring: rewards.Rewards, run_dir: Path, *, rows: int, **options: int
) -> None:
    """Let a trainer answer held-out prompts at every evaluation; a classifier has no answers to give.

    Args:
        trainer: Any trainer.
        held_out: Canonical rows.
        scoring: Its functions score the answers; its models do not.
        run_dir: Where samples go.
        rows: How many of the rows, from the first.
        options: Of ``evaluation.Samples``.
    """
    prompts = evaluation.held_out(held_out, rows)
    if prompts and trainer.model.can_generate():
        scores = {f.__name__: f for f in scoring.functions if isinstance(f, rewards.Scorer)}
        samples = evaluation.Samples(run_dir, prompts, trainer.processing_class, scores, log=trainer.log, **options)
        trainer.add_callback(samples)


def train(trainer: Any, stopping: Any, *, resumed: Path | None) -> dict[str, float]:
    """Train to the end and return the metrics of the training.

    Args:
        trainer: The trainer.
        stopping: The ``preemption.Preemption`` that may end it.
        resumed: The checkpoint to go on from.

    Raises:
        RunPreempted: It was told to end, and has left a checkpoint.
        RunStopped: There are too few rows for a step.
    """
    trainer.add_callback(stopping)
    done = TrainerState.load_from_json(str(resumed / "trainer_state.json")).global_step if resumed else 0
    if 0 < trainer.args.max_steps <= done:  # transformers would take one step more before it looks
        trainer._run_epoch = lambda **_: setattr(trainer.control, "should_training_stop", True)
    try:
        result = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except pickle.UnpicklingError as error:  # torch.load(weights_only=True) found more than tensors
        raise ConfigError(
            f"{resumed} cannot be resumed from: a file in it holds more than tensors and numbers, and to load it could "
            "run code. Remove the checkpoint, and resume from the one before it."
        ) from error
    if stopping.ended:
        raise RunPreempted(f"{stopping.cause}, at step {trainer.state.global_step}", stopping.code)
    if trainer.state.global_step == 0:
        raise RunStopped(
            f"not one step was taken: {len(trainer.train_dataset)} rows do not fill a batch of "
            f"trainer.per_device_train_batch_size={trainer.args.per_device_train_batch_size} on each of "
            f"{trainer.args.world_size} processes. Choose a smaller one, or more rows."
        )
    logged = trainer.state.log_history[-1]
    return {key: logged.get(key, value) for key, value in result.metrics.items()}


def save(trainer: Any, folder: Path) -> None:
    """Write the result, whole also where the checkpoints of a split model are in parts."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder), _internal_call=True)  # publish uploads it


def speed(trainer: Any, metrics: dict[str, float]) -> dict[str, Any]:
    """Return the seconds of an optimizer step and the tokens in a second; None where they were not counted.

    Evaluations during the training are in it, as they are in ``train_runtime``. It also says how often rows shared
    their beginnings.
    """
    seconds, steps = metrics.get("train_runtime"), metrics.get("train_steps_per_second")
    sharing = trainer.prefix_sharing
    tokens = next((log["num_tokens"] for log in reversed(trainer.state.log_history) if "num_tokens" in log), None)
    return {
        "seconds_per_step": 1 / steps if steps else None,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        **({"prefix_sharing": dataclasses.asdict(sharing)} if sharing.passes or sharing.refused else {}),
    }


def evaluate(trainer: Any) -> dict[str, float]:
    """Return the metrics on held-out rows at the end; what the last step computed already is not computed again."""
    if trainer.eval_dataset is None:
        return {}
    if trainer.args.load_best_model_at_end:  # its weights are not those that were evaluated
        return trainer.evaluate()
    last = [entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step]
    return {k: v for entry in last for k, v in entry.items() if k.startswith("eval_")} or trainer.evaluate()


def describe(trainer: Any, revision: str | None) -> dict[str, Any]:
    """Return what a trainer ended up with: its parameters, those that train, its rows, and how weights are kept."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    folder = models.folder_of(model.config._name_or_path, revision)
    return {
        "parameters": sum(_size(p) for p in model.parameters()),
        "trainable_parameters": sum(_size(p) for p in model.parameters() if p.requires_grad),
        "rows": len(trainer.train_dataset),
        "upstream_was_read": trainer_source.knows_trl(),
        "determinism": {
            **{key: getattr(trainer.args, key) for key in ("seed", "data_seed", "full_determinism")},
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        },
        "weights": {
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "quantization": _quantization(model.config),
            "commit": folder.name if folder.parent.name == "snapshots" else None,  # of the hub
            "sha256": models.digest_weights(folder),
        },
    }


def _quantization(config: Any) -> dict[str, Any] | None:
    """Return what is not left at its default in a model's quantization, such as the type that it computes in."""
    found = getattr(config, "quantization_config", None)
    return {key: str(value) for key, value in found.to_diff_dict().items()} if found is not None else None


def _size(parameter: Any) -> int:
    """Count a parameter's numbers; 4-bit weights are packed in pairs or more."""
    packed = type(parameter).__name__ == "Params4bit"
    whole = getattr(parameter, "ds_numel", None) or parameter.numel()  # DeepSpeed leaves the first of its ranks a part
    return whole * (2 * parameter.element_size() if packed else 1)


def push(trainer: Any, run_dir: Path) -> None:
    """Upload ``model/`` where ``trainer.push_to_hub`` asks for it."""
    if trainer.args.push_to_hub:
        from huggingface_hub import HfApi

        HfApi(token=trainer.args.hub_token).upload_folder(
            repo_id=trainer.hub_model_id, folder_path=run_dir / "model", revision=trainer.args.hub_revision
        )
