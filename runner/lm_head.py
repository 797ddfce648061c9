"""TRL's LM head scores supervised positions only, also where there is no Triton: a third of a step on a CPU."""

import inspect
import logging
from functools import partial
from importlib.metadata import version
from typing import Any

from runner import trainer_source
from runner.prefix_sharing import TYPES

logger = logging.getLogger(__name__)

COMPILED = frozenset({"neuron", "xla", "hpu"})  # compile for each shape, so that fewer positions cost more


def compact_lm_head() -> bool:
    """Let TRL leave prompt and padding out of the LM head; return whether it will.

    TRL does so on Triton devices and elsewhere scores every position, because its switch asks for Triton. Only
    the switch in ``add_fused_lm_head`` is replaced; the kernels are chosen by another name, which stays. A TRL
    whose source is not the one that was read keeps its own way.

    Source: trl/trainer/utils.py, ``add_fused_lm_head``: ``compact = _use_triton(hidden_states.device)``
    """
    from trl.trainer import utils

    switch: Any = getattr(utils, "_use_triton", None)
    if getattr(switch, "compacts", False):
        return True
    if not trainer_source.knows_trl() or switch is None or inspect.getsource(utils).count("_use_triton(") != 1:
        logger.info("TRL %s was not compared: its own way to score is kept", version("trl"))
        return False

    def compacts(device: Any) -> bool:
        return device.type not in COMPILED or switch(device)

    compacts.compacts = True  # type: ignore[attr-defined]  # marks it as ours, so that it is replaced once
    utils._use_triton = compacts
    return True


def compact_pairs(trainer: Any) -> bool:
    """Give a trainer that makes logits of all of a pair, as ORPO's and CPO's, the LM head of DPO; return whether it is.

    The loss stays. ``logits/chosen`` and ``logits/rejected`` become means over the answers, as DPO logs them; upstream
    they are means over prompts and padding, too. Models of types that were not compared keep upstream's way, as does
    a loss that weighs experts.

    Source: trl/experimental/orpo/orpo_trainer.py and cpo/cpo_trainer.py, ``concatenated_forward``
    """
    if not hasattr(trainer, "concatenated_forward"):
        return False
    bare = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    unlike = bare.config.model_type not in TYPES or trainer.aux_loss_enabled
    if unlike or trainer.args.use_liger_kernel or not compact_lm_head():  # liger replaces the model's forward pass
        logger.info("%s scores every position of this model, as upstream has it", type(trainer).__name__)
        return False
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(bare, outputs=("log_probs", "mean_logits"))
    trainer.concatenated_forward = partial(_score_pairs, trainer)
    return True


def _score_pairs(trainer: Any, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
    """Return log-probabilities and mean logits of B chosen and B rejected answers, and the loss of the chosen ones."""
    is_cpo = hasattr(trainer, "cpo_alpha")
    padding = trainer.pad_token_id if is_cpo else trainer.padding_value
    pairs = trainer.concatenated_inputs(batch, padding_value=padding, device=trainer.accelerator.device)
    ids, mask, answers = (pairs[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
    count, learnt = len(batch["chosen_labels"]), answers.clone()
    if not is_cpo:  # which learns the chosen answer's prompt, too
        learnt[:count] = ids[:count].masked_fill(mask[:count] != 1, -100)
    output = model(ids, attention_mask=mask, labels=learnt, fused_lm_head=True)
    answers, learnt = answers[:, 1:] != -100, learnt[:count, 1:] != -100
    scores, means = (of[:, -answers.shape[1] :] for of in (output.log_probs, output.mean_logits))
    logps = (scores * answers).sum(-1)
    if not is_cpo or trainer.loss_type in ("ipo", "simpo"):
        logps = logps / answers.sum(-1)
    loss = logps.new_zeros(()) if is_cpo and not trainer.cpo_alpha else -scores[:count][learnt].mean()
    logits = [(m * a).sum() / a.sum().clamp(min=1) for m, a in zip(means.chunk(2), answers.chunk(2), strict=True)]
    return *logps.chunk(2), *logits, loss
