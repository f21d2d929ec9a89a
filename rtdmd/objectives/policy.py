"""Group-relative policy optimisation on the stochastic steps (SubGRPO)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rtdmd.objectives.reduction import STD_FLOOR, weighted_mean


def group_advantages(
    rewards: Mapping[str, Tensor],
    prompt_ids: Tensor,
    weights: Mapping[str, float],
    global_std: bool = True,
    normalize: bool = True,
) -> Tensor:
    """Advantages of samples that are grouped by prompt, over several rewards.

    For each reward: subtract the prompt's mean, divide by the standard deviation over all samples
    (``global_std``) or over the prompt's own, plus 1e-4. The weighted sum over rewards is divided by
    its standard deviation plus 1e-4 (``normalize``). All standard deviations are the population's.
    The sum's mean is 0 by construction and isn't subtracted again, so that a group of equal rewards
    gets exactly 0.

    A sample with a non-finite reward is left out of its group, of every mean and of every standard
    deviation, and gets exactly 0. Rewards of weight 0 don't count, whatever they hold.

    Shapes: each reward [N], ``prompt_ids`` [N] integers; all samples of all ranks. Computed in
    float64, returned as float32 [N]. Raises ValueError for shapes that differ and rewards without a
    weight.
    """
    if not rewards:
        raise ValueError("group_advantages needs at least one reward")
    for name, values in rewards.items():
        if values.shape != prompt_ids.shape:
            raise ValueError(
                f"reward {name!r} has shape {tuple(values.shape)}, prompt_ids has {tuple(prompt_ids.shape)}"
            )
        if name not in weights:
            raise ValueError(f"reward {name!r} has no weight")
    counted = {name: values for name, values in rewards.items() if weights[name] != 0}
    kept = torch.ones_like(prompt_ids, dtype=torch.bool)
    for values in counted.values():
        kept &= torch.isfinite(values)
    advantages = torch.zeros(prompt_ids.shape, device=prompt_ids.device)
    if counted and kept.any():
        advantages[kept] = _relative_to_groups(
            {name: values[kept] for name, values in counted.items()},
            prompt_ids[kept],
            weights,
            global_std,
            normalize,
        )
    return advantages


def _relative_to_groups(
    rewards: Mapping[str, Tensor],
    prompt_ids: Tensor,
    weights: Mapping[str, float],
    global_std: bool,
    normalize: bool,
) -> Tensor:
    _, group = torch.unique(prompt_ids, return_inverse=True)
    sizes = torch.bincount(group).double()
    total = torch.zeros(prompt_ids.shape, dtype=torch.float64, device=prompt_ids.device)
    for name, values in rewards.items():
        scores = values.float().double()  # group means of float32 values are exact in float64
        means = torch.zeros_like(sizes).index_add_(0, group, scores) / sizes
        centred = scores - means[group]
        if global_std:
            std = scores.std(correction=0)
        else:
            variances = torch.zeros_like(sizes).index_add_(0, group, centred.square()) / sizes
            std = variances.sqrt()[group]
        total += weights[name] * centred / (std + STD_FLOOR)
    if normalize:
        total = total / (total.std(correction=0) + STD_FLOOR)
    return total.float()


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    advantage_clip: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Clipped ratio loss of proximal policy optimisation (arXiv 1707.06347, equation 7), negated.

    mean(max(−A·ρ, −A·clip(ρ, 1 − clip_low, 1 + clip_high))),  ρ = exp(log_prob − old_log_prob),
    A clamped to ±advantage_clip. Only ``log_prob`` carries gradient. Shapes: all [B]; float32.
    """
    clipped_advantages = advantages.detach().float().clamp(-advantage_clip, advantage_clip)
    ratio = (log_prob.float() - old_log_prob.detach().float()).exp()
    unclipped = -clipped_advantages * ratio
    clipped = -clipped_advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return weighted_mean(torch.maximum(unclipped, clipped), weights)
