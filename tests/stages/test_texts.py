"""Text embeddings of a stage's prompts: kept or not, those that the family makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rtdmd.errors import UserError
from rtdmd.models import get_family
from rtdmd.models.protocol import ModelFamily
from rtdmd.prompts import PromptSet
from rtdmd.recipe import load_recipe
from rtdmd.stages.assemble import encode_texts
from rtdmd.stages.texts import PromptTexts

# more distinct ones than are encoded at once, and one of them twice
PROMPTS = [f"{number} red circles" for number in range(130)] + ["3 red circles"]
CHOSEN = [130, 3, 129, 0, 3]


@pytest.fixture(scope="module", params=["flux2", "sd3"])
def family(request: Any, tiny_flux2: Path, tiny_sd3: Path) -> ModelFamily:
    folder = {"flux2": tiny_flux2, "sd3": tiny_sd3}[request.param]
    return get_family(request.param).load(
        str(folder), device=torch.device("cpu"), dtype=torch.float32, max_sequence_length=32
    )


def size_gib(family: ModelFamily) -> float:
    """Of one prompt's embeddings."""
    return sum(tensor.nbytes for tensor in family.encode_prompts(["a cat"]).tensors.values()) / 2**30


@pytest.mark.parametrize("kept", [True, False])
def test_embeddings_are_the_familys(family: ModelFamily, kept: bool) -> None:
    """The limit counts distinct prompts: 130 fit where one less would not."""
    batches: list[int] = []
    limit = (130 if kept else 129.5) * size_gib(family)
    texts = PromptTexts(family, PROMPTS, limit, lambda: batches.append(1))
    assert texts.are_kept == kept
    assert len(batches) == (5 if kept else 0)  # of 32
    got = texts(CHOSEN)
    expected = family.encode_prompts([PROMPTS[index] for index in CHOSEN])
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor)


def test_a_kept_embedding_does_not_depend_on_what_it_is_asked_for_with(family: ModelFamily) -> None:
    """Bit for bit: another micro-batch, another rank, a resumed run."""
    first, second = (PromptTexts(family, PROMPTS, 1.0, lambda: None) for _ in range(2))
    whole = first(CHOSEN)
    for row, index in enumerate(CHOSEN):
        alone = second([index])
        for name, tensor in whole.tensors.items():
            assert torch.equal(alone.tensors[name][0], tensor[row])


def test_further_prompts_are_encoded_along(family: ModelFamily) -> None:
    batches: list[int] = []
    texts = PromptTexts(family, PROMPTS[:3], 1.0, lambda: batches.append(1), ["a dog", PROMPTS[0]])
    assert texts.gib == pytest.approx(4 * size_gib(family)) and len(batches) == 1
    expected = family.encode_prompts(["a dog", PROMPTS[0]])
    for name, tensor in texts.of(["a dog", PROMPTS[0]]).tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name])


def test_encoders_that_run_once_need_room_for_all(family: ModelFamily) -> None:
    overrides = ["model.text_encoder=once", "preview.prompts=[a dog]", "model.prompt_embeddings_gib=0.0001"]
    recipe = load_recipe("recipes/dry_run.yaml", overrides)
    prompts = PromptSet.load(recipe.cold_start.prompts)
    count = len(set(prompts.prompts)) + 1
    with pytest.raises(UserError, match=r"take \d+\.\d\d GiB, model\.prompt_embeddings_gib is 0\.0001"):
        encode_texts(recipe, family, prompts, lambda: None)
    recipe = load_recipe("recipes/dry_run.yaml", overrides[:2])
    assert encode_texts(recipe, family, prompts, lambda: None).gib == pytest.approx(count * size_gib(family))
