"""Adapters: which trainer needs which kind, and whether one fits a model."""

import copy
import re
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


def peft_for(config: "PeftConfig", *, trainer: str) -> "PeftConfig":
    """Return a copy of a PEFT config for a trainer: a reward model's score head is trained and saved with it."""
    config = copy.deepcopy(config)
    config.task_type = "SEQ_CLS" if trainer == "reward" else "CAUSAL_LM"
    return config


def check_adapter(model: "PreTrainedModel", config: "PeftConfig") -> None:
    """Return when ``config`` fits ``model``, which may be on the meta device.

    Raises:
        ConfigError: A target module matches nothing or is the output layer, or the pair cannot train.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if getattr(config, "use_dora", False) and getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
        raise ConfigError(
            "peft=dora cannot train on quantization=int8 without a GPU: peft 0.21 loses the scales of 8-bit weights "
            "that DoRA reads. Use quantization=nf4 or quantization=none, or peft=lora."
        )
    targets = getattr(config, "target_modules", None)
    family = model.config.model_type
    linear = sorted({name.rsplit(".", 1)[-1] for name in _linear_layers(model)})
    allowed = f"It has {', '.join(linear)}. Type peft.target_modules=[{','.join(linear[:2])}], or all-linear"
    if targets is None:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
        known = getattr(tuner, "target_module_mapping", None)
        if known is not None and family not in known and not getattr(config, "target_parameters", None):
            raise ConfigError(f"peft.target_modules is not set, and peft has no default for {family}. {allowed}")
        return
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    hits = {
        target: {name for name in names if _matches(target, name, regex=isinstance(targets, str))}
        for target in ([targets] if isinstance(targets, str) else sorted(targets))
    }
    if unmatched := [target for target, found in hits.items() if not found]:
        raise ConfigError(f"peft.target_modules names {', '.join(unmatched)}, which {family} lacks. {allowed}")
    output = model.get_output_embeddings()
    head = {name for name, module in model.named_modules() if output is not None and module is output}
    if any(head & found for found in hits.values()):
        raise ConfigError(
            f"peft.target_modules includes the output layer ({', '.join(head)}), which trl scores without its adapter. "
            f"Leave it out, or train it whole: peft.modules_to_save=[{', '.join(head)}]"
        )


def keep_float32(model: Any) -> None:
    """Cast what trains back to float32, in place, before the optimizer is made.

    The trainers of trl 1.16 cast the adapters of a quantized model to bfloat16, where small updates are lost,
    and the score head of a reward model too, which then cannot read float32 activations.
    """
    import torch
    from peft.utils import ModulesToSaveWrapper

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in {torch.bfloat16, torch.float16}:
            parameter.data = parameter.data.float()
    for wrapper in (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)):
        for trained in wrapper.modules_to_save.values():
            trained.register_forward_pre_hook(_read_as_own)


def _read_as_own(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast what frozen layers of another dtype give to a head, to its own, where autocast does not."""
    import torch

    weight = getattr(module, "weight", None)
    if weight is None or torch.is_autocast_enabled(weight.device.type):
        return inputs
    return tuple(one.to(weight.dtype) if one.is_floating_point() else one for one in inputs)


def _linear_layers(model: Any) -> list[str]:
    """Return the names of the layers that ``all-linear`` stands for."""
    import torch
    from transformers.pytorch_utils import Conv1D

    heads = {model.get_output_embeddings(), getattr(model, "score", None)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module not in heads
    ]


def _matches(target: str, name: str, *, regex: bool) -> bool:
    if regex:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")
