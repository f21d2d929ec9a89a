"""FLUX.2-klein against the stock Flux2KleinPipeline on the same tiny weights."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig
from torch.testing import assert_close
from worlds import PROMPTS, STEPS, UNSHIFTED, World

from rtdmd.errors import UserError
from rtdmd.models.flux2 import Flux2Family, text_layers

LAYERS = text_layers(4)


@pytest.fixture(scope="module")
def pipeline(flux2: World) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(flux2.folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_text_layers_are_the_published_ones_at_36_layers() -> None:
    assert text_layers(36) == (9, 18, 27)
    assert LAYERS == (1, 2, 3)


def test_embeddings_equal_the_pipelines(flux2: World, pipeline: Flux2KleinPipeline) -> None:
    expected, _ = pipeline.encode_prompt(
        prompt=PROMPTS, max_sequence_length=32, text_encoder_out_layers=LAYERS
    )
    embeddings = flux2.family.encode_prompts(PROMPTS).tensors["prompt_embeds"]
    assert embeddings.shape == (len(PROMPTS), 32, 3 * 32)
    assert_close(embeddings, expected)


def test_tokenizer_without_chat_template(flux2: World, tmp_path: Path) -> None:
    spoilt = shutil.copytree(flux2.folder, tmp_path / "pipeline")
    (spoilt / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        Flux2Family.load(str(spoilt), device=torch.device("cpu"), dtype=torch.float32)


def test_default_length_is_512_tokens(flux2: World) -> None:
    family = Flux2Family.load(str(flux2.folder), device=torch.device("cpu"), dtype=torch.float32)
    assert family.encode_prompts(["a dog"]).tensors["prompt_embeds"].shape == (1, 512, 96)


def test_text_encoder_ends_at_the_last_needed_layer(flux2: World) -> None:
    names = {name.split(".")[0] for name, _ in flux2.family.text_encoder.named_parameters()}
    assert len(flux2.family.text_encoder.layers) == LAYERS[-1]
    assert names == {"embed_tokens", "layers"}


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_four_steps_equal_the_pipelines(
    flux2: World, pipeline: Flux2KleinPipeline, guidance_scale: float
) -> None:
    arguments = {
        "prompt": PROMPTS,
        "height": 64,
        "width": 96,
        "num_inference_steps": 4,
        "sigmas": UNSHIFTED,
        "guidance_scale": guidance_scale,
        "latents": flux2.latents(len(PROMPTS), 64, 96),
        "max_sequence_length": 32,
        "text_encoder_out_layers": LAYERS,
    }
    latents = flux2.sample(PROMPTS, guidance_scale, 64, 96)
    # The pipeline hands out what its decoder takes: bring it back to the transformer's latents.
    statistics = pipeline.vae.bn
    expected = pipeline._patchify_latents(pipeline(**arguments, output_type="latent").images)
    expected = (expected - statistics.running_mean.view(1, -1, 1, 1)) / torch.sqrt(
        statistics.running_var.view(1, -1, 1, 1) + pipeline.vae.config.batch_norm_eps
    )
    assert_close(latents, expected, atol=2e-5, rtol=2e-5)
    images = pipeline(**arguments, output_type="pt").images
    assert_close(flux2.family.decode(latents), images, atol=2e-5, rtol=2e-5)


def full_size_family(schedule_shift: float | None = None) -> Flux2Family:
    """With klein's own VAE configuration, without weights or text encoder."""
    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
    return Flux2Family(None, None, text_layers(36), vae, 512, schedule_shift)  # type: ignore[arg-type]


def test_full_size_latents_and_sigmas() -> None:
    family = full_size_family()
    assert family.latent_shape(512, 768) == (128, 32, 48)
    assert family.sigmas(STEPS, 512, 512) == pytest.approx([1, 0.9581, 0.8840, 0.7175], abs=5e-5)
    assert family.sigmas(STEPS, 1024, 1024) == pytest.approx([1, 0.9674, 0.9081, 0.7672], abs=5e-5)


def test_explicit_shift_replaces_the_empirical_one() -> None:
    family = full_size_family(schedule_shift=3.0)
    assert family.sigmas(STEPS, 512, 512) == pytest.approx([1, 0.9, 0.75, 0.5])


@pytest.mark.parametrize(
    ("double", "single", "heads", "text_width", "count"),
    [(5, 20, 24, 7680, 160), (8, 24, 32, 12288, 224)],
    ids=["klein-4B", "klein-9B"],
)
def test_lora_tensors_of_full_size_models(
    double: int, single: int, heads: int, text_width: int, count: int
) -> None:
    with torch.device("meta"):
        network = Flux2Transformer2DModel(
            in_channels=128,
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            attention_head_dim=128,
            joint_attention_dim=text_width,
            guidance_embeds=False,
        )
        network.add_adapter(LoraConfig(r=2, target_modules=list(Flux2Family.lora_targets)))
    adapted = [name for name, _ in network.named_parameters() if "lora_" in name]
    assert len(adapted) == count
    assert sum("single_transformer_blocks" in name and "to_out" in name for name in adapted) == 2 * single


def test_bfloat16_has_the_pipelines_times(flux2: World) -> None:
    """What reaches the network's embedding of time; rounding sigma itself would make other numbers of it."""
    pipeline = Flux2KleinPipeline.from_pretrained(flux2.folder, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    network = pipeline.transformer
    seen: list[float] = []
    network.time_guidance_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].item()))
    pipeline(
        prompt="a dog", height=512, width=512, sigmas=UNSHIFTED, num_inference_steps=4, guidance_scale=1.0,
        max_sequence_length=32, text_encoder_out_layers=LAYERS, output_type="latent",
    )  # fmt: skip
    theirs = list(seen)
    family = Flux2Family.load(
        str(flux2.folder), device=torch.device("cpu"), dtype=torch.bfloat16, max_sequence_length=32
    )
    text, x = family.encode_prompts(["a dog"]), torch.randn(1, *family.latent_shape(512, 512))
    sigmas = family.sigmas(STEPS, 512, 512)
    for sigma in sigmas:
        family.predict_velocity(network, x, sigma, text)
    assert seen[4:] == theirs == [1000, 968, 908, 768]
    rounded = [(torch.tensor(sigma).bfloat16() * 1000).item() for sigma in sigmas]
    assert rounded == [1000, 968, 908, 764]
