"""A process for one run starts fast: it imports what the run can ask for, and looks for garbage when that pays.

bitsandbytes costs each process two CPU seconds, and few runs use it: peft imports it wherever it is installed, and it
drags in much of ``torch._inductor``. Where nothing in a config can ask for it, it is as if it were not installed.
And Python looks for garbage in cycles every 700 new objects, of which the libraries make half a million that stay.
"""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.embedded import NAME as EMBEDDED
from runner.hub import REPO_ID
from runner.safety import RUN_CODE

VARIABLE = "RUNNER_LEAVE_OUT"
MODULE = "bitsandbytes"
IMPORTING = (100_000, 20, 100)  # a sixth less CPU time for the imports than Python's own thresholds, and no more memory
RUNNING = gc.get_threshold()
OPTIMIZERS = {None, "adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"}  # torch's own


def left_out(*configs: dict[str, Any]) -> str:
    """Return the names of the modules that no run of these configs can ask for."""
    return "" if any(map(may_quantize, configs)) else MODULE


def begin(names: str) -> None:
    """Leave modules out of this process, and let imports be fast.

    A process that has begun to import the libraries stays as it is. One that is started for a run is told the names
    in ``RUNNER_LEAVE_OUT``, before anything is imported.
    """
    if "torch" not in sys.modules:
        gc.set_threshold(*IMPORTING)
        sys.modules.update(dict.fromkeys(names.split()))  # type: ignore[arg-type]  # None: a module that is not there


def settle() -> None:
    """Once the libraries are imported: they are no garbage and are not searched again, but what comes after is."""
    gc.freeze()
    gc.set_threshold(*RUNNING)


def may_quantize(config: dict[str, Any]) -> bool:
    """Return whether a run may need bitsandbytes: for weights, for its optimizer or in code that is not ours."""
    quantized = bool(config.get("quantization")) or config["trainer"].get("optim") not in OPTIMIZERS
    return quantized or any(
        bool(value) if key in RUN_CODE else not _is_plain(str(value), node.get("revision"))
        for node, key, value in _walk(config)
        if key in RUN_CODE or (key == "name_or_path" and value)
    )


def _walk(node: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield node, key, value
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)


def _is_plain(name_or_path: str, revision: str | None) -> bool:
    """Return whether a model is known to be whole and not quantized; one that is not here yet may be anything."""
    if name_or_path == EMBEDDED:
        return True
    path: Any = Path(name_or_path).expanduser() / "config.json"
    if not path.is_file() and REPO_ID.fullmatch(name_or_path):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    try:
        return "quantization_config" not in json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):
        return False
