"""The README.md of a trained model: what it is, how it came about, how to load it."""

import re
from pathlib import Path
from typing import Any

import yaml

from runner import report

EMBEDDED = {"embedded:smollm135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LOAD = {
    (False, False): "from transformers import AutoModelForCausalLM as Model",
    (False, True): "from transformers import AutoModelForSequenceClassification as Model",
    (True, False): "from peft import AutoPeftModelForCausalLM as Model",
    (True, True): "from peft import AutoPeftModelForSequenceClassification as Model",
}


def write_card(run_dir: str | Path) -> None:
    """Write model/README.md of a run directory, with the metadata that the hub reads."""
    run = report.load(run_dir)
    (run.model / "README.md").write_text(_card(run), encoding="utf-8")


def _card(run: report.Run) -> str:
    names, adapter = run.names, (run.model / "adapter_config.json").is_file()
    named = str((run.config.get("model") or {}).get("name_or_path") or "?")
    base = EMBEDDED.get(named) or (named if _is_hub_id(named) else None)
    shown_base = f"[{base}](https://huggingface.co/{base})" if base else f"`{_basename(named)}`, a local model"
    dataset = str((run.config.get("dataset") or {}).get("path") or "")
    reward = names["trainer"] == "reward"
    target = str((run.config.get("trainer") or {}).get("_target_"))
    library = ["trl"] if target.startswith("trl.") else []
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if reward else "text-generation",
        "tags": [*library, names["trainer"], *(["lora"] if adapter and "lora" in names["peft"].lower() else [])],
    }
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    if _is_hub_id(dataset) and "/" in dataset:
        front["datasets"] = [dataset]
    what = "An adapter for" if adapter else "A fine-tuned version of"
    versions = run.manifest.get("versions") or {}
    used = [f"{name} {versions[name]}" for name in ("trl", "transformers", "peft", "torch") if name in versions]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_basename(named.rsplit(':', 1)[-1])}, {names['trainer']} on {names['dataset']}",
        f"{what} {shown_base}, trained with {names['trainer'].upper()} on {names['dataset']}.",
        *_results(run),
        "## Use",
        _use(adapter=adapter, reward=reward),
        "## Training",
        f"```yaml\n{yaml.safe_dump(_settings(run), sort_keys=False, allow_unicode=True)}```",
        f"Made with {', '.join(used)}." if used else "",
        "## Licence",
        f"The weights derive from {base or 'the base model'}: its licence applies, and that of the training data.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(run: report.Run) -> list[str]:
    rows = [f"| {name} | {report.number(a)} | {report.number(b)} |" for name, (a, b) in run.scores.items()]
    rows += [f"| {name} | {report.number(a)} | {report.number(b)} |" for name, a, b in report.ends(run)]
    if not rows:
        return []
    note = "Scores are means over held-out prompts, answered greedily; `eval_` is held out, the rest is training."
    return ["## Results", "\n".join(["| | before | after |", "|---|---|---|", *rows]), note]


def _use(*, adapter: bool, reward: bool) -> str:
    load = [LOAD[adapter, reward], "from transformers import AutoTokenizer", ""]
    load += ['model = Model.from_pretrained("path/to/this/folder")']
    load += ['tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")']
    chat = '[{"role": "user", "content": "..."}' + (', {"role": "assistant", "content": "..."}]' if reward else "]")
    prompt = "" if reward else ", add_generation_prompt=True"
    load += [f'inputs = tokenizer.apply_chat_template({chat}{prompt}, return_tensors="pt", return_dict=True)']
    load += [
        "model(**inputs).logits" if reward else "tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0])"
    ]
    return "```python\n" + "\n".join(load) + "\n```"


def _settings(run: report.Run) -> dict[str, Any]:
    """Return the options of trainer, adapter and quantization that were set; of paths only the last part."""
    groups = {name: run.config.get(name) or {} for name in ("trainer", "peft", "quantization")}
    return {
        name: {
            key: _basename(value) if isinstance(value, str) and value.startswith(("/", "~", ".")) else value
            for key, value in group.items()
            if key != "_target_" and value is not None
        }
        for name, group in groups.items()
        if group
    }


def _is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def _basename(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
