"""GenEval's rules on detections made by hand; the arithmetic is in the tests' comments."""

import pytest

from rtdmd.errors import UserError
from rtdmd.rewards.geneval_rules import (
    CLASSES,
    Clause,
    Found,
    Request,
    benchmark_score,
    most_confident,
    partial_score,
    relations,
)


def at(x, y, size=10, color=None):
    """A square around a centre."""
    half = size / 2
    return Found((x - half, y - half, x + half, y + half), 0.99, color)


def request(tag, *include, exclude=()):
    return Request.parse("a prompt", {"tag": tag, "include": list(include), "exclude": list(exclude)})


def a(name, count=1, **more):
    return {"class": name, "count": count, **more}


def scores(asked, objects):
    return benchmark_score(asked, objects), partial_score(asked, objects)


def test_single_object():
    asked = request("single_object", a("dog"))
    assert scores(asked, {"dog": [at(0, 0)]}) == (1, 1)
    assert scores(asked, {}) == scores(asked, {"cat": [at(0, 0)]}) == (0, 0)
    # A second dog doesn't matter to the benchmark; the partial credit is 1 − |1 − 2|/1.
    assert scores(asked, {"dog": [at(0, 0), at(50, 0)]}) == (1, 0)
    # 1 − |1 − 4|/1, as published.
    assert scores(asked, {"dog": [at(x, 0) for x in range(4)]}) == (1, -2)


def test_two_objects():
    asked = request("two_object", a("dog"), a("tie"))
    both = {"dog": [at(0, 0)], "tie": [at(50, 0)]}
    assert scores(asked, both) == (1, 1)
    assert scores(asked, {"dog": both["dog"]}) == (0, 0.5)
    # (1 − 1 + 1) / 2 with two dogs.
    assert scores(asked, {**both, "dog": [at(0, 0), at(9, 9)]}) == (1, 0.5)


def test_counting_is_exact_through_what_is_excluded():
    asked = request("counting", a("cup", 3), exclude=[a("cup", 4)])
    expected = {0: (0, 0), 1: (0, 1 / 3), 2: (0, 2 / 3), 3: (1, 1), 4: (0, 2 / 3), 6: (0, 0), 9: (0, -1)}
    for number, pair in expected.items():
        assert scores(asked, {"cup": [at(30 * x, 0) for x in range(number)]}) == pytest.approx(pair)
    assert asked.min_confidence == 0.9
    assert request("colors", a("cup", color="red")).min_confidence == 0.3


def test_what_is_excluded_must_be_absent():
    asked = request("single_object", a("dog"), exclude=[a("cat")])
    assert scores(asked, {"dog": [at(0, 0)]}) == (1, 1)
    # Partial credit doesn't look at it.
    assert scores(asked, {"dog": [at(0, 0)], "cat": [at(50, 0)]}) == (0, 1)


def test_colors():
    asked = request("colors", a("car", color="red"))
    assert asked.colored == {"car": 1}
    assert scores(asked, {"car": [at(0, 0, color="red")]}) == (1, 1)
    assert scores(asked, {"car": [at(0, 0, color="pink")]}) == (0, 0.5)  # (1 + 0) / 2
    assert scores(asked, {}) == (0, 0)
    # The benchmark looks at the surest car alone; partial credit is (0 + 0) / 2 for a second one.
    assert scores(asked, {"car": [at(0, 0, color="red"), at(50, 0)]}) == (1, 0)
    assert scores(asked, {"car": [at(0, 0, color="pink"), at(50, 0, color="red")]}) == (0, 0)


def test_several_objects_of_a_color():
    asked = request("colors", a("car", 2, color="red"))
    assert asked.colored == {"car": 2}
    assert scores(asked, {"car": [at(0, 0, color="red"), at(50, 0, color="red")]}) == (1, 1)
    assert scores(asked, {"car": [at(0, 0, color="red"), at(50, 0, color="blue")]}) == (0, 0.75)


def test_color_attribution():
    asked = request("color_attr", a("car", color="red"), a("cup", color="blue"))
    red, blue = at(0, 0, color="red"), at(50, 0, color="blue")
    assert scores(asked, {"car": [red], "cup": [blue]}) == (1, 1)
    assert scores(asked, {"car": [blue], "cup": [red]}) == (0, 0.5)  # (1 + 0 + 1 + 0) / 4
    assert scores(asked, {"car": [red], "cup": [red]}) == (0, 0.75)
    assert scores(asked, {"car": [red]}) == (0, 0.5)  # (1 + 1 + 0 + 0) / 4


def test_position():
    asked = request("position", a("bench"), a("dog", position=["left of", 0]))
    bench = [at(100, 100)]
    assert scores(asked, {"bench": bench, "dog": [at(50, 100)]}) == (1, 1)
    # As published a wrong place counts as 0 and 1: (1 + 1 + 0 + 1) / 4.
    assert scores(asked, {"bench": bench, "dog": [at(150, 100)]}) == (0, 0.75)
    # No dog: (1 + 0 + 0) / 3. No bench: the dog has nothing to be left of, (0 + 1 + 0) / 3.
    assert scores(asked, {"bench": bench}) == pytest.approx((0, 1 / 3))
    assert scores(asked, {"dog": [at(50, 100)]}) == pytest.approx((0, 1 / 3))
    # Two benches: the benchmark takes the surest; with partial credit the bench is not there as asked for.
    two = {"bench": [at(100, 100), at(0, 100)], "dog": [at(50, 100)]}
    assert scores(asked, two) == pytest.approx((1, 1 / 3))


def test_every_object_stands_to_every_target():
    asked = request("position", a("bench", 2), a("dog", 2, position=["above", 0]))
    benches = [at(0, 100), at(40, 100)]
    assert scores(asked, {"bench": benches, "dog": [at(0, 0), at(40, 0)]}) == (1, 1)
    # The second dog is left of the second bench rather than above it.
    assert scores(asked, {"bench": benches, "dog": [at(0, 0), at(-400, 90)]}) == (0, 0.75)


def test_a_position_is_not_looked_at_where_the_color_is_wrong():
    asked = request("position", a("bench"), a("dog", color="red", position=["left of", 0]))
    found = {"bench": [at(100, 100)], "dog": [at(50, 100, color="pink")]}
    assert scores(asked, found) == pytest.approx((0, 2 / 3))  # (1 + 1 + 0) / 3


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (50, 50, {"right of", "below"}),  # 48/70.7 = 0.68 on both axes
        (-50, -50, {"left of", "above"}),
        (0, 0, set()),
        (1.9, 0, set()),  # within the margin of 0.1·(10 + 10) = 2
        (3.9, 0, set()),  # 1.9/3.9 = 0.49
        (4.1, 0, {"right of"}),  # 2.1/4.1 = 0.51
        (50, 25, {"right of"}),  # 23/55.9 = 0.41 down
        (50, 40, {"right of", "below"}),  # 38/64.0 = 0.59 down
    ],
)
def test_relations(x, y, expected):
    assert relations(at(x, y).box, at(0, 0).box) == expected


def test_the_margin_grows_with_the_objects():
    """0.1·(100 + 10) = 11: an offset of 21 leaves 10/21 = 0.48, one of 23 leaves 12/23 = 0.52."""
    assert relations(at(21, 0, 100).box, at(0, 0).box) == set()
    assert relations(at(23, 0, 100).box, at(0, 0).box) == {"right of"}


def test_the_surest_count_and_at_most_sixteen_of_a_class():
    assert most_confident([0.2, 0.9, 0.3, 0.31, 0.95], 0.3) == [4, 1, 3]
    assert most_confident([], 0.3) == []
    many = [0.5 + index / 100 for index in range(20)]
    assert most_confident(many, 0.3) == list(range(19, 3, -1))


def test_a_row_of_the_benchmark():
    row = {
        "tag": "position",
        "include": [
            {"class": "teddy bear", "count": 1},
            {"class": "dog", "count": 1, "position": ["right of", 0]},
        ],
    }
    assert Request.parse("a photo of a dog right of a teddy bear", row) == Request(
        "position", (Clause("teddy bear", 1), Clause("dog", 1, relation="right of", target=0))
    )
    assert len(set(CLASSES)) == 80


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({}, ["'tag'"]),
        ({"tag": "counting"}, ["'include'"]),
        ({"tag": "count", "include": [a("dog")]}, ["'count'", "counting"]),
        ({"tag": "colors", "include": []}, ["'include' is empty"]),
        ({"tag": "colors", "include": "dog"}, ["'include' is str"]),
        ({"tag": "colors", "include": ["dog"]}, ["include.0 is str"]),
        ({"tag": "colors", "include": [{"count": 1}]}, ["include.0", "'class'"]),
        ({"tag": "colors", "include": [{"class": "dog"}]}, ["include.0", "'count'"]),
        ({"tag": "colors", "include": [a("dogg")]}, ["'dogg'", "did you mean 'dog'?"]),
        ({"tag": "colors", "include": [a("dog", 0)]}, ["'count' is 0"]),
        ({"tag": "colors", "include": [a("dog", True)]}, ["'count' is True"]),
        ({"tag": "colors", "include": [a("dog", color="rod")]}, ["'rod'", "did you mean 'red'?"]),
        ({"tag": "position", "include": [a("dog", position=["above", 0])]}, ["include.0", "earlier clause"]),
        ({"tag": "position", "include": [a("dog"), a("cat", position=["near", 0])]}, ["include.1", "near"]),
        ({"tag": "position", "include": [a("dog"), a("cat", position="above")]}, ["include.1", "'above'"]),
        ({"tag": "counting", "include": [a("dog")], "exclude": [{"class": "dog"}]}, ["exclude.0"]),
    ],
)
def test_what_is_wrong_with_metadata_names_prompt_and_key(row, fragments):
    with pytest.raises(UserError) as error:
        Request.parse("a photo", row)
    for fragment in ["'a photo'", *fragments]:
        assert fragment in str(error.value)
