"""Files are whole or not there, and damaged JSON is one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtdmd.errors import UserError
from rtdmd.files import read_json, replace_file, replacing


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    replace_file(path, b"old")
    with replacing(path) as beside:
        beside.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        assert (beside.parent, beside.suffix) == (path.parent, ".png")
        beside.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    replace_file(path, "größer")
    assert path.read_bytes() == "größer".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as beside:
            beside.write_text("half")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writers_half_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "generator_ema.pt"
    with replacing(path) as beside:
        beside.write_text("old")
    beside.write_text("half")
    replace_file(path, "whole")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["whole"]


def test_several_writers_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "identity.json"
    with replacing(path, shared=True) as mine, replacing(path) as theirs:
        assert mine != theirs
        mine.write_text("same")
        theirs.write_text("same")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing or damaged"),
        ("{", "missing or damaged"),
        ("[1]", "holds list, not a mapping"),
        ("\udcff", "missing or damaged"),
    ],
)
def test_damaged_json_is_one_error(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "index.json"
    if content is not None:
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=rf"index\.json: {said}.*; fetch it again"):
        read_json(path, "fetch it again")
    path.write_text('{"a": 1}')
    assert read_json(path, "") == {"a": 1}
