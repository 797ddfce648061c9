"""PPO: sample completions, score them, and take clipped steps against a learned value function.

On each rollout of ``rollout_rows`` completions ``num_ppo_epochs`` x ``num_mini_batches`` optimizer steps are taken.
Processes share the rows of each step, and take the steps that one process would take.

Source: arXiv:1707.06347 (PPO), arXiv:1909.08593 (on language models), arXiv:2403.17031 (implementation details).
"""

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import speed_metrics

from runner import rl_math, sampling
from runner.actor_critic import ActorCritic, Reading
from runner.errors import ConfigError
from runner.roles import build_actor_critic, check_vocabulary, initial_value_model
from runner.rollout import Engine, Notes, Rollout, RolloutMaker, about, permutation, total_rewards

CLIPPING = ("cliprange_low", "cliprange_high", "dual_clip", "log_ratio_clamp")
# Options in whole numbers from 1 on, and those that are above 0, where they are not null.
COUNTS = ("num_ppo_epochs", "num_mini_batches", "total_episodes", "max_prompt_length", "max_completion_length",
          "rollout_forward_batch_size", "kl_horizon")  # fmt: skip
ABOVE_ZERO = ("temperature", "log_ratio_clamp", "cliprange_high", "cliprange_value")
RATIO_SQUARED = "val/ratio_squared"  # is logged as the ratio's variance
SHARDED = (
    "trainer=ppo cannot shard a model: its layers are run under one adapter after the other. It runs in one process or "
    "in several that each hold the model (DDP): take fsdp and deepspeed out of trainer and launch."
)
OURS = {"temperature", "top_k", "top_p", "min_p", "do_sample", "num_beams", "num_return_sequences", "max_new_tokens",
        "max_length", "eos_token_id", "pad_token_id", "use_cache"}  # fmt: skip
UNFIT = {
    "torch_compile": "its passes are not the model's own forward pass, which is what would be compiled",
    "neftune_noise_alpha": "noise makes the ratio of old and new probabilities meaningless",
}

logger = logging.getLogger(__name__)


@dataclass
class PPOConfig(TrainingArguments):
    """Options of PPO beside those of ``transformers.TrainingArguments``.

    An optimizer step sees ``per_device_train_batch_size`` x ``gradient_accumulation_steps`` x processes sequences (a
    mini-batch), a rollout ``num_mini_batches`` times as many. Steps, logging and the learning rate's schedule count
    optimizer steps.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "of the policy; about 1e-4 for LoRA"})
    logging_steps: float | None = field(  # type: ignore[assignment]  # null, which __post_init__ replaces
        default=None, metadata={"help": "optimizer steps; null: once per rollout"}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "passes over a rollout"})
    num_mini_batches: int = field(default=1, metadata={"help": "optimizer steps per pass"})
    total_episodes: int | None = field(default=None, metadata={"help": "completions in all; max_steps goes before"})
    max_prompt_length: int | None = field(default=None, metadata={"help": "tokens; null: what the context leaves"})
    max_completion_length: int = field(default=256, metadata={"help": "tokens; longer completions are cut"})
    rollout_forward_batch_size: int = field(default=16, metadata={"help": "sequences sampled or scored at a time"})
    stop_token: str | None = field(default=None, metadata={"help": "a token that ends a completion, beside EOS"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling, and of the log-probabilities"})
    top_k: int = field(default=0, metadata={"help": "0: off; what it cuts off makes the ratio wrong"})
    top_p: float = field(default=1.0, metadata={"help": "1: off; what it cuts off makes the ratio wrong"})
    min_p: float | None = field(default=None, metadata={"help": "what it cuts off makes the ratio wrong"})
    generation_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "of GenerationConfig"})
    chat_template_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "variables of the template"})
    num_samples: int = field(default=4, metadata={"help": "completions of each rollout that callbacks are shown"})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "one per reward; null: 1"})
    reward_device: str | None = field(default=None, metadata={"help": "of reward models; null: the training's"})
    reward_position: Literal["eos", "after_eos"] = field(default="eos", metadata={"help": "after_eos: as TRL 1.12"})
    normalize_scores: bool = field(default=False, metadata={"help": "by mean and deviation of all scores so far"})
    score_clip: list[float] | None = field(default=None, metadata={"help": "lowest and highest score"})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "off the score of an unfinished one"})
    whiten_rewards: bool = field(default=False, metadata={"help": "scale rewards to variance 1"})
    kl_coef: float = field(default=0.05, metadata={"help": "KL to the reference in the reward; 0: no reference"})
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = field(default="k1", metadata={"help": "of the KL in the reward"})
    target_kl: float | None = field(default=None, metadata={"help": "KL per completion that kl_coef is steered to"})
    kl_horizon: int = field(default=10_000, metadata={"help": "episodes in which it is steered"})
    kl_loss_coef: float = field(default=0.0, metadata={"help": "KL to the reference (k3) in the loss"})
    entropy_coef: float = field(default=0.0, metadata={"help": "entropy in the loss"})
    gamma: float = field(default=1.0, metadata={"help": "discount per token"})
    lam: float = field(default=0.95, metadata={"help": "lambda of the advantages"})
    lam_value: float | None = field(default=None, metadata={"help": "lambda of the returns; null: lam"})
    length_adaptive_alpha: float = field(default=0.0, metadata={"help": "lam = 1 - 1 / (alpha * length); 0: off"})
    whiten_advantages: bool = field(default=True, metadata={"help": "over all tokens of a rollout"})
    cliprange_low: float = field(default=0.2, metadata={"help": "how far the ratio may fall"})
    cliprange_high: float = field(default=0.2, metadata={"help": "how far the ratio may rise"})
    dual_clip: float | None = field(default=None, metadata={"help": "above 1: bound of the loss of bad actions"})
    log_ratio_clamp: float | None = field(default=20.0, metadata={"help": "keeps the ratio finite, as verl does"})
    loss_agg: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = field(
        default="token-mean", metadata={"help": "what counts alike in a mini-batch"}
    )
    mask_truncated_completions: bool = field(default=False, metadata={"help": "no policy loss of unfinished ones"})
    value_mode: Literal["shared", "adapter", "separate"] | None = field(
        default=None, metadata={"help": "head on the policy, adapter on its base, own model; null: adapter or separate"}
    )
    cliprange_value: float | None = field(default=0.2, metadata={"help": "how far a value may move; null: off"})
    vf_coef: float = field(default=0.1, metadata={"help": "weight of the value loss"})
    value_learning_rate: float | None = field(default=None, metadata={"help": "null: the policy's"})
    critic_warmup_rollouts: int = field(default=0, metadata={"help": "first rollouts that train the value only"})

    def __post_init__(self) -> None:
        """Check ranges, log once per rollout unless told otherwise, and turn episodes into steps."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        clip = known.get("score_clip", [0, 1])
        ranges = {
            **{f"{name} (at least 1)": known.get(name, 1) >= 1 for name in COUNTS},
            **{f"{name} (above 0)": known.get(name, 1) > 0 for name in ABOVE_ZERO},
            **{f"{name} (0 to 1)": 0 <= known.get(name, 1) <= 1 for name in ("gamma", "lam", "lam_value")},
            "kl_coef (at least 0)": self.kl_coef >= 0,
            "target_kl (above 0, with kl_coef above 0)": self.target_kl is None or (self.target_kl > 0 < self.kl_coef),
            "cliprange_low (0 to 1)": 0 < self.cliprange_low <= 1,
            "dual_clip (above 1)": self.dual_clip is None or self.dual_clip > 1,
            "score_clip ([lowest, highest])": len(clip) == 2 and clip[0] < clip[1],
        }
        if wrong := [name for name, right in ranges.items() if not right]:
            raise ConfigError(
                "trainer=ppo cannot be set up, these are out of range: "
                + ", ".join(f"{name} is {getattr(self, name.split()[0])}" for name in wrong)
            )
        if self.logging_steps is None:
            self.logging_steps = self.steps_per_rollout
        compares = self.load_best_model_at_end or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        if compares and self.metric_for_best_model is None:
            self.metric_for_best_model = "objective/scores"  # an evaluation has no loss
        super().__post_init__()
        if self.total_episodes and self.max_steps <= 0:
            self.max_steps = math.ceil(self.total_episodes / self.rollout_rows) * self.steps_per_rollout
            told = "%d episodes are %d optimizer steps; num_train_epochs does not count"
            logger.info(told, self.total_episodes, self.max_steps)

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on each rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def mini_batch_rows(self) -> int:
        """Sequences in an optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def rollout_rows(self) -> int:
        """Sequences in a rollout, over all processes."""
        return self.mini_batch_rows * self.num_mini_batches

    @property
    def needs_reference(self) -> bool:
        """Whether a KL to the reference is asked for."""
        return self.kl_coef > 0 or self.kl_loss_coef > 0

    def find_faults(self, *, prompts: int, adapted: bool) -> list[str]:
        """Return what cannot be trained with these options, known before any weights load, one sentence each.

        Args:
            prompts: Rows to train on.
            adapted: Whether an adapter is trained.
        """
        faults = []
        if prompts < self.rollout_rows:
            faults.append(
                f"A rollout takes {self.rollout_rows} prompts and the dataset has {prompts}: lower "
                "trainer.per_device_train_batch_size, gradient_accumulation_steps or num_mini_batches, or add rows."
            )
        if self.value_mode == "adapter" and not adapted:
            faults.append(
                "trainer.value_mode=adapter puts a second adapter on the base and there is no first: choose peft=lora, "
                "or trainer.value_mode=separate or shared."
            )
        checkpointing: Any = self.gradient_checkpointing_kwargs or {}
        if self.value_mode in ("adapter", None) and adapted and checkpointing.get("use_reentrant"):
            faults.append(
                "trainer.value_mode=adapter has no gradients with reentrant checkpointing: take use_reentrant out."
            )
        if self.whiten_rewards and self.rollout_rows < 8:
            faults.append(f"trainer.whiten_rewards needs 8 sequences in a rollout and there are {self.rollout_rows}.")
        if self.auto_find_batch_size:
            faults.append(
                "trainer.auto_find_batch_size would change the size of a rollout: set per_device_train_batch_size."
            )
        if self.fsdp or self.deepspeed:
            faults.append(SHARDED)
        if ours := sorted(OURS & set(self.generation_kwargs or {})):
            faults.append(
                f"trainer.generation_kwargs cannot set {', '.join(ours)}: a rollout has one completion to a prompt, "
                "sampled with trainer.temperature, top_k, top_p, min_p, stop_token and max_completion_length."
            )
        faults += [
            f"trainer.{name} has no place in PPO: {why}. Leave it out."
            for name, why in UNFIT.items()
            if getattr(self, name, None)
        ]
        return faults


class PPOTrainer(Trainer):
    """Train a policy with PPO on rewards of completions that it samples itself.

    Args:
        model: The policy: a causal language model, or an adapter model to go on training.
        args: Options.
        train_dataset: Rows with ``prompt``, a text or messages; their other columns go to the reward functions.
        reward_funcs: What ``trl.GRPOTrainer`` takes, one or several: functions of completions and columns, which give
            None where they cannot tell, and sequence classifiers with one label. A score is their sum, weighted with
            ``args.reward_weights``; a sequence that none of them can score is in no loss.
        eval_dataset: Held-out rows, or several sets of them by name.
        processing_class: The policy's tokenizer.
        reward_processing_classes: The classifiers' tokenizers; None is the policy's.
        peft_config: The adapter to train; None trains what of ``model`` requires a gradient.
        value_model: A sequence classifier for ``value_mode="separate"``; None copies the reward model where it has
            the policy's vocabulary, or else the policy. The head starts at zero.
        ref_model: The reference; None is the policy's start: its base without the adapter, or a frozen copy.
        rollout_engine: ``engine(policy, prompt_ids, seeds)`` gives the token ids of a completion to each prompt, which
            are cut at the first stop token; their log-probabilities are the policy's. None samples with the policy.
        callbacks: Beside the Trainer's events they may have ``on_samples(args, state, control, samples=...)``, called
            with some completions and scores of each rollout.
        optimizers: Optimizer and scheduler; None makes those of ``args``.

    Raises:
        ConfigError: The parts cannot be trained together.
    """

    args: PPOConfig
    model: ActorCritic
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: PPOConfig,
        train_dataset: Any,
        reward_funcs: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        peft_config: Any = None,
        value_model: Any = None,
        ref_model: Any = None,
        rollout_engine: Engine | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args._n_gpu = min(args.n_gpu, 1)  # one process per device, never DataParallel
        adapted = peft_config is not None or hasattr(model, "get_base_model")
        mode = args.value_mode or ("adapter" if adapted else "separate")
        _check(args, model, peft_config, ref_model, train_dataset)
        rewards = sampling.prepare_rewards(
            *(reward_funcs, reward_processing_classes, processing_class),
            weights=args.reward_weights,
            device=args.reward_device or args.device,
        )
        if mode == "separate" and value_model is None:
            value_model = initial_value_model(model, rewards, processing_class)
        readers = {reward.name: reward.function for reward in rewards if reward.tokenizer is processing_class}
        for name, reader in {**readers, "value_model": value_model, "ref_model": ref_model}.items():
            check_vocabulary(name, reader, model, processing_class)
        set_seed(args.seed)  # adapters start at random
        actor_critic = build_actor_critic(
            model,
            peft_config=peft_config,
            value_mode=mode,
            value_model=value_model,
            reference=ref_model,
            needs_reference=args.needs_reference,
        )
        self.notes = Notes()
        self._rollout: Rollout | None = None
        self._step_sums: dict[str, Tensor] = {}  # of the optimizer step in hand
        self._loss_total = 0.0
        super().__init__(
            model=actor_critic,
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # the dataloader is a clock
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # by the environment of a launcher
            raise ConfigError(SHARDED)
        if isinstance(actor_critic.reference, nn.Module):
            actor_critic.reference.to(args.device)
        self.maker = RolloutMaker(
            *(actor_critic, processing_class, rewards, args, rollout_engine, self.accelerator.autocast, self.notes)
        )

    # ---- optimizing -----------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return a clock: a tick per micro-batch. Which rows it stands for follows from the optimizer step."""
        args = self.args
        rollouts, left = divmod(len(self.train_dataset), args.rollout_rows)
        if left:
            logger.info("%d prompts are over after the rollouts of an epoch: the next one begins with them", left)
        ticks = rollouts * args.steps_per_rollout * args.gradient_accumulation_steps
        return DataLoader(range(ticks), batch_size=1, collate_fn=list)  # type: ignore[arg-type]  # a range is one

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return the number of prompts."""
        return len(self.train_dataset)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take the gradient of one micro-batch; sample the next rollout first when its time has come."""
        args = self.args
        index, step = divmod(self.state.global_step, args.steps_per_rollout)
        rollout = self._rollout
        if rollout is None or rollout.index != index:
            whole = args.gradient_accumulation_steps == args.num_mini_batches == 1  # one backward pass takes it all
            live = whole and index >= args.critic_warmup_rollouts
            rollout, samples = self.maker.make(index, self.train_dataset, self.state, live=live)
            self._rollout = rollout
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "on_samples"):
                    callback.on_samples(args, self.state, self.control, samples=samples)
        model.train()
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        epoch, part = divmod(step, args.num_mini_batches)
        order = permutation(args.rollout_rows, args.seed, "order", index, epoch)
        mini_batch = order[part * args.mini_batch_rows :][: args.mini_batch_rows]
        mini_batch.sort(key=lambda row: -len(rollout.ids[row]))  # rows of a micro-batch are of like length
        micro = inputs[0] % args.gradient_accumulation_steps
        size = args.per_device_train_batch_size
        rows = mini_batch[args.process_index :: args.world_size][micro * size :][:size]
        with self.notes.timed("optimise"):
            loss = self._accumulate(rollout, rows, mini_batch)
            if self.accelerator.sync_gradients:
                self._finish_step(first=step == 0)
        return loss

    def _accumulate(self, rollout: Rollout, rows: list[int], mini_batch: list[int]) -> Tensor:
        """Add the gradient of the losses of some rows, as a part of the mini-batch's.

        Right after a rollout that one backward pass takes whole, its own forward passes are used.
        """
        model, args = self.model, self.args
        live, self.maker.live = self.maker.live, {}
        warming = rollout.index < args.critic_warmup_rollouts
        weights = {}
        for name in ("policy", "value"):
            mask = getattr(rollout, f"{name}_mask")
            weights[name] = torch.zeros(mask.shape, device=mask.device)
            weights[name][mini_batch] = rl_math.token_weights(
                mask[mini_batch], args.loss_agg, width=args.max_completion_length
            )
        lengths = [len(rollout.ids[row]) for row in rows]
        groups = sampling.group_by_length(lengths, len(rows), sampling.padding_allowed(args.device))
        fresh: list[tuple[list[int], Reading | None]] = [([rows[i] for i in group], None) for group in groups]
        total = torch.zeros((), device=args.device)
        for role in ["value"] if warming else ["policy"] if model.value_mode == "shared" else ["policy", "value"]:
            model.prepare_gradients(role)
            with model.role(role) as player:
                for part, found in live.get(role, fresh):
                    with self.accelerator.autocast():
                        loss = self._loss(rollout, part, role, player, weights, found)
                    self.accelerator.backward(loss)
                    total += loss.detach()
        return total

    def _loss(
        self, rollout: Rollout, rows: list[int], role: str, player: Any, weights: dict[str, Tensor], found: Any
    ) -> Tensor:
        """Return the part that some rows have in the loss of policy or value function, or of both if they share."""
        model, args, batch = self.model, self.args, rollout.part(rows)
        mask, value_mask, shared = rollout.policy_mask[rows], rollout.value_mask[rows], model.value_mode == "shared"
        loss = torch.zeros((), device=mask.device)
        if role == "policy":
            found = found or model.read(
                *(player, batch, mask),
                temperature=args.temperature,
                entropy="gradient" if args.entropy_coef else None,
                value_mask=value_mask if shared else None,
            )
            found = found.fit(mask.size(1))
            clipped, sums = rl_math.policy_loss(
                *(found.logps, rollout.old_logps[rows], rollout.advantages[rows], mask, weights["policy"][rows]),
                **{name: getattr(args, name) for name in CLIPPING},
            )
            self._add(policy_loss=clipped, **sums)
            loss = loss + clipped
            if args.kl_loss_coef:
                away = torch.where(mask, rl_math.kl_k3(found.logps, rollout.ref_logps[rows]), 0)
                loss = loss + args.kl_loss_coef * (weights["policy"][rows] * away).sum()
            if args.entropy_coef:
                loss = loss - args.entropy_coef * (weights["policy"][rows] * found.entropy).sum()
        if role == "value" or shared:  # a head that warms up on the policy's layers leaves them alone
            found = found or Reading(values=model.read_values(player, batch, value_mask, frozen=shared))
            values = found.fit(mask.size(1)).values
            squared, sums = rl_math.value_loss(
                *(values, rollout.values[rows], rollout.returns[rows], value_mask, weights["value"][rows]),
                cliprange=args.cliprange_value,
            )
            self._add(value_loss=squared, **sums)
            loss = loss + args.vf_coef * squared
        self._add(loss=loss)
        return loss

    def _add(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            self._step_sums[name] = self._step_sums.get(name, 0.0) + value.detach().float()

    def _finish_step(self, *, first: bool) -> None:
        """Add gradients and sums up over the processes, and record what the optimizer step was like."""
        if self.args.world_size > 1:  # losses are parts of the whole mini-batch's, so that gradients are summed
            moving = self.model.value_parameters + self.model.policy_parameters * ("policy_loss" in self._step_sums)
            for parameter in moving:  # an expert may have been asked on one process only
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for work in [torch.distributed.all_reduce(parameter.grad, async_op=True) for parameter in moving]:
                work.wait()
        names = sorted(self._step_sums)
        sums = torch.stack([self._step_sums[name] for name in names])
        self._step_sums = {}
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        found = dict(zip(names, sums.tolist(), strict=True))
        self._loss_total += found["loss"]
        self.notes.record("loss", found["loss"])
        self.notes.record("loss/value_avg", found["value_loss"])
        self.notes.record("val/clipfrac_avg", found["value_clipped"], found["value_tokens"])
        if "policy_loss" in found:
            self.notes.record("loss/policy_avg", found["policy_loss"])
            self.notes.record("policy/clipfrac_avg", found["clipped"], found["weighted"])
            means = {"policy/approxkl_avg": "approxkl", "val/ratio": "ratio", RATIO_SQUARED: "ratio_squared"}
            for name, key in means.items():
                self.notes.record(name, found[key], found["tokens"])
            off = (2 * found["approxkl"] / max(1.0, found["tokens"])) ** 0.5
            if first and off > (0.02 if self.args.mixed_precision == "no" else 0.2):
                self.notes.warn(
                    "the ratio of the first pass is not 1: log-probabilities of one and the same policy differ by "
                    "%.3g. Something in the model changes from pass to pass, or its precision is too low",
                    off,
                )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer, with the value function's parameters in groups of their own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer, own = super().create_optimizer(model), {id(p) for p in self.model.value_parameters}
        given = self.args.value_learning_rate
        rate = self.args.learning_rate if given is None else given
        for group in list(optimizer.param_groups):
            value = [p for p in group["params"] if id(p) in own]
            group["params"] = [p for p in group["params"] if id(p) not in own]
            if value:
                optimizer.add_param_group({**group, "params": value, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip policy and value function apart, and return the norm of both."""
        self.accelerator.unscale_gradients()
        norms = []
        for name in ("policy", "value"):
            parameters = getattr(self.model, f"{name}_parameters")
            norms.append(nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm).to(self.args.device))
            self.notes.record(f"grad_norm/{name}", float(norms[-1]))
        return torch.stack(norms).norm()

    # ---- evaluation, logs -----------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample held-out prompts as in training and return mean scores, KL and lengths.

        The random numbers are the same at every evaluation, and no others than training's are touched.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, None, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {key: value for metrics in parts for key, value in metrics.items()}
        start, training = time.time(), self.model.training
        seeds = [sampling.seed_of(self.args.seed, "held out", row) for row in range(len(dataset))]
        episodes = self.maker.play([dataset[row] for row in range(len(dataset))], seeds, self.state, Notes())
        self.model.train(training)
        raw = total_rewards(episodes, self.args.reward_weights)
        found = about(episodes, self.maker.rewards) | {"objective/scores": float(raw[~raw.isnan()].mean())}
        if self.args.needs_reference:
            gaps = [one.frozen["policy_logps"] - one.frozen["reference_logps"] for one in episodes]
            found["objective/kl"] = sum(float(gap.sum()) for gap in gaps) / len(gaps)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(episodes))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what was noted since the last log where training logs."""
        if "loss" in logs:
            noted = self.notes.take()
            if (squared := noted.pop(RATIO_SQUARED, None)) is not None:
                noted["val/ratio_var"] = max(0.0, squared - noted["val/ratio"] ** 2)
            rollouts = math.ceil(self.state.global_step / self.args.steps_per_rollout)
            logs |= noted | {"lr": logs["learning_rate"], "episode": rollouts * self.args.rollout_rows}
        if "train_loss" in logs:  # of the whole run, not since it was resumed
            logs["train_loss"] = self._loss_total / max(1, self.state.global_step)
        super().log(logs, start_time)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            self.model.save(folder)
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            between = self.state.global_step % self.args.steps_per_rollout == 0
            state = {
                "sizes": self._sizes(),
                "kl_coef": self.maker.kl_coef,
                "moments": tuple(self.maker.moments),
                "sums": dict(self.notes.sums),
                "told": sorted(self.notes.told),
                "loss_total": self._loss_total,
                "rollout": None if between or self._rollout is None else vars(self._rollout),
            }
            torch.save(state, Path(output_dir) / "ppo_state.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / "ppo_state.pt").is_file():
            raise ConfigError(
                f"Training cannot be resumed from {folder}: it has no ppo_state.pt. Choose a complete checkpoint of a "
                "PPO run, or start anew."
            )
        state = torch.load(folder / "ppo_state.pt", map_location=self.args.device.type, weights_only=True)
        if state["sizes"] != self._sizes():
            raise ConfigError(
                f"Training cannot be resumed from {folder}: its rollouts have {state['sizes']}, this run's "
                f"{self._sizes()}. Type the values that it began with."
            )
        self.model.load(folder)
        self.maker.kl_coef, self.maker.moments = state["kl_coef"], rl_math.Moments(*state["moments"])
        self.notes.sums.update(state["sums"])
        self.notes.told.update(state["told"])
        self._loss_total = state["loss_total"]
        self._rollout = state["rollout"] and Rollout(**state["rollout"])

    def _load_best_model(self) -> None:
        self.model.load(Path(str(self.state.best_model_checkpoint)))

    def _sizes(self) -> dict[str, int]:
        args = self.args
        return {
            "prompts": len(self.train_dataset),
            "sequences per optimizer step": args.mini_batch_rows,
            "num_mini_batches": args.num_mini_batches,
            "num_ppo_epochs": args.num_ppo_epochs,
        }


# ---- what is refused, and small pieces ----------------------------------------------------------------------------


def _check(args: PPOConfig, model: Any, peft_config: Any, ref_model: Any, train_dataset: Any) -> None:
    """Refuse what cannot be trained together, all faults at once."""
    if not hasattr(train_dataset, "__len__"):
        raise ConfigError("trainer=ppo cannot draw its prompts from a stream: choose a dataset with a length.")
    adapted = peft_config is not None or hasattr(model, "get_base_model")
    config: Any = peft_config or (model.peft_config[model.active_adapter] if adapted else None)
    faults = args.find_faults(prompts=len(train_dataset), adapted=adapted)
    if adapted and getattr(config, "is_prompt_learning", False):
        faults.append(f"peft={config.peft_type.value} puts virtual tokens before the prompt: choose peft=lora.")
    if getattr(config, "bias", "none") != "none" and args.value_mode in (None, "adapter"):
        faults.append(
            f"peft.bias={config.bias} trains the base, which trainer.value_mode=adapter puts a second adapter on: "
            "choose peft.bias=none, or trainer.value_mode=shared."
        )
    elif getattr(config, "bias", "none") != "none" and args.needs_reference and ref_model is None:
        faults.append(
            f"trainer.kl_coef={args.kl_coef} and kl_loss_coef={args.kl_loss_coef} need a reference and nothing can "
            f"serve as one: peft.bias={config.bias} trains the base, so that it is not the start any more: choose "
            "peft.bias=none, or both at 0."
        )
    if hasattr(model, "get_base_model") and peft_config is not None:
        faults.append("The model has an adapter already and peft would put another on it: choose peft=none to go on.")
    if not adapted and not any(parameter.requires_grad for parameter in model.parameters()):
        faults.append("No weight of the policy requires a gradient: choose peft=lora.")
    if faults:
        raise ConfigError("trainer=ppo cannot train this. " + " ".join(faults))
