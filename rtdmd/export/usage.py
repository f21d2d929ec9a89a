"""Code for a model card: how others paint with what a run has trained, with and without rtdmd."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rtdmd.models.adapters import DIFFUSERS_FILE

# The few-step transition as a diffusers scheduler, for those who don't have rtdmd.
CPS_CLASS = """\
class CPS(FlowMatchEulerDiscreteScheduler):
    eta = {eta}
    generator = None

    def step(self, model_output, timestep, sample, return_dict=True, **unused):
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        x, v, angle = sample.float(), model_output.float(), self.eta * math.pi / 2
        x0, noise = x - sigma * v, x + (1 - sigma) * v
        fresh = torch.randn(x.shape, generator=self.generator, device=x.device)
        x = (1 - sigma_next) * x0 + sigma_next * (math.cos(angle) * noise + math.sin(angle) * fresh)
        self._step_index += 1
        return (x.to(sample.dtype),)
"""


@dataclass(frozen=True)
class Usage:
    """Everything that the code depends on."""

    name: str  # of the exported folder or repository
    base: str | None  # the pipeline that adapters go onto; None: the folder is a pipeline itself
    stages: Sequence[str]  # that have a LoRA file each
    pipeline_class: str
    dtype: str
    prompt: str
    height: int
    width: int
    steps: Sequence[float]  # unshifted, in (0, 1]
    eta: float
    shift: float | None  # None is the pipeline's own
    call_arguments: dict[str, Any]

    @property
    def has_even_steps(self) -> bool:
        """Whether the steps are 1 − i/k, which CPSScheduler takes by itself."""
        count = len(self.steps)
        return all(abs(step - (1 - i / count)) < 1e-9 for i, step in enumerate(self.steps))

    def plain(self) -> str:
        """From nothing to a picture, with diffusers alone."""
        settings = "" if self.shift is None else f", shift={self.shift:g}, use_dynamic_shifting=False"
        load = f'{self.pipeline_class}.from_pretrained("{self.base or self.name}", dtype=torch.{self.dtype})'
        lora = f'pipe.load_lora_weights("{self.name}")\n' if self.base is not None else ""
        return (
            "import math\n"
            "import torch\n"
            f"from diffusers import FlowMatchEulerDiscreteScheduler, {self.pipeline_class}\n"
            f"\n\n{CPS_CLASS.format(eta=f'{self.eta:g}')}\n\n"
            f"pipe = {load}\n"
            f"{lora}"
            f"pipe.scheduler = CPS.from_config(pipe.scheduler.config{settings})\n"
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")\n'
            "torch.manual_seed(0)\n" + self._call(sigmas=True)
        )

    def separate_stages(self) -> str:
        """The same picture with each stage's adapter under a name of its own.

        Not with ``subfolder``: in a local folder diffusers prefers a file of that name at the top to it.
        """
        names = ", ".join(f'"{stage}"' for stage in self.stages)
        loads = "".join(
            f'pipe.load_lora_weights("{self.name}", weight_name="{stage}/{DIFFUSERS_FILE}", '
            f'adapter_name="{stage}")\n'
            for stage in self.stages
        )
        return (
            "pipe.unload_lora_weights()\n"
            f"{loads}"
            f"pipe.set_adapters([{names}])\n"
            "torch.manual_seed(0)\n" + self._call(sigmas=True)
        )

    def with_scheduler(self) -> str:
        """The same with rtdmd's scheduler in place of the class above."""
        return (
            "from rtdmd.scheduler import CPSScheduler\n\n"
            f"pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, eta={self.eta:g})\n"
            "torch.manual_seed(0)\n" + self._call(sigmas=False)
        )

    def _call(self, *, sigmas: bool) -> str:
        arguments: dict[str, Any] = {"prompt": self.prompt, "num_inference_steps": len(self.steps)}
        if sigmas:
            arguments["sigmas"] = [float(f"{step:.6g}") for step in self.steps]
        arguments |= {"guidance_scale": 1.0, "height": self.height, "width": self.width}
        lines = "".join(
            f"    {name}={_literal(value)},\n" for name, value in (arguments | self.call_arguments).items()
        )
        return f'image = pipe(\n{lines}).images[0]\nimage.save("picture.png")\n'

    def command(self) -> str:
        """Painting with rtdmd's command line, from the folder or a downloaded copy of the repository."""
        _, is_repository, folder = self.name.rpartition("/")
        fetch = f"hf download {self.name} --local-dir {folder}\n" if is_repository else ""
        return (
            f"{fetch}rtdmd sample {folder}/recipe.yaml --run {folder} --prompt {shlex.quote(self.prompt)}\n"
        )


def _literal(value: Any) -> str:
    """Python source of a value, text in double quotes."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
        return f'"{escaped}"'
    return repr(value)
