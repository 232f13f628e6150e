"""Mount something in a guest that runs, and unmount it again: from the host, inside its namespace.

What is mounted is made on the host, mounted nowhere. A child then enters the guest's mount
namespace, and puts it where the guest's own links lead: a few system calls, and no file of the
guest is ever read.
"""

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NoReturn

from vrun import mountcalls, mountfd, namespaces, noimports, syscalls, volumes
from vrun.errors import NotPermitted, ToolError
from vrun.fstab import load_mounts
from vrun.keys import Keys
from vrun.mounts import is_made_at_start
from vrun.spec import Mount
from vrun.state import find_running
from vstore.guest import Guest, RunState

_MOST_BYTES: Final = 4096


def take_own_mounts() -> None:
    """What mount(8) does for us from now on is seen by nobody else, and goes with this process.

    Raises OSError.
    """
    syscalls.unshare(namespaces.FLAGS["mnt"])
    namespaces.receive_only()


def missing_lines(guest: Guest) -> tuple[list[Mount], list[Mount]]:
    """The lines of the guest's fstab that are not mounted in it: those that can be now, and others.

    The others need what only a start has: the guest's own namespaces, or its addresses. Raises
    ConfigInvalid, NotPermitted for a guest that does not run.
    """
    mounted = _mounted(_running(guest))
    lines = load_mounts(Keys(guest.config, [])) if guest.config and guest.config.is_dir() else ()
    absent = [line for line in lines if volumes.target_of(line) not in mounted]
    late = [line for line in absent if not (line.remote or is_made_at_start(line))]
    return late, [line for line in absent if line not in late]


def mount(guest: Guest, line: Mount) -> None:
    """Mount the line in the guest, with its namespaces as they are.

    Raises ToolError naming the line, NotPermitted for a guest that does not run.
    """
    running = _running(guest)
    target = volumes.target_of(line)
    if "remount" in line.options or target == "/":
        raise ToolError(f"{line.where}: this can only be done when the guest starts")
    with ExitStack() as stack:
        mount_fd = volumes.make_line(line)
        stack.callback(os.close, mount_fd)
        number = _inside(running, lambda root_fd: mountfd.attach(mount_fd, root_fd, target))
    _check(guest, number, f"{line.where}: cannot mount {line.source} on {target} of the guest")


def unmount(guest: Guest, target: str) -> None:
    """Unmount what is mounted on `target` in the guest; what uses it still, goes on with it.

    Raises ToolError, NotPermitted for a guest that does not run.
    """
    running = _running(guest)
    place = os.path.normpath("/" + target.lstrip("/"))
    if place == "/" or place not in _mounted(running):
        raise ToolError(f"guest {guest.name}: nothing is mounted on {place}")

    def take_off(root_fd: int) -> None:
        folder_fd = mountfd.open_inside(root_fd, place)
        os.fchdir(folder_fd)
        os.close(folder_fd)
        mountcalls.umount2(b".", mountcalls.MNT_DETACH)

    number = _inside(running, take_off)
    _check(guest, number, f"guest {guest.name}: cannot unmount {place}")


def _running(guest: Guest) -> RunState:
    running = find_running(guest.name)
    if running is None:
        raise NotPermitted(
            f"guest {guest.name}: does not run", hint="what its fstab names is mounted at a start"
        )
    return running


def _mounted(running: RunState) -> set[str]:
    """Where something is mounted, as the guest sees it."""
    lines = Path(f"/proc/{running.init_pid}/mountinfo").read_text(errors="surrogateescape")
    fields = (line.split(" ")[4] for line in lines.splitlines())
    return {field.replace("\\040", " ").replace("\\134", "\\") for field in fields}


# --- inside


def _inside(running: RunState, work: Callable[[int], None]) -> int:
    """Do the work in the guest's mount namespace; its errno, 0 where it went well.

    The work gets a descriptor of the guest's root. Raises OSError where it cannot be entered.
    """
    init_fd = os.pidfd_open(running.init_pid)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            _be_inside(init_fd, write_fd, work)
        os.close(write_fd)
        answer = os.read(read_fd, _MOST_BYTES)
        os.waitpid(pid, 0)
    finally:
        os.close(init_fd)
        os.close(read_fd)
    return int(answer) if answer else errno.EIO


def _be_inside(init_fd: int, write_fd: int, work: Callable[[int], None]) -> NoReturn:
    number = errno.EIO
    try:
        noimports.refuse_imports()
        syscalls.setns(init_fd, namespaces.FLAGS["mnt"])
        root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        work(root_fd)
        number = 0
    except OSError as error:
        number = error.errno or errno.EIO
    finally:
        os.write(write_fd, str(number).encode())
        os._exit(0)


def _check(guest: Guest, number: int, what: str) -> None:
    if number:
        hint = mountfd.hint(OSError(number, ""), "its target")
        raise ToolError(f"{what}: {os.strerror(number)}", hint=hint)
