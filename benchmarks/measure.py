"""Measure whole commands: CPU seconds, wall seconds and peak memory of a process and of its children."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # pip has compiled what is installed; here the first run compiles ours


@dataclass(frozen=True)
class Cost:
    """What one run of a command took."""

    cpu: float  # seconds of the process and its children
    wall: float  # seconds
    memory: float  # MB, the largest single process
    output: str
    marked: float = 0.0  # CPU seconds when the first line came that had the mark
    last: float = 0.0  # CPU seconds when the last one came


def run(
    command: list[str],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    fails: bool = False,
    mark: str | None = None,
) -> Cost:
    """Run a command once and return what it took; one that fails against expectation ends the benchmark.

    Args:
        command: The command.
        cwd: Where it runs.
        env: Variables beside those of this process.
        fails: Whether it is expected to fail.
        mark: A regular expression; at the first and the last line of output that has it ``marked`` and ``last`` are
            read (Linux only).
    """
    start, output, marks = time.perf_counter(), "", []
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            if mark and re.search(mark, line):
                marks.append(_session_seconds(process.pid))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if bool(process.returncode) != fails:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{output[-3000:]}")
    wall = time.perf_counter() - start
    scale = 1024 if sys.platform != "darwin" else 1024**2
    marks = marks or [0.0]
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / scale, output, marks[0], marks[-1])


def _session_seconds(leader: int) -> float:
    """Return the CPU seconds so far of the living processes of a session, and of children that they waited for."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # from the state on
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == leader:
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def alternate(commands: dict[str, list[str]], *, runs: int, **options: object) -> dict[str, list[Cost]]:
    """Run several commands in turn, A B A B ..., after one warm-up each, so that drift hits all alike."""
    for command in commands.values():
        run(command, **options)  # type: ignore[arg-type]  # passed through
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            costs[name].append(run(command, **options))  # type: ignore[arg-type]  # passed through
    return costs


def middle(costs: list[Cost], what: str) -> float:
    """Return the median of one figure."""
    return median(getattr(cost, what) for cost in costs)
