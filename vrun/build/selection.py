"""Which files of a Debian host make up its packages, and which are its own affair.

A file belongs to a guest if a package put it there. Of what maintainer scripts and administrators
add, a list says what is wanted, so that nobody has to know each place in which somebody may keep a
key. What only root may read is not taken unless it is as the package has it.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from vrun.errors import NotPermitted, ToolError
from vstore import exclude, inode, syscalls
from vstore.exclude import Excludes
from vstore.scan import open_below

DATABASE: Final = b"var/lib/dpkg"

_OTHERS_READ: Final = 0o004
_MERGED: Final = re.compile(rb"\Ausr/(?=(?:s?bin|lib(?:32|64|x32)?)/)")
"""Where /bin and the like are links into /usr, packages may still say that a file is in /bin."""
_CONFFILE: Final = re.compile(rb"^ /(.+) ([0-9a-f]{32})(?: obsolete)?$", re.MULTILINE)
_UCF: Final = re.compile(rb"^([0-9a-f]{32})  /(.+)$", re.MULTILINE)
_IN_TREE: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_LARGEST: Final = 64 << 20  # bytes of a file of the database, and of a configuration file

_NOT_PROGRAMS: Final = frozenset(
    (
        b"usr/local",
        b"usr/src",
        b"usr/lib/modules",
        b"usr/lib/firmware",
        b"lib/modules",
        b"lib/firmware",
    )
)
"""Of the machine and its administrator, or only of use to its kernel."""

_MADE_SETTINGS: Final = (
    "etc/apt/keyrings/*",
    "etc/apt/sources.list",
    "etc/apt/sources.list.d/*.list",
    "etc/apt/sources.list.d/*.sources",
    "etc/ca-certificates.conf",
    "etc/default/keyboard",
    "etc/default/locale",
    "etc/default/useradd",
    "etc/environment",
    "etc/initscript",
    "etc/inputrc",
    "etc/inittab",
    "etc/ld.so.cache",
    "etc/locale.conf",
    "etc/locale.gen",
    "etc/localtime",
    "etc/magic",
    "etc/motd",
    "etc/networks",
    "etc/nsswitch.conf",
    "etc/pam.d/common-*",
    "etc/papersize",
    "etc/profile",
    "etc/python3/debian_config",
    "etc/rc.local",
    "etc/sgml/*",
    "etc/shells",
    "etc/ssl/certs/*",
    "etc/timezone",
    "etc/vconsole.conf",
    "etc/xml/*",
)
"""What maintainer scripts write in /etc; `*` matches slashes too."""

_MADE_FOLDERS: Final = (
    "etc/alternatives",
    "etc/python3",
    "etc/rc?.d",
    "etc/sgml",
    "etc/systemd/*.wants",
    "etc/systemd/*.requires",
    "etc/xml",
)

_REGISTERS: Final = (
    b"var/lib/dpkg",
    b"var/lib/pam",
    b"var/lib/ucf",
    b"var/lib/systemd/deb-systemd-helper-enabled",
    b"var/lib/systemd/deb-systemd-helper-masked",
    b"var/lib/systemd/deb-systemd-user-helper-enabled",
    b"var/lib/xml-core",
    b"var/lib/sgml-base",
    b"var/lib/emacsen-common",
    b"var/lib/dictionaries-common",
    b"var/lib/ispell",
    b"var/lib/aspell",
    b"var/lib/python",
)
"""Where packages keep account of what is installed."""

_LOCKS: Final = frozenset((b"lock", b"lock-frontend", b"triggers/Lock"))


@dataclass(frozen=True, slots=True)
class Packages:
    """What dpkg knows of the tree behind `root_fd`. Paths have no leading slash."""

    root_fd: int
    owned: frozenset[bytes]
    digests: dict[bytes, str]
    """MD5 of configuration files as they came, and of those that ucf(1) looks after."""
    excludes: Excludes
    """What identifies a machine or is secret: the list of what is never unified."""

    @classmethod
    def load(cls, root: Path, root_fd: int) -> "Packages":
        """Raises NotPermitted where dpkg does not manage the tree."""
        owned = {
            line.removeprefix(b"/")
            for path in _lists(root_fd)
            for line in (read_file(root_fd, path) or b"").splitlines()
        }
        if not owned:
            raise NotPermitted(
                f"{root / os.fsdecode(DATABASE)}: dpkg knows no package there",
                hint="only a Debian host is built from; -m rsync copies any tree",
            )
        status = _CONFFILE.findall(read_file(root_fd, DATABASE + b"/status") or b"")
        digests = {path: digest.decode() for path, digest in status}
        hashes = read_file(root_fd, b"var/lib/ucf/hashfile") or b""
        digests |= {path: digest.decode() for digest, path in _UCF.findall(hashes)}
        shipped = exclude.SHIPPED_LIST
        rules = exclude.parse(shipped.read_bytes(), source=os.fspath(shipped))
        return cls(root_fd, frozenset(owned - {b"", b"."}), digests, rules)

    def owns(self, path: bytes) -> bool:
        return path in self.owned or _MERGED.sub(b"", path) in self.owned

    def is_program(self, path: bytes, status: os.stat_result) -> bool:
        """Whether an entry of /usr, /bin or /lib is taken."""
        if stat.S_ISDIR(status.st_mode):
            return path not in _NOT_PROGRAMS
        return _is_open(status) or self.owns(path)

    def is_setting(self, path: bytes, status: os.stat_result) -> bool:
        """Whether an entry of /etc is taken."""
        text = os.fsdecode(path)
        if stat.S_ISDIR(status.st_mode):
            return self.owns(path) or any(fnmatchcase(text, row) for row in _MADE_FOLDERS)
        if stat.S_ISLNK(status.st_mode):
            return not self.excludes.is_excluded(b"/" + path)
        is_made = any(fnmatchcase(text, row) for row in _MADE_SETTINGS)
        if not is_made and not self.owns(path) and path not in self.digests:
            return False
        if self.excludes.is_excluded(b"/" + path) and text != "etc/ld.so.cache":
            return False
        return _is_open(status) or self._is_unchanged(path)

    def is_register(self, path: bytes, status: os.stat_result) -> bool:
        """Whether an entry of the registers of packages is taken."""
        return path.removeprefix(DATABASE + b"/") not in _LOCKS

    def registers(self) -> Iterator[bytes]:
        """The folders of /var in which packages keep account of themselves."""
        yield from _REGISTERS

    def state_skeleton(self) -> Iterator[bytes]:
        """What packages have in /var and /opt, without what they keep there, and their folders in
        the root; each folder before what is in it.
        """
        inside = tuple(register + b"/" for register in _REGISTERS)
        for path in sorted(self.owned):
            if path.startswith(inside) or path in _REGISTERS:
                continue
            if path.startswith((b"var/", b"opt/")) or b"/" not in path:
                yield path

    def _is_unchanged(self, path: bytes) -> bool:
        """Whether a configuration file is as its package has it."""
        if path not in self.digests:
            return self.owns(path)
        try:
            fd = open_below(self.root_fd, path, flags=inode.OPEN_TO_READ)
        except OSError:
            return False
        with os.fdopen(fd, "rb") as file:
            digest = hashlib.md5(file.read(_LARGEST), usedforsecurity=False).hexdigest()
        return digest == self.digests[path]


def read_file(root_fd: int, path: bytes) -> bytes | None:
    """A file of the tree behind `root_fd`, by the tree's own links; None where there is none.

    Raises ToolError for what is no regular file, or one too large.
    """
    try:
        fd = syscalls.openat2(root_fd, path, flags=os.O_PATH, resolve=_IN_TREE)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            raise ToolError(f"/{os.fsdecode(path)} of the source: is no file of a sensible size")
        return Path(f"/proc/self/fd/{fd}").read_bytes()
    finally:
        os.close(fd)


def _lists(root_fd: int) -> list[bytes]:
    """The lists of files that dpkg has of its packages."""
    folder = DATABASE + b"/info"
    try:
        fd = syscalls.openat2(root_fd, folder, flags=os.O_RDONLY | os.O_DIRECTORY, resolve=_IN_TREE)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        names = sorted(map(os.fsencode, os.listdir(fd)))  # noqa: PTH208 - by descriptor
    finally:
        os.close(fd)
    return [folder + b"/" + name for name in names if name.endswith(b".list")]


def _is_open(status: os.stat_result) -> bool:
    """Whether everybody may read it, so that it holds no secret."""
    return stat.S_ISLNK(status.st_mode) or bool(status.st_mode & _OTHERS_READ)
