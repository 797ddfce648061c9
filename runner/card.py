"""The README.md of a trained model: what it is, how it came about, how to load it."""

import re
from pathlib import Path
from typing import Any

import yaml

from runner import report

EMBEDDED = {"embedded:smollm135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
LIBRARIES = ("trl", "transformers", "peft", "torch")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def write_card(run_dir: str | Path) -> None:
    """Write model/README.md of a run directory, with the metadata that the hub reads."""
    run = report.load(run_dir)
    (run.model / "README.md").write_text(_card(run), encoding="utf-8")


def _card(run: report.Run) -> str:
    names, adapter = run.names, (run.model / "adapter_config.json").is_file()
    named = str((run.config.get("model") or {}).get("name_or_path") or "?")
    base = EMBEDDED.get(named) or (named if _is_hub_id(named) else None)
    versions = run.manifest.get("versions") or {}
    card = report.template("card.md.jinja").render(
        **names,
        front=yaml.safe_dump(_front(run, base, adapter), sort_keys=False),
        title=_basename(named.rsplit(":", 1)[-1]),
        adapter=adapter,
        reward=names["trainer"] == "reward",
        base=base,
        name=_basename(named),
        results=[*((name, *ends) for name, ends in run.scores.items()), *report.ends(run)],
        settings=yaml.safe_dump(_settings(run), sort_keys=False, allow_unicode=True),
        used=", ".join(f"{name} {versions[name]}" for name in LIBRARIES if name in versions),
    )
    return card + "\n"


def _front(run: report.Run, base: str | None, adapter: bool) -> dict[str, Any]:
    """Return the metadata that the hub reads."""
    names, dataset = run.names, str((run.config.get("dataset") or {}).get("path") or "")
    of_trl = str((run.config.get("trainer") or {}).get("_target_")).startswith("trl.")
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if names["trainer"] == "reward" else "text-generation",
        "tags": ["trl"] * of_trl + [names["trainer"]] + ["lora"] * (adapter and "lora" in names["peft"].lower()),
    }
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    if _is_hub_id(dataset) and "/" in dataset:
        front["datasets"] = [dataset]
    return front


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
