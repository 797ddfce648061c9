import struct

import pytest

from runner.curves import MOST, _smooth, panels, plot, series

STEPS = range(1, 4)
LOGS = {
    "sft": ["loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens"],
    "dpo": ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"],
    "kto": ["loss", "kl", "rewards/chosen", "rewards/margins"],
    "grpo": ["loss", "reward", "rewards/exact_match/mean", "kl", "entropy", "completions/mean_length"],
    "reward": ["loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"],
}
TITLES = {
    "sft": ["Loss", "Entropy of the policy", "Tokens predicted right (share)", "Gradient norm", "Learning rate"],
    "dpo": [
        *(
            "Loss",
            "Reward margin",
            "Chosen above rejected (share)",
            "Implicit rewards",
            "Log-probability of the answer",
        ),
    ],
    "kto": ["Loss", "Reward margin", "Implicit rewards", "KL to the reference"],
    "grpo": ["Loss", "Reward", "KL to the reference", "Entropy of the policy", "Completion length (tokens)"],
    "reward": ["Loss", "Reward margin", "Chosen above rejected (share)", "Rewards"],
}


def lines_of(*names):
    return [{"step": step, **dict.fromkeys(names, 0.5 * step)} for step in STEPS]


@pytest.mark.parametrize("trainer", LOGS)
def test_every_trainer_gets_the_curves_that_tell_how_it_goes(trainer):
    assert [title for title, _ in panels(lines_of(*LOGS[trainer]), [])] == TITLES[trainer]


def test_scores_of_held_out_answers_and_terms_of_a_sum_get_a_panel():
    lines = lines_of("loss", "reward", "rewards/a/mean", "rewards/b/mean", "rewards/b/std", "eval_exact_match")
    assert panels(lines, ["exact_match"]) == [
        ("Loss", ("loss",)),
        ("Held-out answers", ("eval_exact_match",)),
        ("Reward", ("reward",)),
        ("Reward terms", ("rewards/a/mean", "rewards/b/mean")),
    ]


def test_a_clip_ratio_that_never_leaves_zero_gets_none():
    lines = [{"step": 1, "clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.0}]
    assert panels(lines, []) == []
    assert panels([{"step": 1, "clip_ratio/high_mean": 0.1}], []) == [
        ("Clipped tokens (share)", ("clip_ratio/high_mean",))
    ]


def test_a_series_is_in_order_without_gaps_and_a_step_done_twice_counts_once():
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3, "b": 1}, {"step": 4, "a": 9.0}]
    lines += [{"step": 3, "a": 3}, {"step": 4, "a": 4.0}]  # resumed from step 2
    assert series(lines, "a") == ([1, 3, 4], [1.0, 3.0, 4.0])


def test_smoothing_keeps_a_straight_line_straight_and_leaves_few_points_alone():
    line = [float(x) for x in range(90)]  # windows of 3 on either side, 1 at the very ends
    smooth = _smooth(line)
    assert smooth[1:-1] == line[1:-1]
    assert (smooth[0], smooth[-1]) == (0.5, 88.5)
    assert _smooth(line[:30]) == []


def test_a_picture_is_drawn_of_whatever_there_is(tmp_path):
    path = tmp_path / "curves.png"
    assert not plot([{"step": 3, "train_runtime": 1.0}], path, title="nothing")
    assert not path.exists()
    assert plot([{"step": 0, "eval_score": 0.5}], path, title="one point", scores=["score"])
    names = {name for logged in LOGS.values() for name in logged}
    lines = [*lines_of(*names, *(f"eval_{name}" for name in names)), {"step": 4, "loss": None}]
    assert len(panels(lines, [])) == MOST
    assert plot(lines, path, title="everything")
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG")
    assert width > height > 600
