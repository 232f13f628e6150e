"""ulimits/, rlimits/, sched/, cpuset/, cgroup/ and dlimits/: what a guest is held to."""

import resource
from pathlib import Path

import pytest

from tests.fixtures.guestconfig import Configuration, Keys, configure
from vrun.errors import ConfigInvalid
from vrun.spec import (
    CgroupFile,
    CgroupSettings,
    ContextLimits,
    CpuLimit,
    Cpuset,
    DiskLimit,
    Rlimit,
)

INFINITE = resource.RLIM_INFINITY


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    return configure(tmp_path, monkeypatch)


def warned(etc: Configuration, name: str = "web") -> list[str]:
    """The keys that warnings are about, relative to the guest's folder."""
    prefix = f"{etc.confdir / name}/"
    return [line.split(": ")[0].removeprefix(prefix) for line in etc.spec(name).warnings]


# --- ulimits/


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1024", 1024),
        ("0x400", 1024),
        ("02000", 1024),
        ("2k", 2000),
        ("2K", 2048),
        ("3m", 3_000_000),
        ("3M", 3 << 20),
        ("inf", INFINITE),
        ("infinity", INFINITE),
        ("0", 0),
    ],
)
def test_limits_have_units_of_1000_and_1024(etc: Configuration, text: str, value: int) -> None:
    [limit] = etc.spec_of({"ulimits/nofile": text}).rlimits
    assert limit == Rlimit(resource.RLIMIT_NOFILE, "nofile", value, value)


@pytest.mark.parametrize(
    ("keys", "soft", "hard"),
    [
        ({"core": "100"}, 100, 100),
        ({"core.soft": "100"}, 100, None),
        ({"core.hard": "100"}, None, 100),
        ({"core": "100", "core.soft": "50"}, 50, 100),
        ({"core.soft": "100", "core.hard": "50"}, 50, 50),
        ({"core.soft": "inf", "core.hard": "50"}, 50, 50),
        ({"core.soft": "50", "core.hard": "inf"}, 50, INFINITE),
        ({"core.soft": "50", "core.hard": "0"}, 0, 0),
    ],
)
def test_a_soft_limit_is_never_above_the_hard_one(
    etc: Configuration, keys: dict[str, str], soft: int | None, hard: int | None
) -> None:
    [limit] = etc.spec_of({f"ulimits/{key}": text for key, text in keys.items()}).rlimits
    assert (limit.soft, limit.hard) == (soft, hard)


def test_limits_that_the_kernel_gave_up_are_named(etc: Configuration) -> None:
    etc.add_guest("web", {"ulimits/rss": "1", "ulimits/locks": "1", "ulimits/nofiles": "1"})
    assert etc.spec().rlimits == ()
    assert warned(etc) == ["ulimits/nofiles", "ulimits/locks", "ulimits/rss"]


def test_processes_are_counted_by_guest_or_by_user(etc: Configuration) -> None:
    etc.add_guest("one", {"ulimits/nproc": "100", "cflags": "nproc"})
    etc.add_guest("other", {"ulimits/nproc": "100"})
    assert (etc.spec("one").rlimits, etc.spec("one").limits.pids_max) == ((), 100)
    assert warned(etc, "one") == []
    assert etc.spec("other").rlimits == (Rlimit(resource.RLIMIT_NPROC, "nproc", 100, 100),)
    assert etc.spec("other").limits.pids_max is None
    assert warned(etc, "other") == ["ulimits/nproc"]


# --- rlimits/


@pytest.mark.parametrize(
    ("keys", "limits"),
    [
        ({"rss": "1000"}, ContextLimits(memory_max=4_096_000)),
        ({"rss": "1K", "rss.soft": "512"}, ContextLimits(memory_max=4 << 20, memory_high=2 << 20)),
        ({"rss.soft": "512"}, ContextLimits(memory_high=2 << 20)),
        (
            {"rss.min": "256", "rss.hard": "1024"},
            ContextLimits(memory_max=4 << 20, memory_low=1 << 20),
        ),
        ({"rss": "inf"}, ContextLimits()),
        ({"rss": "inf", "rss.hard": "1024"}, ContextLimits(memory_max=4 << 20)),
        ({"nproc": "50"}, ContextLimits(pids_max=50)),
        ({"nproc.hard": "50", "nproc.soft": "10"}, ContextLimits(pids_max=50)),
        ({"nproc": "inf"}, ContextLimits()),
    ],
)
def test_totals_are_memory_in_pages_and_processes(
    etc: Configuration, keys: dict[str, str], limits: ContextLimits
) -> None:
    spec = etc.spec_of({f"rlimits/{key}": text for key, text in keys.items()})
    assert (spec.limits, spec.warnings) == (limits, ())


@pytest.mark.parametrize(
    "name",
    [
        *("as", "anon", "shmem", "memlock", "nofile", "openfd", "nsock", "locks", "msgqueue"),
        *("nsems", "semary", "dentry", "cpu", "fsize", "data", "stack", "core"),
    ],
)
def test_totals_that_the_kernel_does_not_keep_are_named(etc: Configuration, name: str) -> None:
    etc.add_guest("web", {f"rlimits/{name}.hard": "100", "rlimits/unheard-of": "1"})
    etc.add_guest("free", {f"rlimits/{name}": "inf"})
    assert warned(etc) == ["rlimits/unheard-of", f"rlimits/{name}"]
    assert warned(etc, "free") == []


def test_the_smaller_number_of_processes_counts(etc: Configuration) -> None:
    keys: Keys = {"ulimits/nproc": "100", "cflags": "nproc", "rlimits/nproc": "70"}
    assert etc.spec_of(keys).limits.pids_max == 70


# --- sched/ and schedule


@pytest.mark.parametrize(
    ("keys", "flags", "cpu"),
    [
        (
            {"fill-rate": "7", "interval": "32", "tokens-max": "500"},
            "sched_hard",
            CpuLimit(fill_rate=7, interval=32, burst_ticks=500),
        ),
        ({"fill-rate": "2"}, "sched_hard", CpuLimit(fill_rate=2, interval=4)),
        ({}, "sched_hard", CpuLimit(fill_rate=1, interval=4)),
        ({"fill_rate": "3", "interval": "5"}, "sched_hard", CpuLimit(fill_rate=3, interval=5)),
        ({}, "virt_mem", CpuLimit()),
    ],
)
def test_the_token_bucket_counts_with_its_flag(
    etc: Configuration, keys: dict[str, str], flags: str, cpu: CpuLimit
) -> None:
    sched = {f"sched/{key}": text for key, text in keys.items()}
    assert etc.spec_of({**sched, "cflags": flags}).cpu == cpu


@pytest.mark.parametrize(
    ("key", "bias", "nice"),
    [("priority-bias", "5", 5), ("prio-bias", "-3", -3), ("priority_bias", "100", 19)],
)
def test_the_priority_counts_with_its_flag(
    etc: Configuration, key: str, bias: str, nice: int
) -> None:
    spec = etc.spec_of({f"sched/{key}": bias, "cflags": "sched_prio"})
    assert spec.cpu == CpuLimit(weight_nice=nice)


def test_a_bucket_without_its_flag_is_named(etc: Configuration) -> None:
    etc.add_guest("web", {"sched/fill-rate": "7"})
    assert etc.spec().cpu == CpuLimit()
    assert warned(etc) == ["sched"]


def test_parts_of_the_bucket_that_cannot_be_had_are_named(etc: Configuration) -> None:
    keys = {
        f"sched/{key}": "1"
        for key in ("tokens", "tokens-min", "fill-rate2", "interval2", "idle-time", "speed")
    }
    etc.add_guest("web", {**keys, "sched/cpu0/cpu-id": "0", "cflags": "sched_hard"})
    assert set(warned(etc)) == {*keys, "sched/cpu0"}


def test_the_obsolete_schedule_has_six_lines(etc: Configuration) -> None:
    etc.add_guest("web", {"schedule": "3\n10\n500\n100\n1000\n2", "cflags": "sched_hard"})
    assert etc.spec().cpu == CpuLimit(fill_rate=3, interval=10, burst_ticks=1000)
    assert warned(etc) == ["schedule"]


def test_the_folder_replaces_the_obsolete_schedule(etc: Configuration) -> None:
    keys: Keys = {"schedule": "nonsense", "sched/interval": "8", "cflags": "sched_hard"}
    assert etc.spec_of(keys).cpu == CpuLimit(fill_rate=1, interval=8)


# --- cpuset/ and cgroup/


@pytest.mark.parametrize(
    ("keys", "cpuset"),
    [
        ({}, None),
        ({"cpuset": False}, None),
        ({"cpuset/cpus": "0-3, 6"}, Cpuset(name=None, cpus="0-3,6", mems=None)),
        (
            {
                "cpuset/name": "webs",
                "cpuset/cpus": "1",
                "cpuset/mems": "0",
                "cpuset/nocreate": True,
            },
            Cpuset(name="webs", cpus="1", mems="0", create=False),
        ),
        (
            {"cpuset/cpus": "1", "cpuset/cpu_exclusive": "1", "cpuset/mems_exclusive": "0"},
            Cpuset(name=None, cpus="1", mems=None, cpu_exclusive=True),
        ),
        (
            {"cpuset/cpus": "1", "cpuset/cpus_exclusive": "1", "cpuset/mem_exclusive": "1"},
            Cpuset(name=None, cpus="1", mems=None, cpu_exclusive=True, mem_exclusive=True),
        ),
    ],
)
def test_a_cpuset_is_read_in_both_spellings(
    etc: Configuration, keys: Keys, cpuset: Cpuset | None
) -> None:
    assert etc.spec_of(keys).cpuset == cpuset


def test_a_guests_own_cgroup_settings_replace_those_of_all(etc: Configuration) -> None:
    defaults = etc.set_defaults(
        {
            "cgroup/name": "all",
            "cgroup/base": "/guests/",
            "cgroup/cpu.shares": "100",
            "cgroup/mnt": "/dev/cgroup",
            "cgroup/per-ss": True,
            "cgroup/inherit": "cpuset.mems",
        }
    )
    own = etc.add_guest("own", {"cgroup/memory.max": "1G", "cgroup/README": "x"})
    etc.add_guest("plain")
    etc.add_guest("none", {"nocgroup": True})
    inherit = ("cpuset.mems",)
    files = (CgroupFile("cpu.shares", "100\n", f"{defaults}/cgroup/cpu.shares"),)
    assert etc.spec("plain").cgroup == CgroupSettings(
        name="all", base="guests", inherit=inherit, files=files
    )
    assert etc.spec("own").cgroup == CgroupSettings(
        base="guests",
        inherit=inherit,
        files=(CgroupFile("memory.max", "1G\n", f"{own}/cgroup/memory.max"),),
    )
    assert etc.spec("none").cgroup == CgroupSettings(base="guests", inherit=inherit)
    assert warned(etc, "own") == ["cgroup/README"]


@pytest.mark.parametrize("key", ["tasks", "cgroup.procs", "cgroup.kill", "notes.txt~", "a b.c"])
def test_what_is_no_limit_is_never_written_to_a_group(etc: Configuration, key: str) -> None:
    assert etc.spec_of({f"cgroup/{key}": "1"}).cgroup.files == ()


# --- dlimits/


def dlimit(**keys: str) -> Keys:
    """A complete entry dlimits/0, changed by `keys`."""
    whole = {"directory": "/srv", "space_total": "2000", "inodes_total": "100", "reserved": "5"}
    return {f"dlimits/0/{key}": text for key, text in {**whole, **keys}.items()}


@pytest.mark.parametrize(
    ("keys", "space", "inodes", "amounts"),
    [
        ({}, 2_048_000, 100, "2000 KiB and 100 files"),
        ({"inodes_total": "-1"}, 2_048_000, None, "2000 KiB"),
        ({"space_total": "-1"}, None, 100, "100 files"),
        ({"space_total": "-1", "inodes_total": "-1"}, None, None, ""),
    ],
)
def test_a_disk_limit_is_in_kilobytes(
    etc: Configuration,
    keys: dict[str, str],
    space: int | None,
    inodes: int | None,
    amounts: str,
) -> None:
    spec = etc.spec_of({"context": "1001", **dlimit(**keys)})
    where = f"{etc.confdir}/web/dlimits/0"
    (limit,) = spec.disk_limits
    assert limit == DiskLimit("0", Path("/srv"), space, inodes, 5, where)
    assert limit.amounts == amounts
    assert warned(etc) == []


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({**dlimit(), "context": True}, "dlimits"),
        ({**dlimit(reserved=""), "context": "1001"}, "dlimits/0/reserved"),
    ],
)
def test_a_disk_limit_that_cannot_be_set_is_named(etc: Configuration, keys: Keys, key: str) -> None:
    etc.add_guest("web", keys)
    assert etc.spec().disk_limits == ()
    assert warned(etc) == [key]


def test_a_disk_limit_that_is_disabled_is_not_read(etc: Configuration) -> None:
    spec = etc.spec_of({**dlimit(space_total="lots"), "dlimits/0/disabled": True})
    assert (spec.disk_limits, spec.warnings) == ((), ())


MISTAKES: list[tuple[Keys, str]] = [
    ({"ulimits/core": "12G"}, r"/web/ulimits/core:1: '12G' is no limit"),
    ({"ulimits/core.hard": "-1"}, r"/web/ulimits/core.hard:1: '-1' is no limit"),
    ({"rlimits/rss.soft": "1 K"}, r"/web/rlimits/rss.soft:1"),
    ({"rlimits/as": "x"}, r"/web/rlimits/as:1"),
    ({"sched/fill-rate": "0", "cflags": "sched_hard"}, r"/web/sched/fill-rate:1: 0 is not in"),
    ({"sched/interval": "x"}, r"/web/sched/interval:1: 'x' is no number"),
    ({"schedule": "1\n2\n3"}, r"/web/schedule: has 3 lines, and six belong"),
    ({"schedule": "1\n2\n3\n4\nx\n6"}, r"/web/schedule:5: 'x' is no number"),
    ({"cpuset/cpus": "all"}, r"/web/cpuset/cpus:1: 'all' is no list"),
    ({"cpuset/name": "../x"}, r"/web/cpuset/name:1: '../x' cannot be the path"),
    ({"cpuset/name": "a", "cpuset/cpu_exclusive": "yes"}, r"/web/cpuset/cpu_exclusive:1"),
    ({"cgroup/name": "a/../../b"}, r"/web/cgroup/name:1: 'a/../../b' cannot be the path"),
    ({**dlimit(directory="srv"), "context": "9"}, r"/web/dlimits/0/directory:1: 'srv' is no abs"),
    ({**dlimit(space_total="2G"), "context": "9"}, r"/web/dlimits/0/space_total:1"),
    ({**dlimit(reserved="101"), "context": "9"}, r"/web/dlimits/0/reserved:1"),
]


@pytest.mark.parametrize(("keys", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_file_and_line(
    etc: Configuration, keys: Keys, message: str
) -> None:
    etc.add_guest("web", keys)
    with pytest.raises(ConfigInvalid, match=message):
        etc.spec()
