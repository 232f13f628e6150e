import pytest

from vrun import mountcalls
from vrun.errors import ToolError
from vrun.spec import Mount
from vrun.volumes import Words, parse_words, target_of

_RDONLY, _NOSUID = mountcalls.MOUNT_ATTR_RDONLY, mountcalls.MOUNT_ATTR_NOSUID
_NODEV, _NOEXEC = mountcalls.MOUNT_ATTR_NODEV, mountcalls.MOUNT_ATTR_NOEXEC


def _line(*options: str, fstype: str = "ext4", target: str = "/srv") -> Mount:
    return Mount("/dev/sdb1", target, fstype, options, 0, False, "fstab:1")


def _words(*options: str) -> Words:
    return parse_words(_line(*options))


@pytest.mark.parametrize(
    ("options", "attributes"),
    [
        (("defaults",), _NODEV),
        ((), _NODEV),
        (("dev",), 0),
        (("defaults", "dev"), 0),
        (("nodev", "ro"), _NODEV | _RDONLY),
        (("ro", "rw"), _NODEV),
        (("nosuid", "noexec", "ro"), _NODEV | _NOSUID | _NOEXEC | _RDONLY),
        (("noexec", "exec", "nosuid", "suid", "dev"), 0),
        (("nodiratime",), _NODEV | mountcalls.MOUNT_ATTR_NODIRATIME),
    ],
)
def test_the_last_of_two_words_holds_and_nodev_where_nothing_is_said(
    options: tuple[str, ...], attributes: int
) -> None:
    assert _words(*options).attributes == attributes


def test_devpts_is_exempt_from_nodev() -> None:
    assert parse_words(_line("gid=5", fstype="devpts")).attributes == 0


@pytest.mark.parametrize(
    ("options", "atime"),
    [
        (("noatime",), mountcalls.MOUNT_ATTR_NOATIME),
        (("noatime", "relatime"), mountcalls.MOUNT_ATTR_RELATIME),
        (("strictatime",), mountcalls.MOUNT_ATTR_STRICTATIME),
        (("defaults",), mountcalls.MOUNT_ATTR_RELATIME),
    ],
)
def test_the_last_kind_of_atime_holds(options: tuple[str, ...], atime: int) -> None:
    assert _words(*options).atime == atime


def test_what_is_for_the_file_system_is_passed_on_in_order() -> None:
    words = _words("ro", "size=16m", "noatime", "mode=1777", "huge=never", "user_xattr")
    assert words.for_filesystem == ("size=16m", "mode=1777", "huge=never", "user_xattr")


@pytest.mark.parametrize(
    "word", ["defaults", "auto", "nouser", "users", "_netdev", "nomtab", "nofail", "x-gvfs-show"]
)
def test_words_for_other_programs_are_no_business_of_the_file_system(word: str) -> None:
    words = _words(word)
    assert words.for_filesystem == ()
    assert not words.for_program


def test_bind_and_rbind() -> None:
    assert (_words("bind").bind, _words("bind").recursive) == (True, False)
    assert (_words("rbind").bind, _words("rbind").recursive) == (True, True)
    assert _words("bind", "rec").recursive


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("private", mountcalls.MS_PRIVATE),
        ("rslave", mountcalls.MS_SLAVE),
        ("shared", mountcalls.MS_SHARED),
        ("runbindable", mountcalls.MS_UNBINDABLE),
    ],
)
def test_propagation(word: str, flag: int) -> None:
    assert _words(word).propagation == flag


def test_a_loop_device_is_for_the_program() -> None:
    assert _words("loop").for_program
    assert _words("offset=512").for_program


def test_a_mount_is_never_taken_from_the_host() -> None:
    with pytest.raises(ToolError, match="fstab:1: option move"):
        _words("move")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("/srv", "/srv"),
        ("srv", "/srv"),
        ("//srv//data/", "/srv/data"),
        ("/srv/./x/../data", "/srv/data"),
        ("/../../etc", "/etc"),
        ("/", "/"),
    ],
)
def test_a_target_is_normal(text: str, target: str) -> None:
    assert target_of(_line(target=text)) == target
