"""What this machine is, and what it does well: the settings that follow from it unless a person types them."""

import contextlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")  # Linux only
GPUS = Path("/proc/driver/nvidia/gpus")  # of the driver, whatever a process may use; Linux only
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, on Linux


def describe() -> dict[str, Any]:
    """Return what the manifest says about the machine: accelerators, CPU, cores, memory, native bfloat16."""
    import psutil
    import torch

    device = device_type()
    found: dict[str, Any] = {
        "device": device,
        "accelerators": [],
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "bf16": has_bf16(device),
        "torch_threads": torch.get_num_threads(),
    }
    if device == "cuda":
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found["accelerators"] = [
            {"name": card.name, "memory_gb": round(card.total_memory / 2**30, 1)} for card in cards
        ]
        found["cuda"] = torch.version.cuda or f"rocm {torch.version.hip}"
    elif device != "cpu":
        found["accelerators"] = [{"name": device}] * torch.accelerator.device_count()
    return found


def trainer_defaults(typed: Mapping[str, Any]) -> dict[str, bool]:
    """Return the fields of ``TrainingArguments`` that this machine asks for and that nobody typed.

    Mixed precision keeps float32 master weights: bfloat16 where the accelerator computes in it, else float16 on
    CUDA. On a CPU it is float32, also where the CPU knows bfloat16: casting the weights at every step of a small
    batch costs more than the products save, and an emulated bfloat16 costs ten times the step. Without an
    accelerator, recomputing activations would only cost time; with one, TRL's own default stays.

    Args:
        typed: The fields that are set already; ``use_cpu`` and a precision among them are heeded.
    """
    device = device_type(use_cpu=bool(typed.get("use_cpu")))
    fields: dict[str, bool] = {}
    if not typed.get("bf16") and not typed.get("fp16"):
        bf16 = device != "cpu" and has_bf16(device) and typed.get("bf16") is None
        fields |= {"bf16": bf16, "fp16": device == "cuda" and not has_bf16(device)}
    if device == "cpu":
        fields |= {"use_cpu": True, "gradient_checkpointing": False}
    if device in {"cpu", "mps"}:
        fields["dataloader_pin_memory"] = False  # there is no device to copy to, and torch warns
    return {name: value for name, value in fields.items() if typed.get(name) is None}


def quantization_defaults(typed: Mapping[str, Any], *, use_cpu: bool = False) -> dict[str, str]:
    """Return the fields of ``BitsAndBytesConfig`` that this machine asks for and that nobody typed.

    That is what 4-bit weights compute in. On a CPU it is float32 even where bfloat16 is native: bitsandbytes
    would convert there and back in every layer.
    """
    if typed.get("bnb_4bit_compute_dtype") is not None:
        return {}
    device = device_type(use_cpu=use_cpu)
    return {"bnb_4bit_compute_dtype": "bfloat16" if device != "cpu" and has_bf16(device) else "float32"}


def weights_dtype(dtype: str, *, frozen: bool, device: str) -> str:
    """Return the dtype to load weights in; ``auto`` follows the hardware and what will train.

    Weights that train are kept in float32: an update of a learning rate of 1e-6 is lost in bfloat16's eight
    bits, and mixed precision already computes in bfloat16. Frozen weights under an adapter are kept in
    bfloat16 where the accelerator computes in it, which halves their memory; on a CPU in float32.

    Args:
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        frozen: Whether only an adapter on top of them trains, in mixed precision.
        device: What trains: ``cpu``, ``cuda``, ...
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if frozen and device != "cpu" and has_bf16(device) else "float32"


def installed_gpus() -> int:
    """Return how many NVIDIA GPUs the machine has, whatever this process may use; asks no library."""
    return len(list(GPUS.glob("*")))


def has_driver() -> bool:
    """Tell whether the machine has a driver for NVIDIA's or AMD's GPUs, without which none can have been opened."""
    import ctypes

    with contextlib.suppress(OSError):
        return Path("/dev/kfd").exists() or bool(ctypes.CDLL("libcuda.so.1"))
    return False


def idle_gpus() -> str | None:
    """Return what to say where the machine has GPUs and this process computes on the CPU all the same."""
    if not (found := installed_gpus()) or device_type() != "cpu":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "this PyTorch cannot use them: see python -c 'import torch; torch.cuda.init()'"
    if visible is not None:
        why = f"CUDA_VISIBLE_DEVICES={visible!r} hides them (a launcher sets it: ask it for GPUs)"
    return f"{found} GPUs of this machine stay idle, and the CPU trains: {why}. trainer.use_cpu=true says it is meant."


def device_type(*, use_cpu: bool = False) -> str:
    """Return what would train: ``cuda``, ``mps``, ``xpu``, ... or ``cpu``."""
    import torch

    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def has_bf16(device: str) -> bool:
    """Tell whether a type of device computes in bfloat16 natively, rather than emulating it."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # true for some that emulate it
        return supported and bool({"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split()))  # of x86
    return device == "xpu"


def memory_bytes(device: str) -> float | None:
    """Return the memory that a process can have there: of the first device, or of the machine or its container."""
    import psutil
    import torch

    if device == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    if device != "cpu":
        return None
    total, limit = psutil.virtual_memory().total, CGROUP_LIMIT.read_text() if CGROUP_LIMIT.exists() else "max"
    return float(min(total, int(limit)) if limit.strip().isdigit() else total)


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(key: str) -> str:
    """Return the first value of ``key`` in Linux's list of processors, or an empty string."""
    for line in CPUINFO.read_text().splitlines() if CPUINFO.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
