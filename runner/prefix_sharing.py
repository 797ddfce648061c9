"""The chosen and the rejected answer of a pair are read after one copy of what they have in common, not two.

A pair becomes one sequence: the common beginning, what only the chosen one has, what only the rejected one has. The
mask keeps these two from seeing each other, and the positions of both count on from the beginning, so that every token
is computed from what it would be computed from in a sequence of its own. What leaves the model's body has the shape
that went in: heads, losses and trainers see no difference.

Source: arXiv:2410.20305 (Accelerating Direct Preference Optimization with Prefix Sharing)
"""

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from runner import trainer_source

logger = logging.getLogger(__name__)

TRAINERS = frozenset({"dpo", "reward", "orpo", "cpo"})
# Models whose body sees nothing but token ids, their positions and the mask; each is tested.
TYPES = frozenset({"gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"})
OWN_WAYS = ("torch_compile", "use_liger_kernel", "padding_free", "neftune_noise_alpha")  # of a trainer, to run a model
ASKED = (*OWN_WAYS, "disable_dropout")  # fields of its arguments
ATTENTION = frozenset({"eager", "sdpa"})  # take any mask
SAVES = 0.9  # of the cost of reading a batch as it is: above it, sharing does not pay
LAYER = 6  # times its width, a token's cost in a layer equals its attention to so many tokens


@dataclass
class Sharing:
    """How often it was done.

    Attributes:
        passes: of the model's body that read pairs.
        shared: of these, in which the pairs shared their beginnings.
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
    """How the rows of a batch of shape (2 B, L) become B sequences of L' tokens, and go back.

    Attributes:
        source: (B, L'), where each token is in the flattened batch; padding is 0.
        position: (B, L'), of each token in its own sequence.
        segment: (B, L'), 0: of both, 1: of the chosen one, 2: of the rejected one, -1: padding.
        back: (2 B, L), where each token of the batch is in the flattened B x L' tokens.
    """

    source: torch.Tensor
    position: torch.Tensor
    segment: torch.Tensor
    back: torch.Tensor


def share_prefixes(models: Iterable[Any], arguments: Any, adapter: Any, *, trainer: str) -> Sharing:
    """Let models read batches of all chosen and then all rejected rows with their beginnings once, where that pays.

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
        logger.info("What the answers of a pair have in common is read twice: %s", sharing.refused)
        return sharing
    for model in found:
        _wrap(model.base_model, sharing)
    return sharing


def _wrap(body: Any, sharing: Sharing) -> None:
    """Replace the forward pass of a model's body by one that shares; a copy of the body would still run this one."""
    read, per_token = body.forward, LAYER * body.config.hidden_size

    @functools.wraps(read)
    def forward(input_ids: Any = None, attention_mask: Any = None, **rest: Any) -> Any:
        asked = any(value is not None and value is not False for value in rest.values())  # such as for a cache
        if input_ids is None or attention_mask is None or asked or attention_mask.dim() != 2 or len(input_ids) % 2:
            return read(input_ids=input_ids, attention_mask=attention_mask, **rest)
        rows, length = input_ids.shape
        plan = plan_pairs(input_ids.cpu(), attention_mask.cpu().bool())
        shared = plan.source.shape[1] if plan else 2 * length
        pays = shared * (per_token + shared) <= SAVES * 2 * length * (per_token + length)
        sharing.passes, sharing.shared = sharing.passes + 1, sharing.shared + pays
        sharing.padded += rows * length
        sharing.read += rows // 2 * shared if pays else rows * length
        if plan is None or not pays:
            return read(input_ids=input_ids, attention_mask=attention_mask, **rest)
        source, position, segment, back = (part.to(input_ids.device) for part in plan)
        mask = see_own(segment)
        if body.config._attn_implementation == "eager":  # adds it to the scores
            mask = torch.zeros_like(mask, dtype=body.dtype).masked_fill(~mask, torch.finfo(body.dtype).min)
        given = {**rest, "input_ids": input_ids.flatten()[source], "attention_mask": mask, "position_ids": position}
        output = read(**given)
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[back]
        return output

    body.forward = forward


def why_not(model: Any, arguments: Any, adapter: Any) -> str:
    """Return why a model cannot read pairs with their beginnings once; nothing where it can.

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
    if config._attn_implementation not in ATTENTION:
        return f"{config._attn_implementation} attention takes no mask for it"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or getattr(config, "sliding_window", None):
        return "the model's attention has a window"
    fields = adapter.to_dict() if adapter else {}
    by_row = fields.get("alora_invocation_tokens") or fields.get("peft_type") == "XLORA"
    if by_row or (adapter and adapter.is_prompt_learning):
        return f"{type(adapter).__name__} looks at rows as they come"
    drops = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    drops = drops or any(value for key, value in fields.items() if key.endswith("dropout"))
    if getattr(config, "attention_dropout", 0) or (drops and not getattr(arguments, "disable_dropout", False)):
        return "dropout differs between the chosen and the rejected answer"
    return next((f"trainer.{key}={value}" for key in OWN_WAYS if (value := getattr(arguments, key, None))), "")


def plan_pairs(input_ids: torch.Tensor, real: torch.Tensor) -> Plan | None:
    """Return how a batch of B chosen and then B rejected rows is read as B; None where a row has a gap or no token.

    Args:
        input_ids: (2 B, L).
        real: (2 B, L), false where there is padding, on either side.
    """
    rows, size = input_ids.shape
    count, first = real.sum(1), real.int().argmax(1)
    places = torch.arange(size)
    if not count.all() or not (real == (places >= first[:, None]) & (places < (first + count)[:, None])).all():
        return None
    flat = (torch.arange(rows) * size + first)[:, None]  # where each row's first token is
    tokens = input_ids.flatten()[(flat + places).clamp(max=rows * size - 1)]
    (chosen, rejected), (start_chosen, start_rejected) = count[:, None].chunk(2), flat.chunk(2)
    same = (tokens[: rows // 2] == tokens[rows // 2 :]) & (places < torch.minimum(chosen, rejected))
    common = same.cumprod(1).sum(1, keepdim=True)

    total = chosen + rejected - common
    at = torch.arange(int(total.max()))
    after = at - chosen + common  # the position of what only the rejected row has
    source = torch.where(at < chosen, start_chosen + at, start_rejected + after)
    position = torch.where(at < chosen, at, after)
    segment = (at >= common).int() + (at >= chosen).int()
    source, position, segment = (
        torch.where(at < total, part, padding) for part, padding in ((source, 0), (position, 0), (segment, -1))
    )
    within = (places - first[:, None]).clamp(min=0)
    moved = torch.where(within[rows // 2 :] < common, within[rows // 2 :], within[rows // 2 :] + chosen - common)
    back = torch.cat([within[: rows // 2], moved]).minimum(total.repeat(2, 1) - 1)  # padding gets what is there
    return Plan(source, position, segment, back + len(at) * torch.arange(rows // 2).repeat(2)[:, None])


def see_own(segment: torch.Tensor) -> torch.Tensor:
    """Return the mask (B, 1, L', L') by which a token sees the common beginning and what is before it in its own part.

    Args:
        segment: (B, L'), as in ``Plan``. Padding sees padding, since a row of nothing has no softmax.
    """
    size = segment.shape[1]
    before = torch.ones(size, size, dtype=torch.bool, device=segment.device).tril()
    key, query = segment[:, None, :], segment[:, :, None]
    sees = before & ((key == query) | (key == 0) & (query >= 0))
    return sees[:, None]
