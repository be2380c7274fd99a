"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.atomic import replacing, writable


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_others_may_read_it_as_they_may_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_what_can_be_written_is_asked_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    writable(path)
    assert list(path.parent.iterdir()) == []
    path.write_text("old")
    writable(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("path", "why"),
    [("file/below", "file is no folder"), ("file/deep/below", "Not a directory"), ("", "it is a folder")],
)
def test_what_can_not_be_written_is_named_with_the_reason(tmp_path: Path, path: str, why: str) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="can't be written") as error:
        writable(tmp_path / path)
    assert str(tmp_path / path) in str(error.value)
    assert why in str(error.value)
