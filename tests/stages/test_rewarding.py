"""The reward panel: chunked back-propagation equals autograd through everything at once."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from rtdmd.models import get_family
from rtdmd.objectives import reward_hinge_loss
from rtdmd.randomness import Draws
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import load_rewards
from rtdmd.rewards.clip import ClipReward
from rtdmd.stages.combination import Combination
from rtdmd.stages.rewarding import Captions, RewardPanel
from rtdmd.stages.scores import RewardPull
from rtdmd.stages.scoring_thread import ScoringThread
from tests.distributed.reference import without_rounding

CAPTIONS = Captions(["a cat", "a dog", "two cats", "a red cube", "rain"], [{}] * 5)


@pytest.fixture(scope="module")
def parts(tiny_flux2: Path, tiny_clip: Path) -> tuple[Any, list[Any]]:
    device = torch.device("cpu")
    family = get_family("flux2").load(str(tiny_flux2), device=device, dtype=torch.float32)
    section = RewardSection(name="clipscore", weights=str(tiny_clip))
    return family, without_rounding(load_rewards([section], device, torch.float32))


def make_panel(
    parts: tuple[Any, list[Any]],
    chunk: int,
    scored: list[int] | None = None,
    combination: Combination | None = None,
    margin: float = 3.0,
) -> RewardPanel:
    family, rewards = parts
    return RewardPanel(
        family,
        rewards,
        combination or Combination({"clipscore": 2.0}),
        ["clipscore"],
        margin=margin,
        thread=ScoringThread(torch.device("cpu")),
        score_chunk=chunk,
        backprop_chunk=chunk,
        progress=lambda: scored.append(1) if scored is not None else None,
    )


def latents() -> torch.Tensor:
    return Draws(0, "test").normal(0, "latents", range(5), (16, 8, 8))


def pull_of(panel: RewardPanel, z: torch.Tensor) -> RewardPull:
    pull = panel.score(z.detach(), CAPTIONS, closely=False).pull
    assert pull is not None
    return pull


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
def test_hinge_gradient_equals_autograd_through_everything(
    parts: tuple[Any, list[Any]], chunk: int, weights: list[int]
) -> None:
    """The gradient goes on through the graph behind x0: here x0 = 0.5·z."""
    family, (reward,) = parts
    mask = torch.tensor(weights, dtype=torch.float32)
    z = latents().requires_grad_()
    images = family.decode(0.5 * z)
    total = 2.0 * reward.score(images, CAPTIONS.prompts, CAPTIONS.metadata)
    expected = reward_hinge_loss(total, 3.0, mask)
    (expected_gradient,) = torch.autograd.grad(expected, z)

    loss, metrics = pull_of(make_panel(parts, chunk), 0.5 * z).on(0.5 * z, mask)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-8)
    assert float(metrics["hinge_active"]) == any(weights)
    assert (float(gradient.abs().max()) > 0) == any(weights)


def test_one_chunks_graph_is_alive_at_a_time(
    parts: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a chunk is decoded, nothing that autograd kept of an earlier one is there, pictures included."""
    family, _ = parts
    kept: list[weakref.ref[Kept]] = []
    alive: list[int] = []
    decode = family.decode

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor.detach()

    def pack(tensor: torch.Tensor) -> Kept:
        saved = Kept(tensor)
        kept.append(weakref.ref(saved))
        return saved

    def watched(latents: torch.Tensor) -> torch.Tensor:
        alive.append(sum(saved() is not None for saved in kept))
        images = decode(latents)
        kept.append(weakref.ref(images))
        return images

    monkeypatch.setattr(family, "decode", watched)
    panel = make_panel(parts, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        panel.score(latents(), CAPTIONS, closely=False)
    assert kept and alive == [0] * 3


def test_a_sample_without_a_finite_score_leaves_the_others_gradient_alone(
    parts: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scorer gives NaN for one prompt; that sample's weight is 0, as its advantage is."""
    score = ClipReward.score

    def partly_nan(self: ClipReward, images: Any, prompts: Any, metadata: Any) -> torch.Tensor:
        factors = torch.tensor([float("nan") if prompt == "a dog" else 1.0 for prompt in prompts])
        return factors * score(self, images, prompts, metadata)

    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    z = latents().requires_grad_()
    whole, _ = pull_of(make_panel(parts, 2), z).on(z, mask)
    (expected,) = torch.autograd.grad(whole, z)
    monkeypatch.setattr(ClipReward, "score", partly_nan)
    pull = pull_of(make_panel(parts, 2), z)
    assert not torch.isfinite(pull.losses[1])
    loss, metrics = pull.on(z, mask)
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.equal(loss, whole) and torch.equal(gradient, expected)
    assert torch.isfinite(metrics["hinge"]) and not gradient[1].any()


def test_clipped_and_standardised_gradients(parts: tuple[Any, list[Any]]) -> None:
    """Standardised, the gradient is the raw one over the std; beyond a bound it is zero."""
    family, (reward,) = parts
    z = latents()
    raw = reward.score(family.decode(z), CAPTIONS.prompts, CAPTIONS.metadata)

    def gradient(combination: Combination) -> torch.Tensor:
        panel = make_panel(parts, 2, combination=combination, margin=100.0)
        return pull_of(panel, z).gradient

    plain = gradient(Combination({"clipscore": 2.0}))
    standardised = Combination({"clipscore": 2.0}, decay=0.9)
    early = make_panel(parts, 2, combination=standardised).score(z, CAPTIONS, closely=False)
    assert early.pull is None  # nothing to standardise by yet
    torch.testing.assert_close(early.rewards["clipscore"], raw)
    standardised.observe({"clipscore": raw})
    std = float(raw.double().std(correction=0)) + 1e-4
    torch.testing.assert_close(gradient(standardised), plain / std, rtol=1e-4, atol=1e-7)
    bound = float(raw.sort().values[1:3].mean())  # between the second and the third
    clipped = gradient(Combination({"clipscore": 2.0}, {"clipscore": (bound, 10.0)}))
    below = raw < bound
    assert below.sum() == 2 and not clipped[below].any()
    torch.testing.assert_close(clipped[~below], plain[~below])


def test_a_margin_below_every_reward_is_inactive(parts: tuple[Any, list[Any]]) -> None:
    z = latents().requires_grad_()
    loss, metrics = pull_of(make_panel(parts, 2, margin=-10.0), z).on(z, torch.ones(5))
    (gradient,) = torch.autograd.grad(loss, z)
    assert float(loss.detach()) == 0 and float(metrics["hinge_active"]) == 0 and not gradient.any()


def test_scores_do_not_depend_on_the_chunk(parts: tuple[Any, list[Any]]) -> None:
    scored: list[int] = []
    whole = make_panel(parts, 5).score(latents(), CAPTIONS, closely=False)
    parted = make_panel(parts, 2, scored).score(latents(), CAPTIONS, closely=False)
    torch.testing.assert_close(whole.rewards["clipscore"], parted.rewards["clipscore"], rtol=1e-5, atol=1e-7)
    assert len(scored) == 3
    assert not whole.images and whole.thumbnails is None


def test_scoring_beside_the_caller_gives_the_same_numbers(parts: tuple[Any, list[Any]]) -> None:
    panel = make_panel(parts, 2)
    jobs = [panel.start_scoring(latents()[i:], CAPTIONS[i:], closely=True) for i in range(4)]
    for i, job in enumerate(jobs):
        inline = panel.score(latents()[i:], CAPTIONS[i:], closely=True)
        assert torch.equal(job.result().rewards["clipscore"], inline.rewards["clipscore"])
        assert torch.equal(job.result().images["entropy"], inline.images["entropy"])
    panel.close()


@pytest.mark.gpu
def test_scoring_waits_for_the_callers_stream(tiny_flux2: Path, tiny_clip: Path) -> None:
    """The latents are still being computed on the caller's stream when the job is handed over."""
    device = torch.device("cuda", 0)
    family = get_family("flux2").load(str(tiny_flux2), device=device, dtype=torch.float32)
    rewards = load_rewards([RewardSection("clipscore", weights=str(tiny_clip))], device, torch.float32)
    panel = RewardPanel(
        family,
        rewards,
        Combination({"clipscore": 1.0}),
        ["clipscore"],
        margin=3.0,
        thread=ScoringThread(device),
        score_chunk=2,
        backprop_chunk=1,
        progress=lambda: None,
    )
    jobs, kept = [], []
    busy = torch.randn(4096, 4096, device=device)
    for i in range(4):
        for _ in range(50):
            busy = torch.tanh(busy @ busy)
        kept.append(latents().to(device) * (1 + i) + 0 * busy[0, 0])
        jobs.append(panel.start_scoring(kept[-1], CAPTIONS, closely=True))
    for latent, job in zip(kept, jobs, strict=True):
        inline, beside = panel.score(latent, CAPTIONS, closely=True), job.result()
        torch.testing.assert_close(beside.rewards["clipscore"], inline.rewards["clipscore"])
        torch.testing.assert_close(beside.images["entropy"], inline.images["entropy"])
    panel.close()


def test_jobs_run_in_their_order_without_gradient_and_fail_in_the_caller() -> None:
    thread, order = ScoringThread(torch.device("cpu")), []

    def fail() -> None:
        raise ValueError("the scorer's own words")

    first = [thread.submit(lambda i=i: order.append(i)) for i in range(20)]
    failing = thread.submit(fail)
    after = thread.submit(lambda: order.append(20))
    with pytest.raises(ValueError, match="the scorer's own words"):
        failing.result()
    after.result()
    assert order == list(range(21)) and all(job.done() for job in first)
    thread.close()


def test_a_close_look_adds_monitors_and_statistics(parts: tuple[Any, list[Any]]) -> None:
    family, rewards = parts
    monitors = load_rewards([RewardSection("compressibility")], torch.device("cpu"), torch.float32)
    panel = RewardPanel(
        family,
        rewards,
        Combination({"clipscore": 1.0}),
        [],
        margin=3.0,
        monitors=monitors,
        thread=ScoringThread(torch.device("cpu")),
        score_chunk=2,
        backprop_chunk=1,
        progress=lambda: None,
    )
    seen = panel.score(latents(), CAPTIONS, closely=True)
    images = family.decode(latents())
    expected = monitors[0].score(images, CAPTIONS.prompts, CAPTIONS.metadata)
    assert seen.rewards.keys() == {"clipscore"} and seen.monitors.keys() == {"compressibility"}
    torch.testing.assert_close(seen.monitors["compressibility"], expected, rtol=0.02, atol=0)
    assert {name: values.shape for name, values in seen.images.items()} == {
        "edge_energy": (5,),
        "saturation": (5,),
        "entropy": (5,),
    }
    assert seen.thumbnails is not None and seen.thumbnails.shape == (5, 768)
