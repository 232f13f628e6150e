"""Notes that keep objects from being reclaimed while a copy has yet to link to them."""

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from vstore import inode
from vstore.errors import NoSpace
from vstore.reclaim import PIN

_NUMBERS_A_NAME: Final = 40


class Pins:
    """Symlinks in the program's stage folder behind `fd`; see `vstore.reclaim`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._made = 0

    def set(self, numbers: Sequence[int]) -> list[str]:
        """Pin the objects of these inode numbers; returns what to drop later. Raises NoSpace."""
        names = []
        for start in range(0, len(numbers), _NUMBERS_A_NAME):
            text = ",".join(str(number) for number in numbers[start : start + _NUMBERS_A_NAME])
            name = f"{PIN}{self._made}"
            self._made += 1
            try:
                os.symlink(text, name, dir_fd=self._fd)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise NoSpace("the pool's stage: no room for the notes of a copy") from error
            names.append(name)
        return names

    def drop(self, names: Sequence[str]) -> None:
        """Let these go."""
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)

    def drop_all(self) -> None:
        """Let all go. btrfs shows a descriptor what was there when it was opened."""
        fd = os.open(".", inode.OPEN_FOLDER, dir_fd=self._fd)
        try:
            self.drop([name for name in os.listdir(fd) if name.startswith(PIN)])  # noqa: PTH208
        finally:
            os.close(fd)
