"""Whether what a run needs can be had from here: models, data, a place to write to, trackers, the hub."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from runner import embedded, hub
from runner.errors import ConfigError
from runner.splits import may_be_hub_id

TRACKERS = {  # their packages, where the names differ or there are several
    **{name: (name,) for name in ("wandb", "trackio", "mlflow", "comet_ml", "clearml", "swanlab", "codecarbon")},
    "tensorboard": ("tensorboard", "tensorboardX"),
    "flyte": ("flytekit",),
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
           "adapter_model.safetensors", "adapter_model.bin")  # fmt: skip
HUB_SECONDS = 3.0


@dataclass(frozen=True)
class Place:
    """Where something that the config names is: ``local``, ``built in``, ``cached``, ``hub``, or ``not asked``."""

    key: str
    name: str
    state: str
    about: str = ""


def find_places(config: dict[str, Any], *, ask: bool) -> tuple[list[Place], list[str]]:
    """Find everything that a config names by path or hub id.

    Args:
        config: resolved.
        ask: whether the hub may be asked; without it, what is not on this machine is ``not asked``.

    Returns:
        The places, and the faults of what cannot be had, one text each.
    """
    wanted: dict[str, tuple[str, str | None, str, str]] = {}
    nodes = {"model": config["model"], "value_model": config.get("value_model")} | reward_models(config["reward"])
    for key, node in nodes.items():
        if node:
            wanted[f"{key}.name_or_path"] = (node["name_or_path"], node.get("revision"), "model", "config.json")
            if other := node.get("tokenizer_name_or_path"):
                wanted[f"{key}.tokenizer_name_or_path"] = (other, None, "model", "tokenizer_config.json")
    for key, node in _nested(config["dataset"], "dataset", "sources"):
        if isinstance(node.get("path"), str):
            wanted[f"{key}.path"] = (node["path"], node.get("revision"), "dataset", "README.md")
    places, faults = [], []
    for key, (name, revision, kind, marker) in wanted.items():
        try:
            places.append(_find(key, name, revision, kind, marker, ask=ask))
        except ConfigError as error:
            faults.append(str(error))
    return places, faults


def reward_models(node: dict[str, Any]) -> dict[str, Any]:
    """Return the model nodes of a reward node, by their keys."""
    return {f"{path}.model": one["model"] for path, one in _nested(node, "reward", "terms") if one.get("model")}


def _nested(node: dict[str, Any], path: str, inner: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a node and all that are in it, with their keys."""
    yield path, node
    for name, child in (node.get(inner) or {}).items():
        yield from _nested(child or {}, f"{path}.{inner}.{name}", inner)


def _find(key: str, name: str, revision: str | None, kind: str, marker: str, *, ask: bool) -> Place:
    if name == embedded.NAME:
        built = any(embedded.cache_dir().glob("smollm135m-*/config.json"))
        return Place(key, name, "built in", "" if built else "the first use builds it, in about a minute")
    if kind == "dataset":
        if Path(name).expanduser().exists():
            return Place(key, name, "local")
        if not may_be_hub_id(name):
            return Place(key, name, "local", "missing, see below")
        import datasets

        if Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir():
            return Place(key, name, "cached")
    elif Path(hub.resolve(name, key=key, marker=marker)).is_dir():
        return _local_model(key, Path(name).expanduser(), marker)
    from huggingface_hub import is_offline_mode, try_to_load_from_cache

    held = {
        file: isinstance(try_to_load_from_cache(name, file, revision=revision, repo_type=kind), str)
        for file in (marker, *(WEIGHTS if marker == "config.json" else ()))
    }
    at = f"revision {revision}" if revision else ""
    if held[marker] and (len(held) == 1 or sum(held.values()) > 1):
        return Place(key, name, "cached", at)
    if not ask:
        return Place(key, name, "not asked", at)
    hub.ensure_available(name, key=key, revision=revision, kind=kind, marker=marker)
    if is_offline_mode():  # it has the config, so that no one refused, but the weights are missing
        raise ConfigError(
            f"{key}={name} cannot be loaded: the hub's cache holds its config but no weights, and the hub does not "
            "answer. Go online once, or name a local folder."
        )
    return Place(key, name, "hub", hub.ask(name, key=key, revision=revision, kind=kind, timeout=HUB_SECONDS))


def _local_model(key: str, folder: Path, marker: str) -> Place:
    """Check that a local model has weights, and that none of their files ends early."""
    if marker == "config.json" and not any((folder / name).exists() for name in WEIGHTS):
        raise ConfigError(f"{key}={folder} cannot be loaded: it has no weights ({', '.join(WEIGHTS[:3])}).")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy"):  # reads the header, and whether the file is as long as that says
                continue
        except SafetensorError as error:
            text = f"{key}={folder} cannot be loaded: {path.name} is damaged or incomplete. Copy it again."
            raise ConfigError(text) from error
    return Place(key, str(folder), "local")


def writable(run_dir: Path) -> int:
    """Return the free bytes where a run directory would be.

    Raises:
        ConfigError: nothing can be written there.
    """
    there = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={run_dir} cannot be made: {there} is not a folder that you can write to.")
    return shutil.disk_usage(there).free


def tracker_faults(trainer: dict[str, Any]) -> list[str]:
    """Return what the trackers and the hub that a trainer's node asks for lack: a package, a token."""
    asked = trainer.get("report_to") or []
    asked = [asked] if isinstance(asked, str) else asked
    found = [
        f"trainer.report_to={name} cannot be used: the package {TRACKERS[name][0]} is not installed. Type pip install "
        f"{TRACKERS[name][0]}, or trainer.report_to=none."
        for name in asked
        if name in TRACKERS and not any(map(find_spec, TRACKERS[name]))
    ]
    if "wandb" in asked and not found and not _has_wandb_login():
        found.append("trainer.report_to=wandb has no login: type wandb login, or set WANDB_MODE=offline.")
    if trainer.get("push_to_hub"):
        from huggingface_hub import get_token

        if get_token() is None:
            found.append("trainer.push_to_hub=true has no token: type hf auth login, or set HF_TOKEN.")
    return found


def _has_wandb_login() -> bool:
    netrc = Path.home() / ".netrc"
    known = netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    return known or bool(os.environ.get("WANDB_API_KEY")) or os.environ.get("WANDB_MODE") in ("offline", "disabled")
