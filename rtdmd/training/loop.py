"""One stage from its first or resumed step to its last: steps, EMA, logging, previews, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rtdmd.distributed.collectives import Ranks
from rtdmd.distributed.masters import MASTER
from rtdmd.errors import UserError
from rtdmd.evaluation.identity import Digests
from rtdmd.files import replace_file
from rtdmd.models.adapters import save_diffusers_lora
from rtdmd.models.blocks import num_compiled_graphs
from rtdmd.models.weights import transformer_folder
from rtdmd.recipe.schema import Recipe, TeacherSection, TrainedSection, role_weights
from rtdmd.runs import ENDING_FILE, read_progress
from rtdmd.stages.assemble import Stage
from rtdmd.stages.networks import HandOver
from rtdmd.termination import note_signals, signal_came
from rtdmd.training.artifacts import (
    BEST_FILE,
    FAKE_SCORE_FILE,
    GENERATOR_FILE,
    LAST_FILE,
    copy_file,
    save_state_dict,
)
from rtdmd.training.checkpoint import CheckpointStore
from rtdmd.training.ema import Ema
from rtdmd.training.evaluations import Evaluations
from rtdmd.training.previews import Previews
from rtdmd.training.stopping import StopRules
from rtdmd.training.tracking import Tracker

BASES = tuple(f"roles.{role}.weights" for role in ("teacher", "generator", "fake_score"))


class StopRequest:
    """Whether the run shall end early: on a signal, or after so many steps of this launch."""

    def __init__(self, max_steps: int | None) -> None:
        self._left = max_steps
        note_signals()

    def count_step(self) -> None:
        if self._left is not None:
            self._left -= 1

    def now(self, ranks: Ranks) -> bool:
        """Collective: ranks that got the signal at different moments agree here."""
        return ranks.any(signal_came()) or (self._left is not None and self._left <= 0)


@dataclass
class StageRun:
    """A stage with all that surrounds it."""

    stage: Stage
    ema: Ema
    store: CheckpointStore
    previews: Previews
    evaluations: Evaluations | None  # None: evaluation.every is 0
    recipe: Recipe
    ranks: Ranks
    run: Path  # the run's folder
    rules: StopRules
    identity: dict[str, Any]  # of what is trained; on rank 0
    evaluation_left_out: bool = False  # the one that was due at the last step

    @property
    def folder(self) -> Path:
        return self.run / self.stage.name

    @property
    def _compiles(self) -> bool:
        roles = self.recipe.roles
        return any(role.compile != "none" for role in (roles.teacher, roles.generator, roles.fake_score))

    def _state(self) -> dict[str, Any]:
        roles = self.stage.roles
        return {
            "generator": roles.generator.engine.state() | {"ema": self.ema.pieces},
            "fake_score": roles.fake_score.engine.state(),
        }

    def resume(self) -> int:
        """Collective: restore the last checkpoint; the number of finished steps (0 without one)."""
        # Rank 0's: another machine may still see an older one.
        folder = self.ranks.gather_objects(self.store.latest() if self.ranks.is_main else None)[0]
        if folder is None:
            return 0
        progress = read_progress(folder)
        self.store.load(folder, self._state())
        for role in ("generator", "fake_score"):
            getattr(self.stage.roles, role).engine.restored(progress["num_updates"][role])
        self.ema.num_updates = progress["num_updates"]["ema"]
        self.stage.restore(progress["stage"])
        self.rules.restore(progress["stopping"])
        self.evaluation_left_out = self.ranks.any(progress["evaluation_left_out"])
        best = self.rules.best_step
        if best is not None and self.store.at(best) is None:
            self.rules.forget_best()
        return int(progress["step"])

    def save(self, step: int, is_due: bool) -> None:
        """Collective: the state dicts for others, then the checkpoint, which says that they are there."""
        self.write_state_dicts()
        if is_due and self.rules.choose(step):
            self._copy_generator(BEST_FILE)
        roles = self.stage.roles
        engines = {"generator": roles.generator.engine, "fake_score": roles.fake_score.engine}
        updates = {role: engine.num_updates for role, engine in engines.items()}
        progress = {
            "num_updates": updates | {"ema": self.ema.num_updates},
            "training": self.identity,
            "stage": self.stage.state(),
            "stopping": self.rules.state(),
            "evaluation_left_out": self.evaluation_left_out,
        }
        replicated = [role for role, engine in engines.items() if engine.masters.replicated]
        self.store.save(step, self._state(), progress, replicated, self.rules.best_step)

    def write_state_dicts(self) -> None:
        """Collective: the generator's EMA and the fake score, under peft's and diffusers' names."""
        fake = self.stage.roles.fake_score.engine
        masters = fake.masters.pieces(MASTER)
        save_state_dict(fake.gather(masters), self.folder / FAKE_SCORE_FILE, self.ranks)
        self._write_generator()

    def _write_generator(self) -> None:
        generator = self.stage.roles.generator.engine
        state = save_state_dict(generator.gather(self.ema.pieces), self.folder / GENERATOR_FILE, self.ranks)
        if self.recipe.roles.generator.trains == "lora":
            family, lora = self.stage.family, self.recipe.lora
            self.ranks.on_main_first(lambda: save_diffusers_lora(state, self.folder, family, lora))

    def _evaluate(self, evaluations: Evaluations) -> dict[str, float]:
        """Collective: what the EMA's pictures score."""
        roles = self.stage.roles
        with roles.room_for_pictures():
            return evaluations.measure(roles.generator, self.ema.pieces)

    def _copy_generator(self, name: str) -> None:
        self.ranks.on_main_first(lambda: copy_file(self.folder / GENERATOR_FILE, self.folder / name))

    def _end_early(self, step: int) -> None:
        """Collective: hand over the best checkpoint's generator, and note that the stage is over.

        ``generator_ema.pt`` and the LoRA file for diffusers become the best checkpoint's; the last step's
        stay as ``generator_ema.last.pt``. A crash in between repeats it.
        """
        self.write_state_dicts()
        if self.rules.best_step is not None:
            best = self.store.at(self.rules.best_step)
            if best is None:
                raise UserError(
                    f"{self.folder}: the best checkpoint, of step {self.rules.best_step}, isn't there any "
                    "more; the same command hands over the last one instead"
                )
            self._copy_generator(LAST_FILE)
            self.store.load(best, {"generator": {"ema": self.ema.pieces}})
            self._write_generator()
        ending = {"step": step, "best_step": self.rules.best_step, "reason": self.rules.reason}
        text = json.dumps(ending, indent=2)
        self.ranks.on_main_first(lambda: replace_file(self.folder / ENDING_FILE, text))

    def execute(self, tracker: Tracker, first: int, stop: StopRequest) -> bool:
        """Run steps ``first`` … to the end; whether it got there (else it was asked to stop)."""
        settings, roles, total = self.stage.settings, self.stage.roles, self.stage.num_steps
        if self.rules.reason is not None:  # ended by a rule, but not yet handed over
            self._end_early(first)
            return True
        if first >= total:  # all steps are done, but the files are not there
            self.write_state_dicts()
            return True
        if stop.now(self.ranks):
            return False
        if self.evaluation_left_out and self.evaluations:
            tracker.amend(first, self._evaluate(self.evaluations))
            if stop.now(self.ranks):  # nothing but that is lost
                return False
        roles.watch_memory()
        for step in range(first, total):
            report = self.stage.step(step)
            if report.generator_updated:
                self.ema.update()
            done = step + 1
            metrics = report.metrics
            if self._compiles:
                metrics["compiled_graphs"] = float(num_compiled_graphs())
            notices = list(report.notices)
            ended = self.rules.observe(done, metrics)
            is_last = done == total or ended is not None
            self.evaluation_left_out = False
            if self.evaluations and due(done, self.recipe.evaluation.every, total):
                if not is_last and self.ranks.any(signal_came()):  # what is left of the time is for saving
                    self.evaluation_left_out = True
                    notices.append("a signal to stop has come; the evaluation that is due comes on resuming")
                else:
                    metrics |= self._evaluate(self.evaluations)
            if ended is not None:
                notices.append(f"{self.stage.name} ends early: {ended}")
            tracker.log(done, metrics, notices)
            stop.count_step()
            stopping = stop.now(self.ranks)
            is_due = due(done, settings.checkpoint_every, total)
            if stopping or ended or is_due:
                self.save(done, is_due)
            if ended or due(done, settings.sample_every, total):
                picture = self.run / "samples" / f"{self.stage.name}-{done:06d}.png"
                with roles.room_for_pictures():
                    self.previews.paint(roles.generator, self.ema.pieces, picture)
            if ended:
                self._end_early(done)
                return True
            if stopping and done < total:
                return False
        return True


def training_identity(
    recipe: Recipe, given: HandOver, digests: Digests, progress: Callable[[], None]
) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes from it.

    Transformers count by their files' content. ``progress`` is called after each file.
    """

    def base(role: TeacherSection | TrainedSection) -> str:
        folder = transformer_folder(*role_weights(recipe.model, role))
        parts = []
        for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
            parts.append(digests.of(file))
            progress()
        return sha256("".join(parts).encode()).hexdigest()

    roles = recipe.roles
    starts = {"start_generator": given.generator, "start_fake_score": given.fake_score}
    return {
        **{key: base(getattr(roles, key.split(".")[1])) for key in BASES},
        **{name: digests.of_local(path) for name, path in starts.items() if path is not None},
        "model.family": recipe.model.family,
        "roles.generator.trains": recipe.roles.generator.trains,
        "roles.fake_score.trains": recipe.roles.fake_score.trains,
        "lora.rank": recipe.lora.rank,
        "lora.alpha": recipe.lora.alpha,
        "lora.targets": recipe.lora.targets,
        "seed": recipe.seed,
    }


def due(done: int, every: int, total: int) -> bool:
    """At every multiple of ``every``, and at the end."""
    return done % every == 0 or done == total
