"""Running the system programs that a benchmark needs, and telling what went wrong with one."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path


class BenchError(Exception):
    """What keeps the benchmark from running, in words for a person."""


def call(
    *command: str | Path, env: Mapping[str, str] | None = None, timeout_s: float | None = None
) -> str:
    """What a program prints, that reads nothing.

    Raises BenchError with its complaint; also when it is not installed, or killed after
    `timeout_s`.
    """
    words = " ".join([os.fspath(word) for word in command])
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise BenchError(f"{words}: {error.filename} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{words}: not done after {timeout_s:.0f} s") from error
    if done.returncode:
        raise BenchError(f"{words}: {done.stderr.strip()[-500:] or done.returncode}")
    return done.stdout
