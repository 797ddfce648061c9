import json
import math
from pathlib import Path

import pytest
import torch

from runner import rl_math

GOLDEN = json.loads(Path(__file__).with_name("golden_ppo.json").read_text())
PRECISIONS = [(torch.float64, 1e-8), (torch.float32, 1e-4)]
SHAPING = ["kl_estimator", "gamma", "lam", "lam_value", "length_adaptive_alpha", "whiten_rewards", "whiten_advantages"]
CLIPPING = ["cliprange_low", "cliprange_high", "dual_clip", "log_ratio_clamp"]


def row(*numbers, dtype=torch.float64):
    return torch.tensor([numbers], dtype=dtype)


def yes(*counts, width):
    """(B, T) mask of rows with that many real tokens."""
    return torch.arange(width) < torch.tensor(counts)[:, None]


# ---- the oracle: 22 cases, with garbage at the padded positions ------------------------------------------------


def run_case(case, dtype):
    """Everything that the oracle computes for a case, under the oracle's names."""
    c = case["config"]
    t = {k: torch.tensor(v, dtype=dtype) for k, v in case["inputs"].items() if k not in ("lengths", "ended")}
    ended, lengths = torch.tensor(case["inputs"]["ended"]), torch.tensor(case["inputs"]["lengths"])
    mask = torch.arange(t["old_logprobs"].size(1)) < lengths[:, None]
    new, new_values = t["new_logprobs"].requires_grad_(), t["new_values"].requires_grad_()
    whitening = {"bessel": c["whiten_bessel"], "eps": c["whiten_eps"]}
    scores = rl_math.shape_scores(
        t["scores"], ended, clip=c["score_clip"], missing_eos_penalty=c["missing_eos_penalty"]
    )
    shaped = rl_math.shape_rewards_and_advantages(
        *(t["old_logprobs"], t["ref_logprobs"], t["old_values"], scores, mask),
        kl_coef=c["kl_coef"],
        reward_position=c["reward_position"],
        **{key: c[key] for key in SHAPING},
        **whitening,
    )
    policy_mask = mask & ended[:, None] if c["mask_truncated"] else mask
    weights = rl_math.token_weights(policy_mask, c["loss_agg"], dtype=dtype)
    policy, sums = rl_math.policy_loss(
        *(new, t["old_logprobs"], shaped.advantages, mask, weights), **{key: c[key] for key in CLIPPING}
    )
    value, value_sums = rl_math.value_loss(
        *(new_values, shaped.values, shaped.returns, shaped.value_mask),
        rl_math.token_weights(shaped.value_mask, c["loss_agg"], dtype=dtype),
        cliprange=c["cliprange_value"],
    )
    sums, value_sums = ({k: v.to(dtype) for k, v in found.items()} for found in (sums, value_sums))
    loss = policy + c["vf_coef"] * value
    if c["kl_loss_coef"]:
        away = torch.where(mask, rl_math.kl_k3(new, t["ref_logprobs"]), 0)
        loss = loss + c["kl_loss_coef"] * (weights * away).sum()
    loss.backward()
    used = shaped.rewards
    if c["whiten_rewards"]:
        used = rl_math.masked_whiten(used, shaped.value_mask, shift_mean=False, **whitening)
    raw = rl_math.shape_rewards_and_advantages(
        *(t["old_logprobs"], t["ref_logprobs"], t["old_values"], scores, mask),
        kl_coef=c["kl_coef"],
        reward_position=c["reward_position"],
        **{key: c[key] for key in SHAPING} | {"whiten_advantages": False},
        **whitening,
    )
    non_score = -c["kl_coef"] * shaped.kl.sum(1).mean()
    tokens, cells = sums["tokens"], mask.numel()
    return {
        "kl": shaped.kl,
        "rewards": shaped.rewards,
        "rewards_used": used,
        "advantages_raw": raw.advantages,
        "returns": shaped.returns,
        "advantages": shaped.advantages,
        "policy_mask": policy_mask.to(dtype),
        "value_mask": shaped.value_mask.to(dtype),
        "scores_used": scores,
        "policy_loss": policy,
        "value_loss": value,
        "loss": loss,
        "grad_new_logprobs": new.grad,
        "grad_new_values": new_values.grad,
        "metrics": {
            "objective/kl": shaped.kl.sum(1).mean(),
            "objective/non_score_reward": non_score,
            "objective/scores": scores.mean(),
            "objective/rlhf_reward": non_score + scores.mean(),
            "objective/entropy": torch.where(mask, -t["old_logprobs"], 0).sum(1).mean(),
            "policy/approxkl_avg": sums["approxkl"] / tokens,
            "policy/approxkl_avg_trl": sums["approxkl"] / cells,
            "policy/clipfrac_avg": sums["clipped"] / sums["weighted"],
            "val/clipfrac_avg": value_sums["value_clipped"] / value_sums["value_tokens"],
            "val/ratio": sums["ratio"] / tokens,
            "val/ratio_trl": (sums["ratio"] + cells - tokens) / cells,
            "val/explained_variance": rl_math.explained_variance(shaped.values, shaped.returns, shaped.value_mask),
        },
    }


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_every_number_of_the_oracle_is_reproduced(case, dtype, tolerance):
    found, expected = run_case(case, dtype), dict(case["expected"])
    metrics, expected_metrics = found.pop("metrics"), expected.pop("metrics")
    assert found.keys() == expected.keys()
    assert metrics.keys() == expected_metrics.keys()
    for key, value in {**expected, **expected_metrics}.items():
        target = torch.tensor(value, dtype=dtype)
        ours = {**found, **metrics}[key].detach().to(dtype)
        scale = max(1e-3, float(target.abs().max())) if dtype is torch.float32 else 1.0
        torch.testing.assert_close(
            ours, target, rtol=tolerance, atol=tolerance * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_what_stands_in_padded_positions_is_never_read():
    case = next(c for c in GOLDEN["cases"] if c["name"] == "trl_default")
    poisoned = json.loads(json.dumps(case))
    for key in ("old_logprobs", "ref_logprobs", "new_logprobs"):
        for numbers, length in zip(poisoned["inputs"][key], poisoned["inputs"]["lengths"], strict=True):
            numbers[length:] = [math.nan] * (len(numbers) - length)
    clean, dirty = run_case(case, torch.float64), run_case(poisoned, torch.float64)
    assert torch.equal(clean["loss"], dirty["loss"])
    assert torch.equal(clean["grad_new_logprobs"], dirty["grad_new_logprobs"])


def test_with_lambda_one_the_position_of_the_reward_does_not_move_the_advantages():
    by_name = {case["name"]: run_case(case, torch.float64) for case in GOLDEN["cases"]}
    torch.testing.assert_close(
        by_name["trl_lam1"]["advantages"], by_name["eos_lam1_same_policy_adv_as_trl"]["advantages"]
    )


@pytest.mark.parametrize("case", GOLDEN["adaptive_kl"])
def test_the_adaptive_coefficient_is_the_oracles(case):
    found = rl_math.adaptive_kl(
        case["coef"], case["current_kl"], target=case["target"], horizon=case["horizon"], episodes=case["n_steps"]
    )
    assert found == pytest.approx(case["expected"], rel=1e-12)


# ---- by hand --------------------------------------------------------------------------------------------------


def test_gae_matches_hand_computation():
    # t=1: delta = 1 + 0 - 0.5 = 0.5                  A1 = 0.5
    # t=0: delta = 0 + 0.9*0.5 - 0.2 = 0.25           A0 = 0.25 + 0.9*0.8*0.5 = 0.61
    advantages, returns = rl_math.gae(row(0.0, 1.0), row(0.2, 0.5), gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages, row(0.61, 0.50))
    torch.testing.assert_close(returns, row(0.81, 1.00))


def test_gae_at_lambda_zero_looks_one_token_ahead():
    # delta_t = r_t + V_{t+1} - V_t: 0 + 2 - 1, 0 + 4 - 2, 3 + 0 - 4
    advantages, returns = rl_math.gae(row(0.0, 0.0, 3.0), row(1.0, 2.0, 4.0), gamma=1.0, lam=0.0)
    torch.testing.assert_close(advantages, row(1.0, 2.0, -1.0))
    torch.testing.assert_close(returns, row(2.0, 4.0, 3.0))


def test_gae_at_lambda_one_is_the_discounted_sum_less_the_value():
    # sums from the end with gamma 0.5: 8, 4 + 4 = 8, 2 + 4 = 6
    advantages, returns = rl_math.gae(row(2.0, 4.0, 8.0), row(1.0, 2.0, 3.0), gamma=0.5, lam=1.0)
    torch.testing.assert_close(returns, row(6.0, 8.0, 8.0))
    torch.testing.assert_close(advantages, row(5.0, 6.0, 5.0))


def test_each_row_may_have_its_own_lambda():
    rewards, values = torch.tensor([[0.0, 1.0]] * 2), torch.zeros(2, 2)
    advantages, _ = rl_math.gae(rewards, values, gamma=1.0, lam=torch.tensor([0.0, 0.5]))
    assert advantages.tolist() == [[0.0, 1.0], [0.5, 1.0]]


def test_length_adaptive_lambda_grows_with_the_length_and_starts_at_zero():
    # alpha 0.5: 1 - 1/max(1, 0.5) = 0; 1 - 1/2 = 0.5; 1 - 1/10 = 0.9
    assert rl_math.length_adaptive_lambda(torch.tensor([1.0, 4.0, 20.0]), 0.5).tolist() == pytest.approx([0, 0.5, 0.9])


@pytest.mark.parametrize(("name", "expected"), [("k1", math.log(2)), ("k2", 0.5 * math.log(2) ** 2),
                                                ("k3", math.log(2) - 0.5), ("abs", math.log(2))])  # fmt: skip
def test_kl_estimators_where_the_policy_is_twice_as_sure(name, expected):
    # p/q = 2, so r = q/p = 0.5: -log r = log 2; (log r)^2 / 2; r - 1 - log r = log 2 - 0.5; |log r|
    found = rl_math.KL_ESTIMATORS[name](torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25)))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_k1_and_k3_average_to_the_true_kl_and_k3_is_never_negative():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([0.2, 0.3, 0.5]).double().log()
    true = float((p.exp() * (p - q)).sum())
    for estimator in (rl_math.kl_k1, rl_math.kl_k3):
        assert float((p.exp() * estimator(p, q)).sum()) == pytest.approx(true)
    assert (rl_math.kl_k3(p, q) >= 0).all()


def test_whitening_counts_only_what_the_mask_holds():
    # 1 and 3 under the mask: mean 2, variance ((-1)^2 + 1^2) / (2 - 1) = 2
    x, mask = row(1.0, 3.0, 99.0), yes(2, width=3)
    torch.testing.assert_close(rl_math.masked_whiten(x, mask), row(-(0.5**0.5), 0.5**0.5, 0.0))
    torch.testing.assert_close(rl_math.masked_whiten(x, mask, bessel=False), row(-1.0, 1.0, 0.0))
    torch.testing.assert_close(rl_math.masked_whiten(x, mask, bessel=False, shift_mean=False), row(1.0, 3.0, 0.0))


def test_masked_statistics_of_nothing_are_zero_and_not_nan():
    x, nothing = row(1.0, 2.0), torch.zeros(1, 2, dtype=torch.bool)
    assert rl_math.masked_mean(x, nothing) == 0
    assert rl_math.masked_whiten(x, nothing).tolist() == [[0.0, 0.0]]
    assert rl_math.token_weights(nothing).sum() == 0


def test_whitening_a_single_token_gives_zero():
    assert rl_math.masked_whiten(row(5.0), yes(1, width=1)).tolist() == [[0.0]]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("ratio", "up", "down"), [(1.5, 1.3, 1.5), (1.25, 1.25, 1.25), (1.0, 1.0, 1.0),
                                                   (0.95, 0.95, 0.95), (0.5, 0.5, 0.9)])  # fmt: skip
def test_each_clip_takes_hold_at_its_corner_only(advantage, ratio, up, down):
    # low 0.1, high 0.3: a good action gains at most at 1.3, a bad one is punished on from 0.9 up
    new = torch.tensor([[math.log(ratio)]], requires_grad=True, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss, sums = rl_math.policy_loss(
        *(new, torch.zeros_like(one), advantage * one, yes(1, width=1), one), cliprange_low=0.1, cliprange_high=0.3
    )
    loss.backward()
    bound = up if advantage > 0 else down
    assert loss.item() == pytest.approx(-advantage * bound)
    clipped = bound != ratio
    assert int(sums["clipped"]) == clipped
    assert float(new.grad) == pytest.approx(0.0 if clipped else -advantage * ratio)


def test_dual_clip_bounds_the_loss_of_a_bad_action_that_became_likely():
    # A = -1, ratio 10: the loss would be 10; with c = 3 it is 3, and flat
    new = torch.tensor([[math.log(10.0)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, _ = rl_math.policy_loss(new, 0 * one, -one, yes(1, width=1), one, dual_clip=3.0)
    loss.backward()
    assert (loss.item(), new.grad.item()) == (3.0, 0.0)


def test_the_clamp_of_the_log_ratio_keeps_the_loss_finite():
    new = torch.tensor([[1000.0]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, _ = rl_math.policy_loss(new, 0 * one, -one, yes(1, width=1), one, log_ratio_clamp=20.0)
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-5)


def test_the_value_loss_takes_the_worse_of_plain_and_clipped():
    # old 0, return 1, new 0.9: plain (0.1)^2; clipped to 0.2: (0.8)^2 = 0.64 is worse; half of it
    one = torch.ones(1, 1)
    loss, sums = rl_math.value_loss(0.9 * one, 0 * one, one, yes(1, width=1), one, cliprange=0.2)
    assert (float(loss), int(sums["value_clipped"])) == (pytest.approx(0.32), 1)
    # new -0.5 is farther off than its clipped value -0.2: plain (1.5)^2 = 2.25
    loss, sums = rl_math.value_loss(-0.5 * one, 0 * one, one, yes(1, width=1), one, cliprange=0.2)
    assert (float(loss), int(sums["value_clipped"])) == (pytest.approx(1.125), 0)


@pytest.mark.parametrize(("aggregation", "expected"), [
    ("token-mean", [[0.25, 0, 0], [0.25, 0.25, 0.25]]),            # 4 tokens
    ("seq-mean-token-mean", [[0.5, 0, 0], [1 / 6, 1 / 6, 1 / 6]]),  # 2 sequences, of 1 and 3 tokens
    ("seq-mean-token-sum", [[0.5, 0, 0], [0.5, 0.5, 0.5]]),
    ("seq-mean-token-sum-norm", [[0.05, 0, 0], [0.05, 0.05, 0.05]]),  # over a width of 10
])  # fmt: skip
def test_weights_of_an_aggregation_leave_out_a_row_without_tokens(aggregation, expected):
    weights = rl_math.token_weights(yes(1, 3, 0, width=3), aggregation, width=10)
    torch.testing.assert_close(weights, torch.tensor([*expected, [0.0, 0.0, 0.0]]))


def test_a_score_goes_to_the_last_token_or_to_the_column_after_it():
    # lengths 2, 3 (full) and 0, of 3 columns
    scores, mask = torch.tensor([5.0, 7.0, 9.0]), yes(2, 3, 0, width=3)
    at_end, value_mask = rl_math.place_scores(scores, mask, "eos")
    assert at_end.tolist() == [[0, 5, 0], [0, 0, 7], [0, 0, 0]]
    assert torch.equal(value_mask, mask)
    after_end, value_mask = rl_math.place_scores(scores, mask, "after_eos")
    assert after_end.tolist() == [[0, 0, 5], [0, 0, 7], [0, 0, 0]]
    assert value_mask.sum(1).tolist() == [3, 3, 0]


def test_scores_are_normalised_then_clipped_then_penalised():
    # (3 - 1) / 2 = 1, clipped to 0.5, less 2 for the one without a stop token
    found = rl_math.shape_scores(
        torch.tensor([3.0, 3.0]),
        torch.tensor([True, False]),
        moments=rl_math.Moments(seen=10, mean=1.0, variance=4.0),
        clip=[-0.5, 0.5],
        missing_eos_penalty=2.0,
    )
    assert found.tolist() == [0.5, -1.5]


def test_moments_in_two_parts_are_those_of_the_whole():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    moments = rl_math.update_moments(rl_math.update_moments(rl_math.Moments(), x[:2]), x[2:])
    assert moments == pytest.approx((5, float(x.mean()), float(x.var(correction=0))))


def test_explained_variance_is_one_for_a_perfect_and_zero_for_a_constant_value():
    returns, mask = row(1.0, 2.0, 3.0, 99.0), yes(3, width=4)
    assert rl_math.explained_variance(returns, returns, mask) == 1
    assert rl_math.explained_variance(torch.full_like(returns, 7.0), returns, mask) == 0


def test_log_probability_and_entropy_are_those_of_the_odds():
    # logits 0 and log 3: odds 1 to 3
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert float(rl_math.token_logps(logits, torch.tensor([1]))) == pytest.approx(math.log(0.75))
    expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert float(rl_math.token_entropy(logits)) == pytest.approx(expected)


def test_a_token_is_chosen_by_where_the_number_falls_in_the_distribution():
    # p = 0.2, 0.3, 0, 0.5: cumulative 0.2, 0.5, 0.5, 1
    logits = torch.tensor([0.2, 0.3, 0.0, 0.5]).log().expand(6, 4)
    chosen = rl_math.choose_tokens(logits, torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 1 - 1e-9]).double())
    assert chosen.tolist() == [0, 0, 1, 1, 3, 3]
