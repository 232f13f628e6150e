"""Two guests side by side: none sees, signals, traces or reaches what is the other's.

Each thing is there for its own guest and for the host, who is the witness, and not for the other.
"""

import errno
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fixtures.guestconfig import Keys
from tests.fixtures.intruders import add_intruder, attack, attacking
from tests.fixtures.probes import need
from tests.fixtures.vservers import Host, host_for_guests, is_alive
from tests.fixtures.witness import children_of

_NETWORKS: Final[dict[str, Keys]] = {"bound": {}, "own": {"spaces/net": True}}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from host_for_guests(tmp_path, monkeypatch)


@pytest.fixture(params=list(_NETWORKS))
def pair(host: Host, request: pytest.FixtureRequest) -> Host:
    """A host with the guests `victim` and `web`, which both run; some tests want the network."""
    for name in ("victim", "web"):
        add_intruder(host, name, _NETWORKS[request.param])
    for name in ("victim", "web"):
        host.vserver(name, "start")
    return host


_KEEP: Final = """
    print("ready", flush=True)
    time.sleep(1000)
"""


def test_no_process_of_another_is_seen_or_signalled(pair: Host) -> None:
    with attacking("victim", _KEEP) as client:
        init = pair.init_pid("victim")
        (stub,) = children_of(client.pid)
        victims = [init, *children_of(stub)]
        assert len(victims) == 2
        told = attack(
            pair,
            "web",
            """
            pids = json.loads(sys.argv[1])
            found = {}
            for pid in pids:
                found[pid] = [
                    errno_of(lambda: os.kill(pid, 0)), errno_of(lambda: os.kill(pid, 9)),
                    opens(f"/proc/{pid}/mem", os.O_RDWR), errno_of(lambda: os.pidfd_open(pid)),
                    call({"x86_64": 101}.get(os.uname().machine, 117), 16, pid, 0, 0)[1],
                    errno_of(lambda: os.sched_setaffinity(pid, {0})),
                    errno_of(lambda: os.setpriority(os.PRIO_PROCESS, pid, 19)),
                ]
            errno_of(lambda: os.kill(-1, 9))
            tell([found, sum(name.isdigit() for name in os.listdir("/proc"))])
            """,
            json.dumps(victims),
        )
        gone = [*[errno.ESRCH] * 2, errno.ENOENT, *[errno.ESRCH] * 4]
        assert told[0] == {str(pid): gone for pid in victims}
        assert told[1] == 2
        assert all(is_alive(pid) for pid in victims)


def test_no_ipc_of_another_is_reached(pair: Host) -> None:
    make = """
        libc = ctypes.CDLL(None, use_errno=True)
        made = [libc.shmget(4711, 4096, 0o1666), libc.semget(4711, 1, 0o1666),
                libc.msgget(4711, 0o1666)]
        Path("/dev/shm/there").write_text("secret")
        os.close(os.open("/dev/mqueue/there", os.O_CREAT | os.O_RDWR, 0o666))
        tell(made)
    """
    made = attack(pair, "victim", make)
    assert min(made) >= 0
    look = """
        libc = ctypes.CDLL(None, use_errno=True)
        tell([[libc.shmget(4711, 0, 0), libc.semget(4711, 0, 0), libc.msgget(4711, 0)],
              os.path.exists("/dev/shm/there"), os.listdir("/dev/mqueue")])
    """
    assert attack(pair, "victim", look) == [made, True, ["there"]]
    assert attack(pair, "web", look) == [[-1] * 3, False, []]
    assert not Path("/dev/shm/there").exists()  # noqa: S108


@need("abstract_hooks")
def test_no_socket_of_another_is_reached(pair: Host) -> None:
    serve = """
        port, name = int(sys.argv[1]), "\\0" + sys.argv[2]
        web = socket.create_server(("127.0.0.1", port))
        plain = socket.socket(socket.AF_UNIX)
        plain.bind("/tmp/socket")
        hidden = socket.socket(socket.AF_UNIX)
        hidden.bind(name)
        for server in (web, plain, hidden):
            server.listen()
        print("ready", flush=True)
        time.sleep(1000)
    """
    ask = """
        port, name = int(sys.argv[1]), "\\0" + sys.argv[2]
        def reach(family, address):
            with socket.socket(family) as made:
                made.settimeout(60)
                return errno_of(lambda: made.connect(address))
        tell([reach(socket.AF_INET, ("127.0.0.1", port)), reach(socket.AF_UNIX, "/tmp/socket"),
              reach(socket.AF_UNIX, name)])
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        words = (str(probe.getsockname()[1]), os.urandom(8).hex())
    with attacking("victim", serve, *words):
        assert attack(pair, "victim", ask, *words) == [0, 0, 0]
        refused = [errno.ECONNREFUSED, errno.ENOENT, errno.ECONNREFUSED]
        assert attack(pair, "web", ask, *words) == refused


def test_no_file_of_another_is_reached(pair: Host) -> None:
    pair.inside("victim", "/bin/sh", "-c", "echo secret >/root/key; mkfifo /root/fifo")
    told = attack(
        pair,
        "web",
        """
        own = os.stat("/")
        tops = {os.path.join(base, name) for base, names, _ in os.walk("/") for name in names
                if name == "victim"}
        above = os.stat("/..")
        tell([sorted(tops), (own.st_dev, own.st_ino) == (above.st_dev, above.st_ino),
              os.path.exists("/root/key"), [line.split()[3] for line in open("/proc/1/mountinfo")
                                            if "victim" in line]])
        """,
    )
    assert told == [[], True, False, []]
    assert (pair.etc.vdirbase / "victim/root/key").read_text() == "secret\n"


def test_no_lock_or_name_of_another_is_seen(pair: Host) -> None:
    pair.inside("victim", "/bin/sh", "-c", "echo renamed >/proc/sys/kernel/hostname")
    assert pair.inside("victim", "/bin/hostname") == "renamed\n"
    assert pair.inside("web", "/bin/hostname") == "web\n"
    assert os.uname().nodename != "renamed"
    told = attack(
        pair, "web", 'tell([Path("/proc/locks").read_text(), sorted(os.listdir("/dev/pts"))])'
    )
    assert told == ["", ["0", "ptmx"]]


def test_no_terminal_of_another_is_opened(pair: Host) -> None:
    told = attack(
        pair,
        "web",
        """
        master, slave = os.openpty()
        number = os.ttyname(slave)
        before = os.stat("/dev/pts").st_dev
        tell([number, os.fstat(slave).st_dev == before, sorted(os.listdir("/dev/pts"))])
        """,
    )
    assert told == ["/dev/pts/1", True, ["0", "1", "ptmx"]]


def test_signals_of_another_session_stay_inside(pair: Host) -> None:
    """kill(-1) reaches all of the guest's own processes, and nobody else's."""
    witnesses = [pair.init_pid("victim"), pair.monitor_pid("victim"), pair.monitor_pid("web")]
    done = pair.try_vserver("web", "exec", "/bin/sh", "-c", "kill -KILL -1; echo alive")
    assert done.returncode in (0, 128 + signal.SIGKILL)
    assert all(is_alive(pid) for pid in witnesses)
