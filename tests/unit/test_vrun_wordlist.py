"""Lists of words read as the original reads them, and what a guest may do in the end."""

from pathlib import Path

import pytest

from tests.fixtures.guestconfig import Configuration, Keys, configure
from vrun import stock, wordlist
from vrun.errors import ConfigInvalid
from vrun.keys import Line
from vrun.wordlist import CAPABILITIES, CCAPS, CFLAGS, NCAPS, NFLAGS, SPACES, Table, read_words


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    return configure(tmp_path, monkeypatch)


def words(table: Table, *texts: str, default: str = "") -> set[str]:
    lines = [Line(f"list:{number}", text) for number, text in enumerate(texts, start=1)]
    return set(read_words(table, lines, frozenset(default.split())).words)


# --- how a list is read


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["chown"], {"chown"}),
        (["CAP_CHOWN"], {"chown"}),
        (["cap_Net_Raw,KILL"], {"net_raw", "kill"}),
        (["net_raw kill", "\tmknod"], {"net_raw", "kill", "mknod"}),
        (["kill", "~KILL"], set()),
        (["kill,!CAP_KILL"], set()),
        (["~kill", "kill"], {"kill"}),
        (["~~kill"], {"kill"}),
        (["~!~kill"], set()),
        (["^0"], {"chown"}),
        (["^13"], {"net_raw"}),
        (["^0x27"], {"bpf"}),
        (["0x3"], {"chown", "dac_override"}),
        (["3"], {"chown", "dac_override"}),
        (["010"], {"fowner"}),
        (["~0x1,3"], {"chown", "dac_override"}),
        (["3,~0x1"], {"dac_override"}),
        (["all", "~1"], set(CAPABILITIES.bits) - {"chown"}),
        (["ANY"], set(CAPABILITIES.bits)),
        (["kill,none"], {"kill"}),
        (["0"], set()),
        ([","], set()),
    ],
)
def test_words_are_read_in_every_spelling(texts: list[str], expected: set[str]) -> None:
    assert words(CAPABILITIES, *texts) == expected


@pytest.mark.parametrize(
    ("table", "text", "expected"),
    [
        (CCAPS, "utsname", "set_utsname"),
        (CCAPS, "VXC_RAW_ICMP", "raw_icmp"),
        (CCAPS, "ping", "raw_icmp"),
        (CCAPS, "remount", "secure_remount"),
        (CFLAGS, "info_lock", "lock"),
        (CFLAGS, "VXF_SCHED_HARD", "sched_hard"),
        (CFLAGS, "^17", "virt_uptime"),
        (CFLAGS, "secure", "hide_netif"),
        (NFLAGS, "remap_lback", "lback_remap"),
        (NFLAGS, "NXF_SINGLE_IP", "single_ip"),
        (NCAPS, "0x100", "raw_icmp"),
        (SPACES, "CLONE_NEWUSER", "newuser"),
        (SPACES, "0x40000000", "newnet"),
    ],
)
def test_each_table_has_its_prefix_bits_and_aliases(table: Table, text: str, expected: str) -> None:
    assert words(table, text) == {expected}


def test_a_group_stands_for_its_words() -> None:
    assert words(CFLAGS, "~default", default="virt_uptime nproc") == {"nproc"}


@pytest.mark.parametrize("text", ["fly", "cap_", "^41", "^64", "^", "0x", "1<<40", "09", "~", "#"])
def test_an_unknown_word_is_named_with_its_line(text: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"^list:2: "):
        words(CAPABILITIES, "kill", text)


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("chown", 0),
        ("setpcap", 8),
        ("net_raw", 13),
        ("sys_admin", 21),
        ("mknod", 27),
        ("setfcap", 31),
        ("mac_admin", 33),
        ("audit_read", 37),
        ("checkpoint_restore", 40),
    ],
)
def test_capabilities_are_numbered_as_the_kernel_does(word: str, number: int) -> None:
    assert CAPABILITIES.bits[word] == number


def test_every_capability_has_a_number() -> None:
    assert sorted(CAPABILITIES.bits.values()) == list(range(41))


# --- what a guest may do


def test_the_default_is_the_secure_set_without_ptrace_and_lease(etc: Configuration) -> None:
    spec = etc.spec_of({})
    original = (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID NET_BIND_SERVICE "
        "SYS_CHROOT SYS_PTRACE SYS_TTY_CONFIG LEASE SETFCAP AUDIT_WRITE SYS_BOOT"
    )
    assert spec.capabilities == frozenset(original.split()) - {"SYS_PTRACE", "LEASE"}
    assert spec.ccaps == {"set_utsname", "raw_icmp"}
    assert spec.flags == {"virt_uptime", "sc_helper", "hide_netif"}


@pytest.mark.parametrize(
    ("keys", "field", "added", "taken"),
    [
        ({"bcapabilities": "NET_RAW\n~MKNOD,~KILL"}, "capabilities", {"NET_RAW"}, {"KILL"}),
        ({"ccapabilities": "~raw_icmp"}, "ccaps", set(), {"raw_icmp"}),
        ({"cflags": "~virt_uptime\nnproc"}, "flags", {"nproc"}, {"virt_uptime"}),
        ({"flags": "nproc"}, "flags", {"nproc"}, set()),
        ({"flags": "nproc", "cflags": "lock"}, "flags", {"lock"}, set()),
        ({"nflags": "single_ip"}, "nflags", {"single_ip"}, set()),
        ({"ncapabilities": "~raw_icmp"}, "ncaps", set(), {"raw_icmp"}),
        ({"umask": "newuser,newnet"}, "umask", {"newuser", "newnet"}, set()),
    ],
)
def test_files_change_the_default(
    etc: Configuration, keys: Keys, field: str, added: set[str], taken: set[str]
) -> None:
    etc.add_guest("bare")
    before, after = getattr(etc.spec("bare"), field), getattr(etc.spec_of(keys), field)
    assert after - before == added
    assert before - after == taken
    assert etc.spec().warnings == ()


@pytest.mark.parametrize("word", sorted(stock.CAPABILITIES))
def test_a_capability_that_gives_the_host_away_is_had_and_named(
    etc: Configuration, word: str
) -> None:
    spec = etc.spec_of({"bcapabilities": f"# needed\nCAP_{word}"})
    assert word in spec.capabilities
    [warning] = spec.warnings
    assert warning.startswith(f"{etc.confdir}/web/bcapabilities:2: {word}: ")


def test_what_is_taken_away_again_is_no_reason_to_warn(etc: Configuration) -> None:
    spec = etc.spec_of({"bcapabilities": "all\n" + "\n".join(f"~{w}" for w in stock.CAPABILITIES)})
    assert spec.warnings == ()
    assert not spec.capabilities & set(stock.CAPABILITIES)


@pytest.mark.parametrize("word", sorted(set(stock.CFLAGS) | {"virt_mem", "virt_cpu", "virt_load"}))
def test_a_flag_that_cannot_be_had_is_named(
    etc: Configuration, word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VSERVER_LXCFS", str(tmp_path / "no lxcfs"))
    [warning] = etc.spec_of({"cflags": word}).warnings
    assert warning.startswith(f"{etc.confdir}/web/cflags:1: {word}: ")


def test_lxcfs_gives_a_guest_its_own_memory_and_load(
    etc: Configuration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    monkeypatch.setenv("VSERVER_LXCFS", str(tmp_path))
    assert etc.spec_of({"cflags": "virt_mem,virt_cpu,virt_load"}).warnings == ()


@pytest.mark.parametrize("word", sorted(stock.CCAPS))
def test_a_context_capability_that_cannot_be_had_is_named(etc: Configuration, word: str) -> None:
    [warning] = etc.spec_of({"ccapabilities": word}).warnings
    assert warning.startswith(f"{etc.confdir}/web/ccapabilities:1: {word}: ")


@pytest.mark.parametrize(
    ("word", "capability"), [("secure_mount", "SYS_ADMIN"), ("set_rlimit", "SYS_RESOURCE")]
)
def test_a_system_capability_may_stand_in_for_one(
    etc: Configuration, word: str, capability: str
) -> None:
    spec = etc.spec_of({"ccapabilities": word, "bcapabilities": capability})
    assert not any("ccapabilities" in warning for warning in spec.warnings)


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({"nflags": "hide_netif,hide_lback,private,persistent"}, 4),
        ({"nflags": "hide_netif,hide_lback,lback_allow", "spaces/net": True}, 0),
        ({"cflags": "hide_netif", "spaces/net": True}, 0),
        ({"ncapabilities": "tun_create"}, 1),
        ({"ncapabilities": "tun_create", "spaces/net": True, "bcapabilities": "NET_ADMIN"}, 0),
        ({"umask": "newns\nnewnet"}, 2),
        ({"umask": "newns\nnewnet\nnewuser"}, 0),
        ({"umask": "fs"}, 0),
    ],
)
def test_a_network_or_namespace_of_its_own_meets_some_wishes(
    etc: Configuration, keys: Keys, count: int
) -> None:
    assert len(etc.spec_of(keys).warnings) == count


def test_every_reason_is_for_a_word_that_exists() -> None:
    assert set(stock.CFLAGS) <= set(CFLAGS.bits)
    assert set(stock.CCAPS) <= set(CCAPS.bits)
    assert set(stock.NFLAGS) <= set(NFLAGS.bits)
    assert set(stock.NCAPS) <= set(NCAPS.bits)
    assert set(stock.SPACES) <= set(SPACES.bits)
    assert {word.lower() for word in stock.CAPABILITIES} <= set(CAPABILITIES.bits)
    assert {word.lower() for word in wordlist.SECURE_CAPS} <= set(CAPABILITIES.bits)
