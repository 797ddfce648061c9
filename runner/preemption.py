"""A run that is told to end: it finishes its step, saves, and can be resumed."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from runner import launch
from runner.callbacks import over_ranks

DEADLINE = 1 << 10  # among the numbers of signals

logger = logging.getLogger(__name__)


class Preemption(TrainerCallback):
    """Ends training after the step in hand, with a checkpoint, on a signal or before a deadline.

    SIGTERM, SIGINT and SIGUSR1 (Slurm's warning before its time limit) are heeded in the main thread. The same signal
    again, or one outside of training, ends the process at once. It must be the last of the trainer's callbacks.

    Args:
        max_seconds: Wall-clock limit since now; the run ends when another two steps may not fit. None: no limit.
    """

    def __init__(self, max_seconds: float | None) -> None:
        self.start = self.last = time.monotonic()
        self.max_seconds, self.longest = max_seconds, 0.0
        self.training, self.ended, self.waiting, self.saved = False, False, False, -1
        self.cause, self.reason, self.code, self.seen = "", 0, 143, set[int]()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal, or leave at once."""
        name, self.code = signal.Signals(number).name, 130 if number == signal.SIGINT else 143
        if not self.training or number in self.seen:
            raise SystemExit(self.code)
        self.seen.add(number)
        self.reason = self.reason or number
        logger.warning("%s: the run ends after this step, with a checkpoint; once more ends it at once", name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to finish steps."""
        self.training, self.last = True, time.monotonic()
        if launch.is_ours():
            launch.tell_begun(Path(args.output_dir).parent)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if it is time to; a save at the end of an epoch waits for what that logs."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        if self.max_seconds and now - self.start + 2 * self.longest > self.max_seconds:
            self.reason = self.reason or DEADLINE
        if reason := int(over_ranks(self.reason, largest=True)):
            near = reason == DEADLINE
            self.cause = (
                f"max_seconds={self.max_seconds:g} is near" if near else f"stopped by {signal.Signals(reason).name}"
            )
            args.save_only_model = False
            control.should_save = control.should_training_stop = self.ended = True
        if float(state.epoch).is_integer() and "epoch" in (args.eval_strategy, args.logging_strategy):
            self.waiting, control.should_save = control.should_save, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take note of the step."""
        self.saved = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save what waited; an epoch that was broken off is no reason to log or evaluate."""
        if self.ended and not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = False
            control.should_save = self.saved != state.global_step
        control.should_save |= self.waiting
        self.waiting = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let what follows training be interrupted."""
        self.training = False


@contextlib.contextmanager
def heeding(max_seconds: float | None) -> Iterator[Preemption]:
    """Heed signals inside, and give the callback that ends training."""
    callback = Preemption(max_seconds)
    main = threading.current_thread() is threading.main_thread()
    heeded = [signal.SIGUSR1] if launch.is_ours() else launch.SIGNALS
    with launch.handling(dict.fromkeys(heeded if main else (), callback.handle)):
        yield callback
