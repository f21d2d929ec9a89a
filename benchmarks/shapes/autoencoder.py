"""The small world's AutoencoderKLFlux2: 64×64 pixels to 16×16×4 latents, folded to 8×8 tokens of 16."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from benchmarks.shapes.pictures import to_unit
from benchmarks.shapes.training import Clock, Schedule

LATENT_CHANNELS = 4
KL_WEIGHT = 3e-4
SQUARE_WEIGHT = 2.0


def make_autoencoder() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def train_autoencoder(
    images: Tensor, device: torch.device, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> AutoencoderKLFlux2:
    """L1 + 2·MSE + 3e-4·KL on uint8 ``images`` [N, 3, 64, 64]; then the latents' statistics."""
    torch.manual_seed(seed)
    model = make_autoencoder().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = Schedule(optimizer, steps, warmup=100)
    clock = Clock("autoencoder", steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (batch_size,), device=images.device)
        pictures = (to_unit(images[chosen].to(device)) * 2 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = model.encode(pictures).latent_dist
            painted = model.decode(posterior.sample()).sample.float()
        difference = painted - pictures
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float())
        loss = difference.abs().mean() + SQUARE_WEIGHT * difference.square().mean() + KL_WEIGHT * kl.mean()
        schedule.update(loss, model)
        clock.tick(step, loss)
    model.eval().requires_grad_(False)
    set_latent_statistics(model, images[:16384], device)
    return model


@torch.no_grad()
def encode(model: AutoencoderKLFlux2, images: Tensor, device: torch.device, chunk: int = 1024) -> Tensor:
    """Folded posterior means [N, 16, 8, 8], not normalised, of uint8 pictures; on ``device``."""
    parts = []
    for part in images.split(chunk):
        pictures = to_unit(part.to(device)) * 2 - 1
        parts.append(torch.nn.functional.pixel_unshuffle(model.encode(pictures).latent_dist.mode(), 2))
    return torch.cat(parts)


@torch.no_grad()
def set_latent_statistics(model: AutoencoderKLFlux2, images: Tensor, device: torch.device) -> None:
    """Mean and variance per folded channel into the batch norm that normalises latents."""
    latents = encode(model, images, device)
    model.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    model.bn.running_var.copy_(latents.var((0, 2, 3)))


def normalise(model: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """(z − mean)/std with the batch norm's statistics: what the transformer sees."""
    mean = model.bn.running_mean.view(1, -1, 1, 1)
    return (latents - mean) / (model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps).sqrt()
