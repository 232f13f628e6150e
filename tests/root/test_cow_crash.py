"""A supervisor that is killed at any step: the call of the guest is carried out all the same, by
the next one, and the shared inode stays what it is.
"""

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

import pytest

from tests.fixtures.cow import Ran, in_guest
from tests.fixtures.filesystems import Site, is_immutable
from tests.fixtures.probes import is_soak, need, on
from tests.fixtures.windows import CONTENT, Shared, shared_file
from vrun.cow import keeping, supervisor
from vrun.cow.duty import Duty
from vrun.cow.notifications import Listener
from vrun.cow.supervisor import Supervisor

pytestmark = [need("immutable", "lease"), on("ext4", "xfs")]

_STRIDE = 1 if is_soak() else 7
_MOST_STEPS = 400


def _die_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The first supervisor kills itself at its so many-th step after it has received a call: a step
    is what Python tells audit hooks of, nearly every system call that changes something.

    Calling what this gives tells after how many steps it had let a call go on or answered it; 0 if
    it died before.
    """
    be_supervisor = supervisor.be_supervisor
    memory = mmap.mmap(-1, 4)

    def be(duty: Duty) -> None:
        if duty.bequest is None:
            left = [-1]

            def count(event: str, arguments: tuple[object, ...]) -> None:
                if left[0] > 0 and not event.startswith(("object.", "compile")):
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)

            receive = Listener.receive

            def received(self: Listener) -> object:
                call = receive(self)
                if left[0] < 0:
                    left[0] = steps
                return call

            def note() -> None:
                memory[:] = (steps - left[0]).to_bytes(4, "little")

            serve = _prepared(Supervisor.serve)
            Supervisor.serve = serve  # type: ignore[method-assign,assignment]
            Listener.receive = received  # type: ignore[method-assign,assignment] # this process ends
            for name in ("answer", "go_on"):
                setattr(Listener, name, _followed_by(note, getattr(Listener, name)))
            sys.addaudithook(count)
        be_supervisor(duty)

    monkeypatch.setattr(keeping, "be_supervisor", be)
    return lambda: int.from_bytes(memory[:], "little")


def _prepared(serve: Callable[[Supervisor], NoReturn]) -> Callable[[Supervisor], NoReturn]:
    """It knows the pool's objects, as after a quiet moment: the steps are those of the call."""

    def serve_prepared(self: Supervisor) -> NoReturn:
        self._prepare()
        serve(self)

    return serve_prepared


def _followed_by(act: Callable[[], None], function: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: object, **more: object) -> None:
        function(*arguments, **more)
        act()

    return call


def _write() -> str:
    fd = os.open("/conf", os.O_WRONLY)
    os.write(fd, b"mine")
    os.close(fd)
    return "done"


def _rewrite() -> str:
    fd = os.open("/conf", os.O_WRONLY | os.O_TRUNC)
    os.write(fd, b"mine")
    os.close(fd)
    return "done"


def _unlink() -> str:
    os.unlink("/conf")
    return "done"


def _rename() -> str:
    os.rename("/conf", "/moved")
    return "done"


ACTS: dict[str, tuple[Callable[[], str], dict[str, bytes]]] = {
    "write": (_write, {"conf": b"mine" + CONTENT[4:]}),
    "rewrite": (_rewrite, {"conf": b"mine"}),
    "unlink": (_unlink, {}),
    "rename": (_rename, {"moved": CONTENT}),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ACTS)
def test_a_call_is_carried_out_whenever_the_supervisor_dies(
    site: Site, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    act, expected = ACTS[name]
    killed = 0
    lived: list[int] = []
    for steps in range(1 + len(name) % _STRIDE, _MOST_STEPS, _STRIDE):
        with monkeypatch.context() as patch, shared_file(site, "conf") as shared:
            answered_after = _die_after(steps, patch)
            ran = Ran()
            answer = in_guest(site.pool, site.root("web"), act, ran=ran)
            was_killed = any("was killed" in note for note in ran.notes)
            killed += was_killed
            assert answer == "done", steps
            found = {
                path.name: path.read_bytes()
                for path in site.root("web").iterdir()
                if path.is_file()
            }
            assert found == expected, steps
            assert shared.is_untouched(), steps
            assert is_immutable(shared.object), steps
            assert not list((site.pool / "stage").glob("*/*/*")), steps
            _tidy(site, shared)
        # One that dies after its answer may not be missed before the guest has ended.
        if answered_after():
            lived.append(answered_after())
        assert was_killed or answered_after(), steps
        if len(lived) > 2:
            break
    assert len(lived) > 2, "there are more steps"
    assert killed * _STRIDE >= min(lived) - _STRIDE


def _tidy(site: Site, shared: Shared) -> None:
    """Nothing is left for the next round."""
    for path in (*shared.object.parent.iterdir(), *site.root("web").iterdir()):
        if path.is_file():
            subprocess.run(["chattr", "-i", path], check=True)
            path.unlink()
    for path in site.root("db").iterdir():
        if path.is_file():
            path.unlink()
