"""Sets in the styles of the benchmarks, and which rewards score them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rtdmd.errors import UserError
from rtdmd.evaluation.sets import EvaluationSet, load_set, match_rewards
from rtdmd.recipe.schema import EvaluationSetSection, PromptsSection, RewardSection

GENEVAL = [
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
]
GENEVAL2 = [
    {"prompt": "two cats", "atom_count": 2, "vqa_list": [["How many cats?", "two"]], "skills": ["count"]},
    {"prompt": "a red cat", "atom_count": 3, "vqa_list": [["Is it red?", "Yes"]], "skills": ["attribute"]},
]


def load(path: Path, content: str, images: int | None = None, **options: object) -> EvaluationSet:
    path.write_text(content, encoding="utf-8")
    section = EvaluationSetSection(path.stem, PromptsSection(str(path)), **options)  # type: ignore[arg-type]
    return load_set(section, images)


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "prompts", "categories", "images", "style"),
    [
        ("drawbench.csv", 'Prompts,Category\n"A red car, parked.",Colors\nB,Text\n',
         ["A red car, parked.", "B"], ["Colors", "Text"], 1, "plain"),
        ("drawbench.tsv", "Prompts\tCategory\nA, b\tColors\n", ["A, b"], ["Colors"], 1, "plain"),
        ("parti.tsv", "Prompt\tCategory\tChallenge\tNote\nA\tArts\tBasic\t\n", ["A"], ["Arts"], 1, "plain"),
        ("pickscore.txt", "a cat\n\na dog\n", ["a cat", "a dog"], None, 1, "plain"),
        ("hpsv3.json", json.dumps([{"caption": c, "category": c.upper()} for c in "ab"]),
         ["a", "b"], ["A", "B"], 1, "plain"),
        ("hpsv3.jsonl", lines([{"prompt": "a", "tag": "Arts"}]), ["a"], ["Arts"], 1, "plain"),
        ("anime.json", json.dumps(["a", "b"]), ["a", "b"], None, 1, "plain"),
        ("geneval.jsonl", lines(GENEVAL), ["a photo of two cups", "a photo of a dog"],
         ["counting", "single_object"], 4, "geneval"),
        ("shapes.jsonl", lines([{"tag": "one", "include": [], "prompt": "a"}]), ["a"], ["one"], 1, "plain"),
        ("geneval2.jsonl", lines(GENEVAL2), ["two cats", "a red cat"], ["2 atoms", "3 atoms"], 1, "geneval2"),
        ("ocr.txt", 'a sign "OPEN"\n', ['a sign "OPEN"'], None, 1, "plain"),
    ],
)  # fmt: skip
def test_styles(
    tmp_path: Path,
    name: str,
    content: str,
    prompts: list[str],
    categories: list[str] | None,
    images: int,
    style: str,
) -> None:
    found = load(tmp_path / name, content)
    assert found.prompts.prompts == prompts
    assert found.categories == categories
    assert found.images_per_prompt == images
    assert found.num_pictures == images * len(prompts)
    assert found.style == style


def test_only_geneval_is_a_mean_over_tasks(tmp_path: Path) -> None:
    geneval = load(tmp_path / "a.jsonl", lines(GENEVAL))
    assert geneval.strata("geneval") == ["counting", "single_object"]
    assert geneval.strata("clipscore") is None
    assert load(tmp_path / "b.csv", "Prompts,Category\na,x\n").strata("geneval") is None


def test_the_number_of_pictures_that_is_asked_for(tmp_path: Path) -> None:
    assert load(tmp_path / "a.jsonl", lines(GENEVAL), images=2).images_per_prompt == 2
    assert (
        load(tmp_path / "a.jsonl", lines(GENEVAL), images=2, num_images_per_prompt=3).images_per_prompt == 3
    )


def test_a_column_for_the_categories(tmp_path: Path) -> None:
    content = "prompt,category,challenge\na,x,hard\nb,y,easy\n"
    assert load(tmp_path / "a.csv", content, category="challenge").categories == ["hard", "easy"]
    with pytest.raises(UserError, match="prompt 1 has no category 'chalenge'; did you mean 'challenge'"):
        load(tmp_path / "a.csv", content, category="chalenge")


def test_categories_that_some_prompts_lack_are_none(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "tag": "x"}, {"prompt": "b"}]
    assert load(tmp_path / "a.jsonl", lines(rows)).categories is None  # type: ignore[arg-type]


def test_digest_tells_prompts_and_metadata_apart(tmp_path: Path) -> None:
    first = load(tmp_path / "a.jsonl", lines(GENEVAL))
    assert first.digest() == load(tmp_path / "b.jsonl", lines(GENEVAL)).digest()
    assert first.digest() != load(tmp_path / "b.jsonl", lines(GENEVAL[::-1])).digest()
    changed = [{**GENEVAL[0], "include": [{"class": "cup", "count": 3}]}, GENEVAL[1]]
    assert first.digest() != load(tmp_path / "b.jsonl", lines(changed)).digest()


def test_rewards_score_the_sets_whose_every_prompt_they_accept(tmp_path: Path) -> None:
    sets = [
        load(tmp_path / "geneval.jsonl", lines(GENEVAL)),
        load(tmp_path / "ocr.txt", 'a sign "OPEN"\n'),
        load(tmp_path / "mixed.txt", 'a sign "OPEN"\na cat\n'),
    ]
    rewards = [RewardSection("geneval"), RewardSection("ocr"), RewardSection("compressibility")]
    scoring = match_rewards(sets, rewards)
    assert {name: [reward.name for reward in found] for name, found in scoring.rewards.items()} == {
        "geneval": ["geneval", "compressibility"],
        "ocr": ["ocr", "compressibility"],
        "mixed": ["compressibility"],
    }
    assert len(scoring.notices) == 4
    assert "ocr doesn't score mixed: it refuses 1 of 2 prompts: prompt 'a cat'" in scoring.notices[3]
    with pytest.raises(UserError, match="reward 'geneval' can score none of the sets: it refuses 1 of 1"):
        match_rewards(sets[1:], rewards)
