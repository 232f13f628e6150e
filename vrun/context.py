"""A guest while it starts, runs and stops, as its monitor knows it."""

import errno
import fcntl
import os
import signal
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vrun import prepare, scripts, state
from vrun.audience import Audience
from vrun.cgroup import Group
from vrun.chain import Chain
from vrun.console import Console, Log
from vrun.errors import ToolError
from vrun.loop import Loop
from vrun.order import Order
from vrun.reports import Reports
from vrun.spec import GuestSpec
from vstore.record import dataclass, field

if TYPE_CHECKING:
    from vrun.cow.keeping import Supervision

_PIDFD_INFO: Final = struct.Struct("=QQ11Ii")  # struct pidfd_info
_PIDFD_GET_INFO: Final = 0xC040FF0B  # linux/pidfd.h
_PIDFD_INFO_EXIT: Final = 1 << 3
_ASKED_TIMES: Final = 200
_ASK_AGAIN_S: Final = 0.01
_SIGTIMEDWAIT: Final = ("128", "137")  # asm/unistd_64.h, asm-generic/unistd.h
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED: Final = 2  # linux/posix-timers_types.h: the clock of process P is ~P << 3 | 2
_STATUS_SIGNALS: Final = ("SigBlk:", "SigCgt:")


@dataclass(slots=True)
class Context:
    """One run of a guest, from the first step of its start to the last of its end."""

    spec: GuestSpec
    order: Order
    loop: Loop
    audience: Audience
    log: Log
    host_fd: int
    """The host's mount namespace; the monitor has one of its own."""
    resources: state.Resources = field(default_factory=lambda: state.Resources(0))
    group: Group | None = None
    root_fd: int = -1
    is_restricted: bool = False
    """Its sockets are kept to its addresses."""
    network_fd: int = -1
    """The guest's network namespace, where it is not the host's; as long as it starts."""
    init_pid: int = 0
    """Process 1 of the guest, as the host numbers it; 0: there is none yet."""
    init_fd: int = -1
    """A descriptor of that process."""
    console: Console | None = None
    chain: Chain | None = None
    """To its first processes, as long as it is being launched."""
    is_ours: bool = True
    """That process is this monitor's child."""
    reports_fd: int = -1
    """A socket to the stub, which executes the program that starts the guest."""
    reports: Reports | None = None
    protection: str = "none"
    """Of its shared files: one of the words of protection.py."""
    supervision: "Supervision | None" = None
    """What serves its calls, where it has shared files."""
    _has_ended: bool = False

    @property
    def xid(self) -> int:
        return self.resources.xid

    def resolve(self, path: str) -> str:
        """What `path` of the guest is by the guest's own links; "" where it is nothing."""
        return prepare.resolve(self.root_fd, path)

    def run_scripts(self, phase: scripts.Phase, *, strict: bool) -> None:
        """Run the host's scripts of the phase.

        Raises ToolError at the first that fails if `strict`, else warns of each.
        """
        for failed in scripts.run_phase(
            phase, self.spec, self.loop, self.audience.stdio(), xid=self.xid or None
        ):
            if strict:
                raise ToolError(f"guest {self.spec.name}: its script {failed}")
            self.audience.warn(f"its script {failed}")

    # --- its first process

    def take_init(self, pid: int) -> None:
        """Process `pid` is the guest's first. Raises OSError where it is gone."""
        self.init_fd = os.pidfd_open(pid)
        self.init_pid = pid
        self.loop.watch(self.init_fd, self._init_ended)

    def _init_ended(self) -> None:
        self.loop.unwatch(self.init_fd)
        self._has_ended = True

    def running_chain(self) -> Chain:
        """To its first processes. Raises ToolError where it was not launched."""
        if self.chain is None:
            raise ToolError(f"guest {self.spec.name}: was not launched")
        return self.chain

    def init_status(self) -> int | None:
        """The wait status of the guest's first process; None as long as it runs, or where it was
        the child of another monitor, and the kernel does not tell; then it may take a moment.
        """
        if self.is_ours:
            return self.loop.status_of(self.init_pid) if self.init_pid else None
        return _ask_status(self.init_fd) if self._has_ended else None

    @property
    def is_alive(self) -> bool:
        """Whether the guest's first process has not ended."""
        return self.init_fd >= 0 and not self._has_ended

    def signal_init(self, number: int) -> None:
        """Send a signal to the guest's first process, if it is there."""
        with suppress(ProcessLookupError):
            if self.init_fd >= 0:
                signal.pidfd_send_signal(self.init_fd, number)

    def init_waits(self) -> bool:
        """Whether the first process waits for something to happen: state S of proc(5)."""
        try:
            text = Path(f"/proc/{self.init_pid}/stat").read_bytes()
        except OSError:
            return False
        return text.rpartition(b")")[2][1:2] == b"S"

    def init_worked_s(self) -> float:
        """Seconds of processor time that the first process has used; 0 where it is gone."""
        try:
            return time.clock_gettime(~self.init_pid << 3 | _CPUCLOCK_SCHED)
        except OSError:
            return 0.0

    def age_s(self) -> float:
        """Seconds since the guest's first process began."""
        try:
            began = state.start_of(self.init_pid) / _TICKS
        except OSError:
            return 0.0
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began

    def init_hears(self, number: int) -> bool:
        """Whether the first process does something on the signal.

        The kernel drops one for process 1 of a guest unless it handles it or has it blocked, to
        take it from a descriptor; see pid_namespaces(7). One that waits in sigtimedwait(2), as
        busybox, has it blocked although its status does not show that meanwhile.
        """
        folder = Path(f"/proc/{self.init_pid}")
        try:
            lines = (folder / "status").read_text().splitlines()
            if (folder / "syscall").read_text().split()[0] in _SIGTIMEDWAIT:
                return True
        except OSError:
            return False
        masks = (int(line.split()[1], 16) for line in lines if line.startswith(_STATUS_SIGNALS))
        return any(mask >> (number - 1) & 1 for mask in masks)

    # --- all its processes

    def processes(self) -> list[int]:
        """Those of the guest and those that joined it, as the host numbers them."""
        return self.group.pids() if self.group else []

    def is_alone(self) -> bool:
        """Whether the guest's first process is all that is left of it."""
        return self.processes() in ([], [self.init_pid])

    def signal_all(self, number: int) -> None:
        """Send a signal to each of the guest's processes but the first."""
        for pid in self.processes():
            if pid != self.init_pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def end_start(self) -> None:
        """Close what only a start needs."""
        if self.chain:
            self.chain.close()
            self.chain = None
        for fd in (self.reports_fd, self.network_fd):
            if fd >= 0:
                os.close(fd)
        self.reports_fd = self.network_fd = -1

    def close(self) -> None:
        """Close every descriptor of the run."""
        self.end_start()
        if self.reports:
            self.reports.close()
            self.reports = None
        if self.console:
            self.console.close()
            self.console = None
        if self.supervision:
            supervision, self.supervision = self.supervision, None
            supervision.close()
        if self.init_fd >= 0:
            self.loop.unwatch(self.init_fd)
            os.close(self.init_fd)
            self.init_fd = -1
        if self.root_fd >= 0:
            os.close(self.root_fd)
            self.root_fd = -1


def _ask_status(pidfd: int) -> int | None:
    """The wait status of a process that is no child of ours; None where the kernel cannot tell.

    PIDFD_GET_INFO with PIDFD_INFO_EXIT (linux/pidfd.h, Linux 6.15) knows it from the moment in
    which the parent has taken note.
    """
    request = _PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13)
    for _ in range(_ASKED_TIMES):
        try:
            answer = _PIDFD_INFO.unpack(fcntl.ioctl(pidfd, _PIDFD_GET_INFO, request))
        except OSError as error:
            if error.errno == errno.ESRCH:  # nobody has waited for it yet
                time.sleep(_ASK_AGAIN_S)
                continue
            return None
        if answer[0] & _PIDFD_INFO_EXIT:
            return int(answer[-1])
        time.sleep(_ASK_AGAIN_S)
    return None
