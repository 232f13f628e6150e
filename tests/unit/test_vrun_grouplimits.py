"""Settings of one version of control groups in the words of the other."""

import pytest

from vrun.grouplimits import equals, parse_cpus
from vrun.spec import CgroupFile


@pytest.mark.parametrize(
    ("name", "text", "equal"),
    [
        ("memory.limit_in_bytes", "512M\n", ("memory.max", "512M")),
        ("memory.limit_in_bytes", "-1", ("memory.max", "max")),
        ("memory.max", "max\n", ("memory.limit_in_bytes", "-1")),
        ("memory.high", "1048576", ("memory.soft_limit_in_bytes", "1048576")),
        ("cpu.shares", "1024", ("cpu.weight", "100")),
        ("cpu.shares", "2", ("cpu.weight", "1")),
        ("cpu.shares", "262144", ("cpu.weight", "10000")),
        ("cpu.weight", "100", ("cpu.shares", "1024")),
        ("cpu.weight", "1", ("cpu.shares", "10")),
        ("cpu.cfs_quota_us", "50000", ("cpu.max", "50000 100000")),
        ("cpu.cfs_quota_us", "-1", ("cpu.max", "max 100000")),
        ("cpu.max", "25000 50000", ("cpu.cfs_quota_us", "50000")),
        ("cpu.max", "max", ("cpu.cfs_quota_us", "-1")),
        ("cpu.max", "30000", ("cpu.cfs_quota_us", "30000")),
    ],
)
def test_a_setting_has_an_equal(name: str, text: str, equal: tuple[str, str]) -> None:
    assert list(equals(CgroupFile(name, text, "cgroup/x"))) == [equal]


@pytest.mark.parametrize(
    ("name", "text"), [("devices.deny", "a"), ("cpu.shares", "many"), ("memory.stat", "1")]
)
def test_what_has_no_equal_is_not_guessed(name: str, text: str) -> None:
    assert list(equals(CgroupFile(name, text, "cgroup/x"))) == []


def test_lists_of_processors() -> None:
    assert list(parse_cpus("0-3,6")) == [0, 1, 2, 3, 6]
    assert list(parse_cpus("1")) == [1]
