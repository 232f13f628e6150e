"""Where a copy is to stand, and what stands there already."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import Tool
from tests.fixtures.filesystems import Site
from tests.fixtures.probes import need, on
from tests.fixtures.sshd import Machines, two_machines
from tests.fixtures.trees import File

pytestmark = [need("root", "immutable", "lease", "sshd"), on("ext4")]


@pytest.fixture
def machines(site: Site) -> Iterator[Machines]:
    with two_machines(site) as found:
        found.here.add_guest("web", [File("file", b"content " * 99)])
        yield found


def test_a_target_that_is_a_mount_point_is_refused_before_a_byte(
    machines: Machines, tool: Tool
) -> None:
    """A new volume, empty, that the administrator has mounted where the copy is to be."""
    target = machines.there.root("web")
    target.mkdir()
    subprocess.run(["mount", "--bind", target, target], check=True)
    try:
        done = tool("vserver-copy", *machines.options(), "--json", "web", "127.0.0.1:")
        assert done.returncode == 2, done.stderr
        assert "mounted" in done.stderr
        assert not any(machines.there.vdirbase.glob("web.copy-*"))
    finally:
        subprocess.run(["umount", target], check=True)


def test_a_dry_run_to_a_machine_that_has_no_guest_yet(machines: Machines, tool: Tool) -> None:
    machines.there.vdirbase.rmdir()
    done = tool("vserver-copy", *machines.options(), "-n", "--json", "web", "127.0.0.1:")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files_sent"] == 1
    assert not machines.there.vdirbase.exists()


def test_what_is_left_of_the_old_tree_is_said_here(machines: Machines, tool: Tool) -> None:
    """The other machine's log goes nowhere."""
    root = machines.here.root("web")
    (root / "var/log").mkdir(parents=True)
    (root / "var/log/syslog").write_text("log line\n" * 99)
    tool("vserver-copy", *machines.options(), "-q", "web", "127.0.0.1:")
    kept = machines.there.root("web") / "var/log/syslog"
    subprocess.run(["chattr", "+i", kept], check=True)
    (root / "var/log/syslog").write_text("another\n" * 99)
    done = tool("vserver-copy", *machines.options(), "-q", "--refresh", "web", "127.0.0.1:")
    left = [*machines.there.vdirbase.glob("web.copy-*/**/syslog")]
    for path in left:
        subprocess.run(["chattr", "-i", path], check=True)
    assert done.returncode == 0, done.stderr
    assert left
    assert "tree/syslog: the old version is left" in done.stderr


def test_the_tree_of_a_guest_of_another_name_is_refused(machines: Machines, tool: Tool) -> None:
    """Its configuration was renamed, the tree was not, and cron goes on with the refresh."""
    root = machines.there.root("web")
    root.mkdir()
    (root / "data").write_text("another guest's")
    machines.there.register("renamed", root)
    done = tool("vserver-copy", *machines.options(), "-q", "--refresh", "web", "127.0.0.1:")
    assert (root / "data").exists(), "the tree of guest `renamed` was replaced"
    assert done.returncode == 2, done.stderr
    assert "renamed" in done.stderr
