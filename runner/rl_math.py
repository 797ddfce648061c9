"""The formulas of PPO as pure functions of tensors: nothing here knows of models, tokenizers or configs.

Shapes: B sequences, T completion positions, padded on the right; N any selection of positions; V vocabulary.
``mask`` (B, T) is True at real tokens, the stop token included. ``values[b, t]`` is V(state before token t). What
stands where a mask is False is never read. Time runs along the last dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# ---- KL divergence from samples of the first distribution -----------------------------------------------------
# Source: http://joschu.net/blog/kl-approx.html, with r = exp(ref_logps - logps)


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return -log r: unbiased, of high variance, negative for single tokens."""
    return logps - ref_logps


def kl_k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return (log r)^2 / 2: biased, of low variance, with the gradient of the true KL."""
    return 0.5 * (logps - ref_logps) ** 2


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return (r - 1) - log r: unbiased, of low variance, never negative."""
    return torch.expm1(ref_logps - logps) + (logps - ref_logps)


def kl_abs(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return |log r|: a penalty on any distance, not an estimate of the KL."""
    return (logps - ref_logps).abs()


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3, "abs": kl_abs}


def adaptive_kl(coefficient: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """Return the KL coefficient after ``episodes`` more episodes whose mean KL was ``kl``.

    The error is clipped at a fifth, so that one odd batch cannot throw the coefficient.

    Source: arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * episodes / horizon)


# ---- statistics under a mask ----------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``x`` where ``mask`` is True; 0 where it is True nowhere."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor, *, bessel: bool = False) -> Tensor:
    """Return the variance of ``x`` where ``mask`` is True.

    Args:
        x: Values.
        mask: Which of them count.
        bessel: Whether to divide by n - 1 instead of n.
    """
    squares = torch.where(mask, (x - masked_mean(x, mask)) ** 2, 0).sum()
    return squares / (mask.sum() - int(bessel)).clamp(min=1)


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, bessel: bool = True, eps: float = 1e-8
) -> Tensor:
    """Return ``x`` scaled to variance 1 and, with ``shift_mean``, moved to mean 0; zero where ``mask`` is False."""
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_variance(x, mask, bessel=bessel) + eps)
    return torch.where(mask, white if shift_mean else white + mean, 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns): 1 is a perfect value function, 0 a constant one."""
    return 1 - masked_variance(returns - values, mask) / masked_variance(returns, mask).clamp(min=1e-12)


class Moments(NamedTuple):
    """How many numbers were seen so far, their mean and their variance."""

    seen: float = 0
    mean: float = 0.0
    variance: float = 1.0


def update_moments(moments: Moments, x: Tensor) -> Moments:
    """Return the moments after the numbers of ``x`` (any shape) were seen, too.

    Source: Chan et al. 1983, Algorithms for Computing the Sample Variance, eq. 2.1.
    """
    if not x.numel():
        return moments
    added, mean = x.numel(), float(x.mean())
    count = moments.seen + added
    delta = mean - moments.mean
    squares = moments.variance * moments.seen + float(((x - mean) ** 2).sum())
    squares += delta**2 * moments.seen * added / count
    return Moments(count, moments.mean + delta * added / count, squares / count)


# ---- from scores to advantages --------------------------------------------------------------------------------


def shape_scores(
    scores: Tensor,
    ended: Tensor,
    *,
    moments: Moments | None = None,
    clip: Sequence[float] | None = None,
    missing_eos_penalty: float | None = None,
) -> Tensor:
    """Return (B,) scores normalised, then clipped, then less the penalty where no stop token came.

    Args:
        scores: (B,) weighted sums of the rewards.
        ended: (B,) whether a stop token came.
        moments: Mean and variance to normalise with; None leaves the scores as they are.
        clip: Lowest and highest score.
        missing_eos_penalty: What an unfinished completion loses.

    Source: arXiv:2307.04964 (PPO-max normalises and clips); arXiv:2403.17031 (the EOS trick).
    """
    if moments is not None:
        scores = (scores - moments.mean) / max(moments.variance, 1e-8) ** 0.5
    if clip is not None:
        scores = scores.clamp(clip[0], clip[1])
    if missing_eos_penalty is not None:
        scores = scores - missing_eos_penalty * (~ended).to(scores.dtype)
    return scores


def place_scores(scores: Tensor, mask: Tensor, position: str) -> tuple[Tensor, Tensor]:
    """Put each score at the end of its sequence.

    Args:
        scores: (B,).
        mask: (B, T).
        position: ``eos`` is the last real token. ``after_eos`` is the column after it, where there is one: what
            OpenAI's first PPO and TRL did.

    Returns:
        (B, T) rewards, and (B, T) where the value function is read: the mask, and that column.
    """
    lengths, column = mask.sum(1, keepdim=True), torch.arange(mask.size(1), device=mask.device)
    end = lengths - 1
    if position == "after_eos":
        end = torch.where(lengths < mask.size(1), lengths, end)
        end = torch.where(lengths > 0, end, -1)  # an empty row earns nothing
        mask = column <= end
    return torch.where(column == end, scores[:, None], 0), mask


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """Return (B,) lambda = 1 - 1 / (alpha * length), at least 0: the end of a long completion reaches its start.

    Source: arXiv:2504.05118, length-adaptive GAE.
    """
    return 1 - 1 / (alpha * lengths).clamp(min=1)


def gae(rewards: Tensor, values: Tensor, *, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, T) generalised advantage estimates and returns.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lambda * A_{t+1}, with V = 0 after the last
    column; a return is A_t + V_t.

    Args:
        rewards: (B, T), zero outside the mask.
        values: (B, T), zero outside the mask.
        gamma: Discount per token.
        lam: Lambda, one for all or (B,).

    Source: arXiv:1506.02438, eq. 16.
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    advantages, running = torch.empty_like(deltas), torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.size(1))):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


class Shaped(NamedTuple):
    """What a rollout is optimised with; all (B, T) but for the scores, and zero outside their mask."""

    advantages: Tensor
    returns: Tensor
    values: Tensor
    value_mask: Tensor
    rewards: Tensor  # KL penalty and score, before whitening
    kl: Tensor
    scores: Tensor  # (B,)


def shape_rewards_and_advantages(
    old_logps: Tensor,
    ref_logps: Tensor | None,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    lam_value: float | None = None,
    length_adaptive_alpha: float = 0.0,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    reward_position: str = "eos",
    bessel: bool = True,
    eps: float = 1e-8,
) -> Shaped:
    """Turn the scores of a rollout into advantages and returns.

    Args:
        old_logps: (B, T) of the policy that sampled.
        ref_logps: (B, T) of the reference; None where there is no KL penalty.
        values: (B, T).
        scores: (B,), shaped already.
        mask: (B, T).
        kl_coef: Weight of the KL penalty of each token.
        kl_estimator: A key of ``KL_ESTIMATORS``.
        gamma: Discount per token.
        lam: Lambda of the advantages.
        lam_value: Lambda of the returns; None takes ``lam``. Source: arXiv:2503.01491 (decoupled GAE).
        length_adaptive_alpha: Above 0 it replaces ``lam`` by ``length_adaptive_lambda``.
        whiten_rewards: Whether to scale the rewards to variance 1, without moving their mean.
        whiten_advantages: Whether to whiten the advantages over all tokens.
        reward_position: As in ``place_scores``.
        bessel: As in ``masked_variance``, for whitening.
        eps: Added to the variance in whitening.
    """
    placed, value_mask = place_scores(scores, mask, reward_position)
    kl = torch.zeros_like(old_logps)
    if ref_logps is not None:
        kl = torch.where(mask, KL_ESTIMATORS[kl_estimator](old_logps, ref_logps), 0)
    rewards = used = placed - kl_coef * kl
    if whiten_rewards:
        used = masked_whiten(rewards, value_mask, shift_mean=False, bessel=bessel, eps=eps)
    values = torch.where(value_mask, values, 0)
    _, returns = gae(used, values, gamma=gamma, lam=lam if lam_value is None else lam_value)
    policy_lam: float | Tensor = lam
    if length_adaptive_alpha > 0:
        policy_lam = length_adaptive_lambda(mask.sum(1).to(values.dtype), length_adaptive_alpha)
    advantages, _ = gae(used, values, gamma=gamma, lam=policy_lam)
    if whiten_advantages:
        advantages = masked_whiten(advantages, mask, bessel=bessel, eps=eps)
    advantages = torch.where(mask, advantages, 0)
    return Shaped(advantages, torch.where(value_mask, returns, 0), values, value_mask, rewards, kl, scores)


# ---- losses ---------------------------------------------------------------------------------------------------


def token_weights(
    mask: Tensor, aggregation: str = "token-mean", *, width: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return (B, T) weights whose products with a per-token loss sum to the loss of a mini-batch.

    Taken once over the whole mini-batch, they make the loss independent of how it is split into micro-batches.

    Args:
        mask: (B, T) tokens that count, of all rows of the mini-batch.
        aggregation: ``token-mean``: all tokens count alike. ``seq-mean-token-mean``: all sequences do.
            ``seq-mean-token-sum``: longer sequences count more. ``seq-mean-token-sum-norm``: the same over ``width``.
        width: What the last one divides by; None takes T.
        dtype: Of the result.

    Source: arXiv:2503.14476 (token-mean); arXiv:2503.20783 (sum over a constant).
    """
    weights = mask.to(dtype)
    if aggregation == "token-mean":
        return weights / weights.sum().clamp(min=1)
    lengths = weights.sum(1, keepdim=True)
    divisor = {"seq-mean-token-mean": lengths.clamp(min=1), "seq-mean-token-sum": torch.ones_like(lengths)}.get(
        aggregation, torch.full_like(lengths, width or mask.size(1))
    )
    return weights / divisor / (lengths > 0).sum().clamp(min=1)


def policy_loss(
    new_logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    cliprange_low: float = 0.2,
    cliprange_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped policy loss, -sum of w * min(A * ratio, A * clip(ratio, 1 - low, 1 + high)).

    Args:
        new_logps: (B, T) with a gradient.
        old_logps: (B, T) of the policy that sampled.
        advantages: (B, T).
        mask: (B, T) real tokens.
        weights: (B, T) of ``token_weights``; zero where a token does not count.
        cliprange_low: How far the ratio may fall.
        cliprange_high: How far it may rise. Source: arXiv:2503.14476 (clip-higher).
        dual_clip: Where A < 0 the loss is at most -dual_clip * A. Source: arXiv:1912.09729.
        log_ratio_clamp: Bound of the log-ratio before it is exponentiated.

    Returns:
        The loss, and sums: ``tokens``, and over them ``approxkl``, ``ratio``, ``ratio_squared``; ``weighted``
        tokens with a weight, and how many of them were ``clipped``.

    Source: arXiv:1707.06347, eq. 7.
    """
    log_ratio = torch.where(mask, new_logps - old_logps, 0)
    bounded = log_ratio if log_ratio_clamp is None else log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = bounded.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange_low, 1 + cliprange_high)
    losses = torch.maximum(plain, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    with torch.no_grad():
        counts = weights > 0
        sums = {
            "tokens": mask.sum(),
            "approxkl": (0.5 * log_ratio**2).sum(),
            "ratio": torch.where(mask, ratio, 0).sum(),
            "ratio_squared": torch.where(mask, ratio**2, 0).sum(),
            "weighted": counts.sum(),
            "clipped": (counts & (clipped > plain)).sum(),
        }
    return (weights * losses).sum(), sums


def value_loss(
    new_values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    cliprange: float | None = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return half the squared error of the values, the worse of plain and clipped around the old values.

    Args:
        new_values: (B, T) with a gradient.
        old_values: (B, T) at the time of the rollout.
        returns: (B, T).
        mask: (B, T) where the value function is read.
        weights: (B, T) of ``token_weights``.
        cliprange: How far a value may move in one rollout; None does not clip.

    Returns:
        The loss, and sums: ``value_tokens``, and how many of them were ``value_clipped``.

    Source: arXiv:2005.12729 (value function clipping).
    """
    new_values = torch.where(mask, new_values, 0)
    losses = plain = (new_values - returns) ** 2
    if cliprange is not None:
        near = torch.maximum(torch.minimum(new_values, old_values + cliprange), old_values - cliprange)
        losses = torch.maximum(plain, (near - returns) ** 2)
    with torch.no_grad():
        sums = {"value_tokens": mask.sum(), "value_clipped": (mask & (losses > plain)).sum()}
    return 0.5 * (weights * losses).sum(), sums


# ---- log-probabilities ----------------------------------------------------------------------------------------


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """Return (N,) log-probabilities of ``ids`` (N,) under ``logits`` (N, V), which hold the temperature already."""
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """Return (N,) entropies in nats of ``logits`` (N, V)."""
    log_total = logits.logsumexp(-1, keepdim=True)
    return log_total.squeeze(-1) - (torch.exp(logits - log_total) * logits).sum(-1)


def choose_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample one token a row by inverting the cumulative distribution.

    With a number of its own for each row, a sample does not depend on the rows beside it nor on a global state.

    Args:
        logits: (B, V), minus infinity where a token cannot come.
        uniform: (B,) in [0, 1).

    Returns:
        (B,) tokens.
    """
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no float64
    cumulative = logits.softmax(-1, dtype=exact).cumsum(-1)
    point = uniform.to(exact)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=logits.size(-1) - 1)
