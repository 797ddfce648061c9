"""From prompts to scored completions: what a policy samples, and what functions and reward models say of it."""

import asyncio
import hashlib
import inspect
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runner import rl_math
from runner.errors import ConfigError

# Spelt out, because what is left open is filled from the model's own generation config.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True}
NEUTRAL |= {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
PASS = 32  # tokens that cost as much as another pass through the layers

Row = dict[str, Any]


@dataclass
class Episode:
    """A prompt with the completion that was sampled to it, and what was found out about it."""

    prompt: list[int]  # token ids
    cut: bool  # whether the start of a long prompt was left out
    completion: list[int]  # token ids, the stop token included
    ended: bool  # whether there is one
    text: str = ""
    rewards: list[float] = field(default_factory=list)  # one per reward; NaN where it cannot tell
    frozen: dict[str, Tensor] = field(default_factory=dict)  # log-probabilities and values, 1-D

    @property
    def ids(self) -> list[int]:
        """Prompt and completion."""
        return self.prompt + self.completion


@dataclass
class Reward:
    """A reward function, or a reward model with its tokenizer."""

    name: str
    function: Callable[..., Any]
    tokenizer: Any = None


# ---- sampling -----------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Any, row: Mapping[str, Any], template: Mapping[str, Any]) -> list[int]:
    """Return the token ids of a row's prompt: a text, or messages, whose last turn may be a begun answer."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    begun, tools = prompt[-1]["role"] == "assistant", row.get("tools")
    encoded = tokenizer.apply_chat_template(
        prompt,
        tools=(json.loads(tools) if isinstance(tools, str) else tools) or None,
        add_generation_prompt=not begun,
        continue_final_message=begun,
        tokenize=True,
        return_dict=True,
        **template,
        **(row.get("chat_template_kwargs") or {}),
    )
    return list(encoded["input_ids"])


def stop_ids(model: Any, tokenizer: Any, stop_token: str | None = None) -> list[int]:
    """Return the ids that end a completion: the tokenizer's, those of the model, which may be several, and one more.

    Raises:
        ConfigError: ``stop_token`` is not one token.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if stop_token not in (None, "eos"):
        ids = tokenizer.encode(stop_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(
                f"trainer.stop_token={stop_token!r} cannot end a completion: it is {len(ids)} tokens, "
                f"{tokenizer.convert_ids_to_tokens(ids)}. Choose a single token, or null for the tokenizer's EOS."
            )
        found += ids
    return list(dict.fromkeys(token for token in found if token is not None))


def sample(
    model: Any,
    prompts: list[list[int]],
    seeds: list[int] | None,
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: list[int],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float | None = None,
    vocabulary: int | None = None,
    options: Row | None = None,
) -> list[list[int]]:
    """Sample a completion to each prompt, in batches of like length, with the KV cache.

    A completion is a function of the weights, its prompt and its seed: neither the rows beside it nor anything that
    draws random numbers in between can change it.

    Args:
        model: A transformers model that generates.
        prompts: Token ids, at least one each.
        seeds: One per prompt; None takes the likeliest token each time.
        max_new_tokens: Most tokens of a completion.
        batch_size: Most prompts at a time.
        stop_ids: Tokens that end a completion.
        pad_id: Any token.
        temperature: What the logits are divided by.
        top_k: Likeliest tokens to choose from; 0 is all.
        top_p: Likeliest tokens of that mass to choose from.
        min_p: Tokens at least that likely, relative to the likeliest.
        vocabulary: Ids from here on are never sampled; None: all can be.
        options: More of ``transformers.GenerationConfig``.

    Returns:
        Token ids; what follows a stop token is padding.
    """
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": stop_ids or None, "pad_token_id": pad_id}
    config = GenerationConfig(**NEUTRAL | ends | (options or {}))
    completions: list[list[int]] = [[] for _ in prompts]
    for group in group_by_length([len(prompt) for prompt in prompts], batch_size):
        width = len(prompts[group[0]])
        ids = torch.tensor([[pad_id] * (width - len(prompts[row])) + prompts[row] for row in group])
        mask = torch.tensor([[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in group])
        choosers: list[LogitsProcessor] = []
        if seeds is not None:
            numbers = _draw([seeds[row] for row in group], max_new_tokens).to(model.device)
            choosers = [*_warpers(temperature, top_k, top_p, min_p), _Chooser(numbers, width, vocabulary)]
        sampled = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(choosers),
        )
        for row, tokens in zip(group, sampled[:, width:].tolist(), strict=True):
            completions[row] = tokens
    return completions


def _draw(seeds: list[int], count: int) -> Tensor:
    """Return (B, count) numbers in [0, 1), each row from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(count, generator=generator) for generator in generators])


def _warpers(temperature: float, top_k: int, top_p: float, min_p: float | None) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    return warpers


class _Chooser(LogitsProcessor):
    """Leaves one token a row: the one that the row's own random number of this step chooses."""

    def __init__(self, numbers: Tensor, width: int, vocabulary: int | None) -> None:
        self.numbers, self.width, self.vocabulary = numbers, width, vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.vocabulary is not None:
            scores[:, self.vocabulary :] = -math.inf
        chosen = rl_math.choose_tokens(scores, self.numbers[:, input_ids.size(1) - self.width])
        return torch.full_like(scores, -math.inf).scatter_(1, chosen[:, None], 0.0)


def cut_at_stop(completions: list[list[int]], stop_ids: list[int]) -> list[tuple[list[int], bool]]:
    """Return each completion up to and with its first stop token, and whether it has one."""
    ends = [next((n for n, token in enumerate(tokens, 1) if token in stop_ids), None) for tokens in completions]
    return [(tokens[:end], end is not None) for tokens, end in zip(completions, ends, strict=True)]


# ---- scoring ------------------------------------------------------------------------------------------------------


def prepare_rewards(
    functions: Any, tokenizers: Any, tokenizer: Any, *, weights: list[float] | None, device: Any
) -> list[Reward]:
    """Return rewards by name, their models frozen and in place.

    Args:
        functions: A reward function or model, or a list of them.
        tokenizers: Those of the models, alike; None where it is the policy's.
        tokenizer: The policy's.
        weights: One per reward, or None.
        device: Where the models go.

    Raises:
        ConfigError: A model has several labels, or the weights are not as many as the rewards.
    """
    functions = list(functions) if isinstance(functions, list | tuple) else [functions]
    tokenizers = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(functions)
    if weights is not None and len(weights) != len(functions):
        raise ConfigError(
            f"trainer.reward_weights={weights} cannot be used: there are {len(functions)} rewards. Give one weight "
            "for each, or null."
        )
    rewards = []
    for function, own in zip(functions, tokenizers, strict=True):
        if not isinstance(function, nn.Module):
            inner = getattr(function, "func", function)  # of a partial
            rewards.append(Reward(getattr(inner, "__name__", type(inner).__name__), function))
            continue
        model: Any = function
        name = str(getattr(model.config, "_name_or_path", "")).rstrip("/").rsplit("/", 1)[-1] or "reward_model"
        if model.config.num_labels != 1:
            raise ConfigError(
                f"The reward model {name} cannot score completions: it has {model.config.num_labels} labels. Choose "
                "one with a single label, as trainer=reward makes them."
            )
        own = own or tokenizer
        if own.pad_token_id is None:
            own.pad_token = own.eos_token
        model.config.get_text_config().pad_token_id = own.pad_token_id
        if not getattr(model, "is_quantized", False):
            model.to(device)
        rewards.append(Reward(name, model.eval().requires_grad_(False), own))
    for place, reward in enumerate(rewards):  # metrics are told apart by name
        if same := sum(other.name == reward.name for other in rewards[:place]):
            reward.name += f"_{same + 1}"
    return rewards


def reward_arguments(rows: list[Row], texts: list[str], known: Row) -> Row:
    """Return what reward functions are called with: the completions as the prompts are, texts or messages.

    Args:
        rows: With ``prompt``, and columns that are handed on.
        texts: A completion to each.
        known: More arguments, which go before columns of their names.
    """
    prompts = [row["prompt"] for row in rows]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    columns = {key for row in rows for key in row} - {"prompt", "completion"}
    given = {column: [row.get(column) for row in rows] for column in columns}
    return given | {"prompts": prompts, "completions": completions} | known


def score(rewards: list[Reward], rows: list[Row], episodes: list[Episode], *, batch_size: int, known: Row) -> None:
    """Add the rewards to some episodes.

    Args:
        rewards: Functions get ``prompts``, ``completions``, ``completion_ids``, every column of the rows and what is
            ``known``; models get prompt and completion as text.
        rows: The rows that the episodes were sampled to.
        episodes: With their text.
        batch_size: Most sequences that a reward model reads at a time.
        known: More arguments of functions.

    Raises:
        ConfigError: A function returned something else than a number, or None, for each completion.
    """
    ids = {"completion_ids": [one.completion for one in episodes]}
    arguments = reward_arguments(rows, [one.text for one in episodes], ids | known)
    prompts, completions = arguments["prompts"], arguments["completions"]
    found = []
    for reward in rewards:
        if isinstance(reward.function, nn.Module):
            found.append(_ask_model(reward, prompts, completions, episodes, batch_size))
            continue
        values = reward.function(**arguments)
        if inspect.isawaitable(values):
            values = asyncio.run(_wait_for(values))
        values = [math.nan if value is None else float(value) for value in values]
        if len(values) != len(rows) or any(map(math.isinf, values)):
            raise ConfigError(
                f"The reward {reward.name} cannot be used: it returned {len(values)} values for {len(rows)} "
                f"completions, {sum(map(math.isinf, values))} of them infinite. Return a finite number, or None, for "
                "each completion."
            )
        found.append(values)
    for one, numbers in zip(episodes, zip(*found, strict=True), strict=True):
        one.rewards = list(numbers)


def _ask_model(
    reward: Reward, prompts: list[Any], completions: list[Any], episodes: list[Episode], batch_size: int
) -> list[float]:
    """Return a reward model's scores of the texts in its own tokenizer and template.

    Plain text that ended gets the tokenizer's EOS, as reward models are trained on (``trl.RewardTrainer`` adds it).
    """
    model: Any = reward.function
    texts: list[list[int]] = []
    for prompt, completion, one in zip(prompts, completions, episodes, strict=True):
        if isinstance(prompt, str):
            end = (reward.tokenizer.eos_token or "") if one.ended else ""
            texts.append(reward.tokenizer(text=prompt + completion + end)["input_ids"])
        else:
            text = reward.tokenizer.apply_chat_template(prompt + completion, tokenize=False)
            texts.append(reward.tokenizer(text=text, add_special_tokens=False)["input_ids"])
    scores = [math.nan] * len(texts)
    for group in group_by_length([len(ids) for ids in texts], batch_size, padding_allowed(model.device)):
        batch = reward.tokenizer.pad(
            {"input_ids": [texts[row] for row in group]}, padding_side="right", return_tensors="pt"
        ).to(model.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, number in zip(group, logits[:, 0].float().tolist(), strict=True):
            scores[row] = number
    return scores


async def _wait_for(values: Awaitable[Any]) -> Any:
    return await values


# ---- batches and seeds --------------------------------------------------------------------------------------------


def group_by_length(lengths: Sequence[int], limit: int, waste: float = math.inf) -> list[list[int]]:
    """Split sequences into batches of like length, the longest first.

    Args:
        lengths: Tokens of each.
        limit: Most sequences of a batch.
        waste: Most padding in a batch, as a share of its tokens; a pass of its own is never worth ``PASS`` tokens.

    Returns:
        Positions in ``lengths``; the first of a batch is its longest.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        last = groups[-1] if groups else []
        tokens = sum(lengths[other] for other in last) + lengths[row]
        padding = lengths[last[0]] * (len(last) + 1) - tokens if last else 0
        if last and len(last) < limit and padding <= max(waste * tokens, PASS):
            last.append(row)
        else:
            groups.append([row])
    return groups


def padding_allowed(device: torch.device) -> float:
    """Return how much padding is worth a larger batch: on a CPU many small batches cost no more than a large one."""
    return 0.1 if device.type == "cpu" else math.inf


def seed_of(*parts: Any) -> int:
    """Return a seed that is a function of ``parts`` alone, and unlike that of other parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())
