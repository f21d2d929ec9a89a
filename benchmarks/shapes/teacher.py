"""The small world's text encoder and Flux2Transformer2DModel, trained together by flow matching.

Legend: B batch, L text tokens, D width of the text encoder.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from benchmarks.shapes.training import Average, Clock, Schedule

TEXT_WIDTH = 128
TEXT_DEPTH = 4  # FLUX.2 takes hidden states depth/4, depth/2 and 3·depth/4: here 1, 2, 3
GRID = 8  # latent tokens a side
CAPTION_DROPOUT = 0.1
_WARM, _TIMED = 50, 200  # steps before the pace is taken, and of which it is taken


def text_config(tokenizer: Any) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=192,
        num_hidden_layers=TEXT_DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_transformer() -> Flux2Transformer2DModel:
    """2 double and 6 single blocks, 6 heads of 32; modulation starts small, the output at zero."""
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=64,
        mlp_ratio=3.0,
        axes_dims_rope=(4, 12, 12, 4),
        rope_theta=200,
        guidance_embeds=False,
    )
    for name, weight in model.named_parameters():
        if "modulation" in name or name.startswith("norm_out"):
            nn.init.normal_(weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    return model


class Teacher(nn.Module):
    """Velocity of noisy latents given token ids, in the shapes that training has."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        super().__init__()
        self.text_encoder = Qwen3ForCausalLM(text_config(tokenizer))
        self.transformer = make_transformer()
        self.pad_token_id = tokenizer.pad_token_id
        axes = [torch.arange(size) for size in (1, GRID, GRID, 1)]
        self.register_buffer("image_ids", torch.cartesian_prod(*axes), persistent=False)
        words = [torch.arange(size) for size in (1, 1, 1, length)]
        self.register_buffer("text_ids", torch.cartesian_prod(*words), persistent=False)

    def encode(self, tokens: Tensor) -> Tensor:
        """Hidden states 1, 2 and 3 side by side, [B, L, 3·D]; layer 4 isn't computed."""
        backbone: Qwen3Model = self.text_encoder.model
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        visible = causal & (tokens != self.pad_token_id)[:, None, None, :]  # (B, 1, L, L)
        # A padded query sees the prompt before it, so no row is empty.
        hidden = backbone.embed_tokens(tokens)
        positions = torch.arange(length, device=tokens.device)[None]
        rotary = backbone.rotary_emb(hidden, positions)
        states = []
        for layer in backbone.layers[: TEXT_DEPTH - 1]:
            hidden = layer(hidden, attention_mask=visible, position_ids=positions, position_embeddings=rotary)
            states.append(hidden)
        return torch.cat(states, dim=-1)

    def forward(self, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """v(x, sigma | tokens), shape of ``x`` [B, 16, 8, 8]."""
        velocity = self.transformer(
            hidden_states=x.flatten(2).transpose(1, 2),
            encoder_hidden_states=self.encode(tokens),
            timestep=sigma,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            guidance=None,
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, (GRID, GRID))


@dataclass(frozen=True)
class TeacherSettings:
    """Optimisation of the teacher."""

    steps: int
    batch_size: int = 1024
    learning_rate: float = 1.5e-3
    ema_decay: float = 0.9995
    seed: int = 0
    compile: bool = True
    seconds: float | None = None  # fewer steps if they would take longer


def train_teacher(
    latents: Tensor, tokens: Tensor, empty: Tensor, tokenizer: Any, settings: TeacherSettings
) -> tuple[Teacher, int]:
    """Flow matching on normalised ``latents`` [N, 16, 8, 8] with ``tokens`` [N, L]; sigmoid(N(0.3, 1)) noise.

    A tenth of the captions are replaced by ``empty`` [L], for guidance. Returns the averaged model and the
    number of steps taken.
    """
    device = latents.device
    torch.manual_seed(settings.seed)
    teacher = Teacher(tokenizer, tokens.shape[1]).to(device)
    teacher.text_encoder.model.layers[-1].requires_grad_(False)  # never used
    teacher.text_encoder.model.norm.requires_grad_(False)
    trained = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    schedule = Schedule(optimizer, settings.steps, warmup=min(500, settings.steps // 10 + 1))
    average = Average(teacher, settings.ema_decay)
    fast = HalfCopy(teacher)
    predict = torch.compile(fast.model) if settings.compile else fast.model
    clock = Clock("teacher", settings.steps)
    began, step = _now(device), -1
    timed = began
    while (step := step + 1) < schedule.steps:
        if step == _WARM:
            timed = _now(device)
        if step == _WARM + _TIMED and settings.seconds is not None:
            pace = (_now(device) - timed) / _TIMED
            left = settings.seconds - (_now(device) - began)
            schedule.steps = min(settings.steps, step + int(left / pace))
            print(f"teacher: {1000 * pace:.1f} ms a step, {schedule.steps} steps", flush=True)
        chosen = torch.randint(len(latents), (settings.batch_size,), device=device)
        dropped = torch.rand(settings.batch_size, 1, device=device) < CAPTION_DROPOUT
        captions = torch.where(dropped, empty, tokens[chosen])
        x0 = latents[chosen]
        noise = torch.randn_like(x0)
        # In the network's precision, so that it sees the noise level that there is.
        sigma = (torch.randn(settings.batch_size, device=device) + 0.3).sigmoid().to(fast.dtype).float()
        level = sigma.view(-1, 1, 1, 1)
        x = (1 - level) * x0 + level * noise
        velocity = predict(x.to(fast.dtype), sigma, captions)
        loss = (velocity.float() - (noise - x0)).square().mean()
        loss.backward()
        fast.hand_over_gradients()
        schedule.step(teacher)
        fast.refresh()
        average.update()
        clock.tick(step, loss)
    average.write()
    return teacher.eval().requires_grad_(False), step


class HalfCopy:
    """A bfloat16 copy of a model (float32 on a CPU), which computes; the model keeps the float32 masters."""

    def __init__(self, master: nn.Module) -> None:
        self.model = copy.deepcopy(master)
        on_gpu = next(master.parameters()).device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        for parameter in self.model.parameters():  # buffers hold positions, which bfloat16 would round
            parameter.data = parameter.data.to(self.dtype)
        pairs = zip(master.parameters(), self.model.parameters(), strict=True)
        chosen = [(own, fast) for own, fast in pairs if own.requires_grad]
        self._masters = [own for own, _ in chosen]
        self._copies = [fast for _, fast in chosen]

    def hand_over_gradients(self) -> None:
        """Move the copy's gradients to the masters, in float32."""
        for own, fast in zip(self._masters, self._copies, strict=True):
            assert fast.grad is not None
            own.grad, fast.grad = fast.grad.float(), None

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the copy."""
        torch._foreach_copy_(list(self._copies), list(self._masters))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
