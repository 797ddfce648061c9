"""What runs begin with, done once in the process that trials are forked from, so that none of them has to do it."""

import json
import os
from contextlib import suppress
from typing import Any

from runner import ahead, console, hardware, launch, lean, models, report
from runner.config import given, trainer_name


def rehearse(config: dict[str, Any]) -> None:
    """Read the tokenizer and the weights of a config; no device is opened.

    Not where a run reads them in other processes or straight to a device, or draws new weights with its own seed.
    What cannot be read here raises, and a trial will say why.
    """
    from transformers import AutoModelForCausalLM

    node, trainer = config["model"], config["trainer"]
    quantized = bool(config["quantization"]) or not lean.is_plain(node["name_or_path"], node.get("revision"))
    drawn = trainer_name(trainer["_target_"]) == "reward"
    if quantized or drawn or node.get("trust_remote_code") or launch.is_needed(config["launch"]):
        return
    console.quieten()
    tokenizer = ahead.keep(models.load_tokenizer, **given(models.load_tokenizer, node))
    models.highest(tokenizer, len(tokenizer))
    dtype, path = node.get("dtype", "auto"), models.local_path(node["name_or_path"], node.get("revision"))
    if dtype == "auto":  # a guess: to ask the device would open it, and a trial can read what it needs
        device = hardware.device_type(use_cpu=bool(trainer.get("use_cpu")))
        dtype = "bfloat16" if config["peft"] and device != "cpu" else "float32"
    ahead.keep(models.read, AutoModelForCausalLM, path, **{**given(models.read, node), "dtype": dtype})


with suppress(ImportError):  # over a thousand patterns for the names of weights are compiled, and kept
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("")
for page in ("report.html.jinja", "card.md.jinja"):
    report.template(page)
if shared := json.loads(os.environ.get("RUNNER_REHEARSE", "null")):
    with suppress(Exception):
        rehearse(shared)
