"""Log-probabilities under the reference model of DPO and KTO: computed once, and kept for all who need the same."""

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from runner import launch, manifest
from runner.encoding import digest_rows
from runner.journal import JOURNAL

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FIELD = "precompute_ref_log_probs"
# Fields of the arguments that change what is computed; the batch size, which only rounds otherwise, is none.
CHANGES = ("max_length", "truncation_mode", "ld_alpha", "bf16", "fp16")


def choose(arguments: Any, node: dict[str, Any], *, rows: int | None, run_dir: Path, one_disk: bool) -> dict[str, bool]:
    """Set the field of a trainer's arguments where nobody typed it, and return what was chosen.

    A pass over all rows before the training saves passes in it from the second epoch on; in a trial of a sweep, whose
    first makes it for all, from half an epoch. A run that goes on, or is repeated, does what its manifest says.

    Args:
        arguments: of any trainer.
        node: what was typed.
        rows: to train on; None: not known.
        run_dir: of the run.
        one_disk: whether all processes read the same files.
    """
    if rows is None or not hasattr(arguments, FIELD) or node.get(FIELD) is not None:
        return {}
    before = manifest.read(run_dir).get("chosen", {}) if (run_dir / manifest.FILE).exists() else {}
    step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    epochs = arguments.max_steps * step / rows if arguments.max_steps > 0 else arguments.num_train_epochs
    pays = epochs > (0.5 if (run_dir.parent / JOURNAL).exists() else 1)
    possible = one_disk and not (arguments.sync_ref_model or arguments.fsdp or arguments.deepspeed)
    arguments.precompute_ref_log_probs = bool(before.get(FIELD, pays and possible))
    return {FIELD: arguments.precompute_ref_log_probs}


def share(trainer: Any, dataset: "Dataset", compute: Callable[[], "Dataset"]) -> "Dataset":
    """Let TRL compute or read the log-probabilities of rows, under a name that follows from all that they hang on.

    TRL's own name hangs on when the rows were read and on the adapter that is to train, and so no run shares it.

    Args:
        trainer: TRL's.
        dataset: token ids.
        compute: TRL's ``_precompute_ref_logps`` of the two.

    Source: trl 1.16, trl/trainer/dpo_trainer.py and kto_trainer.py, ``_precompute_ref_logps``
    """
    from datasets import config
    from filelock import FileLock

    if not str(trainer._precompute_model_hash).startswith(FIELD):  # not ours yet
        trainer._precompute_model_hash = f"{FIELD} {_digest_reference(trainer)}"
    dataset._fingerprint = digest_rows(dataset).hexdigest()[:32]
    if launch.is_ours():
        launch.tell_begun(Path(trainer.args.output_dir).parent)
    folder = Path(config.HF_DATASETS_CACHE, "runner")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # encoding has told that nothing is kept
        return compute()
    dataset._get_cache_file_path = lambda fingerprint: str(folder / f"reference-{fingerprint}.arrow")
    name = hashlib.sha256(f"{dataset._fingerprint} {trainer._precompute_model_hash}".encode()).hexdigest()[:32]
    with FileLock(folder / f"{name}.arrow.lock") if trainer.accelerator.is_main_process else nullcontext():
        trainer.accelerator.wait_for_everyone()  # so that all processes see the same files
        kept = set(folder.iterdir())
        made = compute()
    files = {file for file in map(Path, (file["filename"] for file in made.cache_files)) if file.parent == folder}
    for file in files if trainer.accelerator.is_main_process else ():
        os.utime(file)  # encoding removes what nobody has read for a month
    logger.info("Reference log-probabilities of %d rows %s", len(made), "kept" if files <= kept else "computed")
    return made


def _digest_reference(trainer: Any) -> str:
    """Return a digest of what the reference computes with: its weights, without an adapter that trains."""
    import torch
    import trl
    from trl.trainer.utils import hash_module

    model = trainer.ref_model or trainer.model
    weights = model.state_dict()
    if hasattr(model, "peft_config"):
        trained = {name for name, one in model.named_parameters() if one.requires_grad}
        weights = {name.replace(".base_layer", ""): one for name, one in weights.items() if name not in trained}
    about: list[Any] = [getattr(trainer.args, field, None) for field in CHANGES]
    about += [{k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}]
    about += [model.config._attn_implementation, trainer.accelerator.device.type, torch.__version__, trl.__version__]
    return f"{hash_module(SimpleNamespace(state_dict=lambda: weights))} {about}"  # type: ignore[arg-type]
