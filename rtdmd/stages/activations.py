"""``activation_checkpointing: auto``: as few blocks are recomputed as the device's memory allows.

Measured on the stage's own updates rather than on a trial: the peak then has everything in it that is there
in training, and no gradient has to be undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rtdmd.distributed.collectives import Ranks
from rtdmd.models.recomputation import Recomputation, fewest_recomputed, predicted_peak, spread
from rtdmd.recipe.schema import Recipe
from rtdmd.stages.device_memory import GIB, CudaMemory, DeviceMemory, Watched


class PeakWatch:
    """The peak while each role's gradient is computed.

    A role's time begins with the first forward of its network that carries gradient, and ends with another
    role's, or when its gradient is said to be done.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._role: str | None = None
        self._hooks: list[RemovableHandle] = []
        self._reserved = self._outside = 0
        self.peaks: dict[str, int] = {}

    def observe(self, role: str, network: nn.Module, is_present: Callable[[], bool]) -> None:
        """Watch the forwards of a role's network: those in which it ``is_present``."""

        def enter(*_: Any) -> None:
            if torch.is_grad_enabled() and role != self._role and is_present():
                self.close()
                self._role = role

        self._hooks.append(network.register_forward_pre_hook(enter))

    def close(self) -> None:
        """End the time of the role whose it is, or that between roles."""
        peak = self._memory.peak()
        if self._role is None:
            self._outside = max(self._outside, peak)
        else:
            self.peaks[self._role] = max(self.peaks.get(self._role, 0), peak)
        self._role = None
        self._reserved = max(self._reserved, self._memory.peak_reserved())
        self._memory.reset_peak()

    def beside(self) -> int:
        """Bytes reserved that a role's activations can't have.

        Other streams keep what they have used, above all the scoring thread's; the rest is what of this
        stream's was never full, in pieces that are too small.
        """
        others = self._memory.reserved_by_others()
        return others + max(0, self._reserved - others - max(self._outside, *self.peaks.values()))

    def restart(self) -> None:
        """Forget what was used so far."""
        self.peaks.clear()
        self._reserved = self._outside = 0
        self._memory.empty_cache()
        self._memory.reset_peak()

    def stop(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()


class AutomaticRecomputation:
    """Chooses the number of recomputed blocks of roles, after two updates of the generator and a close look.

    Until then all blocks are recomputed but one of each kind, which is measured. Only what comes after the
    first update counts.
    """

    def __init__(self, memory: DeviceMemory, ranks: Ranks) -> None:
        self._memory = memory
        self._ranks = ranks
        self._watch = PeakWatch(memory)
        self._watched = Watched()
        self._roles: dict[str, Recomputation] = {}

    def add(
        self,
        role: str,
        network: nn.Module,
        recomputation: Recomputation | None,
        is_present: Callable[[], bool] = lambda: True,
    ) -> None:
        """A role of the stage; without ``recomputation`` its peak is only told from the others'.

        ``is_present``: whether a forward of ``network`` is the role's, where several share it.
        """
        self._watch.observe(role, network, is_present)
        if recomputation is not None:
            recomputation.measure()
            self._roles[role] = recomputation

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to choose."""
        return not self._roles

    def restart(self) -> None:
        """Forget what was used so far: by loading, by a first update, or by pictures between steps."""
        self._watched.restart()
        self._watch.restart()

    def gradient_is_done(self) -> None:
        """What is used from now on, until another role's forward, is no role's."""
        if not self.is_settled:
            self._watch.close()

    def after_step(self, generator_updated: bool, closely: bool = True) -> list[str]:
        """Collective: call after each step; what was chosen, when it is."""
        if self.is_settled:
            return []
        self._watch.close()
        is_known = self._watched.after_step(generator_updated, closely)
        if generator_updated and self._watched.updates == 1:
            self.restart()
        if not is_known:
            return []
        self._watch.stop()
        beside = self._watch.beside()
        notices = [self._settle(role, recomputation, beside) for role, recomputation in self._roles.items()]
        self._roles = {}
        self._memory.empty_cache()  # what is cached was cut to the sizes of before
        return notices

    def _settle(self, role: str, recomputation: Recomputation, beside: int) -> str:
        # Ranks that recomputed other blocks than each other would gather other shards under ZeRO-3.
        # Of what is reserved: an allocator that is short of it gives back and asks again in every step.
        reserved = self._watch.peaks[role] + beside
        mine = [reserved, -self._memory.available(), *recomputation.kept_bytes()]
        together = torch.tensor(mine, dtype=torch.float64, device=self._ranks.device)
        peak, lacking, *kept = self._ranks.max(together).tolist()
        measured, total = recomputation.measured, len(kept)
        count = fewest_recomputed(peak, kept, measured, -lacking)
        predicted = predicted_peak(peak, kept, measured, spread(count, total))
        recomputation.choose(count)
        return (
            f"{role}: {count} of {total} blocks are recomputed in backward (activation_checkpointing: auto); "
            f"{predicted / GIB:.1f} GiB at most, as reserved, "
            f"are expected of {-lacking / GIB:.1f} GiB to be had"
        )


def automatic_recomputation(recipe: Recipe, ranks: Ranks) -> AutomaticRecomputation | None:
    """Where a role asks for it and there is a GPU whose memory can be watched."""
    trained = (recipe.roles.generator, recipe.roles.fake_score)
    if ranks.device.type != "cuda" or all(role.activation_checkpointing != "auto" for role in trained):
        return None
    return AutomaticRecomputation(CudaMemory(ranks.device), ranks)
