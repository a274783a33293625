"""Files are written whole or not at all, and what cannot be written is an error that says where."""

from pathlib import Path
from typing import BinaryIO

import pytest

from pared.errors import FileError
from pared.files.disk import make_directory, write_atomic


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    write_atomic(path, lambda file: file.write(b"first"))
    write_atomic(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_the_usual_permissions_are_given(tmp_path: Path) -> None:
    write_atomic(tmp_path / "ours", lambda file: file.write(b""))
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_that_names_the_directory(tmp_path: Path) -> None:
    def full(_: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError) as error:
        write_atomic(tmp_path / "file", full)
    assert str(error.value) == (
        f"{tmp_path}: cannot be written: No space left on device\n"
        "  Choose another directory, or change its permissions or free space."
    )
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError) as error:
        make_directory(tmp_path / "file" / "below")
    assert error.value.where == str(tmp_path / "file" / "below")
    assert error.value.what == "cannot be written: Not a directory"
    make_directory(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
