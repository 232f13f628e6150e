"""The walk over every folder of a tree."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vstore.folders import Missed, walk_folders


def test_a_name_that_the_file_system_gives_twice_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As xfs does, when it is removed and made again while its folder is read."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    real = os.scandir

    @contextmanager
    def give_twice(fd: int) -> Iterator[list["os.DirEntry[str]"]]:
        with real(fd) as entries:
            yield list(entries) * 2

    monkeypatch.setattr(os, "scandir", give_twice)
    root_fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        missed = Missed()
        found = [
            (folder.path, [entry.name for entry in folder.entries])
            for folder in walk_folders(root_fd, missed)
        ]
    finally:
        os.close(root_fd)
    assert found == [(b"", ["folder"]), (b"folder", ["file"])]
    assert missed == Missed()
