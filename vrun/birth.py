"""What a guest's first process does, until it executes the guest's init.

It is forked by the monitor into the guest's cgroup and new namespaces. As long as it is our program
nothing of the guest runs anywhere; it builds the root, takes the limits, the filter and the ceiling
of capabilities, and executes the guest's init by way of a sealed stub. launch.py has the order.
"""

import errno
import fcntl
import os
import termios
from collections.abc import Callable
from typing import NoReturn

from vrun import capabilities, limits, mounts, seccomp, stub, syscalls
from vrun.cgroup import Group
from vrun.chain import FarEnd
from vrun.errors import ToolError
from vrun.noimports import refuse_imports
from vrun.spec import GuestSpec
from vrun.styles import Program, find_in_path
from vstore.record import dataclass


@dataclass(slots=True, kw_only=True)
class Birth:
    """All that the first process needs to know; made by the monitor before it forks."""

    spec: GuestSpec
    group: Group
    program: Program
    kind: stub.Kind
    root: mounts.RootOptions
    filter: bytes
    far: FarEnd
    report_fd: int
    """A socket: the stub waits there for the word, and tells what became of the program."""
    stub_fd: int | None = None
    notifying: bytes = b""
    """The filter of copy-on-write links; empty where the guest shares no files."""
    network_fd: int = -1
    """A network namespace to enter; -1: the host's, or a new one."""


Step = tuple[str, Callable[[Birth], None]]


def run(steps: tuple[Step, ...], birth: Birth) -> NoReturn:
    """Do one step after the other and end this process; what fails is told to the monitor."""
    try:
        for name, do in steps:
            birth.far.step = name
            do(birth)
    except (OSError, ToolError) as error:
        birth.far.fail(error)
    except Exception as error:  # noqa: BLE001 (a bug of ours must reach a person too)
        birth.far.fail(ToolError(repr(error)))
    os._exit(0)


def join_groups(birth: Birth) -> None:
    """It was born in the v2 group, which is to be the root of its cgroup namespace."""
    birth.group.join_v1()
    syscalls.unshare(syscalls.CLONE_NEWCGROUP)


def enter_network(birth: Birth) -> None:
    """Enter a namespace that there is, or wait until the monitor has set up the new one."""
    if birth.network_fd >= 0:
        syscalls.setns(birth.network_fd, syscalls.CLONE_NEWNET)
    if birth.spec.network == "own":
        birth.far.wait()


def set_names(birth: Birth) -> None:
    syscalls.set_name(b"init")
    if birth.spec.hostname is not None:
        syscalls.sethostname(os.fsencode(birth.spec.hostname))
    if birth.spec.domainname is not None:
        syscalls.setdomainname(os.fsencode(birth.spec.domainname))


def make_stub(birth: Birth) -> None:
    """As long as our own modules can be found: within the guest's root there are none."""
    birth.stub_fd = stub.open_sealed(birth.kind)


def mount_root(birth: Birth) -> None:
    console = mounts.enter_root(birth.root)
    refuse_imports()
    syscalls.refuse_core_dumps()
    os.setsid()
    os.umask(0o022)
    if console is None:
        _use_for_stdio(os.open(os.devnull, os.O_RDWR))
        return
    birth.far.say("console", fds=(console.master_fd,))
    os.close(console.master_fd)
    if birth.kind == "wait":  # rc scripts expect to be able to read /dev/tty
        fcntl.ioctl(console.slave_fd, termios.TIOCSCTTY, 0)
    _use_for_stdio(console.slave_fd)


def _use_for_stdio(fd: int) -> None:
    for number in range(3):
        os.dup2(fd, number)
    os.close(fd)


def take_limits(birth: Birth) -> None:
    limits.apply(birth.spec)


def leave_keyring(birth: Birth) -> None:
    try:
        syscalls.join_session_keyring()
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a kernel without keys
            raise


def load_filter(birth: Birth) -> None:
    if birth.notifying:
        from vrun.cow import notifyfilter  # the monitor has loaded it

        listener_fd = notifyfilter.load(birth.notifying)
        birth.far.say("listener", fds=(listener_fd,))
        os.close(listener_fd)
    seccomp.load(birth.filter)


def drop_capabilities(birth: Birth) -> None:
    capabilities.limit(birth.spec.capabilities)


def say_ready(birth: Birth) -> None:
    """Nothing of the guest has run yet: from here on the monitor says that it runs."""
    birth.far.say("ready")


def execute(birth: Birth) -> None:
    """Become the stub, which waits for the word and executes the program.

    This comes back only as an error.
    """
    program = birth.program
    environment = dict((*birth.spec.init.environment, *program.environment))
    path = find_in_path(program.argv[0], environment.get("PATH", ""))
    stub.execute(
        birth.kind,
        path,
        program.argv,
        environment,
        name="init",
        report_fd=birth.report_fd,
        stub_fd=birth.stub_fd,
    )
