"""What watches a training: metrics.jsonl, samples of rollouts, guards that end a hopeless run, progress.

One output each; all are given to the trainer's constructor.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from runner.errors import RunStopped

CHUNK = 1 << 20  # elements of a parameter that are summed at a time
SHOWN = (  # what a line of progress has room for, in this order; the rest is in metrics.jsonl
    *("loss", "reward", "objective/scores", "objective/kl", "rewards/accuracies", "rewards/margins", "accuracy"),
    *("margin", "kl", "val/explained_variance"),
    *("completions/mean_length", "mean_token_accuracy", "grad_norm", "learning_rate"),
)

logger = logging.getLogger(__name__)


class MetricsWriter(TrainerCallback):
    """Append one line to metrics.jsonl for everything that the trainer logs.

    A line holds ``step``, ``epoch``, ``seconds`` (since this object was made) and the metrics under TRL's names.
    What is no finite number is null.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line; it is complete on disk when this returns."""
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, "epoch": state.epoch, "seconds": time.monotonic() - self.start, **logs}
        text = json.dumps({key: _plain(value) for key, value in line.items()}, ensure_ascii=False, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


class RolloutSamples(TrainerCallback):
    """Append what a trainer shows of each rollout to samples.jsonl: prompts, completions, scores.

    Their lines have the number of the rollout, which answers to held-out prompts have not.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "samples.jsonl"

    def on_samples(self, args: Any, state: Any, control: Any, *, samples: list[dict[str, Any]]) -> None:
        """Write one line for each sample."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))


class Guards(TrainerCallback):
    """End a run that cannot come right, with the reason.

    Before training: nothing to train. In the first steps: a gradient that is not finite, weights that do not move.
    At every log: a loss or gradient norm that is not finite; for that, transformers must not hide it
    (``logging_nan_inf_filter=False``).

    Args:
        first_steps: Optimizer steps whose gradients are looked at.
        patience: Optimizer steps in a row, from the first on, that may leave the weights as they were because the
            gradient is zero, as in GRPO when all completions of a group earn the same. In float16 as many may
            overflow while the loss scale falls.

    Raises:
        RunStopped: From inside the trainer; on all ranks at once.
    """

    def __init__(self, *, first_steps: int = 10, patience: int = 20) -> None:
        self.first_steps, self.patience = first_steps, patience
        self.steps = self.still = self.overflows = 0
        self.moved = False
        self.before: torch.Tensor | None = None
        self.gradient: float | None = None  # largest absolute value of the last step; None: out of sight

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check that there is something to train."""
        if not any(True for _ in _trainable(model)):
            raise RunStopped(
                f"{type(model).__name__} cannot be trained: none of its parameters requires a gradient. "
                "Choose peft=lora, or peft=none without quantization to train all weights."
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Remember the weights until they have moved once."""
        if not self.moved:
            self.before = _fingerprint(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the gradients of the first steps."""
        if self.moved and self.steps >= self.first_steps:
            return
        self.gradient = _largest_gradient(model)
        if self.gradient is None or math.isfinite(self.gradient):
            self.overflows = 0
            return
        self.overflows += 1
        if args.fp16 and self.overflows <= self.patience:  # the loss scale is still falling; the step is skipped
            return
        names = [name for name, p in _trainable(model) if p.grad is not None and not _is_finite(p.grad)]
        raise RunStopped(
            f"the gradient of step {state.global_step + 1} is not finite, in {len(names)} parameters, "
            f"first {', '.join(names[:3]) or 'on another rank'}. {_advice(args)}"
        )

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Check that the first step with a learning rate moved the weights."""
        self.steps += 1
        if self.moved or self.before is None or getattr(optimizer, "step_was_skipped", False):
            return
        rates = [group.get("lr") for group in optimizer.param_groups]
        if all(rate == 0 for rate in rates):  # the first step of a warm-up; an optimizer may also keep no rate
            return
        after = _fingerprint(model)
        if not _is_finite(after):
            raise RunStopped(f"the weights are not finite after step {state.global_step + 1}. {_advice(args)}")
        self.moved = over_ranks(float((after != self.before).any())) > 0
        if self.moved:
            self.before = None
        elif self.gradient:
            raise RunStopped(
                f"step {state.global_step + 1} did not move a single weight, though the gradient is not zero "
                f"(largest value {self.gradient:.3g}) and the learning rate is {max(r or 0 for r in rates):.3g}. "
                "Either the step is below the precision of the weights (model.dtype=float32, or a larger "
                "trainer.learning_rate), or the optimizer does not hold them."
            )
        else:
            self._wait(state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Check loss and gradient norm."""
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is None or _plain(value) is not None:
                continue
            fault = f"{name} is {float(value)} at step {state.global_step}"
            if name == "eval_loss":
                logger.warning("%s: some held-out rows may have no supervised token", fault)
            elif name == "loss" or not args.fp16:
                raise RunStopped(f"{fault}, which no step can mend. {_advice(args)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so when nothing was learned."""
        if self.still and not self.moved:
            logger.warning("no step moved the weights: the result is the model that the run began with")

    def _wait(self, step: int) -> None:
        self.still += 1
        if self.still == 1:
            logger.warning("step %d did not move the weights: the gradient is zero", step)
        if self.still < self.patience:
            return
        raise RunStopped(
            f"the first {self.still} steps did not move a single weight: every gradient was zero. With a reward: "
            "all completions of a prompt earned the same, so choose easier prompts, a reward with more shades, or "
            "more trainer.num_generations. Otherwise: no token may be supervised, see the token audit."
        )


class Progress(TrainerCallback):
    """Log one plain line for everything that the trainer logs, instead of a bar that a log file cannot hold."""

    def __init__(self) -> None:
        self.start, self.first = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Log the line."""
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            logger.info("trained %d steps in %s", state.global_step - self.first, duration(logs["train_runtime"]))
            return
        held_out = any(key.startswith("eval_") for key in logs)
        numbers = "  ".join(_show(logs, "eval_" if held_out else ""))
        if held_out:
            logger.info("step %d, held out: %s", state.global_step, numbers)
        else:
            logger.info("step %d/%d  %s%s", state.global_step, state.max_steps, numbers, self._times(state))

    def _times(self, state: Any) -> str:
        spent = time.monotonic() - self.start
        done, left = state.global_step - self.first, state.max_steps - state.global_step
        return f"  ({duration(spent)}, {duration(spent / done * left)} left)" if done and left > 0 else ""


def duration(seconds: float) -> str:
    """Return a duration as a person says it: ``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _show(logs: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield ``name value`` for what a line has room for; all of a log that is no trainer's own evaluation."""
    everything = prefix and "eval_runtime" not in logs
    for key in [key for key in logs if key != "epoch"] if everything else [prefix + name for name in SHOWN]:
        value = _plain(logs.get(key))
        if isinstance(value, int | float):
            yield f"{key} {value:.4g}"


def _plain(value: Any) -> Any:
    """Turn a logged value into what JSON can hold; None for what is no finite number."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | bool | int | float | None) else str(value)


def _advice(args: Any) -> str:
    precision = "float16" if args.fp16 else "bfloat16" if args.bf16 else "float32"
    return (
        f"Lower trainer.learning_rate (now {args.learning_rate}) or trainer.max_grad_norm "
        f"(now {args.max_grad_norm}), train in a wider type than {precision}, or look for odd rows in the data."
    )


# ---- parameters: what this rank holds of them, whatever wraps the model --------------------------------------


def _trainable(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor's shard


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(_local(tensor)).all())


def _fingerprint(model: Any) -> torch.Tensor:
    """Return sum and norm of every trainable parameter, so wide that one moved element shows.

    Returns:
        float64 of shape (parameters, 2) on the CPU.
    """
    rows = []
    for _, parameter in _trainable(model):
        flat = _local(getattr(parameter, "ds_tensor", parameter)).reshape(-1)  # of DeepSpeed's: this rank's part
        wide = torch.float32 if flat.device.type == "mps" else torch.float64  # mps has no float64
        parts = [(one.sum(dtype=wide), torch.linalg.vector_norm(one, dtype=wide)) for one in flat.split(CHUNK)]
        rows.append(torch.stack([torch.stack(part) for part in parts]).sum(0))
    return torch.stack(rows).double().cpu()


def _largest_gradient(model: Any) -> float | None:
    """Return the largest absolute gradient over all ranks; None where it is kept elsewhere (DeepSpeed)."""
    gradients = [_local(p.grad) for _, p in _trainable(model) if p.grad is not None]
    seen = over_ranks(float(len(gradients)))
    largest = over_ranks(float(get_total_norm([g for g in gradients if g.numel()], math.inf)))  # keeps NaN, as sum does
    return largest if seen else None


def over_ranks(value: float, *, largest: bool = False) -> float:
    """Return the sum, or the largest, over all ranks, so that they decide alike and none waits for one that stopped."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM)
    return float(tensor)
