"""Limits of single processes: set on the process that becomes the guest, inherited by all of it.

Totals of a guest are in grouplimits.py.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from vrun import syscalls
from vrun.errors import NotPermitted
from vrun.spec import GuestSpec, Rlimit

_OOM_SCORE_ADJ: Final = Path("/proc/self/oom_score_adj")
_OPEN_FILES: Final = 1_048_576
_MESSAGES: Final = 819_200
_RAISED: Final = {
    resource.RLIMIT_AS: resource.RLIM_INFINITY,
    resource.RLIMIT_CORE: resource.RLIM_INFINITY,
    resource.RLIMIT_CPU: resource.RLIM_INFINITY,
    resource.RLIMIT_DATA: resource.RLIM_INFINITY,
    resource.RLIMIT_FSIZE: resource.RLIM_INFINITY,
    resource.RLIMIT_MEMLOCK: resource.RLIM_INFINITY,
    resource.RLIMIT_MSGQUEUE: _MESSAGES,
    resource.RLIMIT_NOFILE: _OPEN_FILES,
    resource.RLIMIT_NPROC: resource.RLIM_INFINITY,
    resource.RLIMIT_RSS: resource.RLIM_INFINITY,
    resource.RLIMIT_RTTIME: resource.RLIM_INFINITY,
    resource.RLIMIT_STACK: resource.RLIM_INFINITY,
}
"""What the hard limits become that the guest's configuration does not name."""
_STACK: Final = 8 << 20
_MEMLOCK: Final = 8 << 20
_SOFT: Final = {
    resource.RLIMIT_AS: resource.RLIM_INFINITY,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_CPU: resource.RLIM_INFINITY,
    resource.RLIMIT_DATA: resource.RLIM_INFINITY,
    resource.RLIMIT_FSIZE: resource.RLIM_INFINITY,
    resource.RLIMIT_MEMLOCK: _MEMLOCK,
    resource.RLIMIT_MSGQUEUE: _MESSAGES,
    resource.RLIMIT_NICE: 0,
    resource.RLIMIT_NOFILE: 1024,
    resource.RLIMIT_RSS: resource.RLIM_INFINITY,
    resource.RLIMIT_RTPRIO: 0,
    resource.RLIMIT_RTTIME: resource.RLIM_INFINITY,
    resource.RLIMIT_STACK: _STACK,
}
"""The soft ones, as the kernel gives them to its first process (INIT_RLIMITS of asm-generic/
resource.h): what the caller may have set for itself is not handed on."""
_LOWERED: Final = (resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO)
"""Those whose hard limit is 0 too: a process could else go ahead of all others."""
_CALCULATED: Final = (resource.RLIMIT_NPROC, resource.RLIMIT_SIGPENDING)
"""Those that the kernel takes from the size of the memory: as process 1 has them."""


def apply(spec: GuestSpec) -> None:
    """Take the guest's process limits, nice level, I/O class, OOM bias and personality.

    For the calling process and what it forks or executes; it still needs its capabilities, and a
    /proc. Raises NotPermitted naming the setting; a hard limit that no file names stays where it
    cannot be raised.
    """
    set_rlimits(spec.rlimits)
    if spec.nice or not spec.nice_is_relative:
        _set_nice(spec)
    if spec.ionice is not None:
        _set_ionice(spec)
    if spec.oom_score_adj is not None:
        _set_oom_score_adj(spec.oom_score_adj)
    if spec.personality is not None:
        syscalls.personality(spec.personality)


def set_rlimits(limits: tuple[Rlimit, ...]) -> None:
    """Set these limits with setrlimit(2), and make the others what they are after boot: the hard
    ones as high as can be, the soft ones the kernel's defaults.

    Raises NotPermitted for one above the caller's without CAP_SYS_RESOURCE.
    """
    named = {limit.resource for limit in limits}
    for number, hard in _RAISED.items():
        if number not in named:
            _raise_hard(number, hard)
    for number, soft in _defaults():
        if number not in named:
            hard = 0 if number in _LOWERED else resource.getrlimit(number)[1]
            resource.setrlimit(number, (hard if _is_above(soft, hard) else soft, hard))
    for limit in limits:
        _set_rlimit(limit)


def _defaults() -> Iterator[tuple[int, int]]:
    yield from _SOFT.items()
    for number in _CALCULATED:
        with suppress(OSError):
            yield number, resource.prlimit(1, number)[0]


def _raise_hard(number: int, hard: int) -> None:
    soft, old = resource.getrlimit(number)
    if _is_above(hard, old):
        with suppress(ValueError, OSError):  # without CAP_SYS_RESOURCE
            resource.setrlimit(number, (soft, hard))


def _set_rlimit(limit: Rlimit) -> None:
    soft, hard = resource.getrlimit(limit.resource)
    soft = soft if limit.soft is None else limit.soft
    hard = hard if limit.hard is None else limit.hard
    if _is_above(soft, hard):
        soft = hard
    try:
        resource.setrlimit(limit.resource, (soft, hard))
    except (ValueError, OSError) as error:
        raise NotPermitted(
            f"ulimits/{limit.name}: cannot set {_show(soft)} (soft) and {_show(hard)} (hard) "
            f"where {_show(resource.getrlimit(limit.resource)[1])} is the hard limit: {error}",
            hint="raising a hard limit takes CAP_SYS_RESOURCE, and nofile ends at fs.nr_open",
        ) from error


def _is_above(left: int, right: int) -> bool:
    if right == resource.RLIM_INFINITY:
        return False
    return left == resource.RLIM_INFINITY or left > right


def _show(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _set_nice(spec: GuestSpec) -> None:
    try:
        if spec.nice_is_relative:
            os.nice(spec.nice)
        else:
            os.setpriority(os.PRIO_PROCESS, 0, spec.nice)
    except OSError as error:
        if "igneg_nice" in spec.flags:
            return
        raise NotPermitted(
            f"nice: cannot take level {spec.nice}: {error.strerror}",
            hint="a level below the caller's takes CAP_SYS_NICE; the flag igneg_nice does without",
        ) from error


def _set_ionice(spec: GuestSpec) -> None:
    io_class, level = spec.ionice or (0, 0)
    wanted = io_class << syscalls.IOPRIO_CLASS_SHIFT | level
    try:
        syscalls.ioprio_set(syscalls.IOPRIO_WHO_PROCESS, 0, wanted)
    except OSError as error:
        if "igneg_ionice" in spec.flags:
            return
        raise NotPermitted(
            f"ionice: cannot take class {io_class}, level {level}: {error.strerror}",
            hint="class 1 takes CAP_SYS_NICE; the flag igneg_ionice does without",
        ) from error


def _set_oom_score_adj(value: int) -> None:
    try:
        _OOM_SCORE_ADJ.write_text(str(value))
    except OSError as error:
        raise NotPermitted(
            f"badness: cannot take {value}: {error.strerror}",
            hint="less than the caller's takes CAP_SYS_RESOURCE",
        ) from error
