"""Two machines that a wire joins: network namespaces with a veth pair, each with its own sshd.

They share this machine's processor and one file system; each has a CONFDIR, a VDIRBASE and a pool
of its own. What goes over the wire is read from the counters of its device.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.calls import BenchError, call
from tests.fixtures.filesystems import Filesystem, Site, make_site
from tests.fixtures.sshd import Server, run_sshd

_DEVICE: Final = "wire"
_HERE: Final = "10.213.7.1"
THERE: Final = "10.213.7.2"
_BURST: Final = "256kb"
_LATENCY: Final = "50ms"


@dataclass(frozen=True, slots=True)
class Wire:
    """The two machines. Programs are started on the one that is `here`."""

    namespaces: tuple[str, str]
    here: Site
    there: Site
    server: Server

    def limit(self, rate: str) -> None:
        """Let the wire carry `rate` (as tc(8) writes it) each way; "" is no limit."""
        for namespace in self.namespaces:
            tc = ["ip", "netns", "exec", namespace, "tc", "qdisc"]
            with suppress(BenchError):
                call(*tc, "del", "dev", _DEVICE, "root")
            if rate:
                shape = ["rate", rate, "burst", _BURST, "latency", _LATENCY]
                call(*tc, "add", "dev", _DEVICE, "root", "tbf", *shape)

    def command(self, *words: str | Path) -> list[str]:
        """The words, run on the machine that is here."""
        return ["ip", "netns", "exec", self.namespaces[0], *(os.fspath(word) for word in words)]

    def count_bytes(self) -> int:
        """Bytes on the wire so far, both ways, with all headers."""
        script = f"cat /sys/class/net/{_DEVICE}/statistics/[rt]x_bytes"
        return sum(int(line) for line in call(*self.command("sh", "-c", script)).split())

    def environment(self) -> dict[str, str]:
        places = {
            "VSERVER_CONFDIR": self.here.confdir,
            "VSERVER_VDIRBASE": self.here.vdirbase,
            "VSERVER_RUNDIR": self.here.rundir,
        }
        return {**os.environ, **{name: os.fspath(path) for name, path in places.items()}}

    def ssh(self) -> str:
        """ssh(1) with what it needs to get there, as `rsync -e` takes it."""
        known = self.server.folder / "known"
        known.write_text(f"{THERE} {self.server.public_key}\n")
        options: list[str | Path] = [
            "-F",
            "none",
            "-i",
            self.server.key,
            "-o",
            f"UserKnownHostsFile={known}",
        ]
        return " ".join(["ssh", *(os.fspath(option) for option in options)])


@contextmanager
def joined(mount: Path) -> Iterator[Wire]:
    """Two machines with their guests below `mount`; nothing of them is left at the end."""
    names = tuple(f"vbench-{os.getpid()}-{side}" for side in ("here", "there"))
    sites = []
    for name in ("here", "there"):
        (mount / name).mkdir()
        sites.append(make_site(Filesystem("", mount, mount / name)))
    with ExitStack() as stack:
        for name in names:
            call("ip", "netns", "add", name)
            stack.callback(_drop, name)
        peer = ["peer", "name", _DEVICE, "netns", names[1]]
        call("ip", "link", "add", _DEVICE, "netns", names[0], "type", "veth", *peer)
        for name, address in zip(names, (_HERE, THERE), strict=True):
            ip = ["ip", "-n", name]
            call(*ip, "address", "add", f"{address}/24", "dev", _DEVICE)
            call(*ip, "link", "set", _DEVICE, "up")
            call(*ip, "link", "set", "lo", "up")
        server = stack.enter_context(
            run_sshd(mount / "sshd", address=THERE, port=22, namespace=names[1])
        )
        yield Wire((names[0], names[1]), sites[0], sites[1], server)


def _drop(name: str) -> None:
    with suppress(BenchError):
        call("ip", "netns", "delete", name)
