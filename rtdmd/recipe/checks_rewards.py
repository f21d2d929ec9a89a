"""What holds for every reward of a recipe, whatever it is for."""

from __future__ import annotations

from rtdmd.recipe.checks_files import check_readable, check_source
from rtdmd.recipe.report import Report
from rtdmd.recipe.schema import RewardSection


def check_reward(report: Report, key: str, reward: RewardSection, *, is_used: bool) -> None:
    """Mode of the registered reward at ``key``; its files' places only if it is about to be used."""
    from rtdmd.rewards import REWARDS

    spec = REWARDS.get(reward.name)
    if spec is not None and reward.mode not in spec.modes:
        report.fault(f"{key}.mode", reward.mode, f"{reward.name} has no such mode; leave the key out")
    if reward.token_file is not None and reward.url is not None and is_used:
        check_readable(report, f"{key}.token_file", reward.token_file)
    if reward.weights is None or spec is None or not is_used or reward.url is not None:
        return
    if spec.default_weights is None:
        report.fault(f"{key}.weights", reward.weights, f"{reward.name} has no weights; leave the key out")
    else:
        check_source(report, f"{key}.weights", reward.weights, needs=None)
