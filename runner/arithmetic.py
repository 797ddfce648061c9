"""The embedded dataset: sums to solve, made from a seed. One row serves every trainer."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from runner.errors import ConfigError

Row = dict[str, Any]
Problem = tuple[str, int, int]

LARGEST = 999  # the space is listed in full: about a million problems per operation

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
_COMMUTES = ("+", "*")


def arithmetic(
    *,
    train_rows: int = 240,
    eval_rows: int = 100,
    max_value: int = 20,
    operations: Sequence[str] = ("+",),
    seed: int = 0,
) -> tuple[list[Row], list[Row]]:
    """Make train and held-out rows whose problems are disjoint, also with the operands swapped.

    Args:
        train_rows: number of rows, all different; of a sum both orders may occur.
        eval_rows: number of held-out rows.
        max_value: largest operand, 1 to 999; the smallest is 0. No result is negative.
        operations: some of + - *.
        seed: same seed, same rows, on every platform and Python version.

    Returns:
        Rows of ``prompt``, ``completion``, ``chosen`` (the completion), ``rejected`` (a plausible wrong
        answer), all messages, and ``answer``, the number as text.
    """
    _check(train_rows, eval_rows, max_value, operations)
    stream = Random(seed)
    groups = [group for operation in operations for group in _problems(operation, max_value)]
    _shuffle(groups, stream)
    held_out = [group[_below(len(group), stream)] for group in groups[:eval_rows]]
    remaining = [problem for group in groups[eval_rows:] for problem in group]
    if eval_rows > len(groups) or train_rows > len(remaining):
        held = min(eval_rows, len(groups))
        raise ConfigError(
            f"dataset=arithmetic cannot make {train_rows} train and {eval_rows} held-out rows: with "
            f"max_value={max_value} and operations={list(operations)} there are {len(groups)} problems, which "
            f"after {held} held-out ones leave {len(remaining)} train rows. Lower dataset.train_rows or "
            "dataset.eval_rows, or raise dataset.max_value."
        )
    _shuffle(remaining, stream)
    return [_row(p, stream) for p in remaining[:train_rows]], [_row(p, stream) for p in held_out]


def _check(train_rows: int, eval_rows: int, max_value: int, operations: Sequence[str]) -> None:
    if not 1 <= max_value <= LARGEST:
        raise ConfigError(f"dataset.max_value={max_value} is outside 1 to {LARGEST}.")
    if train_rows < 1 or eval_rows < 0:
        raise ConfigError(
            f"dataset.train_rows={train_rows} and dataset.eval_rows={eval_rows} must be at least 1 and 0."
        )
    known = list(_OPERATIONS)
    if not operations or len(set(operations)) < len(operations) or not set(operations) <= set(known):
        raise ConfigError(
            f"dataset.operations={list(operations)} must name each of some of {known} once, for example "
            "dataset.operations=['+','-']."
        )


def _problems(operation: str, max_value: int) -> list[list[Problem]]:
    """List all problems with results >= 0, those that differ by the order of operands in one group."""
    groups = []
    for large in range(max_value + 1):
        for small in range(large + 1):
            group = [(operation, large, small)]
            if operation in _COMMUTES and small != large:
                group.append((operation, small, large))
            groups.append(group)
    return groups


def _row(problem: Problem, stream: Random) -> Row:
    operation, a, b = problem
    answer = _OPERATIONS[operation](a, b)
    right = [{"role": "assistant", "content": str(answer)}]
    wrong = [{"role": "assistant", "content": str(_slip(answer, stream))}]
    # A short system message of its own keeps out the longer one that a chat template may add.
    system, question = "Answer with a number.", f"{a} {operation} {b} ="
    return {
        "prompt": [{"role": "system", "content": system}, {"role": "user", "content": question}],
        "completion": right,
        "chosen": right,
        "rejected": wrong,
        "answer": str(answer),
    }


def _slip(answer: int, stream: Random) -> int:
    """Pick a mistake that a person could make: off by one or two, or by ten where there are tens."""
    steps = [-2, -1, 1, 2] + ([-10, 10] if answer >= 10 else [])
    slips = [answer + step for step in steps if answer + step >= 0]
    return slips[_below(len(slips), stream)]


def _below(limit: int, stream: Random) -> int:
    """Draw from 0 to limit - 1. Only the stream of ``Random.random`` is the same in every Python version."""
    return int(stream.random() * limit)


def _shuffle(items: list[Any], stream: Random) -> None:
    for last in range(len(items) - 1, 0, -1):
        other = _below(last + 1, stream)
        items[last], items[other] = items[other], items[last]
