"""Group-relative advantages and the clipped ratio loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rtdmd.objectives import group_advantages, policy_loss

IDS = torch.tensor([7, 7, 3, 3, 3])
REWARDS = {"a": torch.tensor([1.0, 3.0, 0.0, 3.0, 6.0]), "b": torch.tensor([2.0, 2.0, 1.0, 0.0, 2.0])}
WEIGHTS = {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(
    ("global_std", "normalize", "expected"),
    [
        (True, False, [-0.48561935, 0.48561935, -1.45685804, -0.62492188, 2.08177993]),
        (True, True, [-0.40136208, 0.40136208, -1.20408625, -0.51649497, 1.72058122]),
        (False, False, [-0.99990001, 0.99990001, -1.22469487, -0.61229744, 1.83699232]),
        (False, True, [-0.83036428, 0.83036428, -1.01704457, -0.50848077, 1.52552534]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_group_advantages_by_hand(
    global_std: bool, normalize: bool, expected: list[float], dtype: torch.dtype
) -> None:
    """Prompts 7 (two samples) and 3 (three). Reward a less its prompt means 2 and 3: (−1, 1, −3, 0,
    3); b less 2 and 1: (0, 0, 0, −1, 1). Population variances over all samples: a about 2.6:
    (2.56 + 0.16 + 6.76 + 0.16 + 11.56)/5 = 4.24, b about 1.4: (3·0.36 + 0.16 + 1.96)/5 = 0.64; within
    the prompts: a 1 and 6, b 0 and 2/3. Each divides by its root + 1e-4, b counts half. The sum's
    root mean square, by which it is divided, is 1.2098283 (global) and 1.2040703 (per prompt)."""
    rewards = {name: values.to(dtype) for name, values in REWARDS.items()}
    advantages = group_advantages(rewards, IDS, WEIGHTS, global_std, normalize)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_group_advantages_of_equal_groups_by_hand() -> None:
    """2 prompts × 2 samples, interleaved, one reward: (1, 5, 3, 5) for prompts (0, 1, 0, 1). Means 2
    and 5: (−1, 0, 1, 0). Variance about 3.5: (6.25 + 2.25 + 0.25 + 2.25)/4 = 2.75. A weight of −2
    flips the sign."""
    ids = torch.tensor([0, 1, 0, 1])
    rewards = {"a": torch.tensor([1.0, 5.0, 3.0, 5.0])}
    advantages = group_advantages(rewards, ids, {"a": -2.0}, normalize=False)
    share = 2 / (math.sqrt(2.75) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([share, 0.0, -share, 0.0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("global_std", [True, False])
def test_a_sample_without_a_finite_score_is_left_out_by_hand(value: float, global_std: bool) -> None:
    """The third sample has no score b, so its a = 0 doesn't count either. What is left, prompts (7, 7, 3,
    3): a = (1, 3, 3, 6) less 2 and 4.5: (−1, 1, −1.5, 1.5), b = (2, 2, 0, 2) less 2 and 1: (0, 0, −1, 1).
    Population variances over the four, about 3.25 and 1.5: a (5.0625 + 0.0625 + 0.0625 + 7.5625)/4 =
    3.1875, b (3·0.25 + 2.25)/4 = 0.75; within the prompts: a 1 and 2.25, b 0 and 1. Each divides by its
    root + 1e-4, b counts half."""
    rewards = {"a": REWARDS["a"], "b": torch.tensor([2.0, 2.0, value, 0.0, 2.0])}
    advantages = group_advantages(rewards, IDS, WEIGHTS, global_std, normalize=False)
    if global_std:
        first, second = 1 / (math.sqrt(3.1875) + 1e-4), 1.5 / (math.sqrt(3.1875) + 1e-4)
        second += 0.5 / (math.sqrt(0.75) + 1e-4)
    else:
        first, second = 1 / 1.0001, 1.5 / 1.5001 + 0.5 / 1.0001
    expected = torch.tensor([-first, first, 0.0, -second, second])
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-7)
    kept = [0, 1, 3, 4]
    without = {name: values[kept] for name, values in rewards.items()}
    for normalize in (True, False):
        got = group_advantages(rewards, IDS, WEIGHTS, global_std, normalize)
        assert got[2] == 0
        assert torch.equal(got[kept], group_advantages(without, IDS[kept], WEIGHTS, global_std, normalize))


def test_a_group_with_one_sample_left_and_no_samples_left() -> None:
    """One sample equals its own mean; without any sample every advantage is 0."""
    a = torch.tensor([math.nan, 3.0, 0.0, 3.0, 6.0])
    assert group_advantages({"a": a}, IDS, {"a": 1.0})[:2].tolist() == [0.0, 0.0]
    assert not group_advantages({"a": torch.full((5,), math.nan)}, IDS, {"a": 1.0}).any()


def test_a_reward_that_is_only_logged_leaves_no_sample_out() -> None:
    """Weight 0: neither its values nor its gaps matter."""
    rewards = {"a": REWARDS["a"], "b": torch.tensor([math.nan, math.inf, 0.0, 1.0, 2.0])}
    expected = group_advantages({"a": REWARDS["a"]}, IDS, {"a": 1.0})
    assert torch.equal(group_advantages(rewards, IDS, {"a": 1.0, "b": 0.0}), expected)


def random_rewards(sizes: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """Two rewards for prompts with as many samples as ``sizes`` says, in random order."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    ids = ids[torch.randperm(len(ids), generator=generator)]
    draws = torch.randn(2, len(ids), generator=generator)
    return {"a": draws[0], "b": 10 * draws[1] + 3}, ids


@pytest.mark.parametrize("global_std", [True, False])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [24, 24], [1, 2, 5]])
def test_group_advantages_have_mean_zero_and_unit_variance(sizes: list[int], global_std: bool) -> None:
    """Each prompt's mean is 0, being a sum of centred rewards; the normalised variance is 1 up to the
    1e-4 in the denominator. A prompt with one sample has the advantage 0."""
    rewards, ids = random_rewards(sizes)
    advantages = group_advantages(rewards, ids, WEIGHTS, global_std)
    for prompt, size in enumerate(sizes):
        assert advantages[ids == prompt].mean().item() == pytest.approx(0, abs=1e-6)
        assert size > 1 or advantages[ids == prompt].item() == 0.0
    assert advantages.double().std(correction=0).item() == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("global_std", [True, False])
def test_group_advantages_ignore_the_order_and_names_of_prompts(global_std: bool) -> None:
    """Permuting the samples permutes the advantages; renaming the prompts (also to negative and large
    ids, which reverses their order) changes nothing."""
    rewards, ids = random_rewards([3, 4, 5])
    expected = group_advantages(rewards, ids, WEIGHTS, global_std)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    permuted = group_advantages(
        {name: values[order] for name, values in rewards.items()}, ids[order], WEIGHTS, global_std
    )
    torch.testing.assert_close(permuted, expected[order], rtol=1e-6, atol=1e-7)
    renamed = torch.tensor([10**12, 5, -9])[ids]
    torch.testing.assert_close(
        group_advantages(rewards, renamed, WEIGHTS, global_std), expected, rtol=1e-6, atol=1e-7
    )


def test_per_prompt_std_ignores_offsets_and_nearly_ignores_scales_of_prompts() -> None:
    """(r − mean)/std of the prompt is the same for r + c, and for λ·r apart from the 1e-4. The std
    over all samples contains the offsets: there the same change matters."""
    rewards, ids = random_rewards([4, 4, 4])
    shifted = {"a": rewards["a"] + torch.tensor([0.0, 8.0, -32.0])[ids], "b": rewards["b"]}
    scaled = {"a": rewards["a"] * torch.tensor([1.0, 8.0, 32.0])[ids], "b": rewards["b"]}
    expected = group_advantages(rewards, ids, WEIGHTS, global_std=False)
    for changed, tolerance in ((shifted, 1e-5), (scaled, 1e-3)):
        advantages = group_advantages(changed, ids, WEIGHTS, global_std=False)
        torch.testing.assert_close(advantages, expected, rtol=0, atol=tolerance)
    pooled = group_advantages(rewards, ids, WEIGHTS, global_std=True)
    assert (group_advantages(shifted, ids, WEIGHTS, global_std=True) - pooled).abs().max() > 0.1


def test_a_common_offset_never_matters() -> None:
    """A constant added to every sample leaves both the prompt means' and the overall std's
    deviations alone."""
    rewards, ids = random_rewards([4, 4, 4])
    shifted = {"a": rewards["a"] + 64, "b": rewards["b"]}
    for global_std in (True, False):
        expected = group_advantages(rewards, ids, WEIGHTS, global_std)
        torch.testing.assert_close(
            group_advantages(shifted, ids, WEIGHTS, global_std), expected, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("global_std", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-7, -26.3, 1e6])
def test_a_group_of_equal_rewards_gets_exactly_zero(
    value: float, normalize: bool, global_std: bool, dtype: torch.dtype
) -> None:
    """24 equal rewards of at most 24 bits sum exactly in float64, their mean is the value itself, and
    0 stays 0 through every division. The weight of such samples is decided by ``advantage != 0``."""
    ids = torch.arange(3).repeat(24)
    rewards, _ = random_rewards([24, 24, 24])
    rewards = {name: values.to(dtype) for name, values in rewards.items()}
    for values in rewards.values():
        values[ids == 1] = value
    advantages = group_advantages(rewards, ids, WEIGHTS, global_std, normalize)
    assert (advantages[ids == 1] == 0).all()
    assert (advantages[ids != 1] != 0).all()


def test_equal_rewards_everywhere_give_zeros() -> None:
    """0/(0 + 1e-4) = 0, twice: nothing to learn, and nothing non-finite."""
    advantages = group_advantages({"a": torch.full((48,), 0.1)}, torch.arange(48) // 24, {"a": 1.0})
    assert (advantages == 0).all()


def test_group_advantages_take_integers_and_one_sample() -> None:
    """Rewards of 0 and 1 may come as int64: (0, 1) less ½ is ∓½, over ½ + 1e-4. N = 1 gives 0."""
    advantages = group_advantages(
        {"a": torch.tensor([0, 1])}, torch.tensor([4, 4]), {"a": 1.0}, normalize=False
    )
    torch.testing.assert_close(advantages, torch.tensor([-0.5, 0.5]) / 0.5001)
    assert group_advantages({"a": torch.tensor([2.0])}, torch.tensor([4]), {"a": 1.0}).tolist() == [0.0]


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ({}, {}, "at least one reward"),
        ({"a": torch.zeros(4)}, {"a": 1.0}, "'a' has shape"),
        ({"a": torch.zeros(5, 1)}, {"a": 1.0}, "'a' has shape"),
        ({"a": torch.zeros(5)}, {"b": 1.0}, "'a' has no weight"),
    ],
)
def test_group_advantages_errors(rewards: dict[str, Tensor], weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, IDS, weights)


def loss_and_gradient(
    ratio: list[float], advantages: list[float], weights: list[float] | None = None, **clipping: float
) -> tuple[float, list[float]]:
    """policy_loss at the given ratios and its gradient in log_prob; clips 0.1, 0.2 and ±5."""
    clipping = {"clip_low": 0.1, "clip_high": 0.2, "advantage_clip": 5.0} | clipping
    old = torch.tensor([-0.7, 0.2, 1.0, -3.0])[: len(ratio)]
    log_prob = (old + torch.tensor(ratio).log()).requires_grad_()
    given = None if weights is None else torch.tensor(weights)
    loss = policy_loss(log_prob, old, torch.tensor(advantages), weights=given, **clipping)
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss.backward()
    assert log_prob.grad is not None
    return loss.item(), log_prob.grad.tolist()


@pytest.mark.parametrize("clip", [0.2, 1e-5, 0.0])
def test_gradient_at_ratio_one_is_minus_advantage_over_count(clip: float) -> None:
    """ρ = exp(0) = 1 exactly: the loss is −mean(A), d(−Aρ)/d log_prob = −A·ρ = −A, and both branches
    of the maximum are equal and carry it; A = (2, −1, 0, 0.5)."""
    log_prob = torch.tensor([-0.7, 0.2, 1.0, -3.0], requires_grad=True)
    advantages = torch.tensor([2.0, -1.0, 0.0, 0.5])
    loss = policy_loss(log_prob, log_prob.detach(), advantages, clip, clip, 5.0)
    loss.backward()
    assert loss.item() == pytest.approx(-0.375)
    torch.testing.assert_close(log_prob.grad, -advantages / 4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.3, 1.0, -1.2, 0.0),  # above 1.2 with A > 0: no further gain
        (1.15, 1.0, -1.15, -1.15),  # inside the upper side, which is wider than the lower
        (0.8, 1.0, -0.8, -0.8),  # below 0.9 with A > 0: pulled back
        (0.8, -1.0, 0.9, 0.0),  # below 0.9 with A < 0: no further gain
        (0.85, -1.0, 0.9, 0.0),  # 0.15 is outside the lower side, inside the upper
        (0.95, -1.0, 0.95, 0.95),  # inside
        (1.3, -1.0, 1.3, 1.3),  # above 1.2 with A < 0: pulled back
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    """max(−A·ρ, −A·clip(ρ, 0.9, 1.2)); where the first branch wins the gradient is −A·ρ."""
    actual_loss, actual_gradient = loss_and_gradient([ratio], [advantage])
    assert actual_loss == pytest.approx(loss, rel=1e-6)
    assert actual_gradient == pytest.approx([gradient], rel=1e-6)


def test_the_published_clip_resolves_in_float32() -> None:
    """clip = 1e-5: a log-ratio of 5e-6 is inside, 2e-5 and −2e-5 are outside, on either side."""
    old = torch.zeros(4)
    log_prob = torch.tensor([5e-6, 2e-5, -5e-6, -2e-5], requires_grad=True)
    policy_loss(log_prob, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), 1e-5, 1e-5, 5.0).backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([-0.25, 0.0, 0.25, 0.0]), rtol=1e-4, atol=0)


def test_advantages_are_clamped() -> None:
    """A = (9, −9, 1, −1) counts as (2, −2, 1, −1) with advantage_clip 2: the gradient at ρ = 1 is
    −A/4; the default 5 of the recipe cuts to ±5."""
    for clip in (2.0, 5.0):
        loss, gradient = loss_and_gradient([1.0] * 4, [9.0, -9.0, 1.0, -1.0], advantage_clip=clip)
        assert loss == pytest.approx(0.0, abs=1e-6)
        assert gradient == pytest.approx([-clip / 4, clip / 4, -0.25, 0.25], rel=1e-5)


def test_policy_weights() -> None:
    """Weights (1, 0, 1, 0) at ρ = 1: the mean runs over two samples, −(2 + 0.5)/2, gradient −A/2 and 0."""
    advantages = [2.0, -1.0, 0.5, 3.0]
    loss, gradient = loss_and_gradient([1.0] * 4, advantages, [1.0, 0.0, 1.0, 0.0])
    assert loss == pytest.approx(-1.25, rel=1e-6)
    assert gradient == pytest.approx([-1.0, 0.0, -0.25, 0.0], rel=1e-6)
    assert loss_and_gradient([1.0] * 4, advantages, [0.0] * 4) == (0.0, [0.0] * 4)


def test_policy_loss_is_computed_in_float32() -> None:
    """bf16 resolves 2⁻⁸ near 1; ρ = exp(2⁻¹⁰) must not round to 1. Loss −ρ with a wide clip."""
    loss = policy_loss(
        torch.tensor([2.0**-10]).bfloat16(),
        torch.zeros(1).bfloat16(),
        torch.ones(1).bfloat16(),
        0.2,
        0.2,
        5.0,
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.exp(2.0**-10), rel=1e-6)
