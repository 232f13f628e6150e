"""What a call of a guest is served with that the quick look did not let go on: where its path leads
with the caller's rights, component by component, whether that is frozen, and how the call is
answered.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from vrun.cow import kernel, paths, rights
from vrun.cow.breaking import Break, Changed, Check, Target, Workshop, open_regular
from vrun.cow.notifications import Begun, Call, Gone, Listener
from vrun.errors import ToolError
from vstore.record import dataclass

log = logging.getLogger(__name__)

_TRIES: Final = 32


@dataclass(slots=True, kw_only=True)
class Asked:
    """One call, and who waits for its answer."""

    listener: Listener
    call: Call
    is_time64: bool = False
    """Its times have 8 bytes each although its addresses have 4."""
    begun: Begun | None = None
    held_until_s: float = 0.0
    """Until when it waits for a lease to go, by the monotonic clock; 0: it does not."""
    number: int = -1
    """The descriptor that the caller is to get, once it has been taken."""


class Answered(Exception):
    """The call has its result, and is not to go on."""

    def __init__(self, value: int = 0, error: int = 0) -> None:
        super().__init__(value, error)
        self.value = value
        self.error = error


class Deferred(Exception):
    """The call is answered later."""


CopyElsewhere = Callable[[Asked, Break, int], bool]
"""Have a break, of the inode of that number, filled by another process, then finished and the call
served once more; False where that cannot be. The break belongs to whoever does that.
"""
WaitFor = Callable[[Asked, int], bool]
"""Have a call served once more when the inode of that number has been copied; False: cannot be."""


@dataclass(slots=True)
class Found:
    """A frozen file, as a path of the caller led to it."""

    place: paths.Place
    ino: int
    status: rights.Status
    is_by_descriptor: bool = False
    """The path led through a descriptor, which goes on showing the shared file."""
    copy_ino: int = 0
    """The name has got its copy for this call already, of this number."""

    @property
    def target(self) -> Target:
        place = self.place
        credentials = self.status.credentials
        return Target(place.folder_fd, place.name, self.ino, credentials, place.text)


class Desk:
    """Looks at calls, and breaks links for them."""

    def __init__(self, shop: Workshop, copy_elsewhere: CopyElsewhere, wait_for: WaitFor) -> None:
        self.shop = shop
        self.roots = shop.roots
        self._copy_elsewhere = copy_elsewhere
        self._wait_for = wait_for
        self.in_work: set[int] = set()
        """Inode numbers whose copies other processes make at the moment."""

    def is_empty(self, call: Call, address: int) -> bool:
        """Whether the path at `address` is empty, or there is none."""
        return not address or kernel.read_text(call.tid, address) == b""

    @contextmanager
    def located(
        self, asked: Asked, directory: int, address: int, *, follow: bool
    ) -> Iterator[Found | None]:
        """The frozen file that a path of the caller leads to; None where it is none that concerns
        us. Raises OSError, as the call would; Gone.
        """
        place = None
        try:
            place, status = self.walk(asked, directory, address, follow=follow)
            yield self._as_found(asked, place, status) if place is not None else None
        finally:
            if place is not None:
                place.close()

    def walk(
        self, asked: Asked, directory: int, address: int, *, follow: bool
    ) -> tuple[paths.Place | None, rights.Status]:
        """Where a path of the caller leads, and his rights. Raises OSError, Gone."""
        tid = asked.call.tid
        status = self.load_status(asked)
        text = kernel.read_text(tid, address)
        asked.listener.check(asked.call.id)
        if not text:
            return None, status
        caller = paths.Caller(self.roots, self.shop.own, status, tid)
        place = paths.walk(caller, directory, text, follow=follow)
        try:
            asked.listener.check(asked.call.id)  # else it began in another process of that number
        except Gone:
            place.close()
            raise
        return place, status

    def load_status(self, asked: Asked) -> rights.Status:
        """Of the caller. Raises Gone."""
        try:
            status = rights.load_status(self.roots.proc_fd, asked.call.tid)
        except OSError as error:
            raise Gone from error
        asked.listener.check(asked.call.id)
        return status

    def _as_found(self, asked: Asked, place: paths.Place, status: rights.Status) -> Found | None:
        if place.fd < 0:
            return None
        ino = self.frozen_ino(place.fd)
        if ino is None:
            return None
        if place.folder_fd >= 0:
            return Found(place, ino, status)
        found_ino = self.find_name(place, ino, asked.begun)
        if not found_ino:
            return None
        copy_ino = found_ino if found_ino != ino else 0
        return Found(place, ino, status, is_by_descriptor=True, copy_ino=copy_ino)

    def frozen_ino(self, fd: int) -> int | None:
        """The number of the inode behind `fd` if it is a frozen file on the pool's file system."""
        attributes, _, mode, ino = kernel.look(fd, b"", kernel.AT_EMPTY_PATH)
        if not (attributes & kernel.IMMUTABLE and stat.S_ISREG(mode)):
            return None
        return ino if kernel.device_and_mount()[0] == self.shop.pool.device else None

    def find_name(self, place: paths.Place, ino: int, begun: Begun | None = None) -> int:
        """Give `place`, which has only a descriptor, the folder and name that it was opened by; the
        number of the inode there, `ino` or that of the copy which the call has got already. 0 where
        the file has no such name any more.

        To be called with the caller's root.
        """
        name = os.fsencode(os.readlink(f"self/fd/{place.fd}", dir_fd=self.roots.proc_fd))
        copy_ino = 0
        if begun is not None and begun.ino == ino and begun.path:
            name, copy_ino = begun.path, begun.copy_ino
        if not name.startswith(b"/"):
            return 0
        try:
            found = paths.walk_back(name)
        except OSError:
            return 0
        found_ino = kernel.look(found.fd, b"", kernel.AT_EMPTY_PATH)[3] if found.fd >= 0 else 0
        if not found_ino or found_ino not in (ino, copy_ino):
            found.close()
            return 0
        os.close(place.fd)
        place.fd, place.folder_fd, place.name = found.fd, found.folder_fd, found.name
        place.text = name
        return found_ino

    # --- breaking

    def break_path(
        self,
        asked: Asked,
        directory: int,
        address: int,
        check: Check,
        *,
        follow: bool = True,
        is_emptied: bool = False,
        act: Check | None = None,
    ) -> None:
        """Break the link of the name that a path leads to, if it is frozen and the caller may do
        what `check` tries. Afterwards the call can go on.

        `act` does what the call does, through a descriptor: where the caller's own would show the
        shared file.

        Raises Answered, Deferred, Gone; OSError of a walk that fails as the call itself will.
        """
        for _ in range(_TRIES):
            with self.located(asked, directory, address, follow=follow) as found:
                if found is None:
                    return
                try:
                    ino = found.copy_ino or self.break_found(
                        asked, found.target, check, is_emptied=is_emptied
                    )
                    if found.is_by_descriptor and act is not None:
                        self._act(found.target, ino, act)
                except Changed:
                    continue
                return

    def _act(self, target: Target, ino: int, act: Check) -> None:
        """Only on the copy: the caller may have no right to what somebody puts in its place."""
        fd = open_regular(self.shop, target.folder_fd, target.name, ino, os.O_RDWR)
        try:
            with self.telling(), self.shop.own.given_up_for(target.credentials):
                act(fd)
        finally:
            os.close(fd)
        raise Answered

    def break_found(
        self,
        asked: Asked,
        target: Target,
        check: Check,
        *,
        is_emptied: bool = False,
        at_once: bool = False,
    ) -> int:
        """As break_path(), for what was found; `at_once` if the call cannot be served once more.

        Gives the number of the private inode. Raises Changed besides.
        """
        with self.telling():
            self.wait_for_copy(asked, target.ino)
            work = Break(self.shop, target)
            is_ours = True
            try:
                work.check(check)
                if not is_emptied:
                    if work.takes_long and not at_once:
                        is_ours = not self._copy_elsewhere(asked, work, target.ino)
                        if not is_ours:
                            raise Deferred
                    work.fill()
                ino = work.copy_ino
                asked.listener.page.note_begun(asked.call.id, work.begun)
                work.finish()
            finally:
                if is_ours:
                    work.close()
        return ino

    def wait_for_copy(self, asked: Asked, ino: int) -> None:
        """Raise Deferred where another process copies that inode; the call comes again then."""
        if ino in self.in_work and self._wait_for(asked, ino):
            raise Deferred

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What cannot be done inside is the call's result.

        A pool that is busy, or an inode that cannot be thawed, is EPERM: what the kernel says to
        every change of a frozen file.
        """
        try:
            yield
        except OSError as error:
            raise Answered(error=error.errno or errno.EIO) from error
        except ToolError as error:
            log.warning("a shared file stays as it is: %s", error.message)
            raise Answered(error=errno.EPERM) from error
