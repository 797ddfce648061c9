import re

import pytest

from runner.arithmetic import arithmetic
from runner.errors import ConfigError
from runner.rows import validate


def problem(row):
    """Read the operands and the operation back from the question, the larger operand of a sum first."""
    a, operation, b = re.search(r"(\d+) ([-+*]) (\d+)", row["prompt"][-1]["content"]).groups()
    pair = (int(a), int(b))
    return operation, *(pair if operation == "-" else sorted(pair, reverse=True))


def test_the_same_seed_gives_these_rows_everywhere():
    # Written down once: random.random() has the same stream in every Python version and on every platform.
    train, held_out = arithmetic(train_rows=3, eval_rows=2, max_value=9, seed=0)
    assert [(problem(row), row["answer"], row["rejected"][0]["content"]) for row in train + held_out] == [
        (("+", 3, 1), "4", "6"),
        (("+", 8, 7), "15", "13"),
        (("+", 8, 6), "14", "4"),
        (("+", 5, 0), "5", "7"),
        (("+", 7, 0), "7", "6"),
    ]
    assert train[0]["prompt"] == [
        {"role": "system", "content": "Answer with a number."},
        {"role": "user", "content": "1 + 3 ="},
    ]
    assert arithmetic(train_rows=3, eval_rows=2, max_value=9, seed=0) == (train, held_out)
    assert arithmetic(train_rows=3, eval_rows=2, max_value=9, seed=1) != (train, held_out)


@pytest.mark.parametrize("operations", [["+"], ["-"], ["*"], ["+", "-", "*"]])
def test_answers_are_right_and_the_rejected_ones_wrong(operations):
    train, held_out = arithmetic(train_rows=60, eval_rows=20, max_value=20, operations=operations)
    compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for row in train + held_out:
        validate(row)
        operation, a, b = problem(row)
        right, wrong = int(row["completion"][0]["content"]), int(row["rejected"][0]["content"])
        assert operation in operations
        assert right == compute[operation](a, b)
        assert row["answer"] == str(right)
        assert row["chosen"] == row["completion"]
        assert wrong != right
        assert wrong >= 0
        assert abs(wrong - right) in (1, 2, 10)


@pytest.mark.parametrize("operation", ["+", "-", "*"])
def test_train_and_held_out_problems_are_disjoint_also_when_swapped(operation):
    # All that there are: operands 0..9 have 55 unordered pairs, of which 10 are held out; the other 45 make 90 rows,
    # less the doubles (a + a) among them, or 45 rows where the order is no choice (a - b with a >= b).
    rows = 45 if operation == "-" else 80
    train, held_out = arithmetic(train_rows=rows, eval_rows=10, max_value=9, operations=[operation])
    assert not {problem(row) for row in train} & {problem(row) for row in held_out}
    assert len({problem(row) for row in held_out}) == 10
    questions = [row["prompt"][-1]["content"] for row in train]
    assert len(set(questions)) == rows


def test_sizes_are_as_asked_and_the_held_out_rows_do_not_depend_on_the_train_size():
    train, held_out = arithmetic(train_rows=7, eval_rows=5, max_value=30)
    assert (len(train), len(held_out)) == (7, 5)
    _, again = arithmetic(train_rows=300, eval_rows=5, max_value=30)
    assert [problem(row) for row in again] == [problem(row) for row in held_out]


def test_no_held_out_rows_may_be_asked_for():
    assert arithmetic(train_rows=1, eval_rows=0, max_value=1)[1] == []


def test_more_rows_than_there_are_problems_are_refused_with_the_number():
    # Operands 0..3 have 4 * 5 / 2 = 10 unordered pairs; without held-out ones they make 4 * 4 = 16 rows.
    with pytest.raises(ConfigError, match=r"there are 10 problems.*leave 16 train rows.*dataset\.max_value"):
        arithmetic(train_rows=17, eval_rows=0, max_value=3)
    with pytest.raises(ConfigError, match=r"there are 10 problems.*10 held-out ones leave 0 train rows"):
        arithmetic(train_rows=1, eval_rows=11, max_value=3)
    assert len(arithmetic(train_rows=16, eval_rows=0, max_value=3)[0]) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_value": 0}, "outside 1 to 999"),
        ({"max_value": 1000}, "outside 1 to 999"),
        ({"train_rows": 0}, r"train_rows=0"),
        ({"eval_rows": -1}, r"eval_rows=-1"),
        ({"operations": []}, r"dataset\.operations"),
        ({"operations": ["/"]}, r"dataset\.operations=\['/'\] must name"),
        ({"operations": ["+", "+"]}, r"dataset\.operations"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        arithmetic(**options)
