"""Prompt files with their faults, and the samplers' promises."""

import json
from collections import Counter

import datasets
import pytest

from rtdmd.errors import UserError
from rtdmd.prompts import GroupSampler, PromptSet, ShuffledPrompts, check_prompts
from rtdmd.recipe.schema import PromptsSection

GENEVAL_ROWS = [
    {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "tie", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a dog right of a tie",
    },
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
        "prompt": "two cups",
    },
]


def _write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def _write_jsonl(path, rows):
    return _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _load(source, **options):
    return PromptSet.load(PromptsSection(source=source, **options))


def test_text_file_skips_blank_lines_and_has_no_metadata(tmp_path):
    source = _write(tmp_path / "a.txt", "\ufeffa cat\r\n\n  zwei Vögel \n\u2028 \nend")
    prompts = _load(source)
    assert prompts.prompts == ["a cat", "zwei Vögel", "end"]
    assert prompts.metadata == [{}, {}, {}]
    assert len(prompts) == 3


def test_a_separator_inside_a_line_does_not_split_the_prompt(tmp_path):
    assert _load(_write(tmp_path / "a.txt", "one\u2028line\n")).prompts == ["one\u2028line"]


def test_json_is_one_list_of_prompts_or_objects(tmp_path):
    prompts = _load(_write(tmp_path / "a.json", '["one", {"text": "two", "tag": 3}]'))
    assert prompts.prompts == ["one", "two"]
    assert prompts.metadata == [{}, {"tag": 3}]


def test_tables_with_tabs_and_with_capitals(tmp_path):
    prompts = _load(_write(tmp_path / "a.tsv", 'Prompts\tCategory\na "b", c\tColors\n'))
    assert prompts.prompts == ['a "b", c']
    assert prompts.metadata == [{"Category": "Colors"}]


def test_json_in_a_folder_describes_the_other_files(tmp_path):
    _write(tmp_path / "info.json", '{"licence": "none"}')
    _write(tmp_path / "a.txt", "one\n")
    assert _load(str(tmp_path)).prompts == ["one"]


def test_geneval_metadata_stays_as_written(tmp_path):
    """Keys absent in one row stay absent, lists may mix strings and numbers."""
    prompts = _load(_write_jsonl(tmp_path / "geneval.jsonl", GENEVAL_ROWS))
    assert prompts.prompts == ["a dog right of a tie", "two cups"]
    expected = [{key: value for key, value in row.items() if key != "prompt"} for row in GENEVAL_ROWS]
    assert prompts.metadata == expected


def test_parquet_has_no_filled_in_keys(tmp_path):
    rows = [
        {"prompt": "a", "tag": "x", "include": [{"class": "dog", "color": "red"}]},
        {"prompt": "b", "tag": None, "include": [{"class": "cat", "color": None}]},
    ]
    source = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).to_parquet(source)
    prompts = _load(source)
    assert prompts.prompts == ["a", "b"]
    assert prompts.metadata == [
        {"tag": "x", "include": [{"class": "dog", "color": "red"}]},
        {"include": [{"class": "cat"}]},
    ]


def test_csv_values_stay_text(tmp_path):
    source = _write(tmp_path / "a.csv", 'id,caption\n1,NA\n2,1984\n3,"red, ""big""\nhat"\n')
    prompts = _load(source)
    assert prompts.prompts == ["NA", "1984", 'red, "big"\nhat']
    assert prompts.metadata == [{"id": "1"}, {"id": "2"}, {"id": "3"}]


def test_folder_is_read_in_the_order_of_names(tmp_path):
    _write(tmp_path / "b.txt", "third\n")
    _write_jsonl(tmp_path / "a.jsonl", [{"text": "first"}, {"text": "second", "n": 2}])
    _write(tmp_path / "README.md", "not a prompt")
    _write(tmp_path / ".hidden.txt", "not a prompt")
    prompts = _load(str(tmp_path))
    assert prompts.prompts == ["first", "second", "third"]
    assert prompts.metadata == [{}, {"n": 2}, {}]
    assert _load(str(tmp_path), limit=2).prompts == ["first", "second"]


def test_column_is_the_named_one_or_the_first_known(tmp_path):
    source = _write_jsonl(tmp_path / "a.jsonl", [{"caption": "c", "text": "t", "Prompt": "p"}])
    assert _load(source).prompts == ["t"]
    assert _load(source, column="Prompt").prompts == ["p"]


@pytest.mark.parametrize(
    ("name", "content", "options", "fragments"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', {}, ["a.jsonl: line 2", "not JSON"]),
        ("a.jsonl", '{"prompt": "a"}\n\n["b"]\n', {}, ["line 3", "JSON object", "list"]),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', {}, ["line 2", "'prompt' is blank"]),
        ("a.jsonl", '{"prompt": "a"}\n{"tag": "b"}\n', {}, ["line 2", "no value for 'prompt'"]),
        ("a.jsonl", '{"prompt": 7}\n', {}, ["line 1", "int", "not text"]),
        (
            "a.jsonl",
            '{"promt": "a", "tag": "b"}\n',
            {},
            ["prompt, text or caption", "promt, tag", "`column`"],
        ),
        (
            "a.jsonl",
            '{"prompt": "a"}\n',
            {"column": "promt"},
            ["'promt'", "did you mean 'prompt'", "columns: "],
        ),
        ("a.jsonl", '{"prompt": "a"}\n', {"column": "xyz"}, ["'xyz'", "known: prompt"]),
        ("a.jsonl", "", {}, ["no prompts in it"]),
        ("a.txt", "\n \n", {}, ["no prompts in it"]),
        ("a.txt", "a\n", {"column": "prompt"}, ["'prompt'", "known: text"]),
        ("a.txt", "a\n", {"limit": 0}, ["limit", "at least 1"]),
        ("a.csv", "prompt,id\na\n", {}, ["row 1 (line 2)", "2 columns"]),
        ("a.csv", "prompt,id\na,1,2\n", {}, ["row 1 (line 2)", "2 columns"]),
        ("a.csv", "prompt\n' '\n \n", {}, ["row 2 (line 3)", "blank"]),
        ("a.csv", 'prompt,id\n"a red circle,1\na blue square,2\n', {}, ["line 2 opens a quote"]),
        ("a.jsonl", '{"prompt": "half \\ud800"}\n', {}, ["line 1", "half of a character"]),
        ("a.jsonl", '{"prompt": "a", "id": ' + "1" * 5000 + "}\n", {}, ["line 1", "not a row of prompts"]),
        ("a.json", "[" * 100_000, {}, ["not a list of prompts"]),
        ("a.yaml", "[]", {}, [".txt, .jsonl, .json, .csv, .tsv, .parquet", "'.yaml'"]),
        ("a.json", "[", {}, ["a.json: line 1, column 2: not JSON"]),
        ("a.json", "{}", {}, ["expected one JSON list, found dict"]),
        ("a.json", '["a", 2]', {}, ["item 2: expected an object or a prompt, found int"]),
        ("a.tsv", "Prompts\tid\na\n", {}, ["row 1 (line 2)", "2 columns"]),
        ("a.parquet", "not parquet", {}, ["a.parquet", "cannot be read"]),
    ],
)
def test_faults_name_the_place_and_are_found_by_the_check_too(tmp_path, name, content, options, fragments):
    source = _write(tmp_path / name, content)
    section = PromptsSection(source=source, **options)
    with pytest.raises(UserError) as error:
        PromptSet.load(section)
    for fragment in fragments:
        assert fragment in str(error.value)
    messages = check_prompts(section, "rtdmd.prompts")
    assert len(messages) == 1
    assert messages[0].startswith("rtdmd.prompts")


def test_parquet_faults_name_the_row(tmp_path):
    source = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": None}]).to_parquet(source)
    with pytest.raises(UserError, match="row 2: no value for 'prompt'"):
        _load(source)
    datasets.Dataset.from_list([{"prompt": " "}, {"prompt": "b"}]).to_parquet(source)
    with pytest.raises(UserError, match="row 1: 'prompt' is blank"):
        _load(source)


def test_bytes_that_are_not_utf8_are_named_with_line_and_position(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"first\nse" + "ä".encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"a\.txt: line 2, byte 8: 0xe4 is not UTF-8"):
        _load(str(path))


def test_missing_files_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="no prompt file"):
        _load(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        _load(str(tmp_path / "missing.txt"))
    # Looks like a hub id, but for its ending.
    with pytest.raises(UserError, match="no such file"):
        _load("prompts/missing.txt")


def test_check_collects_faults_and_leaves_hub_ids_alone(tmp_path):
    section = PromptsSection(source=str(tmp_path / "missing.txt"), limit=0)
    messages = check_prompts(section, "cold_start.prompts")
    assert len(messages) == 2
    assert messages[0] == "cold_start.prompts.limit = 0: must be at least 1"
    assert check_prompts(PromptsSection(source="owner/name"), "cold_start.prompts") == []
    assert check_prompts(PromptsSection(source=_write(tmp_path / "a.txt", "a")), "cold_start.prompts") == []


def test_every_pass_is_a_permutation_of_its_own():
    walk = ShuffledPrompts(num_prompts=7, seed=3, stage="cold_start")
    passes = [[walk.index(7 * number + offset) for offset in range(7)] for number in range(4)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4


def test_the_walk_is_a_function_of_seed_stage_and_position():
    def walk(seed=3, stage="cold_start"):
        return ShuffledPrompts(num_prompts=50, seed=seed, stage=stage)

    forward = [walk().index(position) for position in range(120)]
    jumping = walk()
    assert [jumping.index(position) for position in reversed(range(120))] == forward[::-1]
    assert [walk(seed=4).index(position) for position in range(50)] != forward[:50]
    assert [walk(stage="rtdmd").index(position) for position in range(50)] != forward[:50]


# (prompts, K, batch per rank, sampling batches, ranks); the published sizes first
GROUPS = [
    (500, 24, 6, 16, 16),
    (500, 16, 2, 16, 16),
    (500, 24, 9, 16, 8),
    (500, 4, 2, 6, 1),  # a group spans two sampling batches
    (500, 3, 2, 3, 1),  # ... and ends in the middle of one
    (20, 4, 8, 4, 2),  # 16 prompts an epoch, of 20
    (5, 2, 4, 3, 1),  # more groups than prompts
    (2, 4, 2, 6, 1),
]


@pytest.mark.parametrize("sizes", GROUPS)
def test_every_prompt_of_a_sampling_batch_appears_k_times(sizes: tuple[int, int, int, int, int]):
    num_prompts, repeats, batch, num_batches, ranks = sizes
    sampler = GroupSampler(*sizes, 0)
    size = batch * ranks
    for epoch in range(5):
        positions = sampler.epoch(epoch)
        assert len(positions) == size * num_batches
        assert all(0 <= prompt < num_prompts for prompt in positions)
        for start in range(0, len(positions), size):
            counts = Counter(positions[start : start + size])
            if size >= repeats:
                assert set(counts.values()) == {repeats}
        counts = Counter(positions)
        assert all(count % repeats == 0 for count in counts.values())
        groups = len(positions) // repeats
        assert len(counts) == groups or groups > num_prompts
        assert max(counts.values()) <= repeats * (-(-groups // num_prompts) + 1)


def test_a_spanning_group_lies_in_consecutive_sampling_batches():
    """K = 4 with two samples a batch: batches 0 and 1 hold the first group, 2 and 3 the second."""
    positions = GroupSampler(500, 4, 2, 6, 1, seed=0).epoch(0)
    assert [len(set(positions[start : start + 4])) for start in (0, 4, 8)] == [1, 1, 1]
    assert len(set(positions)) == 3


def test_epochs_walk_through_passes_of_the_set():
    """20 prompts, 5 an epoch: four epochs see all, and the next four in another order."""
    sampler = GroupSampler(20, 2, 2, 5, 1, seed=0)
    epochs = [set(sampler.epoch(epoch)) for epoch in range(8)]
    assert set.union(*epochs[:4]) == set.union(*epochs[4:]) == set(range(20))
    assert epochs[:4] != epochs[4:]


def test_copies_spread_over_ranks():
    sampler = GroupSampler(100, 8, 8, 1, 4, seed=0)
    positions = sampler.epoch(0)
    ranks = [{positions[position] for position in sampler.rank_positions(rank, 0)} for rank in range(4)]
    assert all(len(prompts) > 2 for prompts in ranks)


def test_one_rank_with_twice_the_batch_sees_the_same_positions():
    one = GroupSampler(100, 4, 8, 3, 1, seed=5)
    two = GroupSampler(100, 4, 4, 3, 2, seed=5)
    assert one.epoch(7) == two.epoch(7)
    for batch in range(3):
        halves = [*two.rank_positions(0, batch), *two.rank_positions(1, batch)]
        assert list(one.rank_positions(0, batch)) == halves
    assert GroupSampler(100, 4, 8, 3, 1, seed=6).epoch(7) != one.epoch(7)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((100, 4, 3, 4, 2), "3 x 2, is not a multiple"),
        ((100, 4, 1, 6, 1), "epoch of 6 samples"),
        ((3, 2, 8, 1, 1), "4 distinct prompts, there are 3"),
        ((0, 4, 4, 1, 1), "at least 1"),
    ],
)
def test_impossible_arithmetic(sizes: tuple[int, int, int, int, int], message: str):
    with pytest.raises(ValueError, match=message):
        GroupSampler(*sizes, 0)


def test_positions_outside_the_epoch():
    sampler = GroupSampler(100, 4, 4, 2, 2, seed=0)
    for rank, batch in [(2, 0), (-1, 0), (0, 2)]:
        with pytest.raises(ValueError, match="rank"):
            sampler.rank_positions(rank, batch)
    with pytest.raises(ValueError, match="negative"):
        ShuffledPrompts(4, 0, "rtdmd").index(-1)


def test_a_hub_dataset_that_cannot_be_reached():
    with pytest.raises(UserError, match="owner/no-such-name: cannot be read"):
        _load("owner/no-such-name")
