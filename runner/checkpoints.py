"""Checkpoints that can be trusted: sealed when complete, checked before use, with what upstream leaves out.

A checkpoint's seal is written last. It names every file with its size and digest, and how far the run's own logs
were, so that a run which goes on from it ends with the logs of a run that was never interrupted.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from runner import disk, manifest
from runner.errors import MEMORY, ConfigError, RunStopped

SEAL, STATE = "complete.json", "runner_state.pt"
LOGS = ("metrics.jsonl", "samples.jsonl")
# What the trainers of transformers 5 and trl 1.16 count or hold between steps, and do not save.
COUNTED = ("_total_loss_scalar", "_globalstep_last_logged", "_tr_loss", "_total_train_tokens", "_step", "entropy_coef",
           "_last_world_entropy")  # fmt: skip
# Keys whose change, once allowed, lets a step have other rows than the checkpoint's.
SIZES = {"global_batch_size", "launch.processes", "launch.nodes", "trainer.per_device_train_batch_size",
         "trainer.gradient_accumulation_steps"}  # fmt: skip
COLLECTED = ("_metrics", "_stored_metrics")  # numbers of steps that are not logged yet, by mode and name
HELD = "_buffered_inputs"  # completions in hand of GRPO and RLOO

logger = logging.getLogger(__name__)


class Checkpoints(TrainerCallback):
    """Complete every checkpoint of a run, and a trainer that goes on from one.

    Args:
        trainer: The trainer.
        run_dir: The run's directory.
        keep: Complete checkpoints that are kept, the newest and the best; None keeps all.
        resumed: The checkpoint that training goes on from.
    """

    def __init__(self, trainer: Any, run_dir: Path, *, keep: int | None, resumed: Path | None) -> None:
        self.trainer, self.run_dir, self.keep, self.resumed = trainer, run_dir, keep, resumed
        self.went_on = False
        self.order: torch.Tensor | None = None  # random state that the order of this epoch is drawn from
        if resumed:
            _refuse_parts(trainer.args, resumed)
        self.trainer.accelerator.wait_for_everyone()  # until all have found the checkpoint
        if trainer.is_world_process_zero():
            tidy(run_dir, resumed)
        trainer.callback_handler.callbacks.insert(0, self)  # before those that write what it corrects

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the trainer back what it had counted and held."""
        if self.resumed is None:
            return
        if getattr(args, "sync_ref_model", False):
            raise ConfigError(
                f"{self.run_dir} cannot be resumed: trainer.sync_ref_model changes a model that is not saved."
            )
        found = self._load(args)
        self.order = found.pop("order").cpu()
        self.trainer.model.train(found.pop("training"))  # by which trl tells what it logs at the end
        self._find_best(self.resumed, state)
        sampler = _sampler(kwargs.get("train_dataloader"))
        if type(sampler).__name__ == "RepeatSampler" and getattr(sampler, "shuffle", False):
            for _ in range(int(state.epoch)):  # orders of the epochs that are over: trl draws one after the other
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        for name in COLLECTED:
            for mode, numbers in found.pop(name, {}).items():
                getattr(self.trainer, name)[mode].clear()
                getattr(self.trainer, name)[mode].update(numbers)
        for name, value in found.items():
            setattr(self.trainer, name, value)

    def _load(self, args: Any) -> dict[str, Any]:
        """Return what this rank had counted and held."""
        assert self.resumed is not None
        own = self.resumed / _state_name(args)  # which is not there where fewer processes saved
        state = own if own.exists() else self.resumed / STATE
        found = torch.load(state, map_location=args.device.type, weights_only=True)
        before, rows = found.pop("processes"), found.pop("rows", None)
        if before == args.world_size:
            return found
        refused = f"{self.run_dir} cannot go on with {args.world_size} processes: its checkpoint was saved by {before}"
        record = manifest.read(self.run_dir)
        *earlier, last = record.get("resumes") or [{}]
        if found.pop(HELD, None):
            raise ConfigError(f"{refused}, in the middle of a generation. Start as many.")
        if rows not in (None, _rows(args)) and not SIZES & (last.get("changed") or {}).keys():
            raise ConfigError(
                f"{refused}, with {rows} rows a step instead of {_rows(args)}. Type global_batch_size={rows}."
            )
        logger.warning("Going on with %d processes; the checkpoint was saved by %d", args.world_size, before)
        manifest.update(self.run_dir, resumes=[*earlier, {**last, "processes": [before, args.world_size]}])
        return found

    def _find_best(self, resumed: Path, state: Any) -> None:
        """Let the best checkpoint be the one of this directory, which may have moved, if it is as it was written."""
        if saved := json.loads((resumed / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]:
            best = self.run_dir / "checkpoints" / Path(saved).name
            if fault := find_fault(best):
                raise ConfigError(
                    f"{self.run_dir} cannot be resumed: of its best checkpoint {best}, {fault}. Restore it."
                )
            state.best_model_checkpoint = str(best)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the order of a resumed epoch from the random state that it was drawn from before."""
        if self.order is not None and self.resumed and not float(state.epoch or 0).is_integer() and not self.went_on:
            torch.set_rng_state(self.order)
        self.order, self.went_on = torch.get_rng_state(), True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete and seal the checkpoint that was just written, then delete those that are too many."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        names = [name for name in (*COUNTED, *COLLECTED, HELD) if hasattr(self.trainer, name)]
        found = {name: _plain(getattr(self.trainer, name)) for name in names}
        found |= {"order": self.order, "processes": args.world_size, "rows": _rows(args)}
        found |= {"training": self.trainer.model.training}
        torch.save(found, folder / _state_name(args))
        self.trainer.accelerator.wait_for_everyone()  # each process writes files of its own
        if not state.is_world_process_zero:
            return
        for path in (self.run_dir / name for name in LOGS):
            if path.exists():
                disk.sync(path)
        seal(folder, {name: _size(self.run_dir / name) for name in LOGS}, resumable=not args.save_only_model)
        best = state.best_model_checkpoint
        prune(folder.parent, keep=self.keep, best=Path(best).name if best else None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Make the mean loss at the end that of the whole run, not of the steps since it was resumed."""
        if self.resumed and logs and "train_loss" in logs and not hasattr(self.trainer, "_loss_total"):
            mean = self.trainer._total_loss_scalar / max(1, state.global_step)
            logs["train_loss"] = state.log_history[-1]["train_loss"] = mean


def seal(folder: Path, logs: Mapping[str, int], *, resumable: bool = True) -> None:
    """Write to disk all of a checkpoint, then the seal that makes it one.

    Args:
        folder: The checkpoint.
        logs: Bytes of each of the run's logs at this moment.
        resumable: Whether it holds more than the model.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        disk.sync(path)
        files[str(path.relative_to(folder))] = [path.stat().st_size, disk.digest(path)]
    disk.write(folder / SEAL, json.dumps({"files": files, "logs": dict(logs), "resumable": resumable}, indent=1))


def find_fault(folder: Path) -> str | None:
    """Return why a checkpoint cannot be used; None for one that is complete and as it was written."""
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "it was not finished"
    except (ValueError, KeyError):
        return f"{SEAL} cannot be read"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if disk.digest(path) != digest:
            return f"{name} is not what was written"
    return None


def find_newest(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run that can be used; those that cannot are named. A new run has none.

    Raises:
        ConfigError: None can be used, though one was complete; or they hold no more than the model.
    """
    found, broken = None, []
    for folder in _by_step(run_dir / "checkpoints"):
        fault = find_fault(folder)
        if fault is None:
            found = folder
            break
        logger.warning("%s cannot be used: %s", folder, fault)
        broken.append(folder)
    if broken and found is None and any((folder / SEAL).exists() for folder in broken):
        raise ConfigError(
            f"{run_dir} cannot be resumed: all its checkpoints are damaged, see above. Restore one, or start anew."
        )
    sealed = json.loads((found / SEAL).read_text(encoding="utf-8")) if found else {}
    if not sealed.get("resumable", True):
        raise ConfigError(
            f"{run_dir} cannot be resumed: its checkpoints hold the model only (trainer.save_only_model)."
        )
    for name, length in sealed.get("logs", {}).items():
        if _size(run_dir / name) < length:
            raise ConfigError(
                f"{run_dir / name} is shorter than when {found} was saved: it was cut or lost. Restore it."
            )
    if found or (run_dir / LOGS[0]).exists():
        logger.info("Going on from %s", found or "the start: no checkpoint is complete")
    return found


def tidy(run_dir: Path, resumed: Path | None) -> None:
    """Cut the logs of a run back to a checkpoint, or to nothing, and rename newer checkpoints to ``.damaged``."""
    for folder in _by_step(run_dir / "checkpoints"):
        if folder == resumed:
            break
        shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
        folder.rename(folder.with_suffix(".damaged"))
    logs = json.loads((resumed / SEAL).read_text(encoding="utf-8"))["logs"] if resumed else dict.fromkeys(LOGS, 0)
    for name, length in logs.items():
        if (run_dir / name).exists():
            os.truncate(run_dir / name, length)


@contextlib.contextmanager
def fitting(run_dir: Path) -> Iterator[None]:
    """Say in a line what was full, the disk or the device, and what to do.

    Raises:
        RunStopped: One was.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if free_space(run_dir, error):
            raise RunStopped(f"disk full: {error}. The checkpoints before stay: make room, then resume.") from error
        if MEMORY.search(f"{type(error).__name__}: {error}"):
            raise RunStopped(
                f"out of memory: {'. '.join(str(error).split('. ')[:2])}. Type a smaller "
                "trainer.per_device_train_batch_size, trainer.gradient_checkpointing=true, or peft=lora "
                "quantization=nf4; python -m runner.check says what would fit."
            ) from error
        raise


def free_space(run_dir: Path, fault: BaseException) -> bool:
    """Tell whether a full disk or quota is what a save failed of; then delete what it left unfinished."""
    full = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
    chain: list[BaseException] = [fault]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    found = any(getattr(one, "errno", None) in full or os.strerror(errno.ENOSPC) in str(one) for one in chain)
    try:  # torch.save and safetensors say it in words of their own
        with tempfile.NamedTemporaryFile(dir=run_dir) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        found |= error.errno in full
    for folder in _by_step(run_dir / "checkpoints") if found else []:
        if not (folder / SEAL).exists():
            shutil.rmtree(folder)
    return found


def prune(folder: Path, *, keep: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints but for ``keep`` complete ones and the ``best``; never the last complete one."""
    complete = [path for path in _by_step(folder) if (path / SEAL).exists()]
    for path in complete[max(1, keep) :] if keep else []:
        if path.name != best:
            (path / SEAL).unlink()  # first, so that a half-deleted one is not taken for complete
            shutil.rmtree(path)


def _by_step(folder: Path) -> list[Path]:
    """List checkpoints, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def _state_name(args: Any) -> str:
    return STATE.replace(".pt", f"_{args.process_index}.pt") if args.process_index else STATE


def _refuse_parts(args: Any, resumed: Path) -> None:
    """Refuse a checkpoint of DeepSpeed's that other processes have parts of."""
    before = len(list(resumed.glob(STATE.replace(".pt", "*.pt"))))
    if getattr(args, "deepspeed", None) and before != args.world_size:
        raise ConfigError(
            f"{resumed} cannot be resumed by {args.world_size} processes: DeepSpeed has cut it into the parts of "
            f"{before}. Start as many."
        )


def _sampler(loader: Any) -> Any:
    """Return what orders the rows of a loader, also where each process takes its share of the batches."""
    while hasattr(loader, "batch_sampler"):
        loader = loader.batch_sampler
    return getattr(loader, "sampler", None)


def _rows(args: Any) -> int:
    """Return the sequences of an optimizer step, over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _plain(value: Any) -> Any:
    """Return what ``torch.load`` reads without running code: dicts and lists for their kin."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, torch.Tensor):  # a number of numpy's
        return value.item()
    return value
