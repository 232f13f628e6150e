"""Run a program of the host's for a build: it ends when the build is killed.

Else it would go on writing into a tree that the next build of the name removes.
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from vrun import syscalls


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> "subprocess.CompletedProcess[bytes]":
    """Run `command` to its end; it gets SIGKILL when this process ends before it. Raises OSError
    where it cannot be executed.
    """
    ours = os.getpid()

    def die_with_parent() -> None:
        syscalls.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != ours:
            os._exit(1)

    return subprocess.run(  # noqa: S603 - the administrator's own, or one that is named by us
        command,
        env=environment,
        cwd=folder,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        check=False,
        preexec_fn=die_with_parent,
    )
