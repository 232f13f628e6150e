"""Where control groups are, from /proc/self/mountinfo of several kinds of machine."""

from pathlib import Path

import pytest

from vrun.errors import NotPermitted
from vrun.hierarchy import parse_mountinfo

_V1 = "33 24 0:29 / /sys/fs/cgroup/{0} rw,nosuid shared:9 - cgroup cgroup rw,{0}\n"


def test_a_host_of_v2_alone() -> None:
    text = (
        "24 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "31 24 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    found = parse_mountinfo(text)
    assert found.v2 == Path("/sys/fs/cgroup")
    assert dict(found.v1) == {}


def test_a_hybrid_host() -> None:
    text = (
        _V1.format("memory")
        + _V1.format("cpu,cpuacct")
        + "34 24 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
        + "38 24 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        + _V1.format("memory").replace("/sys/fs/cgroup", "/second")
    )
    found = parse_mountinfo(text)
    assert found.v2 == Path("/sys/fs/cgroup/unified")
    assert dict(found.v1) == {
        "memory": Path("/sys/fs/cgroup/memory"),
        "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "cpuacct": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "name=systemd": Path("/sys/fs/cgroup/systemd"),
    }


def test_a_mount_point_with_a_blank() -> None:
    found = parse_mountinfo("31 24 0:28 / /a\\040b\\134 rw - cgroup2 none rw\n")
    assert found.v2 == Path("/a b\\")


def test_a_host_of_v1_alone_is_told_what_to_mount() -> None:
    with pytest.raises(NotPermitted, match="no cgroup v2 hierarchy") as caught:
        parse_mountinfo(_V1.format("memory"))
    assert "mount -t cgroup2" in str(caught.value.hint)
