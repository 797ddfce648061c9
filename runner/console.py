"""What a process of ours says, and with which code it ends."""

import logging
import sys
import warnings
from pathlib import Path

from runner.errors import ConfigError
from runner.redaction import Scrubbing


def exit_code(error: Exception) -> int:
    """Return 2 for what a person can correct, 1 for a run that a guard ended."""
    return 2 if isinstance(error, ConfigError) else 1


def set_up_logs(run_dir: Path | None, *, terminal: bool = True) -> None:
    """Log to the terminal, if asked to, and, with a run directory, to its ``runner.log``, as Hydra does."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)] if terminal else []
    if run_dir is not None:
        handlers.append(logging.FileHandler(run_dir / "runner.log", encoding="utf-8"))
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=not terminal,
    )
    for handler in handlers:
        handler.addFilter(Scrubbing())


def quieten() -> None:
    """Keep the libraries' bars and deprecations from between our lines."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import datasets
    import transformers

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
