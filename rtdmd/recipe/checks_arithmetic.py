"""Arithmetic across fields: batches, groups of images, ranks, steps. Every fault proposes working numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rtdmd.recipe.report import Report
from rtdmd.recipe.schema import Recipe, RtdmdSection
from rtdmd.schedules import flux2_sigmas, sd3_sigmas

_MAX_GPUS_LISTED = 64

# Each family's own schedule: (steps u in (0, 1], image tokens) -> sigmas. These are also the families'
# names, so that checking a recipe need not import the models' libraries.
FAMILY_SIGMAS: dict[str, Callable[[Sequence[float], int], list[float]]] = {
    "sd3": lambda steps, _tokens: sd3_sigmas(steps),
    "flux2": flux2_sigmas,
}


def check_arithmetic(report: Report, recipe: Recipe, *, world_size: int, stages: Sequence[str]) -> None:
    """Batches divide, groups of K fit the ranks, steps and intervals leave room."""
    if world_size < 1:
        report.fault("--world-size", world_size, "write the number of ranks, 1 or more")
        return
    _check_micro_batches(report, recipe)
    if "cold_start" in stages:
        noisiest = _noisiest_outcome(recipe) if recipe.cold_start.sub_interval else 0.0
        _check_interval(report, recipe, "cold_start", noisiest)
    if "rtdmd" in stages:
        noisiest = _noisiest_outcome(recipe) if recipe.rtdmd.matches_drawn else 0.0
        _check_interval(report, recipe, "rtdmd", noisiest)
        _check_policy_steps(report, recipe)
        _check_groups(report, recipe.rtdmd, world_size)


def groups_fit(section: RtdmdSection, world_size: int) -> bool:
    """Whether every prompt can appear exactly K times, in whole sampling batches of all ranks.

    Where a sampling batch of all ranks is smaller than K, a group spans consecutive ones, and the
    whole epoch has to be a multiple of K.
    """
    group = section.images_per_prompt
    batch = section.sample_batch_size * world_size
    return (batch if batch >= group else batch * section.num_sample_batches) % group == 0


def _check_micro_batches(report: Report, recipe: Recipe) -> None:
    cold_start, rtdmd = recipe.cold_start, recipe.rtdmd
    for key, batch in (
        ("cold_start.batch_size", cold_start.batch_size),
        ("rtdmd.sample_batch_size", rtdmd.sample_batch_size),
        ("rtdmd.num_sample_batches", rtdmd.num_sample_batches),
    ):
        if batch < 1:
            report.fault(key, batch, "write at least 1")
    for key, micro, batch_key, batch in (
        ("cold_start.micro_batch_size", cold_start.micro_batch_size, "batch_size", cold_start.batch_size),
        ("rtdmd.micro_batch_size", rtdmd.micro_batch_size, "sample_batch_size", rtdmd.sample_batch_size),
        (
            "rtdmd.fake_score_micro_batch_size",
            rtdmd.fake_score_micro_batch_size,
            "sample_batch_size",
            rtdmd.sample_batch_size,
        ),
        (
            "rtdmd.score_batch_size",
            rtdmd.score_batch_size,
            "sample_batch_size",
            rtdmd.sample_batch_size,
        ),
    ):
        if micro is not None and batch >= 1 and (micro < 1 or batch % micro):
            divisors = _neighbours(micro, (size for size in range(1, batch + 1) if batch % size == 0))
            advice = f"write {_either(divisors)}, or null for all at once"
            report.fault(key, micro, f"does not divide {batch_key} = {batch}; {advice}")


def _noisiest_outcome(recipe: Recipe) -> float:
    """The highest sigma that a step leads to, usually the first."""
    family_sigmas = FAMILY_SIGMAS.get(recipe.model.family)
    timesteps, shift = recipe.schedule.timesteps, recipe.schedule.shift
    is_usable = all(0 < step <= 1000 for step in timesteps) and (shift is None or shift > 0)
    if family_sigmas is None or not is_usable:
        return 0.0  # reported by other checks
    steps = [step / 1000 for step in timesteps]
    tokens = (recipe.model.height // 16) * (recipe.model.width // 16)  # a token is 16x16 pixels
    sigmas = family_sigmas(steps, tokens) if shift is None else sd3_sigmas(steps, shift)
    return max([*sigmas[1:], 0.0])


def _check_interval(report: Report, recipe: Recipe, stage: str, stop: float) -> None:
    """t starts at 1000·s + min_interval, with s up to ``stop``, and ends at timestep_range[1]."""
    section = recipe.cold_start if stage == "cold_start" else recipe.rtdmd
    if sorted(section.timestep_range[:1] + section.timestep_range[-1:]) != section.timestep_range:
        return  # not two ascending timesteps: reported by another check
    end, interval = section.timestep_range[1], section.min_interval_timesteps
    room = end - 1000 * stop
    if interval > room:
        lower = f"write at most {int(room)}, " if room >= 1 else ""
        report.fault(
            f"{stage}.min_interval_timesteps",
            interval,
            f"states at sigma {stop:.4f} are matched, so t would start at {1000 * stop + interval:.4g}, "
            f"above {stage}.timestep_range[1] = {end:g}; {lower}widen the range, or lower schedule.timesteps",
        )


def _check_policy_steps(report: Report, recipe: Recipe) -> None:
    steps, most = recipe.rtdmd.num_policy_steps, len(recipe.schedule.timesteps) - 1
    if most < 1:
        report.fault(
            "schedule.timesteps",
            recipe.schedule.timesteps,
            "stage rtdmd draws policy steps from all but the last step; write at least two timesteps",
        )
    elif not 1 <= steps <= most:
        report.fault(
            "rtdmd.num_policy_steps",
            steps,
            f"only the first {most} of {most + 1} steps are stochastic; write 1 to {most}",
        )


def _check_groups(report: Report, section: RtdmdSection, world_size: int) -> None:
    group = section.images_per_prompt
    if group < 2:
        report.fault(
            "rtdmd.images_per_prompt", group, "an advantage compares images of one prompt; write 2 or more"
        )
        return
    if section.sample_batch_size < 1 or section.num_sample_batches < 1 or groups_fit(section, world_size):
        return
    batch = section.sample_batch_size * world_size
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    samples = f"sample_batch_size {section.sample_batch_size} x {ranks} = {batch} samples"
    if batch < group:
        total = batch * section.num_sample_batches
        samples += f", x num_sample_batches {section.num_sample_batches} = {total}"
    report.fault(
        "rtdmd.images_per_prompt",
        group,
        f"{samples}, not a multiple of images_per_prompt; {_proposals(section, world_size)}",
    )


def _proposals(section: RtdmdSection, world_size: int) -> str:
    """What to change, one field at a time, so that groups fit."""

    def fits(batch: int, group: int, batches: int) -> bool:
        changed = RtdmdSection(
            section.generator,
            section.fake_score,
            section.prompts,
            sample_batch_size=batch,
            images_per_prompt=group,
            num_sample_batches=batches,
        )
        return groups_fit(changed, world_size)

    batch, group, batches = section.sample_batch_size, section.images_per_prompt, section.num_sample_batches
    found = {
        "sample_batch_size": [size for size in range(1, batch + group + 1) if fits(size, group, batches)],
        "images_per_prompt": [size for size in range(2, 2 * group + 1) if fits(batch, size, batches)],
        "num_sample_batches": [count for count in range(1, batches + group + 1) if fits(batch, group, count)],
    }
    origin = {"sample_batch_size": batch, "images_per_prompt": group, "num_sample_batches": batches}
    options = [
        f"{name} {_either(_neighbours(origin[name], sizes))}" for name, sizes in found.items() if sizes
    ]
    counts = [count for count in range(1, _MAX_GPUS_LISTED + 1) if groups_fit(section, count)]
    options.append(f"{_ranges(counts)} ranks" if counts else f"no number of ranks up to {_MAX_GPUS_LISTED}")
    return "these work: " + "; or ".join(options)


def _neighbours(value: int, candidates: Iterable[int]) -> list[int]:
    """The nearest candidate below ``value`` and the nearest above it."""
    ordered = sorted(candidates)
    return [size for size in ordered if size < value][-1:] + [size for size in ordered if size > value][:1]


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _ranges(numbers: Sequence[int]) -> str:
    """``1-4, 8, 12`` for [1, 2, 3, 4, 8, 12]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
