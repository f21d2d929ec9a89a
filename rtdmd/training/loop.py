"""One stage from its first or resumed step to its last: steps, EMA, logging, previews, checkpoints."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.masters import MASTER
from rtdmd.recipe.schema import Recipe
from rtdmd.stages.assemble import Stage
from rtdmd.training.artifacts import FAKE_SCORE_FILE, GENERATOR_FILE, save_diffusers_lora, save_state_dict
from rtdmd.training.checkpoint import CheckpointStore, read_progress
from rtdmd.training.ema import Ema
from rtdmd.training.previews import Previews
from rtdmd.training.tracking import Tracker


class StopRequest:
    """Whether the run shall end early: on SIGTERM, or after so many steps of this launch."""

    def __init__(self, max_steps: int | None) -> None:
        self._left = max_steps
        self.terminated = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.terminated = True

    def count_step(self) -> None:
        if self._left is not None:
            self._left -= 1

    def now(self, ranks: Ranks) -> bool:
        """Collective: ranks that got the signal at different moments agree here."""
        return ranks.any(self.terminated) or (self._left is not None and self._left <= 0)


@dataclass
class StageRun:
    """A stage with all that surrounds it."""

    stage: Stage
    ema: Ema
    store: CheckpointStore
    previews: Previews
    recipe: Recipe
    ranks: Ranks
    run: Path  # the run's folder

    @property
    def folder(self) -> Path:
        return self.run / self.stage.name

    def _state(self) -> dict[str, Any]:
        roles = self.stage.roles
        return {
            "generator": roles.generator.engine.state() | {"ema": self.ema.pieces},
            "fake_score": roles.fake_score.engine.state(),
        }

    def resume(self) -> int:
        """Collective: restore the last checkpoint; the number of finished steps (0 without one)."""
        folder = self.store.latest() if self.recipe.resume == "auto" else None
        if folder is None:
            return 0
        progress = read_progress(folder)
        self.store.load(folder, self._state())
        for role in ("generator", "fake_score"):
            getattr(self.stage.roles, role).engine.restored(progress["num_updates"][role])
        self.ema.num_updates = progress["num_updates"]["ema"]
        self.stage.restore(progress["stage"])
        return int(progress["step"])

    def save(self, step: int) -> None:
        """Collective: the state dicts for others, then the checkpoint, which says that they are there."""
        self.write_state_dicts()
        roles = self.stage.roles
        engines = {"generator": roles.generator.engine, "fake_score": roles.fake_score.engine}
        updates = {role: engine.num_updates for role, engine in engines.items()}
        progress = {
            "num_updates": updates | {"ema": self.ema.num_updates},
            "training": training_identity(self.recipe),
            "stage": self.stage.state(),
        }
        replicated = [role for role, engine in engines.items() if engine.masters.replicated]
        self.store.save(step, self._state(), progress, replicated)

    def write_state_dicts(self) -> None:
        """Collective: the generator's EMA and the fake score, under peft's and diffusers' names."""
        generator, fake = self.stage.roles.generator.engine, self.stage.roles.fake_score.engine
        masters = fake.masters.pieces(MASTER)
        save_state_dict(fake.gather(masters), self.folder / FAKE_SCORE_FILE, self.ranks)
        state = save_state_dict(generator.gather(self.ema.pieces), self.folder / GENERATOR_FILE, self.ranks)
        if self.recipe.roles.generator.trains == "lora":
            family, lora = self.stage.family, self.recipe.lora
            self.ranks.on_main_first(lambda: save_diffusers_lora(state, self.folder, family, lora))

    def execute(self, tracker: Tracker, first: int, stop: StopRequest) -> bool:
        """Run steps ``first`` … to the end; whether it got there (else it was asked to stop)."""
        settings, total = self.stage.settings, self.stage.num_steps
        if first >= total:  # all steps are done, but the files are not there
            self.write_state_dicts()
            return True
        if stop.now(self.ranks):
            return False
        for step in range(first, total):
            report = self.stage.step(step)
            if report.generator_updated:
                self.ema.update()
            done = step + 1
            tracker.log(done, report.metrics, report.notices)
            stop.count_step()
            stopping = stop.now(self.ranks)
            if stopping or due(done, settings.checkpoint_every, total):
                self.save(done)
            if due(done, settings.sample_every, total):
                picture = self.run / "samples" / f"{self.stage.name}-{done:06d}.png"
                self.previews.paint(self.stage.roles.generator, self.ema.pieces, picture)
            if stopping and done < total:
                return False
        return True


def training_identity(recipe: Recipe) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes from it."""
    return {
        "model.family": recipe.model.family,
        "roles.generator.trains": recipe.roles.generator.trains,
        "roles.fake_score.trains": recipe.roles.fake_score.trains,
        "lora.rank": recipe.lora.rank,
        "lora.alpha": recipe.lora.alpha,
        "lora.targets": recipe.lora.targets,
    }


def due(done: int, every: int, total: int) -> bool:
    """At every multiple of ``every``, and at the end."""
    return done % every == 0 or done == total
