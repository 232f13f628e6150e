"""What the joining process does by itself: it finds the command, and loads nothing inside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vrun.joiner import Failure, NotExecutable, find_program, parse_failure


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders in which commands are looked for."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    return first, second


def _search(folders: tuple[Path, Path]) -> str:
    return ":".join(os.fspath(folder) for folder in folders)


def _program(folder: Path, name: str, mode: int = 0o755) -> str:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return os.fspath(path)


def test_the_first_program_of_that_name_is_meant(folders: tuple[Path, Path]) -> None:
    wanted = _program(folders[0], "tool")
    _program(folders[1], "tool")

    assert find_program("tool", _search(folders)) == wanted


def test_what_cannot_be_executed_is_passed_over(folders: tuple[Path, Path]) -> None:
    _program(folders[0], "tool", 0o644)
    wanted = _program(folders[1], "tool")

    assert find_program("tool", _search(folders)) == wanted


def test_a_folder_is_no_program(folders: tuple[Path, Path]) -> None:
    (folders[0] / "tool").mkdir()

    with pytest.raises(NotExecutable, match="Is a directory") as caught:
        find_program("tool", _search(folders))

    assert caught.value.code == 126


def test_a_name_with_a_slash_is_not_looked_for(folders: tuple[Path, Path]) -> None:
    _program(folders[0], "tool")

    with pytest.raises(NotExecutable, match=r"has no \./tool") as caught:
        find_program("./tool", _search(folders))

    assert caught.value.code == 127


def test_what_is_nowhere_is_not_found(folders: tuple[Path, Path]) -> None:
    with pytest.raises(NotExecutable, match="has no command tool") as caught:
        find_program("tool", _search(folders))

    assert caught.value.code == 127


def test_a_failure_arrives_as_it_was_told() -> None:
    assert parse_failure(b"126\0cannot execute /b\xff\0n") == Failure(
        126, "cannot execute /b\udcff\0n"
    )
    assert parse_failure(b"") is None


def test_no_module_is_loaded_once_files_are_the_guests() -> None:
    script = """if True:
        import sys
        from vrun import joiner
        sys.meta_path[:] = [joiner._NoImports()]
        try:
            import wave
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "module wave is not loaded inside a guest\n"
