"""Files are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import pytest

from lightning_prune.files import write_file, write_text


def test_writes_where_no_folder_was(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "größer\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "größer\n".encode()
    write_file(str(tmp_path / "c.bin"), lambda file: file.write(b"\x00\xff"))
    assert (tmp_path / "c.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "c.bin").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_what_stood_there_stays_until_all_is_written(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def half(file: IO[bytes]) -> None:
        file.write(b"af")
        file.flush()
        assert path.read_text() == "before"
        raise error

    with pytest.raises(error):
        write_file(path, half)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]  # noqa: PTH208


def test_folders_that_cannot_be_written_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "a.txt", "")
