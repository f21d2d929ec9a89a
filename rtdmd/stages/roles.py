"""Teacher, generator and fake score as stages see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from rtdmd.distributed.engine import FrozenEngine, TrainedEngine, collect_garbage
from rtdmd.distributed.shared import ShardedBase, SharedBase, SharedNetwork
from rtdmd.models.guidance import predict_guided_velocity
from rtdmd.models.protocol import ModelFamily, TextEmbeddings
from rtdmd.recipe.schema import ColdStartSection, OptimizerSection, RtdmdSection
from rtdmd.rollout import VelocityFn
from rtdmd.stages.activations import AutomaticRecomputation
from rtdmd.stages.residency import AutomaticResidency


def learning_rate(optimizer: OptimizerSection, step: int, num_steps: int) -> float:
    """η·min(1, (N − k)/(c·N)) at step k = 0, 1, … of N, with the cooldown c; η throughout if c = 0."""
    cooling = optimizer.cooldown * num_steps
    left = max(num_steps - step, 0)
    return optimizer.learning_rate * (left / cooling if left < cooling else 1.0)


@dataclass(frozen=True)
class Teacher:
    """The frozen network under classifier-free guidance."""

    engine: FrozenEngine
    family: ModelFamily
    unconditional: TextEmbeddings  # of the empty prompt, B = 1
    guidance_scale: float

    def velocity(self, text: TextEmbeddings) -> VelocityFn:
        """Guided velocity for the prompts in ``text``."""

        def predict(x: Tensor, sigma: float | Tensor) -> Tensor:
            return predict_guided_velocity(
                self.family, self.engine, x, sigma, text, self.unconditional, self.guidance_scale
            )

        return predict


@dataclass(frozen=True)
class Student:
    """A network that trains, generator or fake score; it sees no guidance."""

    engine: TrainedEngine
    family: ModelFamily

    def velocity(self, text: TextEmbeddings) -> VelocityFn:
        """Velocity for the prompts in ``text``; ``x`` may hold several samples per prompt in turn."""

        def predict(x: Tensor, sigma: float | Tensor) -> Tensor:
            copies = x.shape[0] // len(text)
            tiled = text if copies == 1 else TextEmbeddings.cat([text] * copies)
            return self.family.predict_velocity(self.engine, x, sigma, tiled)

        return predict


@dataclass(frozen=True)
class Roles:
    """The three networks of a stage."""

    teacher: Teacher
    generator: Student
    fake_score: Student
    recomputation: AutomaticRecomputation | None = None  # where activation_checkpointing is auto
    residency: AutomaticResidency | None = None  # where whole_blocks is null

    @property
    def bases(self) -> dict[SharedBase, list[str]]:
        """Shared bases with the names of the roles on them."""
        found: dict[SharedBase, list[str]] = {}
        for role in (self.teacher, self.generator, self.fake_score):
            if isinstance(role.engine.network, SharedNetwork):
                found.setdefault(role.engine.network.base, []).append(role.engine.name)
        return found

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left that steps choose by their use of memory."""
        return not self._choosers

    @property
    def _choosers(self) -> list[AutomaticRecomputation | AutomaticResidency]:
        """That have something left to choose."""
        choosers = (self.recomputation, self.residency)
        return [chooser for chooser in choosers if chooser is not None and not chooser.is_settled]

    def set_learning_rates(
        self, settings: ColdStartSection | RtdmdSection, step: int, num_steps: int
    ) -> None:
        """Those of step 0, 1, … of ``num_steps``."""
        for student, optimizer in (
            (self.generator, settings.generator),
            (self.fake_score, settings.fake_score),
        ):
            student.engine.set_learning_rate(learning_rate(optimizer, step, num_steps))

    def after_step(self, generator_updated: bool, closely: bool = True) -> tuple[str, ...]:
        """Collective: call after each step; what the user should know of it.

        ``closely`` says that the step has looked at all that a stage ever looks at. Memory goes to
        activations first, and what they leave to blocks of the bases.
        """
        if self.recomputation is not None and not self.recomputation.is_settled:
            notices = self.recomputation.after_step(generator_updated, closely)
            if notices:  # another peak from now on
                self.watch_memory()
            return tuple(notices)
        if self.residency is not None:
            return tuple(self.residency.after_step(generator_updated, closely))
        return ()

    def gradient_is_done(self) -> None:
        """What comes before another role's forward takes the memory that activations have left."""
        if self.recomputation is not None:
            self.recomputation.gradient_is_done()

    def watch_memory(self) -> None:
        """Steps come now: what was used before them counts for nothing that is chosen by its use."""
        for chooser in self._choosers:
            chooser.restart()

    @contextmanager
    def room_for_pictures(self) -> Iterator[None]:
        """Collective: inside it no block of a base in shards stays whole.

        There was room for them beside training steps; pictures of another size may need more.
        """
        bases = [base.shards for base in self.bases if isinstance(base, ShardedBase)]
        with_kept = [shards for shards in bases if shards.num_kept]
        with ExitStack() as stack:
            for shards in with_kept:
                stack.enter_context(shards.all_released())
            if with_kept:
                collect_garbage()
            yield
        if with_kept:
            collect_garbage()
        for shards in with_kept:
            shards.gather_kept()
        self.watch_memory()

    def close(self) -> None:
        """Free all three engines."""
        for engine in (self.teacher.engine, self.generator.engine, self.fake_score.engine):
            engine.close()
