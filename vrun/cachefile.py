"""What is worth keeping between starts: files that anybody may delete, below RUNDIR/.filters."""

import os
from contextlib import suppress
from pathlib import Path


def keep(path: Path, content: bytes) -> None:
    """Keep `content` at `path`, whose folder is made 0700.

    Several starts may write at once: each puts a whole file in place. No cache is no failure.
    """
    spare = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        spare.write_bytes(content)
        spare.replace(path)
