"""What of pyroute2 is loaded for a guest's addresses."""

import subprocess
import sys

import pytest

_LOADED = """
import sys
from vrun import rtnetlink
rtnetlink.load()
{}
print(*{{"asyncio", "multiprocessing", "pyroute2.ndb"}}.intersection(sys.modules))
"""


def _loaded(*lines: str) -> list[str]:
    program = _LOADED.format("\n".join(lines))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_messages_of_addresses_come_alone() -> None:
    assert _loaded("from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg") == []


@pytest.mark.parametrize("first", ["", "from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg"])
def test_what_devices_need_can_be_loaded_too(first: str) -> None:
    found = _loaded(first, "from pyroute2.iproute.linux import IPRoute", "IPRoute().close()")
    assert "pyroute2.ndb" not in found


def test_a_package_that_is_there_stays() -> None:
    assert "pyroute2.ndb" in _loaded("import pyroute2.ndb.main", "pyroute2.ndb.main.NDB")
