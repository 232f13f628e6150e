"""The control group of a running guest: where its processes are counted, limited, held and killed.

    <v2 hierarchy>/vservers/1001/           Group.path: programs of chbind, the guest's limits
                   └── guest/               its processes, and the groups that it makes itself; the
                                            root of its cgroup namespace
    <v1 controller>/vservers/1001/          for each controller that is still in a v1 hierarchy

The guest may write below `guest/` if it likes; its limits stand one level above, out of its sight.
On a host whose process 1 is systemd the first line is vservers.slice/vservers-1001.scope/1001, and
the scope holds the group `monitor` beside it for the guest's monitor.
"""

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vrun import syscalls, systemd
from vrun.errors import NotPermitted, ToolError
from vrun.hierarchy import Hierarchies, find_hierarchies, own_cgroup
from vrun.spec import CgroupSettings, Cpuset
from vstore.record import dataclass, field

BASE: Final = "vservers"
_GUEST: Final = "guest"
_MONITOR: Final = "monitor"
_DEFAULT: Final = ("cpu", "cpuacct", "memory", "pids")
"""Controllers that every guest has where the machine has them, for limits and figures."""
_OPTIONAL: Final = ("cpuset", "io", "blkio")
_MOST: Final = {"cgroup.max.depth": 32, "cgroup.max.descendants": 4096}
"""What a guest may make below its own: thousands one in the other have paths that no call takes."""
_OURS: Final = "trusted.vserver"
"""An extended attribute of the groups that we made, and may remove."""
_POLL_S: Final = 0.002
_TRIES: Final = 10


@dataclass(frozen=True, slots=True)
class Group:
    """The groups of one guest; the same record means them in every process."""

    path: Path
    """Its folder in the v2 hierarchy; the last component is the guest's number."""
    v1: Mapping[str, Path] = field(default_factory=dict)
    """Controllers of v1 hierarchies, each with the folder that the guest's processes are in."""

    def join(self, pid: int = 0) -> None:
        """Move a process (0: the calling one) into the guest; children that it makes follow.

        That takes some 15 ms on most machines. Raises OSError: ENODEV where the group was removed,
        ESRCH for no such process.
        """
        for folder in self.homes:
            (folder / "cgroup.procs").write_text(str(pid))

    @property
    def homes(self) -> tuple[Path, ...]:
        """The folders that `join` moves a process to, that of the v2 hierarchy last."""
        return tuple(dict.fromkeys((*self.v1.values(), self.path / _GUEST)))

    def fork(self, flags: int) -> int:
        """As os.fork(), with the child in the guest and in new namespaces of `flags`, CLONE_NEW*.

        The caller has one thread. The child has still to call `join_v1`. Raises OSError.
        """
        folder_fd = os.open(self.path / _GUEST, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return syscalls.fork_into_cgroup(folder_fd, flags)
        finally:
            os.close(folder_fd)

    def join_v1(self) -> None:
        """Move the calling process, which is in the guest's v2 group, into those of v1 too."""
        for folder in dict.fromkeys(self.v1.values()):
            (folder / "cgroup.procs").write_text("0")

    def folder_of(self, controller: str) -> Path | None:
        """Where the control files of `controller` are; None where the machine does not have it."""
        if controller in self.v1:
            return self.v1[controller]
        return self.path if controller in _words(self.path / "cgroup.controllers") else None

    def is_populated(self) -> bool:
        """Whether a process is in it; False where it is gone."""
        with suppress(OSError):
            return "populated 1" in (self.path / "cgroup.events").read_text().splitlines()
        return False

    def open_events(self) -> int:
        """A descriptor that is alarmed (POLLPRI) when `is_populated` changes. Raises OSError."""
        return os.open(self.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)

    def pids(self) -> list[int]:
        """Its processes as the host numbers them; may be out of date at once."""
        found: list[int] = []
        for folder in _tree(self.path):
            with suppress(OSError):
                found.extend(map(int, (folder / "cgroup.procs").read_text().split()))
        return found

    def kill(self) -> None:
        """Send SIGKILL to all in it, forks under way included; returns before they are gone.

        See cgroup-v2.rst, cgroup.kill (Linux 5.14). A frozen guest dies too.
        """
        with suppress(FileNotFoundError):
            (self.path / "cgroup.kill").write_text("1")

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until no process is left in it; False if some are after that time."""
        deadline = time.monotonic() + timeout_s
        while self.is_populated():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def set_frozen(self, frozen: bool) -> None:
        """Hold all of it still, or let it go on; returns before every process stands."""
        (self.path / "cgroup.freeze").write_text("1" if frozen else "0")

    def remove(self, *, timeout_s: float = 2) -> None:
        """Remove the guest's groups, and those above that only it was in; all its processes ended.

        Removes what there is: a group that is gone is no error. Raises ToolError where processes
        are in one after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        for folder in dict.fromkeys((self.path, *self.v1.values())):
            if folder.name == self.path.name:
                _remove_tree(folder, deadline)
                _remove_ours(folder.parent)
            else:  # other guests may be in it
                _remove_ours(folder)

    def take_monitor(self) -> None:
        """On a systemd host: move the calling process to where the guest's first monitor was.

        A monitor that a later command makes would else end with the session that was logged in.
        """
        monitor = self.path.parent / _MONITOR
        if systemd.is_init() and monitor.is_dir():
            (monitor / "cgroup.procs").write_text("0")

    def as_record(self) -> dict[str, Any]:
        """What `from_record` takes, for a JSON file."""
        return {
            "path": os.fspath(self.path),
            "v1": {controller: os.fspath(folder) for controller, folder in self.v1.items()},
        }

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> "Group":
        """The group that `as_record` described. Raises KeyError."""
        v1 = {controller: Path(folder) for controller, folder in record["v1"].items()}
        return Group(Path(record["path"]), v1)

    @staticmethod
    def load(path: Path) -> "Group":
        """The group whose v2 folder is `path`, with the v1 folders that have the same place."""
        hierarchies = find_hierarchies()
        place = path.relative_to(hierarchies.v2)
        folders = {name: mount / place for name, mount in hierarchies.v1.items()}
        return Group(path, {name: folder for name, folder in folders.items() if folder.is_dir()})


def create(
    xid: int,
    settings: CgroupSettings | None = None,
    *,
    cpuset: Cpuset | None = None,
    controllers: frozenset[str] = frozenset(_DEFAULT),
) -> Group:
    """Make the groups of the guest with that number; nothing is in them and nothing is limited.

    `controllers` are those that it needs a group of where they are in v1 hierarchies, beside what
    `settings` and `cpuset` name; each costs a moment when the guest is put into it.
    Call it from the guest's monitor: on a systemd host the calling process is moved beside them.
    Raises NotPermitted where the machine does not let us, ToolError where processes are in a group
    of that number.
    """
    settings = settings or CgroupSettings()
    hierarchies = find_hierarchies()
    top = _top(hierarchies, xid, settings)
    place = _place(top.relative_to(hierarchies.v2), xid, settings)
    group = Group(
        hierarchies.v2 / place, _v1_folders(hierarchies, place, settings, cpuset, controllers)
    )
    if group.is_populated():
        raise ToolError(
            f"{group.path}: processes are in the cgroup of context {xid} already",
            hint=f"see them with: cat {group.path}/cgroup.procs {group.path}/*/cgroup.procs",
        )
    try:
        _make_all(group, top, hierarchies, settings)
    except OSError as error:
        with suppress(ToolError, OSError):
            group.remove(timeout_s=0)
        raise NotPermitted(
            f"{error.filename or hierarchies.v2}: cannot make the guest's cgroup: {error.strerror}",
            hint="run as root, where the cgroup hierarchies are mounted for writing",
        ) from error
    return group


def _top(hierarchies: Hierarchies, xid: int, settings: CgroupSettings) -> Path:
    """The v2 group below which all is ours to arrange."""
    if systemd.is_init() and settings.base is None:
        return _take_scope(hierarchies, xid)
    return hierarchies.v2


def _place(top: Path, xid: int, settings: CgroupSettings) -> Path:
    """The guest's folder below each mount point."""
    base = settings.base or ("." if top.parts else BASE)
    return top / base.strip("/") / (settings.name or ".") / str(xid)


def _take_scope(hierarchies: Hierarchies, xid: int) -> Path:
    """The guest's scope, with this process in its group `monitor`."""
    own = own_cgroup(hierarchies)
    if own.parent.name == systemd.scope_name(xid):  # the guest is started again
        return own.parent
    if own.name != systemd.scope_name(xid):
        systemd.start_scope(xid, f"Guest with context {xid}")
    scope = own_cgroup(hierarchies)
    monitor = scope / _MONITOR
    monitor.mkdir(exist_ok=True)
    (monitor / "cgroup.procs").write_text("0")
    return scope


def _v1_folders(
    hierarchies: Hierarchies,
    place: Path,
    settings: CgroupSettings,
    cpuset: Cpuset | None,
    controllers: frozenset[str],
) -> dict[str, Path]:
    wanted = {*controllers, *(file.name.partition(".")[0] for file in settings.files)}
    if cpuset is not None:
        wanted.add("cpuset")
    folders = {
        name: mount / (place.parent if settings.name else place)
        for name, mount in hierarchies.v1.items()
        if name in wanted
    }
    if cpuset is not None and cpuset.name and "cpuset" in folders:
        named = hierarchies.v1["cpuset"] / cpuset.name
        if cpuset.create or named.is_dir():
            folders["cpuset"] = named
        else:
            del folders["cpuset"]
    return folders


def _make_all(group: Group, top: Path, hierarchies: Hierarchies, settings: CgroupSettings) -> None:
    _make(group.path / _GUEST, hierarchies.v2)
    for name, most in _MOST.items():
        (group.path / name).write_text(str(most))
    _enable_controllers(group.path, top)
    inherit = tuple(dict.fromkeys((*settings.inherit, "cpuset.cpus", "cpuset.mems")))
    for folder in dict.fromkeys(group.v1.values()):
        mounts = hierarchies.v1.values()
        mount = next(mount for mount in mounts if folder.is_relative_to(mount))
        _make(folder, mount, inherit)


def _make(folder: Path, mount: Path, inherit: tuple[str, ...] = ()) -> None:
    """Make the groups from `mount` down to `folder`.

    Another guest that ends at this moment removes the levels above, if they are empty.
    """
    for tries in range(_TRIES, 0, -1):
        try:
            for level in reversed((folder, *folder.parents)):
                if level != mount and level.is_relative_to(mount) and not level.is_dir():
                    _make_level(level, inherit)
        except (FileExistsError, FileNotFoundError):
            if tries == 1:
                raise
        else:
            return


def _make_level(level: Path, inherit: tuple[str, ...]) -> None:
    """Make one group, with its parent's values of `inherit`; a v1 cpuset is empty without them."""
    level.mkdir()
    os.setxattr(level, _OURS, b"1")
    for name in inherit:
        with suppress(FileNotFoundError):  # a file of another controller
            (level / name).write_text((level.parent / name).read_text())


def _enable_controllers(path: Path, top: Path) -> None:
    """Let the v2 controllers that guests use count from `top` down to what is in `path`.

    Not below a group that has processes itself, as one of chbind has: no process could be in what
    is below then (EOPNOTSUPP). The hierarchy's root, which has no type, is none of these.
    """
    for level in reversed((path, *path.parents)):
        if not level.is_relative_to(top):
            continue
        if (level / "cgroup.type").exists() and (level / "cgroup.procs").read_text():
            return
        have = _words(level / "cgroup.controllers")
        on = _words(level / "cgroup.subtree_control")
        for name in (*_DEFAULT, *_OPTIONAL):
            if name in have - on:
                with suppress(OSError):  # set_limits() says what is missing
                    (level / "cgroup.subtree_control").write_text(f"+{name}")


def _words(path: Path) -> set[str]:
    with suppress(OSError):
        return set(path.read_text().split())
    return set()


def _tree(folder: Path) -> Iterator[Path]:
    """`folder` and all groups below it, the deepest first."""
    for name, _, _ in os.walk(folder, topdown=False):
        yield Path(name)


def _remove_tree(folder: Path, deadline: float) -> None:
    while folder.is_dir():
        try:
            for group in _tree(folder):
                group.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline:
                raise ToolError(
                    f"{error.filename}: cannot remove the cgroup: processes are in it"
                ) from error
            time.sleep(_POLL_S)


def _remove_ours(folder: Path) -> None:
    """Remove groups that we made above those of guests, from `folder` up, while they are empty."""
    with suppress(OSError):  # one that another made, or that is in use
        while os.getxattr(folder, _OURS):
            folder.rmdir()
            folder = folder.parent
