"""newvserver: a dialog that ends in a guest."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.filesystems import thaw_below
from tests.fixtures.guestconfig import write_program
from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    SLEEPER,
    Host,
    free_number,
    host_for_guests,
    is_alive,
    run_installed,
)

pytestmark = need("root")

_ADDRESS = f"10.78.{os.getpid() % 250}.7"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    for host in host_for_guests(tmp_path, monkeypatch):
        yield host
        host.stop_all()
        thaw_below(tmp_path)


def dialog(*words: str, answers: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """`newvserver` as installed, with these lines typed; it must end with `code`."""
    return run_installed("newvserver", *words, code=code, stdin=answers)


def test_a_dialog_makes_a_guest_that_runs(host: Host) -> None:
    root = host.add_busybox("first")
    (root / "sbin/init").unlink()  # it would take its time to stop
    write_program(root / "sbin/init", "exec sleep 1000")
    host.set_key("first", "fstab", "none /proc proc defaults 0 0")
    answers = ["first", "no/name", "web", "flying", "", "", "www.example", f"lo:{_ADDRESS}/33"]
    answers += [f"lo:{_ADDRESS}/32", "", "y", "y", "y"]
    host.names.append("web")
    (host.etc.confdir / ".defaults").mkdir()
    (host.etc.confdir / ".defaults/context.next").write_text(free_number())
    done = dialog(answers="".join(f"{line}\n" for line in answers))
    for said in (
        "guest first is there already",
        "cannot be a guest's name",
        "there is no method 'flying'",
        "Clone of which guest [first]:",
        "Host name [web]:",
        f"# vserver web build -m clone --hostname www.example --interface lo:{_ADDRESS}/32 -- "
        "-s first\n",
        "web: built by clone in ",
    ):
        assert said in done.stdout, done.stdout
    assert done.stdout.endswith("\nweb: started\n")
    assert is_alive(host.init_pid("web"))
    assert host.inside("web", "hostname") == "www.example\n"
    folder = host.etc.confdir / "web"
    assert (folder / "apps/init/mark").read_text() == "default\n"
    assert (folder / "interfaces/0/ip").read_text() == f"{_ADDRESS}\n"


def test_without_questions_what_is_not_said_is_the_default(host: Host) -> None:
    grow = "mkdir bin; cp /bin/busybox bin; ln -s busybox bin/sh"
    done = dialog("web", "-y", "-m", "skeleton", "--", "sh", "-c", grow)
    assert "\nweb: `vserver web start` starts it\n" in done.stdout
    root = host.etc.vdirbase / "web"
    assert (root / "bin/busybox").exists()
    assert (host.etc.confdir / "web/uts/nodename").read_text() == "web\n"
    assert not (host.etc.confdir / "web/apps/init/mark").exists()
    assert "no default" in dialog("-y", code=1).stderr
    assert "is there already" in dialog("web", "-y", "-m", "skeleton", code=1).stderr
    assert "is no folder" in dialog("x", "-y", "-m", "rsync", "-s", "/no/such", code=1).stderr


def test_no_answer_and_no_build_nothing(host: Host) -> None:
    host.etc.add_guest("first", SLEEPER)
    assert "interrupted" in dialog("web", "-m", "skeleton", answers="", code=130).stderr
    done = dialog("web", "-m", "skeleton", "--no-interface", answers="\nn\nn\nn\n")
    assert done.stdout.endswith("nothing is built\n")
    assert sorted(path.name for path in host.etc.confdir.iterdir()) == ["first"]
