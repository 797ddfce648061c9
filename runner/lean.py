"""A process for one run starts fast: it imports what the run can ask for, once, and looks for garbage when that pays.

bitsandbytes costs each process two CPU seconds, and few runs use it: peft imports it wherever it is installed, and it
drags in much of ``torch._inductor``. Where nothing in a config can ask for it, it is as if it were not installed.
scipy and boto3 are imported by transformers and accelerate wherever they are found, for models of images and to ask
about SageMaker: they are not found until that is over.
Python looks for garbage in cycles every 700 new objects, of which the libraries make half a million that stay.
And transformers reads the 1,600 modules of its models twice when it is imported, to see what is in them, and what is
installed is asked for by several.
"""

import gc
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from runner import disk, embedded
from runner.hub import REPO_ID
from runner.safety import RUN_CODE

VARIABLE = "RUNNER_LEAVE_OUT"
MODULE = "bitsandbytes"
LATER = ("scipy", "boto3")  # are there again once ``settle`` was called
FINDER = "create_import_structure_from_path"
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
        gc.disable()
        for name in (*names.split(), *LATER):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None: a module that is not there
        sys.meta_path.insert(0, _Watch())
        find = importlib.metadata.packages_distributions
        # Of folders with packages; another one, such as where runs are started, changes all the time.
        places = filter(lambda folder: any(folder.glob("*.*-info")), map(Path, sys.path))
        importlib.metadata.packages_distributions = cache(lambda: _kept("packages", places, find))


def settle() -> None:
    """Once the libraries are imported: they are no garbage and are not searched again, but what comes after is."""
    for name in LATER:
        if sys.modules.get(name, name) is None:
            del sys.modules[name]
    gc.freeze()
    gc.enable()


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
    if name_or_path == embedded.NAME:
        return True
    path: Any = Path(name_or_path).expanduser() / "config.json"
    if not path.is_file() and REPO_ID.fullmatch(name_or_path):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    try:
        return "quantization_config" not in json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):
        return False


class _Watch:
    """Waits for the module with which transformers looks what there is in its folder of models, and keeps its answer.

    It looks again when a file of that folder, or the module, has another size or time.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "transformers.utils.import_utils":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        loader: Any = spec.loader if spec else None
        execute: Any = getattr(loader, "exec_module", None)

        def exec_module(module: Any) -> None:
            execute(module)
            if find := getattr(module, FINDER, None):
                models = Path(module.__file__).parents[1] / "models"
                files = [Path(module.__file__), *models.rglob("*.py")]
                read = cache(lambda: _kept("transformers", sorted(files), lambda: find(models)))
                setattr(module, FINDER, lambda of: read() if Path(of) in (models, models / "__init__.py") else find(of))

        if execute:
            loader.exec_module = exec_module
        return spec


def _kept(name: str, files: Iterable[Path], find: Callable[[], Any]) -> Any:
    return disk.kept(embedded.cache_dir() / name, disk.state(files), find)
