"""The losses and advantages of both stages, pure functions of tensors."""

from rtdmd.objectives.policy import group_advantages, policy_loss
from rtdmd.objectives.reduction import weighted_mean
from rtdmd.objectives.rewards import clip_scores, combine_rewards, reward_hinge, reward_hinge_loss
from rtdmd.objectives.score import ambient_score_loss, consistency_loss, distribution_matching_loss

__all__ = [
    "ambient_score_loss",
    "clip_scores",
    "combine_rewards",
    "consistency_loss",
    "distribution_matching_loss",
    "group_advantages",
    "policy_loss",
    "reward_hinge",
    "reward_hinge_loss",
    "weighted_mean",
]
