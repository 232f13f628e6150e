"""Work that a monitor has done by a child, so that what it imports is not kept for years."""

import json
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from vrun import syscalls
from vrun.errors import ToolError
from vrun.loop import Loop


def call(loop: Loop, work: Callable[[], Any], *, keep: Iterable[int] = ()) -> Any:
    """What `work` returns, computed in a forked child; it must be something that JSON can hold.

    Of our descriptors the child has those of `keep` alone.

    Raises ToolError as `work` does, or when the child was killed; OSError with the child's errno;
    Aborted, with the child killed.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    pid = loop.fork(keep=(write_fd, *keep))
    if pid == 0:
        syscalls.set_parent_death_signal(signal.SIGKILL)
        _answer(work, write_fd)
        os._exit(0)
    os.close(write_fd)
    chunks: list[bytes] = []
    ended: list[bool] = []

    def read() -> None:
        data = os.read(read_fd, 1 << 16)
        chunks.append(data)
        if not data:
            loop.unwatch(read_fd)
            ended.append(True)

    loop.watch(read_fd, read)
    try:
        loop.wait(lambda: bool(ended))
        loop.wait_child(pid)
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        loop.unwatch(read_fd)
        os.close(read_fd)
    return _unpack(b"".join(chunks))


def _answer(work: Callable[[], Any], fd: int) -> None:
    answer: dict[str, Any]
    try:
        answer = {"value": work()}
    except ToolError as error:
        answer = {"message": error.message, "hint": error.hint}
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else None
        answer = {"errno": error.errno, "reason": error.strerror or str(error), "file": name}
    except Exception:  # noqa: BLE001 (a bug of ours must reach a person too)
        import traceback

        answer = {"message": traceback.format_exc(), "hint": None}
    with open(fd, "w") as file:
        json.dump(answer, file)


def _unpack(data: bytes) -> Any:
    if not data:
        raise ToolError("a process that worked for the guest was killed")
    answer = json.loads(data)
    if "message" in answer:
        raise ToolError(answer["message"], hint=answer["hint"])
    if "errno" in answer:
        raise OSError(answer["errno"], answer["reason"], answer["file"])
    return answer["value"]
