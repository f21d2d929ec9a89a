"""Cold start the plain way, to compare with: eager PyTorch in one process, everything recomputed.

Follows what FACTS of the published code say about its cost, not its text: autocast over bfloat16 networks,
peft's own LoRA layers, whole text encoder with its vocabulary head, guidance and the regulariser's two moves
one after the other, and an EMA of all parameters at every iteration.

``ddp`` is without the wrapper, which in one process only copies the adapters' gradients into buckets.
``fsdp`` wraps every block, what trains and what is frozen together, so that the base's weight gradients are
computed and kept as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from benchmarks.full_size import build_flux2, build_sd3, role_weights, size_of
from benchmarks.reward_memory import creating_on
from rtdmd.distributed.loading import build_network
from rtdmd.models.blocks import blocks_of
from rtdmd.models.protocol import TextEmbeddings
from rtdmd.randomness import Draws
from rtdmd.recipe.schema import OptimizerSection, Recipe
from rtdmd.rollout import Trajectory, VelocityFn, rollout
from rtdmd.stages.ac_dmd import AmbientMatching, AmbientSettings, Samples

Wrapper = Literal["ddp", "fsdp"]


class PublishedStyle:
    """Three whole networks, two optimizers, an EMA."""

    def __init__(
        self, recipe: Recipe, prompts: Sequence[str], device: torch.device, tiny: bool, wrapper: Wrapper
    ) -> None:
        """In the one process of an initialised process group."""
        self._recipe = recipe
        self._wrapper = wrapper
        self._device = device
        self._dtype = getattr(torch, recipe.dtype)
        self._prompts = list(prompts)
        settings, model = recipe.cold_start, recipe.model
        with creating_on(device, self._dtype):
            if model.family == "flux2":
                self.family: Any = build_flux2(
                    size_of(recipe, tiny),
                    model.max_sequence_length,
                    recipe.schedule.shift,
                    whole_encoder=True,
                )
            else:
                self.family = build_sd3(
                    size_of(recipe, tiny), model.max_sequence_length, recipe.schedule.shift
                )
        self.unconditional = self.family.encode_prompts([""])
        self._teacher = self._wrapped(self._network(tiny).requires_grad_(False).eval())
        self._generator = self._with_lora(self._network(tiny))
        self._fake = self._with_lora(self._network(tiny))
        self._optimizers = {
            "generator": self._adam(self._generator, settings.generator),
            "fake": self._adam(self._fake, settings.fake_score),
        }
        # Listed once: between forward and backward FSDP's modules don't show all of their parameters.
        self._averaged = list(self._generator.parameters())
        self._ema = [parameter.detach().clone() for parameter in self._averaged]
        self._shape = self.family.latent_shape(model.height, model.width)
        self._sigmas = self.family.sigmas(recipe.schedule.timesteps, model.height, model.width)
        self._draws = Draws(recipe.seed, "baseline")
        low, high = settings.timestep_range
        self._matching = AmbientMatching(
            self._draws,
            AmbientSettings(
                recipe.schedule.eta,
                settings.consistency_weight,
                settings.consistency_max_timesteps,
                settings.min_interval_timesteps,
                (low, high),
            ),
        )

    def _network(self, tiny: bool) -> nn.Module:
        weights = role_weights(self._recipe, tiny)
        make = self.family.transformer_class
        return build_network(
            lambda: make.from_config(weights.config), weights, {}, self._dtype, self._device, lambda: None
        )

    def _with_lora(self, network: nn.Module) -> nn.Module:
        lora = self._recipe.lora
        network.requires_grad_(False)
        targets = list(lora.targets or self.family.lora_targets)
        network.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))  # type: ignore[operator]
        network.enable_gradient_checkpointing()  # type: ignore[operator]
        return self._wrapped(network.to(self._device, self._dtype))

    def _wrapped(self, network: nn.Module) -> nn.Module:
        if self._wrapper == "ddp":
            return network
        kinds = {type(block) for block in blocks_of(network, self.family.block_lists)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process doesn't shard, that gradients take more memory
            return FullyShardedDataParallel(
                network,
                auto_wrap_policy=ModuleWrapPolicy(kinds),
                use_orig_params=True,
                device_id=self._device,
            )

    def close(self) -> None:
        """Free the memory, whatever still refers to it."""
        for network in (self._teacher, self._generator, self._fake):
            for parameter in network.parameters():
                parameter.untyped_storage().resize_(0)
        self._averaged.clear()
        self._ema.clear()
        self._optimizers.clear()

    def _adam(self, network: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=section.learning_rate, weight_decay=section.weight_decay)

    def _velocity(self, network: nn.Module, text: TextEmbeddings) -> VelocityFn:
        """In batches of the prompts', one after the other."""

        def predict(x: Tensor, sigma: float | Tensor) -> Tensor:
            count = len(text)
            levels = [sigma] * (len(x) // count) if isinstance(sigma, float) else sigma.split(count)
            parts = zip(x.split(count), levels, strict=True)
            return torch.cat(
                [self.family.predict_velocity(network, part, level, text) for part, level in parts]
            )

        return predict

    def _guided(self, text: TextEmbeddings) -> VelocityFn:
        guidance = self._recipe.model.guidance_scale
        conditional = self._velocity(self._teacher, text)
        unconditional = self._velocity(self._teacher, self.unconditional.expand(len(text)))

        def predict(x: Tensor, sigma: float | Tensor) -> Tensor:
            without = unconditional(x, sigma)
            return without + guidance * (conditional(x, sigma) - without)

        return predict

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    def _states(self, text: TextEmbeddings, step: int, stop: int, grad_last: bool) -> Samples:
        indices = range(len(text))

        def noise(name: str) -> Tensor:
            return self._draws.normal(step, name, indices, self._shape, self._device)

        def steps(state: Tensor, first: int, count: int) -> Trajectory:
            return rollout(
                self._velocity(self._generator, text),
                state,
                self._sigmas,
                self._recipe.schedule.eta,
                lambda index: noise(f"transition{index}"),
                first=first,
                num_steps=count,
            )

        with torch.no_grad():
            before = steps(noise("initial"), 0, stop - 1)
        with torch.set_grad_enabled(grad_last):
            trajectory = steps(before.final, stop - 1, 1)
        return Samples(trajectory.final, trajectory.final_sigma, step, indices)

    def _update(self, name: str, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._optimizers[name].param_groups[0]["params"], 1.0)
        self._optimizers[name].step()
        self._optimizers[name].zero_grad()

    def iteration(self, step: int, stop: int, with_generator: bool) -> None:
        """One fake-score update, a generator update where asked for, and the EMA."""
        batch = self._recipe.cold_start.batch_size
        text = self.family.encode_prompts([self._prompts[i % len(self._prompts)] for i in range(batch)])
        with self._autocast():
            samples = self._states(text, step, stop, grad_last=False)
            loss, _ = self._matching.fake_score_loss(self._velocity(self._fake, text), samples)
        self._update("fake", loss)
        if with_generator:
            with self._autocast():
                samples = self._states(text, step, stop, grad_last=True)
                loss = self._matching.generator_loss(
                    self._guided(text), self._velocity(self._fake, text), samples
                )
            self._update("generator", loss)
        torch._foreach_lerp_(self._ema, [parameter.detach() for parameter in self._averaged], 0.01)
