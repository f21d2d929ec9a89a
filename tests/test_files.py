"""Files are whole or not there, and damaged JSON is one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtdmd.errors import UserError
from rtdmd.files import is_partial, read_json, replace_file, replacing


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    replace_file(path, b"old")
    with replacing(path) as beside:
        beside.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        assert (beside.parent, beside.suffix) == (path.parent, ".png")
        beside.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    replace_file(path, "größer")
    assert path.read_bytes() == "größer".encode()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):  # a folder that has vanished isn't made again
        replace_file(tmp_path / "step-000002" / "state.json", "{}")


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


def test_several_writers_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "identity.json"
    with replacing(path, shared=True) as mine:
        mine.write_text("same")
        monkeypatch.setattr("os.getpid", lambda: -1)  # another process
        replace_file(path, "same", shared=True)
        assert mine.exists()
        assert is_partial(mine)
    assert list(tmp_path.iterdir()) == [path]
    assert not is_partial(path)


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
    with pytest.raises(UserError, match=rf"{tmp_path}: cannot be read \(.*\)$"):  # no advice to remove it
        read_json(tmp_path, "remove it")
    path.write_text('{"a": 1}')
    assert read_json(path, "") == {"a": 1}
