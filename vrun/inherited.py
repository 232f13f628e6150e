"""What a program has from whoever runs it, and a guest's monitor must not hand on to the guest.

A guest that somebody starts from a job at `nice -n 19`, in a shell with `ulimit -n 64` or below
nohup(1) is to be like one that was started when the machine booted. So is the host's part of it:
scripts and commands of the phases run with this too.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun import limits, stub, syscalls

_OOM_SCORE_ADJ: Final = Path("/proc/self/oom_score_adj")
_UMASK: Final = 0o022


def leave() -> None:
    """Give this process, and so its children, the defaults of the kernel and of boot.

    Scheduling class, nice level, I/O class, cpus, memory policy, execution domain, OOM bias,
    resource limits, umask, signals. What needs a right that the process lacks stays. Raises OSError
    for what no kernel refuses.
    """
    _leave_scheduling()
    syscalls.personality(0)
    with suppress(PermissionError):
        _OOM_SCORE_ADJ.write_text("0")
    limits.set_rlimits(())
    os.umask(_UMASK)
    stub.reset_signals()


def _leave_scheduling() -> None:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))
    try:
        syscalls.ioprio_set(syscalls.IOPRIO_WHO_PROCESS, 0, 0)  # by the nice level
        syscalls.reset_memory_policy()
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
