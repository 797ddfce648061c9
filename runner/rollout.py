"""A rollout: what a policy samples and earns, frozen with what policy, reference and value function say of it.

Every process plays its share of the prompts and then holds the whole rollout, whose tensors are small. What is random
is a function of seed, rollout and row alone: nothing in between can change it, nor the number of processes.

Shapes: B sequences of a rollout, b of a batch, T completion positions.
"""

import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runner import rl_math, sampling
from runner.actor_critic import ActorCritic, Reading, Sequences, base_of
from runner.errors import ConfigError
from runner.sampling import Episode, Reward, Row

logger = logging.getLogger(__name__)
clock = time.perf_counter  # of the seconds per phase

Engine = Callable[[Any, list[list[int]], list[int]], list[list[int]]]
SHAPING = ("kl_estimator", "gamma", "lam", "lam_value", "length_adaptive_alpha", "whiten_rewards", "whiten_advantages")


@dataclass
class Rollout:
    """A rollout of B sequences, frozen; tensors are (B, T), zero where they are not read."""

    index: int
    ids: list[list[int]]  # prompt and completion
    prompt_lengths: list[int]
    policy_mask: Tensor
    value_mask: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def part(self, rows: list[int]) -> Sequences:
        """Return some of the sequences."""
        return Sequences([self.ids[row] for row in rows], [self.prompt_lengths[row] for row in rows])


class Notes:
    """Metrics and seconds since the last log, and warnings that are given once."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.seconds: dict[str, float] = defaultdict(float)
        self.told: set[str] = set()

    def record(self, name: str, total: float, count: float = 1) -> None:
        """Add ``total`` of ``count`` things to the mean that is logged next."""
        self.sums[name][0] += float(total)
        self.sums[name][1] += count

    def take(self) -> dict[str, float]:
        """Return the means and the seconds of each phase, and begin anew."""
        found = {name: total / count for name, (total, count) in self.sums.items() if count}
        found |= {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        self.sums.clear()
        self.seconds.clear()
        return found

    def warn(self, message: str, *values: Any) -> None:
        """Log a warning, once in a run."""
        if message not in self.told:
            self.told.add(message)
            logger.warning(message, *values)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the seconds of a phase."""
        start = clock()
        yield
        self.seconds[phase] += clock() - start


class RolloutMaker:
    """Samples, scores and freezes.

    Args:
        actor_critic: Whose policy samples.
        tokenizer: The policy's.
        rewards: What a completion earns.
        args: A ``PPOConfig``.
        engine: ``engine(policy, prompt_ids, seeds)`` gives the token ids of a completion to each prompt, to be cut at
            the first stop token; None samples with the policy itself.
        autocast: Gives the context of mixed precision.
        notes: Gets metrics, times and warnings.

    Raises:
        ConfigError: No token ends a completion as asked, or nothing is left of the context for a prompt.
    """

    def __init__(
        self,
        actor_critic: ActorCritic,
        tokenizer: Any,
        rewards: list[Reward],
        args: Any,
        engine: Engine | None,
        autocast: Callable[[], Any],
        notes: Notes,
    ) -> None:
        self.actor_critic, self.tokenizer, self.rewards, self.args = actor_critic, tokenizer, rewards, args
        self.engine, self.autocast, self.notes = engine or self._sample, autocast, notes
        self.kl_coef, self.moments = args.kl_coef, rl_math.Moments()
        self.live: dict[str, list[tuple[list[int], Reading]]] = {}
        self.stop_ids = sampling.stop_ids(actor_critic, tokenizer, args.stop_token)
        readers = [
            actor_critic,
            *(m for m in (actor_critic.reference, actor_critic.own_value_model) if hasattr(m, "config")),
        ]
        self.vocabulary = min(int(model.config.get_text_config().vocab_size) for model in readers)
        self.pad_id = next(token for token in (tokenizer.pad_token_id, *self.stop_ids, 0) if token is not None)
        context = getattr(actor_critic.config.get_text_config(), "max_position_embeddings", None) or 1 << 40
        self.prompt_limit = min(args.max_prompt_length or context, context - args.max_completion_length)
        if self.prompt_limit < 1:
            raise ConfigError(
                f"trainer.max_completion_length={args.max_completion_length} leaves no room for a prompt: the model's "
                f"context holds {context} tokens. Choose less than that."
            )

    def encode(self, row: Row) -> list[int]:
        """Return the token ids of a row's prompt."""
        return sampling.encode_prompt(self.tokenizer, row, self.args.chat_template_kwargs or {})

    def _sample(self, policy: Any, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        args = self.args
        return sampling.sample(
            *(base_of(policy), prompts, seeds),
            max_new_tokens=args.max_completion_length,
            batch_size=args.rollout_forward_batch_size,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            vocabulary=self.vocabulary,
            options=args.generation_kwargs,
            **{name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")},
        )

    @torch.no_grad()
    def play(
        self, rows: list[Row], seeds: list[int], state: Any, notes: Notes, *, values: bool = False, live: bool = False
    ) -> list[Episode]:
        """Sample, score and read this process's share of the rows; return what all processes found, in order.

        Args:
            rows: Dataset rows.
            seeds: One per row.
            state: The trainer's, for reward functions.
            notes: Gets times, and what reward functions log.
            values: Whether the value function is asked, too.
            live: Whether what policy and value function say is kept in ``live`` with its graph, too.
        """
        args, world = self.args, self.args.world_size
        mine = list(zip(rows, seeds, strict=True))[args.process_index :: world]
        episodes = self._play([row for row, _ in mine], [seed for _, seed in mine], state, notes) if mine else []
        self._freeze(episodes, notes, values=values, live=live)
        if world == 1:
            return episodes
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, episodes)
        return [parts[place % world][place // world] for place in range(len(rows))]

    def _play(self, rows: list[Row], seeds: list[int], state: Any, notes: Notes) -> list[Episode]:
        self.actor_critic.eval()
        prompts = [self.encode(row) for row in rows]
        kept = [prompt[-self.prompt_limit :] for prompt in prompts]
        with notes.timed("generate"), self.autocast():
            sampled = self.engine(self.actor_critic.policy, kept, seeds)
        episodes = [
            Episode(end, len(end) < len(prompt), tokens, ended, self.tokenizer.decode(tokens, skip_special_tokens=True))
            for prompt, end, (tokens, ended) in zip(
                prompts, kept, sampling.cut_at_stop(sampled, self.stop_ids), strict=True
            )
        ]
        with notes.timed("reward"):
            sampling.score(
                *(self.rewards, rows, episodes),
                batch_size=self.args.rollout_forward_batch_size,
                known={"trainer_state": state, "log_metric": notes.record, "log_extra": lambda *_: None},
            )
        return episodes

    def _freeze(self, episodes: list[Episode], notes: Notes, *, values: bool, live: bool) -> None:
        """Add what reference, value function and policy say of the completions now."""
        model, args = self.actor_critic, self.args
        model.train()  # some kernels round otherwise in evaluation, and dropout is off
        self.live = {}
        limit = args.per_device_train_batch_size if live else args.rollout_forward_batch_size
        lengths = [len(one.ids) for one in episodes]
        groups = sampling.group_by_length(lengths, limit, sampling.padding_allowed(args.device))
        beyond = int(args.reward_position == "after_eos")  # the value of the state after the last token
        shared = model.value_mode == "shared"
        phases = [*(["reference"] if args.needs_reference else []), *(["value"] * (values and not shared)), "policy"]
        for phase in phases:
            with notes.timed(phase), model.role(phase) as player, self.autocast():
                for group in groups:
                    part = [episodes[row] for row in group]
                    batch = Sequences([one.ids for one in part], [len(one.prompt) for one in part])
                    counts = torch.tensor([len(one.completion) for one in part], device=args.device)
                    place = torch.arange(int(counts.max()) + 1, device=args.device)
                    mask, value_mask = place < counts[:, None], place < counts[:, None] + beyond
                    keeps = live and (phase == "policy" or (phase == "value" and args.device.type == "cpu"))
                    with torch.set_grad_enabled(keeps):  # two graphs at a time are too much for many a GPU
                        if phase == "value":
                            found = Reading(values=model.read_values(player, batch, value_mask))
                        elif phase == "reference":
                            found = model.read(player, batch, mask, temperature=args.temperature)
                        else:
                            found = model.read(
                                *(player, batch, mask),
                                temperature=args.temperature,
                                entropy="gradient" if args.entropy_coef else "value",
                                value_mask=value_mask if shared else None,
                            )
                    if keeps:
                        rows = [args.process_index + args.world_size * row for row in group]
                        self.live.setdefault(phase, []).append((rows, found))
                    for key, table in found._asdict().items():
                        for one, numbers in zip(part, [] if table is None else table.float().cpu(), strict=False):
                            kept = numbers[: len(one.completion) + beyond].detach().clone()
                            one.frozen[f"{phase}_logps" if key == "logps" else key] = kept

    def make(self, index: int, dataset: Any, state: Any, *, live: bool = False) -> tuple[Rollout, list[Row]]:
        """Return the ``index``-th rollout of the run, the same on all processes, and some samples of it.

        With ``live``, rows and what policy and value function say of them are in ``live`` with their graphs, so that
        the first pass over the rollout needs no forward pass of its own.
        """
        args, size, count = self.args, self.args.rollout_rows, len(dataset)
        seed = args.data_seed if args.data_seed is not None else args.seed
        (epoch, start), (last, _) = divmod(index * size, count), divmod((index + 1) * size - 1, count)
        orders = [place for one in range(epoch, last + 1) for place in permutation(count, seed, "prompts", one)]
        order = orders[start : start + size]
        seeds = [sampling.seed_of(args.seed, "completion", index, row) for row in range(size)]
        episodes = self.play([dataset[row] for row in order], seeds, state, self.notes, values=True, live=live)
        width = max(1, *(len(one.completion) for one in episodes))
        policy, reference, values = (
            _table([one.frozen.get(key) for one in episodes], width).to(args.device)
            for key in ("policy_logps", "reference_logps", "values")
        )
        ended = torch.tensor([one.ended for one in episodes], device=args.device)
        lengths = torch.tensor([len(one.completion) for one in episodes], device=args.device)
        raw = total_rewards(episodes, args.reward_weights).to(args.device)
        scored = ~raw.isnan()
        mask = (torch.arange(width, device=args.device) < lengths[:, None]) & scored[:, None]
        if args.normalize_scores:
            self.moments = rl_math.update_moments(self.moments, raw[scored])
        scores = rl_math.shape_scores(
            *(raw.nan_to_num(), ended),
            moments=self.moments if args.normalize_scores else None,
            clip=args.score_clip,
            missing_eos_penalty=args.missing_eos_penalty,
        )
        shaped = rl_math.shape_rewards_and_advantages(
            *(policy, reference if args.needs_reference else None, values, scores, mask),
            kl_coef=self.kl_coef,
            reward_position=args.reward_position,
            **{name: getattr(args, name) for name in SHAPING},
        )
        away = torch.where(mask, policy - reference, 0).sum(1)[scored] if args.needs_reference else raw[:0]
        self._note(episodes, shaped, policy, mask, scored, away)
        rollout = Rollout(
            index=index,
            ids=[one.ids for one in episodes],
            prompt_lengths=[len(one.prompt) for one in episodes],
            policy_mask=mask & ended[:, None] if args.mask_truncated_completions else mask,
            value_mask=shaped.value_mask,
            old_logps=policy,
            ref_logps=reference,
            values=shaped.values,
            advantages=shaped.advantages,
            returns=shaped.returns,
        )
        return rollout, self._samples(episodes, shaped.scores.tolist(), state, rollout=index)

    def _note(
        self, episodes: list[Episode], shaped: rl_math.Shaped, logps: Tensor, mask: Tensor, scored: Tensor, away: Tensor
    ) -> None:
        """Record what a rollout was like, warn of what cannot be learned from, and steer the KL.

        ``away`` is log-probability under the policy less that under the reference, one a completion, or empty.
        """
        args, count, notes = self.args, max(1, int(scored.sum())), self.notes
        kl, scores = shaped.kl.sum(1)[scored], shaped.scores[scored]
        entropy = _table([one.frozen["entropy"] for one in episodes], mask.size(1)).to(mask.device)
        score, penalty = float(scores.sum()) / count, -self.kl_coef * float(kl.sum()) / count
        metrics = {
            "objective/kl": float(kl.sum()) / count,
            "objective/entropy": -float((logps * mask).sum()) / count,
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": score + penalty,
            "objective/scores": score,
            "objective/scores_std": float(scores.std(correction=0)) if len(scores) else 0.0,
            "objective/kl_coef": self.kl_coef,
            "policy/entropy_avg": float(rl_math.masked_mean(entropy, mask)),
            "val/num_eos_tokens": sum(one.ended for one in episodes),
            "val/explained_variance": float(
                rl_math.explained_variance(shaped.values, shaped.returns, shaped.value_mask)
            ),
            "val/values_mean": float(rl_math.masked_mean(shaped.values, shaped.value_mask)),
            "val/returns_mean": float(rl_math.masked_mean(shaped.returns, shaped.value_mask)),
            **about(episodes, self.rewards),
        }
        for name, value in metrics.items():
            notes.record(name, value)
        if len(scores) > 1 and metrics["objective/scores_std"] == 0:
            notes.warn("all completions of a rollout earned the same: there is nothing to learn from in it")
        if cut := sum(one.cut for one in episodes):
            limit = self.prompt_limit
            notes.warn("%d of %d prompts are longer than %d tokens: their ends are used", cut, len(episodes), limit)
        if len(away) > 1 and float(away.mean() + 2 * away.std() / len(away) ** 0.5) < -1e-3:
            notes.warn(
                "the KL to the reference is negative on average (%.3g), which no distance is: completions are not "
                "sampled from the policy that is scored (top_k, top_p, min_p, generation_kwargs, the engine)",
                float(away.mean()),
            )
        if args.target_kl and len(kl):
            self.kl_coef = rl_math.adaptive_kl(
                *(self.kl_coef, float(kl.mean())), target=args.target_kl, horizon=args.kl_horizon, episodes=len(kl)
            )

    def _samples(self, episodes: list[Episode], scores: list[float], state: Any, *, rollout: int) -> list[Row]:
        names = [reward.name for reward in self.rewards]
        return [
            {
                "step": state.global_step,
                "rollout": rollout,
                "index": index,
                "prompt": self.tokenizer.decode(one.prompt),
                "completion": one.text,
                "scores": {
                    name: None if math.isnan(value) else value for name, value in zip(names, one.rewards, strict=True)
                },
                "score": None if all(map(math.isnan, one.rewards)) else scores[index],
            }
            for index, one in enumerate(episodes[: self.args.num_samples])
        ]


def permutation(count: int, *seed: Any) -> list[int]:
    """Return the numbers below ``count`` in an order that is a function of ``seed`` alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(sampling.seed_of(*seed))).tolist()


def total_rewards(episodes: list[Episode], weights: list[float] | None) -> Tensor:
    """Return (B,) weighted sums of the rewards that could tell; NaN where none could."""
    rewards = torch.tensor([one.rewards for one in episodes])
    total = (rewards * torch.tensor(weights or [1.0] * rewards.size(1))).nansum(1)
    return torch.where(rewards.isnan().all(1), math.nan, total)


def about(episodes: list[Episode], rewards: list[Reward]) -> dict[str, float]:
    """Return means over completions, and of each reward."""
    found = {
        "completions/mean_length": sum(len(one.completion) for one in episodes) / len(episodes),
        "completions/ended_ratio": sum(one.ended for one in episodes) / len(episodes),
        "prompts/truncated_ratio": sum(one.cut for one in episodes) / len(episodes),
    }
    for place, reward in enumerate(rewards):
        known = [one.rewards[place] for one in episodes if not math.isnan(one.rewards[place])]
        found |= {f"rewards/{reward.name}/mean": sum(known) / len(known)} if known else {}
    return found


def _table(rows: list[Any], width: int) -> Tensor:
    """Return (B, width) numbers, zero where a row has none."""
    table = torch.zeros(len(rows), width)
    for place, numbers in enumerate(rows):
        if numbers is not None:
            table[place, : len(numbers[:width])] = numbers[:width]
    return table
