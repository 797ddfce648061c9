"""What rows of a batch have in common at their beginnings is read once: a system prompt, the prompt of several answers.

Several rows become one sequence: the first row, then of every row what those before it do not have. The mask shows each
token its own row alone, and positions count within the row, so that every token is computed from what it would be
computed from in a sequence of its own; and there is less padding. What leaves the model's body has the shape that went
in: heads, losses and trainers see no difference.

Source: arXiv:2410.20305 (Accelerating Direct Preference Optimization with Prefix Sharing), for the two rows of a pair
"""

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from runner import trainer_source
from runner.estimate import read_together

logger = logging.getLogger(__name__)

TRAINERS = frozenset({"sft", "dpo", "kto", "reward", "orpo", "cpo", "grpo", "rloo"})
# Models whose body sees nothing but token ids, their positions and the mask; each is tested.
TYPES = frozenset({"gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"})
# Adapters that look at each token alone, whatever is beside it; each is tested. And fields by which they do not.
ADAPTERS = frozenset({"LORA", "ADALORA", "MISS", "RANDLORA", "VERA", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "IA3"})
BY_ROW = ("alora_invocation_tokens", "velora_config", "monteclora_config", "arrow_config")
OWN_WAYS = ("torch_compile", "use_liger_kernel", "padding_free", "neftune_noise_alpha")  # of a trainer, to run a model
ASKED = (*OWN_WAYS, "disable_dropout")  # fields of its arguments
# Times its width, a token's cost in a layer equals its attention to so many tokens; measured on a CPU, in float32.
LAYER = {"sdpa": 3, "eager": 1}


@dataclass
class Sharing:
    """How often it was done.

    Attributes:
        passes: of the model's body that read two rows or more.
        shared: of these, in which rows shared their beginnings.
        padded: tokens of all these passes, with padding, as they came.
        read: tokens that were read, with padding.
        refused: why it was not done at all; empty where it could be.
    """

    passes: int = 0
    shared: int = 0
    padded: int = 0
    read: int = 0
    refused: str = ""


class Plan(NamedTuple):
    """How the rows of a batch of shape (B, L), sorted, become S sequences of L' tokens, and go back.

    Attributes:
        source: (S, L'), where each token is in the flattened batch; padding is 0.
        position: (S, L'), of each token in its row; padding is 0.
        row: (S, L'), the number of the first row that has it; padding is -1.
        until: (S, L'), that of the last row that has it; padding is -1.
        back: (B, L), where each token of the batch is in the flattened S x L' tokens.
    """

    source: torch.Tensor
    position: torch.Tensor
    row: torch.Tensor
    until: torch.Tensor
    back: torch.Tensor


def share_prefixes(models: Iterable[Any], arguments: Any, adapter: Any, *, trainer: str) -> Sharing:
    """Let models read what the rows of a batch begin with once, where that pays.

    Args:
        models: Causal language models or classifiers, on their way to a trainer; None among them is none.
        arguments: Of the trainer.
        adapter: The config of the adapter that the trainer adds, or None.
        trainer: Its short name.

    Returns:
        Counts, of all these models.
    """
    found = [model for model in models if model is not None] if trainer in TRAINERS else []
    sharing = Sharing(refused=next(filter(None, (why_not(model, arguments, adapter) for model in found)), ""))
    if sharing.refused:
        logger.info("What the rows of a batch have in common is read once for each: %s", sharing.refused)
        return sharing
    for model in found:
        _wrap(model.base_model, sharing)
    return sharing


def _wrap(body: Any, sharing: Sharing) -> None:
    """Replace the forward pass of a model's body by one that shares; a copy of the body would still run this one."""
    read, per_token = body.forward, token_cost(body.config)

    @functools.wraps(read)
    def forward(input_ids: Any = None, attention_mask: Any = None, **rest: Any) -> Any:
        asked = any(value is not None and value is not False for value in rest.values())  # such as for a cache
        if input_ids is None or attention_mask is None or asked or attention_mask.dim() != 2 or len(input_ids) < 2:
            return read(input_ids=input_ids, attention_mask=attention_mask, **rest)
        plan = plan_rows(input_ids.cpu(), attention_mask.cpu().bool(), per_token=per_token)
        sharing.passes, sharing.shared = sharing.passes + 1, sharing.shared + (plan is not None)
        sharing.padded += input_ids.numel()
        sharing.read += plan.source.numel() if plan else input_ids.numel()
        if plan is None:
            return read(input_ids=input_ids, attention_mask=attention_mask, **rest)
        plan = Plan(*(part.to(input_ids.device) for part in plan))
        mask, kind = see_own(plan), input_ids.device.type
        if kind == "cpu" or body.config._attn_implementation == "eager":  # each layer adds it and keeps it
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else body.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        given = {"input_ids": input_ids.flatten()[plan.source], "position_ids": plan.position, "attention_mask": mask}
        output = read(**(rest | given))
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[plan.back]
        return output

    body.forward = forward


def token_cost(config: Any) -> int:
    """Return what a token costs a model beside its attention, as ``estimate.read_together`` has it."""
    return LAYER[config._attn_implementation] * int(config.hidden_size)


def why_not(model: Any, arguments: Any, adapter: Any) -> str:
    """Return why a model cannot read what rows have in common once; nothing where it can.

    Args:
        model: Without the adapter.
        arguments: Of its trainer.
        adapter: The adapter's config, or None.
    """
    config = model.config
    if not trainer_source.knows_trl():
        return "this TRL was not compared"
    if config.model_type not in TYPES or model.base_model is model:
        return f"models of type {config.model_type} were not tested with it"
    if config._attn_implementation not in LAYER:
        return f"{config._attn_implementation} attention takes no mask for it"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or getattr(config, "sliding_window", None):
        return "the model's attention has a window"
    fields = adapter.to_dict() if adapter else {}
    if adapter and (fields["peft_type"] not in ADAPTERS or any(map(fields.get, BY_ROW))):
        return f"{type(adapter).__name__} looks at rows as they come"
    drops = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    drops = drops or any(value for key, value in fields.items() if key.endswith("dropout"))
    if getattr(config, "attention_dropout", 0) or (drops and not getattr(arguments, "disable_dropout", False)):
        return "dropout differs between rows"
    return next((f"trainer.{key}={value}" for key in OWN_WAYS if (value := getattr(arguments, key, None))), "")


def plan_rows(input_ids: torch.Tensor, real: torch.Tensor, *, per_token: int) -> Plan | None:
    """Return how B rows are read as fewer sequences; None where a row has a gap or no token, or it does not pay.

    In alphabetical order every row has most in common with the one before. The tokens that it does not have in common
    follow those of the rows before it, as many rows to a sequence as cost least.

    Args:
        input_ids: (B, L).
        real: (B, L), false where there is padding, on either side.
        per_token: As in ``estimate.read_together``.
    """
    rows, size = input_ids.shape
    count, first = real.sum(1), real.int().argmax(1)
    places, numbers = torch.arange(size), torch.arange(rows)
    if not count.all() or not (real == (places >= first[:, None]) & (places < (first + count)[:, None])).all():
        return None
    start = numbers * size + first  # of each row, in the flattened batch
    tokens = input_ids.flatten()[(start[:, None] + places).clamp(max=rows * size - 1)]
    tokens = tokens.masked_fill(places >= count[:, None], -1)
    order = torch.tensor(sorted(numbers.tolist(), key=tokens.tolist().__getitem__))
    tokens, length = tokens[order], count[order]
    common = torch.zeros_like(length)
    common[1:] = ((tokens[1:] == tokens[:-1]) & (tokens[1:] >= 0)).cumprod(1).sum(1)
    padded = not bool(real.all())
    together, width = read_together(length.tolist(), common.tolist(), size=size, per_token=per_token, padded=padded)
    if together == 1:
        return None

    common[::together] = 0
    owner = torch.where(places >= common[:, None], numbers[:, None], 0).cummax(0).values  # (B, L), who has the token
    until = torch.zeros_like(owner).scatter_reduce(0, owner, numbers[:, None].expand(rows, size), "amax")
    own = (owner == numbers[:, None]) & (places < length[:, None])
    number = own.flatten().cumsum(0).view(rows, size) - 1
    number = number - number[::together, :1].repeat_interleave(together, 0)[:rows]  # in its sequence
    row, position = own.nonzero(as_tuple=True)
    plan = torch.tensor([0, 0, -1, -1])[:, None, None].repeat(1, -(-rows // together), width)
    plan[:, row // together, number[own]] = torch.stack([start[order][row] + position, position, row, until[own]])
    within = (places - first[:, None]).clamp(min=0).minimum(count[:, None] - 1)  # padding gets what is there
    sorted_row = order.argsort()[:, None]
    back = sorted_row // together * width + number[owner[sorted_row, within], within]
    return Plan._make([*plan, back])


def see_own(plan: Plan) -> torch.Tensor:
    """Return the mask (S, 1, L', L') by which a token sees those before it in its own row; padding sees padding."""
    position, row, until = plan.position[:, None], plan.row[:, None], plan.until[:, None]
    return ((position <= position.mT) & (row <= row.mT) & (row.mT <= until))[:, None]
