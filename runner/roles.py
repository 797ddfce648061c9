"""Which weights play policy, value function and reference of PPO: adapters on one base, or models of their own."""

import copy
import logging
from typing import Any

import torch
from torch import nn

from runner.actor_critic import REFERENCE, VALUE, ActorCritic
from runner.errors import ConfigError
from runner.sampling import Reward

logger = logging.getLogger(__name__)
SAME_START = (True, "gaussian", "eva", "mica")  # how LoRA may start and leave the model what it is


def build_actor_critic(
    model: Any, *, peft_config: Any, value_mode: str, value_model: Any, reference: Any, needs_reference: bool
) -> ActorCritic:
    """Put the parts together: adapters on the base, and what can serve as the reference.

    Args:
        model: The policy; it gets the adapter of ``peft_config``.
        peft_config: The adapter to train, or None.
        value_mode: ``shared``, ``adapter`` or ``separate``.
        value_model: A sequence classifier, for ``separate``.
        reference: A model of the same vocabulary, or None for the policy's start.
        needs_reference: Whether there has to be a reference.
    """
    fresh = getattr(peft_config, "init_lora_weights", True) in SAME_START
    if needs_reference and reference is None and peft_config is None and not hasattr(model, "get_base_model"):
        reference = copy.deepcopy(model)
    if isinstance(reference, nn.Module):
        reference.eval().requires_grad_(False)
    if peft_config is not None:
        from peft import get_peft_model

        if getattr(peft_config, "lora_dropout", 0):
            logger.warning("peft.lora_dropout=%s has no effect: PPO trains without dropout", peft_config.lora_dropout)
        model = get_peft_model(model, peft_config)
    if hasattr(model, "get_base_model"):
        if needs_reference and reference is None:
            reference = "base" if peft_config is not None and fresh else REFERENCE
        if value_mode == "adapter":
            _copy_adapter(model, VALUE)
        if reference == REFERENCE:
            _copy_adapter(model, REFERENCE)
    return ActorCritic(model, value_mode, value_model, reference)


def new_value_model(policy: Any) -> Any:
    """Return a sequence classifier with one label on a copy of the policy's layers, in float32.

    Raises:
        ConfigError: The policy's layers are quantized, and cannot train as a whole.
    """
    from transformers import AutoModelForSequenceClassification

    if getattr(policy, "is_quantized", False):
        raise ConfigError(
            "trainer.value_mode=separate cannot copy a quantized policy as its value model. Name one, for example "
            "model@value_model=pythia160m, or choose trainer.value_mode=adapter."
        )
    if hasattr(policy, "get_base_model"):
        policy = copy.deepcopy(policy).merge_and_unload()
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ConfigError(
            f"trainer.value_mode=separate cannot copy the policy as its value model: transformers has no sequence "
            f"classifier for {config.model_type}. Choose trainer.value_mode=shared, or name a model, for example "
            "model@value_model=pythia160m."
        ) from error
    model.base_model.load_state_dict(policy.base_model.state_dict())
    return model


def same_vocabulary(model: Any, policy: Any, tokenizer: Any) -> bool:
    """Whether a model can read the policy's ids; embeddings are often padded, so that sizes may differ a little."""
    size, own = (int(one.config.get_text_config().vocab_size) for one in (model, policy))
    return size == own or len(tokenizer) <= size < len(tokenizer) + 1024


def check_vocabulary(name: str, model: Any, policy: Any, tokenizer: Any) -> None:
    """Refuse a model that is given the policy's ids and has another vocabulary.

    Raises:
        ConfigError: It has.
    """
    if model is not None and not same_vocabulary(model, policy, tokenizer):
        raise ConfigError(
            f"{name} cannot read what the policy writes: it has {model.config.get_text_config().vocab_size} tokens and "
            f"the policy {policy.config.get_text_config().vocab_size}. Choose a model of the policy's family; a reward "
            "model may have a tokenizer of its own (reward.model.tokenizer_name_or_path)."
        )


def initial_value_model(policy: Any, rewards: list[Reward], tokenizer: Any) -> Any:
    """Return a value model that begins as the reward model, or else as the policy."""
    for reward in rewards:
        model = reward.function
        if not (isinstance(model, nn.Module) and hasattr(model, "score")):
            continue
        if same_vocabulary(model, policy, tokenizer) and reward.tokenizer.get_vocab() == tokenizer.get_vocab():
            logger.info("The value model begins as the reward model %s", reward.name)
            return copy.deepcopy(model).float().requires_grad_(True)
    logger.info("The value model begins as a whole copy of the policy, in float32")
    return new_value_model(policy)


def _copy_adapter(model: Any, name: str) -> None:
    """Add an adapter that begins as the active one is."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(model.peft_config[model.active_adapter])
    if not isinstance(getattr(config, "init_lora_weights", True), bool):
        config.init_lora_weights = True  # other starts change the base's weights
    model.add_adapter(name, config)
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    set_peft_model_state_dict(model, state, adapter_name=name)
