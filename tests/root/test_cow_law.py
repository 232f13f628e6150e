"""One law for random sequences of calls: in a guest whose files are shared they give the same
results, errors and trees as in a private copy; but for what is said of inode numbers.
"""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures.cow import Ran, become, in_guest
from tests.fixtures.filesystems import Site, remove
from tests.fixtures.inside import in_child
from tests.fixtures.probes import is_soak, need, on
from tests.fixtures.windows import shared_file
from vrun import capabilities
from vrun.wordlist import SECURE_CAPS
from vstore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

pytestmark = [need("immutable", "lease"), on("ext4", "btrfs")]

_NAMES = ("a", "b", "c", "d/e", "new", "link", "d", "missing/x")
_USER = 1000
_RECENT = 1_700_000_000

_name = st.sampled_from(_NAMES)
_open_flags = st.sampled_from(
    [
        *(os.O_WRONLY, os.O_RDWR, os.O_RDONLY, os.O_WRONLY | os.O_APPEND),
        *(os.O_WRONLY | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT),
        *(os.O_WRONLY | os.O_CREAT | os.O_EXCL, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        *(os.O_WRONLY | os.O_NOFOLLOW, os.O_WRONLY | os.O_DIRECTORY, os.O_PATH | os.O_WRONLY),
    ]
)
_mode = st.sampled_from([0o600, 0o644, 0o4755, 0o2755, 0o000, 0o777])
_ids = st.sampled_from([-1, 0, 5, _USER])
_step = st.one_of(
    st.tuples(st.just("write"), _name, _open_flags),
    st.tuples(st.just("truncate"), _name, st.sampled_from([0, 3, 5000])),
    st.tuples(st.just("chmod"), _name, _mode),
    st.tuples(st.just("chown"), _name, _ids, _ids),
    st.tuples(st.just("lchown"), _name, _ids, _ids),
    st.tuples(st.just("utime"), _name, st.sampled_from([None, 7, 99])),
    st.tuples(st.just("setxattr"), _name, st.sampled_from([0, os.XATTR_CREATE, os.XATTR_REPLACE])),
    st.tuples(st.just("removexattr"), _name),
    st.tuples(st.just("unlink"), _name),
    st.tuples(st.just("rename"), _name, _name, st.sampled_from([0, 1, 2])),
    st.tuples(st.just("link"), _name, _name),
    st.tuples(st.just("fchmod"), _name, _mode),
    st.tuples(st.just("user")),
)


class _Runner:
    """Carries out the steps below one folder; nothing is imported for that."""

    def run(self, steps: list[tuple[Any, ...]]) -> list[Any]:
        os.umask(0o022)
        os.chdir("/")
        return [self._try(*step) for step in steps]

    def _try(self, kind: str, *arguments: Any) -> Any:
        try:
            return getattr(self, f"_{kind}")(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def _write(self, name: str, flags: int) -> object:
        fd = os.open(name, flags, 0o640)
        try:
            if flags & os.O_ACCMODE and not flags & os.O_PATH:
                os.write(fd, b"written")
            return "opened"
        finally:
            os.close(fd)

    def _truncate(self, name: str, size: int) -> None:
        os.truncate(name, size)

    def _chmod(self, name: str, mode: int) -> None:
        os.chmod(name, mode)

    def _chown(self, name: str, uid: int, gid: int) -> None:
        os.chown(name, uid, gid)

    def _lchown(self, name: str, uid: int, gid: int) -> None:
        os.lchown(name, uid, gid)

    def _utime(self, name: str, when: int | None) -> None:
        os.utime(name, None if when is None else (when, when))

    def _setxattr(self, name: str, flags: int) -> None:
        os.setxattr(name, "user.key", b"value", flags)

    def _removexattr(self, name: str) -> None:
        os.removexattr(name, "user.key")

    def _unlink(self, name: str) -> None:
        os.unlink(name)

    def _rename(self, old: str, new: str, how: int) -> None:
        flags = (0, RENAME_NOREPLACE, RENAME_EXCHANGE)[how]
        renameat2(-100, old.encode(), -100, new.encode(), flags=flags)

    def _link(self, old: str, new: str) -> None:
        os.link(old, new)

    def _fchmod(self, name: str, mode: int) -> int:
        fd = os.open(name, os.O_RDONLY)
        try:
            os.fchmod(fd, mode)
            return stat.S_IMODE(os.fstat(fd).st_mode)
        finally:
            os.close(fd)

    def _user(self) -> None:
        become(_USER)


def _grow(root: Path) -> None:
    (root / "d").mkdir(parents=True)
    (root / "link").symlink_to("a")
    (root / "d").chmod(0o777)
    root.chmod(0o1777)


def _describe(root: Path) -> dict[str, Any]:
    """All but inode numbers; names of one file are told, and times of this run are "now"."""
    found: dict[str, Any] = {}
    groups: dict[int, list[str]] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "proc"]
        for name in names:
            path = Path(folder, name)
            status = path.lstat()
            place = str(path.relative_to(root))
            groups.setdefault(status.st_ino, []).append(place)
            is_link = path.is_symlink()
            found[place] = (
                *(stat.filemode(status.st_mode), status.st_uid, status.st_gid),
                "now" if is_link or status.st_mtime > _RECENT else status.st_mtime_ns,
                os.readlink(path) if is_link else path.read_bytes(),
                {} if is_link else {key: os.getxattr(path, key) for key in os.listxattr(path)},
            )
    found[""] = sorted(sorted(group) for group in groups.values())
    return found


_FILES = {"a": b"first " * 300, "b": b"second " * 9, "c": b"third " * 2000, "d/e": b"fourth " * 40}


@contextmanager
def _trees(site: Site) -> Iterator[tuple[Site, Path]]:
    """Two guests that share files, and a private copy; in a folder of their own."""
    base = Path(tempfile.mkdtemp(dir=site.vdirbase))
    own = replace(site, vdirbase=base)
    copy = base / "copy"
    for root in (own.root("web"), own.root("db"), copy):
        _grow(root)
    with ExitStack() as stack:
        for name, content in _FILES.items():
            stack.enter_context(shared_file(own, name, content))
            (copy / name).write_bytes(content)
            (copy / name).chmod(0o644)
            shared = (own.root("web") / name).stat()
            os.utime(copy / name, ns=(shared.st_atime_ns, shared.st_mtime_ns))
        yield own, copy
    remove(base)


def _in_copy(copy: Path, steps: list[tuple[Any, ...]]) -> list[Any]:
    os.chroot(copy)
    os.chdir("/")
    capabilities.limit(SECURE_CAPS)
    return _Runner().run(steps)


def test_calls_give_what_they_give_in_a_private_copy(site: Site) -> None:
    @settings(
        max_examples=300 if is_soak() else 30,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(_step, min_size=1, max_size=12))
    def obey(steps: list[tuple[Any, ...]]) -> None:
        with _trees(site) as (own, copy):
            before = _describe(own.root("db"))
            ran = Ran()
            answers = in_guest(own.pool, own.root("web"), lambda: _Runner().run(steps), ran=ran)
            assert not ran.notes
            assert answers == in_child(lambda: _in_copy(copy, steps))
            assert _describe(own.root("web")) == _describe(copy)
            assert _describe(own.root("db")) == before

    obey()
