"""The ways in which a run ends early on purpose, and how a lack of memory is told."""

import re

MEMORY = re.compile(r"(?i)out ?of ?memory|(can't|cannot) allocate memory|MemoryError")


class ConfigError(Exception):
    """A person can fix this: what cannot be done, what was found, what is allowed, what to type. Exit code 2."""


class RunStopped(Exception):  # noqa: N818  it is an end, not an error of ours
    """A guard ended a run that could not have come right; the text is the cause in the manifest. Exit code 1."""


class RunPreempted(Exception):  # noqa: N818  as above
    """A run was told to end, and can be resumed from the checkpoint that it left.

    Args:
        cause: What told it to.
        code: The exit code: 143, or 130 for an interrupt from the keyboard.
    """

    def __init__(self, cause: str, code: int) -> None:
        super().__init__(cause)
        self.code = code


class RunPruned(Exception):  # noqa: N818  as above
    """A sweep ended one of its trials, which fell behind the others; the text is the cause in the manifest."""
