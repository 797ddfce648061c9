"""Engines that split a model over processes (accelerate's FSDP2, DeepSpeed) or sample for it (vLLM), by their names.

What they are told, what is known not to work with them, and what they lack on this machine.
"""

import re
from importlib.metadata import requires
from importlib.util import find_spec
from typing import Any

from runner import hardware
from runner.errors import ConfigError

# The nodes of ``launch`` whose keys are the fields of an accelerate class.
PLUGINS = {"fsdp": "accelerate.utils.FullyShardedDataParallelPlugin", "deepspeed": "accelerate.utils.DeepSpeedPlugin"}
# Fields that FSDP2 has no use for.   Source: accelerate 1.15, FullyShardedDataParallelPlugin.__post_init__
OF_FSDP1 = ("sharding_strategy", "backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states",
            "limit_all_gathers", "param_init_fn")  # fmt: skip
BITSANDBYTES = re.compile(r"(?!.*torch).*(bnb|8bit|32bit|paged|ademamix)")  # optimizers of transformers that it makes


def fields(node: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ``transformers.TrainingArguments`` that let a training be split as ``launch`` says."""
    if fsdp := node.get("fsdp"):
        own: dict[str, Any] = {"gradient_checkpointing": False} if fsdp.get("activation_checkpointing") else {}
        if fsdp.get("cpu_offload") and hardware.device_type() == "cuda":
            own["ddp_backend"] = "cuda:nccl,cpu:gloo"  # the norm of gradients that are kept on the CPU is summed there
        return {"fsdp": True, "fsdp_config": {"version": 2}, **own}
    if deepspeed := _given(node.get("deepspeed")):
        from accelerate.utils import DeepSpeedPlugin

        made = DeepSpeedPlugin(**deepspeed).deepspeed_config
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        of_trainer = dict.fromkeys((*sizes, "gradient_clipping"), "auto")
        precision = {name: {"enabled": "auto"} for name in ("bf16", "fp16")}
        return {"deepspeed": {**precision, **made, **of_trainer}}
    return {}


def tell(arguments: Any, node: dict[str, Any]) -> None:
    """Give a trainer's arguments those of accelerate's fields that transformers has no name for."""
    if fsdp := _given(node.get("fsdp")):
        arguments.fsdp_plugin_args.update(fsdp)
    for name, value in _given(node.get("deepspeed")).items():
        if name in ("zero3_init_flag", "transformer_moe_cls_names"):
            setattr(arguments.deepspeed_plugin, name, value)


def verify(trainer: Any, node: dict[str, Any]) -> None:
    """Check that a trainer is split as ``launch`` says, and not otherwise: accelerate says nothing of either.

    Raises:
        ConfigError: It is not.
    """
    kinds = {"FSDP": "fsdp", "DEEPSPEED": "deepspeed"}
    found, asked = kinds.get(trainer.accelerator.distributed_type.value), chosen(node)
    if found != asked:
        raise ConfigError(
            f"The model would be split by {found or 'nothing'}, and launch asks for {asked or 'nothing'}: what another "
            "launcher sets is not in the run's config. Choose launch=ddp, fsdp2, zero2 or zero3, and start with "
            "python -m runner."
        )


def find_conflicts(config: dict[str, Any]) -> list[str]:
    """Return what is known not to work with the engines that a config asks for, a sentence each.

    Args:
        config: Its keys and types are right.
    """
    node, trainer = config.get("launch") or {}, config["trainer"]
    found, asked = _place_faults(node), chosen(node)
    if asked is None:
        return found
    if node.get("fsdp") and node.get("deepspeed"):
        found.append("launch.fsdp and launch.deepspeed cannot split one model: leave one out.")
    if str(trainer["_target_"]).endswith("PPOConfig"):  # see runner.ppo: one model plays several roles, layer by layer
        found.append(
            f"trainer=ppo cannot run with launch.{asked}: it runs one set of weights under one adapter after the other "
            "and adds gradients up itself. Choose launch=ddp, where each process holds the model."
        )
    if isinstance((node.get("deepspeed") or {}).get("hf_ds_config"), str):
        found.append(
            "launch.deepspeed.hf_ds_config takes keys, not a file: a run reads its config.yaml only. Write the file's "
            "keys under launch.deepspeed.hf_ds_config in a recipe of your own."
        )
    return found + _quantization_faults(config, node) + _fsdp_faults(node.get("fsdp") or {}, trainer)


def find_missing(node: dict[str, Any], *, processes: int, use_cpu: bool) -> list[str]:
    """Return what this machine lacks for a ``launch`` node, a sentence each.

    Args:
        node: The config's ``launch``.
        processes: That this machine would start.
        use_cpu: Whether a CPU is asked for.
    """
    if node.get("deepspeed") and not find_spec("deepspeed"):
        return ["launch.deepspeed needs DeepSpeed, which is not installed: type pip install 'runner[deepspeed]'."]
    if chosen(node) is None and not hardware.GPUS.exists():
        return []  # whether there are devices need not be asked of torch, whose import takes seconds
    import torch

    device, count = hardware.device_type(use_cpu=use_cpu), torch.cuda.device_count()
    if device == "cpu" and node.get("fsdp"):  # Source: accelerate 1.15, AcceleratorState, by its distributed_type
        return [
            "launch.fsdp cannot run on a CPU: accelerate would train a whole copy in each process, without a word. "
            "Choose launch=ddp, which says so, or launch=zero2 (DeepSpeed), which splits gradients and optimizer."
        ]
    if device == "cpu" and (node.get("deepspeed") or {}).get("zero_stage", 2) == 3:
        return [
            "launch.deepspeed.zero_stage=3 cannot run on a CPU: DeepSpeed has no way to there. Choose launch=zero2."
        ]
    if device == "cuda" and processes > count:
        return [
            f"launch.processes={processes} needs a GPU for each process, and there are {count}: type "
            "launch.processes=auto, or trainer.use_cpu=true."
        ]
    return []


def vllm_faults(trainer: dict[str, Any]) -> list[str]:
    """Return what is missing for vLLM to sample for a trainer, whose node this is."""
    if not trainer.get("use_vllm") or find_spec("vllm"):
        return []
    wanted = next((text for text in requires("trl") or [] if text.startswith("vllm")), "vllm").partition(";")[0].strip()
    return [
        f"trainer.use_vllm=true needs vLLM, which is not installed: type pip install '{wanted}', the versions that the "
        "installed TRL supports, or trainer.use_vllm=false."
    ]


def chosen(node: dict[str, Any]) -> str | None:
    """Return ``fsdp`` or ``deepspeed`` where a ``launch`` node lets one of them split the model."""
    return next((name for name in PLUGINS if node.get(name)), None)


def _given(node: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (node or {}).items() if value is not None}


def _place_faults(node: dict[str, Any]) -> list[str]:
    """Return what is wrong with the machines that a node names."""
    nodes, rank, meeting = node.get("nodes", 1), node.get("node_rank", 0), node.get("rendezvous")
    found = []
    if isinstance(nodes, int) and nodes > 1 and not meeting:
        found.append(f"launch.nodes={nodes} must know where to meet: type launch.rendezvous=HOST:PORT, of the first.")
    if meeting and not re.fullmatch(r"\S+:\d+", meeting):
        found.append(f"launch.rendezvous={meeting} is not HOST:PORT: type, for example, launch.rendezvous=node1:29500.")
    if isinstance(nodes, int) and not 0 <= rank < nodes:
        found.append(f"launch.node_rank={rank} is none of launch.nodes={nodes} machines: they are numbered from 0.")
    return found


def _quantization_faults(config: dict[str, Any], node: dict[str, Any]) -> list[str]:
    """Return what keeps quantized weights from being split.

    Source: https://huggingface.co/docs/bitsandbytes/fsdp_qlora (only floats are split, so that 4-bit weights are stored
    as the type of the others, and 8-bit ones cannot be); https://huggingface.co/docs/peft/accelerate/deepspeed
    """
    quantization = config.get("quantization") or {}
    if not quantization or not (node.get("fsdp") or (node.get("deepspeed") or {}).get("zero_stage", 2) == 3):
        return []
    if quantization.get("load_in_8bit"):
        return [
            "quantization.load_in_8bit=true cannot be split over processes: integers are not. Choose quantization=nf4 "
            "quantization.bnb_4bit_quant_storage=bfloat16, or launch=ddp."
        ]
    dtype = config["model"].get("dtype", "auto")
    wanted = "bfloat16" if dtype == "auto" else dtype
    if (stored := quantization.get("bnb_4bit_quant_storage") or "uint8") == wanted:
        return []
    return [
        f"quantization.bnb_4bit_quant_storage={stored} cannot be split over processes beside weights in {wanted}: type "
        f"quantization.bnb_4bit_quant_storage={wanted}."
    ]


def _fsdp_faults(fsdp: dict[str, Any], trainer: dict[str, Any]) -> list[str]:
    found = [f"launch.fsdp.{key} has no place in FSDP2: leave it out." for key in OF_FSDP1 if fsdp.get(key) is not None]
    if fsdp and fsdp.get("fsdp_version", 2) != 2:
        found.append("launch.fsdp.fsdp_version must be 2: transformers is about to drop FSDP1.")
    if fsdp.get("activation_checkpointing") and trainer.get("gradient_checkpointing"):  # transformers' Trainer raises
        found.append(
            "launch.fsdp.activation_checkpointing and trainer.gradient_checkpointing recompute the same activations: "
            "leave the latter out."
        )
    if fsdp and BITSANDBYTES.fullmatch(str(trainer.get("optim", ""))):
        # Source: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1633
        found.append(
            f"trainer.optim={trainer['optim']} cannot update weights that FSDP2 has split: bitsandbytes knows no such "
            "tensors. Choose trainer.optim=adamw_torch_fused, or launch=zero2."
        )
    return found
