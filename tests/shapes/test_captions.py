"""The language: words, kinds, metadata there and back, held-out combinations, prompt files."""

import hashlib
import json
from itertools import product

import numpy as np
import pytest

from rtdmd.errors import UserError
from rtdmd.prompts import PromptSet
from rtdmd.recipe.schema import PromptsSection
from rtdmd.shapes.captions import COLORS, KINDS, OPPOSITES, SHAPES, Caption, Group
from rtdmd.shapes.negatives import contradict, hard_negatives
from rtdmd.shapes.prompts import distinct_captions, main, write_prompts
from rtdmd.shapes.splits import PROPORTIONS, counted, draw_caption, pairs, split_of

RED_CIRCLES = Group(2, "red", "circle", "small")
ORANGE_SQUARE = Group(1, "orange", "square")


def captions(split, count, kind=None, seed=0):
    rng = np.random.default_rng(seed)
    return [draw_caption(rng, split, kind) for _ in range(count)]


@pytest.mark.parametrize(
    ("caption", "kind", "text"),
    [
        (Caption((ORANGE_SQUARE,)), "single", "an orange square"),
        (Caption((RED_CIRCLES,)), "count", "two small red circles"),
        (Caption((Group(3, "green", "cross"),)), "count", "three green crosses"),
        (
            Caption((ORANGE_SQUARE, Group(1, "black", "square"))),
            "and",
            "an orange square and a black square",
        ),
        (
            Caption((Group(1, "blue", "cross", "large"), ORANGE_SQUARE), "above"),
            "relation",
            "a large blue cross above an orange square",
        ),
        (
            Caption((RED_CIRCLES, ORANGE_SQUARE), "left of"),
            "mix",
            "two small red circles left of an orange square",
        ),
        (Caption((ORANGE_SQUARE, RED_CIRCLES)), "mix", "an orange square and two small red circles"),
    ],
)
def test_text_and_kind(caption, kind, text):
    assert (caption.kind, caption.text) == (kind, text)


@pytest.mark.parametrize(
    ("groups", "relation"),
    [
        ((), None),
        ((RED_CIRCLES, ORANGE_SQUARE, ORANGE_SQUARE), None),
        ((Group(1, "red", "circle", "small"), Group(1, "red", "circle", "large")), None),
        ((RED_CIRCLES, Group(2, "blue", "circle")), None),
        ((Group(4, "red", "circle"),), None),
        ((ORANGE_SQUARE,), "left of"),
    ],
)
def test_no_such_caption(groups, relation):
    with pytest.raises(ValueError):
        Caption(groups, relation)


def test_metadata_are_those_of_geneval():
    """The object of the relation comes first; who stands there names it by its index."""
    assert Caption((RED_CIRCLES, ORANGE_SQUARE), "left of").metadata == {
        "tag": "mix",
        "include": [
            {"class": "square", "count": 1, "color": "orange"},
            {"class": "circle", "count": 2, "color": "red", "size": "small", "position": ["left of", 0]},
        ],
        "prompt": "two small red circles left of an orange square",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_there_and_back(kind):
    for caption in captions("all", 200, kind):
        assert caption.kind == kind
        assert Caption.from_metadata(json.loads(json.dumps(caption.metadata))) == caption
        assert len(caption.text.split()) <= 12


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "prompt 'a': shapes needs the metadata 'include'"),
        ({"include": []}, "not a list of one or two clauses"),
        ({"include": "circle"}, "not a list"),
        ({"include": ["circle"]}, "include.0 is str"),
        ({"include": [{"count": 1, "color": "red"}]}, "include.0: 'class' is None"),
        ({"include": [{"class": "circel", "count": 1, "color": "red"}]}, "did you mean 'circle'"),
        ({"include": [{"class": "circle", "count": 1, "color": "pink"}]}, "'color' is 'pink'; known: black"),
        ({"include": [{"class": "circle", "count": True, "color": "red"}]}, "'count' is True"),
        ({"include": [{"class": "circle", "count": 4, "color": "red"}]}, "from 1 to 3"),
        ({"include": [{"class": "circle", "count": 1, "color": "red", "size": "tiny"}]}, "'size' is 'tiny'"),
        ({"include": [{"class": "circle", "count": 2, "color": "red"}] * 2}, "unlike in colour or shape"),
        (
            {"include": [{"class": "circle", "count": 1, "color": "red", "position": ["above", 0]}]},
            "only the second clause",
        ),
        (
            {
                "include": [
                    {"class": "circle", "count": 1, "color": "red"},
                    {"class": "circle", "count": 1, "color": "blue", "position": ["beside", 0]},
                ]
            },
            "one of left of",
        ),
    ],
)
def test_metadata_that_are_not_understood(row, message):
    with pytest.raises(UserError, match=message):
        Caption.from_metadata({**row, "prompt": "a"})


def test_splits_share_no_combination():
    for part, whole in ((pairs, 32 * 31 // 2), (counted, 64)):
        splits = [set(part(split)) for split in ("train", "validation", "test")]
        assert sum(map(len, splits)) == len(set.union(*splits)) == len(part("all")) == whole
        assert [len(split) for split in splits[1:]] == [round(0.05 * whole), round(0.1 * whole)]


def test_held_out_combinations_never_change():
    """A model trained with one split is evaluated with it years later, on any machine."""
    digest = hashlib.sha256(repr((pairs("test"), counted("test"), pairs("validation"))).encode()).hexdigest()
    assert digest[:16] == "fa8fe9af145b33f5"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_keep_to_their_split(split, kind):
    for caption in captions(split, 300, kind):
        assert split_of(caption) == ("all" if kind == "single" else split)
        # Neither the order of the groups nor the relation moves a pair to another split.
        if len(caption.groups) == 2:
            turned = Caption(caption.groups[::-1], caption.relation and OPPOSITES[caption.relation])
            assert split_of(turned) == split


def test_train_counts_nothing_that_is_held_out():
    held_out = {*counted("validation"), *counted("test")}
    for caption in captions("train", 1000, "mix"):
        assert not held_out & {(group.combination, group.count) for group in caption.groups}


def test_a_count_of_one_split_beside_a_pair_of_another_is_of_none():
    combination, count = next(item for item in counted("validation") if item[1] == 2)
    other = next(
        first if second == combination else second
        for first, second in pairs("test")
        if combination in (first, second)
    )
    assert split_of(Caption((Group(count, *combination), Group(1, *other)))) is None


def test_kinds_come_in_their_proportions():
    """2000 draws: a share p has a standard deviation of at most 0.011."""
    kinds = [caption.kind for caption in captions("train", 2000)]
    for kind, share in PROPORTIONS.items():
        assert kinds.count(kind) / 2000 == pytest.approx(share, abs=0.04)
    rng = np.random.default_rng(0)
    some = {draw_caption(rng, proportions={"count": 3, "and": 1}).kind for _ in range(50)}
    assert some == {"count", "and"}
    with pytest.raises(ValueError, match="kind must be one of"):
        draw_caption(rng, kind="counts")


def test_every_color_and_shape_is_seen_in_training():
    seen = {group.combination for caption in captions("train", 2000) for group in caption.groups}
    assert seen == set(product(COLORS, SHAPES))


def test_contradictions_by_hand():
    circle, square = Group(1, "red", "circle"), Group(1, "blue", "square", "small")
    left = Caption((circle, square), "left of")
    true = [
        Caption((square, circle), "right of"),
        Caption((circle, square)),
        Caption((circle, Group(1, "blue", "square")), "left of"),
        Caption((Group(1, "red", "circle", "large"), square), "left of"),  # not false: it isn't known
    ]
    false = [
        Caption((square, circle), "left of"),
        Caption((circle, square), "below"),
        Caption((circle, Group(1, "blue", "square", "large")), "left of"),
        Caption((Group(1, "blue", "circle"), Group(1, "red", "square", "small")), "left of"),
        Caption((circle,)),
        Caption((Group(2, "red", "circle"), square), "left of"),
    ]
    assert not any(contradict(left, other) for other in true)
    assert all(contradict(left, other) for other in false)
    assert not contradict(Caption((circle, square)), left)


@pytest.mark.parametrize("kind", KINDS)
def test_hard_negatives_are_distinct_and_repeatable(kind):
    for number, caption in enumerate(captions("all", 100, kind)):
        negatives = hard_negatives(np.random.default_rng(number), caption)
        assert negatives == hard_negatives(np.random.default_rng(number), caption)
        assert len({negative.text for negative in negatives}) == 8
        assert caption not in negatives


def test_hard_negatives_of_a_relation_take_turns():
    """Colour, shape, count, size, relation and binding: each once in the first six."""
    caption = Caption((Group(1, "red", "circle", "small"), Group(1, "blue", "square")), "above")
    first = hard_negatives(np.random.default_rng(0), caption, 6)
    assert sum(negative.relation != "above" for negative in first) == 1
    assert sum(sum(group.count for group in negative.groups) == 3 for negative in first) == 1
    assert sum(negative.groups[0].size == "large" for negative in first) == 1
    swapped = Caption((Group(1, "blue", "circle", "small"), Group(1, "red", "square")), "above")
    assert swapped in first


def test_too_many_hard_negatives():
    """An object of no named size: 7 colours, 3 shapes, 2 counts."""
    caption = Caption((ORANGE_SQUARE,))
    assert len(hard_negatives(np.random.default_rng(0), caption, 12)) == 12
    with pytest.raises(ValueError, match="fewer than 13"):
        hard_negatives(np.random.default_rng(0), caption, 13)


def test_prompt_files_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, "test", 200, seed=3)
    prompts = PromptSet.load(PromptsSection(source=str(path)))
    assert len(set(prompts.prompts)) == 200
    for prompt, row in zip(prompts.prompts, prompts.metadata, strict=True):
        caption = Caption.from_metadata(row)
        assert caption.text == prompt and split_of(caption) in ("test", "all")
    assert distinct_captions("test", 200, 3) == [Caption.from_metadata(row) for row in prompts.metadata]
    assert distinct_captions("test", 200, 4) != distinct_captions("test", 200, 3)


def test_prompts_as_a_command(capsys):
    assert main(["--split", "validation", "--count", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [
        caption.text for caption in distinct_captions("validation", 5, 0)
    ]
    assert main(["--split", "test", "--count", "0"]) == 2
    assert main(["--split", "test", "--count", "1", "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "--count 0: write at least 1\n--seed -1: write 0 or more\n"


def test_a_split_without_that_many_captions():
    """One object: 32 combinations, each small, large or of no named size."""
    with pytest.raises(UserError, match="has but 96 distinct captions, 97 were asked for"):
        distinct_captions("train", 97, 0, {"single": 1.0})
