"""What is known of a run while it is checked, and how it is told."""

import sys
from dataclasses import dataclass, field
from typing import Any

from runner import launch, views
from runner.compose import Composed
from runner.config import trainer_name
from runner.findings import Finding


@dataclass
class Check:
    """One check: what is known of the run so far, and what was found."""

    options: dict[str, str]
    policies: dict[str, str]
    composed: Composed
    overrides: list[str]
    where: dict[str, Any]  # ``compose.places``: where options come from
    found: list[tuple[str, Finding]] = field(default_factory=list)  # each with its policy
    facts: dict[str, Any] = field(default_factory=dict)  # by section, for JSON
    absent: set[str] = field(default_factory=set)  # keys that name what is not here
    read: Any = None  # the train rows as they were read, which findings number
    rows: Any = None  # the splits that are used
    tokenizer: Any = None
    audit: dict[str, Any] = field(default_factory=dict)
    arguments: Any = None
    model: Any = None
    copies: dict[str, float] = field(default_factory=dict)  # bytes of further models, by what they are
    plan: Any = None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        return self.composed.config

    @property
    def trainer(self) -> str:
        """The trainer's short name."""
        return trainer_name(self.config["trainer"]["_target_"])

    @property
    def reads(self) -> str:
        """What the trainer reads."""
        return views.row_kind(self.trainer)

    @property
    def processes(self) -> int:
        """How many processes the run is planned for."""
        return launch.world(self.config["launch"])

    @property
    def failed(self) -> bool:
        """Whether something has to be corrected."""
        return any(policy == "fail" for policy, _ in self.found)

    def add(self, *found: Finding) -> None:
        """Print findings and keep them."""
        for one in found:
            policy = self.policies[one.name]
            self.found.append((policy, one))
            say(f"  {'FAULT' if policy == 'fail' else 'note '} {one.name}: {one.text}")


class Passed(Exception):  # noqa: N818  it ends a section, and is no error
    """A section cannot be done, because something before it could not."""


def need(done: Check, *prefixes: str) -> None:
    """Pass a section over where something that it reads is not here.

    Raises:
        Passed: It is not.
    """
    if absent := sorted(key for key in done.absent if key.startswith(prefixes)):
        raise Passed(f"{', '.join(absent)} cannot be read from here")


def say(text: str) -> None:
    """Write a line of the command's output, as soon as it is known."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def table(rows: dict[str, Any]) -> None:
    """Write names and values in two columns."""
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        say(f"  {name:<{width}}  {value}")


def size(count: float) -> str:
    """Return a number of bytes as a person says it."""
    unit = "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if count < 999.5:
            break
        count, unit = count / 1000, larger
    return f"{count:.3g} {unit}"
