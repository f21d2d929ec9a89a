"""The judge of the small world as a reward."""

import pytest
import torch

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import REWARDS, load_rewards
from rtdmd.shapes.captions import Caption, Group
from rtdmd.shapes.drawing import render
from rtdmd.shapes.scenes import Scene, Thing

CIRCLE = Thing("circle", "red", "small", 15.0, 30.0, 12.0)
SQUARE = Thing("square", "blue", "large", 45.0, 32.0, 20.0)


def images(*scenes):
    pictures = [torch.from_numpy(render(Scene("sky", things))) for things in scenes]
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 255


def score(mode, batch, *captions):
    (reward,) = load_rewards([RewardSection("shapes", mode=mode)], torch.device("cpu"), torch.float32)
    rows = [caption.metadata for caption in captions]
    return reward.score(batch, [row["prompt"] for row in rows], rows)


def test_verdict_and_partial_credit():
    """Five parts: the second's size is wrong, the third's size and relation, and all of the last one's."""
    circle, blue = Group(1, "red", "circle", "small"), Group(1, "blue", "square")
    large = Group(1, "red", "circle", "large")
    captions = [
        Caption((circle, blue), "left of"),
        Caption((large, blue), "left of"),
        Caption((large, blue), "above"),
        Caption((circle, blue), "left of"),
    ]
    batch = images(*[(CIRCLE, SQUARE)] * 3, ())
    assert score("default", batch, *captions).tolist() == [1, 0, 0, 0]
    assert score("official", batch, *captions).tolist() == pytest.approx([1, 4 / 5, 3 / 5, 0])
    assert score("default", batch, *captions).dtype == torch.float32


def test_a_blurred_and_tinted_picture_is_still_right():
    batch = torch.nn.functional.avg_pool2d(images((CIRCLE,)), 3, stride=1, padding=1, count_include_pad=False)
    caption = Caption((Group(1, "red", "circle"),))
    assert score("default", batch * 0.97, caption).tolist() == [1]


def test_pictures_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"pictures of 64×64 pixels, got 32×64; set model.height"):
        score("default", torch.zeros(1, 3, 32, 64), Caption((Group(1, "red", "circle"),)))


def test_prompts_without_this_metadata_are_refused():
    check = REWARDS["shapes"].check_prompt
    check("a red circle", Caption((Group(1, "red", "circle"),)).metadata)
    with pytest.raises(UserError, match="prompt 'a dog': shapes needs the metadata 'include'"):
        check("a dog", {})
    with pytest.raises(UserError, match=r"prompt 'a dog': include\.0: 'class' is 'dog'"):
        check("a dog", {"tag": "single_object", "include": [{"class": "dog", "count": 1}]})
