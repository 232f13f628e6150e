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
from vstore.heldback import signals_held_back


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
    with signals_held_back() as let_come:

        def begin() -> None:
            syscalls.set_parent_death_signal(signal.SIGKILL)
            if os.getppid() != ours:
                os._exit(1)
            let_come()

        process = subprocess.Popen(  # noqa: S603 - the administrator's own, or one named by us
            command,
            env=environment,
            cwd=folder,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            preexec_fn=begin,
        )
        with process:
            try:
                let_come()
                output, errors = process.communicate()
            except BaseException:
                process.kill()
                raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
