"""Users of a guest: what its own files say, and what hostile ones cannot do."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vrun.errors import ToolError
from vrun.users import User, find_user

_ACCOUNTS = """\
root:x:0:0:root:/root:/bin/bash
bob:x:1000:1000:Bob,,,:/home/bob:/bin/zsh
1001:x:1002:100::/srv:
"""
_GROUPS = """\
root:x:0:
users:x:100:alice
bob:x:1000:
sudo:x:27:bob,alice
adm:x:4:bob
"""


class Root:
    """The root of a guest, grown in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
        (path / "etc").mkdir()

    def write(self, *, accounts: str = _ACCOUNTS, groups: str = _GROUPS) -> "Root":
        (self.path / "etc/passwd").write_text(accounts, errors="surrogateescape")
        (self.path / "etc/group").write_text(groups, errors="surrogateescape")
        return self

    def find(self, wanted: str) -> User:
        return find_user(self.fd, wanted)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    made = Root(tmp_path)
    yield made
    os.close(made.fd)


def test_a_name_has_its_account_and_its_groups(root: Root) -> None:
    bob = root.write().find("bob")

    assert bob == User("bob", 1000, 1000, (1000, 27, 4), "/home/bob", "/bin/zsh")


def test_a_number_is_the_account_that_has_it(root: Root) -> None:
    assert root.write().find("1000").name == "bob"


def test_a_name_of_digits_goes_before_the_number(root: Root) -> None:
    assert root.write().find("1001").uid == 1002


def test_what_an_account_leaves_open_is_filled_in(root: Root) -> None:
    assert root.write().find("1002").shell == "/bin/sh"


def test_a_group_that_is_named_counts_alone(root: Root) -> None:
    root.write()

    assert root.find("bob:users") == User("bob", 1000, 100, (100,), "/home/bob", "/bin/zsh")
    assert root.find("1000:7").groups == (7,)


def test_an_unknown_number_needs_a_group(root: Root) -> None:
    with pytest.raises(ToolError, match="no user 4711") as caught:
        root.write().find("4711")

    assert caught.value.hint == "name one: 4711:GROUP"
    assert root.find("4711:users") == User("4711", 4711, 100, (100,), "/", "/bin/sh")


@pytest.mark.parametrize(
    "wanted", ["nobody", "", "-1", "+0", " 0", "0x0", "\u0660", "4294967295", "bob:"]
)
def test_what_is_no_user_is_refused(root: Root, wanted: str) -> None:
    with pytest.raises(ToolError, match=r"has no (user|group)"):
        root.write().find(wanted)


def test_an_id_that_setresuid_would_ignore_is_no_id(root: Root) -> None:
    root.write(accounts="bob:x:4294967295:0::/:/bin/sh\neve:x:7:4294967295::/:/bin/sh\n")

    for name in ("bob", "eve"):
        with pytest.raises(ToolError, match="has no user"):
            root.find(name)


def test_lines_that_are_none_are_passed_over(root: Root) -> None:
    accounts = f"# bob:x:0:0::/:/\n+::::::\nbob:x:0\nbob:x:zero:0::/:/\n{_ACCOUNTS}"

    assert root.write(accounts=accounts).find("bob").uid == 1000


def test_names_that_are_no_text_are_found(root: Root) -> None:
    root.write(accounts="b\udcffb:x:5:6::/:/bin/sh\n", groups="")

    assert root.find("b\udcffb").uid == 5


def test_the_files_may_be_links_inside_the_guest(root: Root) -> None:
    root.write()
    (root.path / "real").write_text("eve:x:9:9::/:/bin/sh\n")
    (root.path / "etc/passwd").unlink()
    (root.path / "etc/passwd").symlink_to("/real")

    assert root.find("eve").uid == 9


def test_a_link_out_of_the_guest_stays_inside(
    root: Root, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("host") / "passwd"
    outside.write_text("eve:x:9:9::/:/bin/sh\n")
    root.write()
    (root.path / "etc/passwd").unlink()
    (root.path / "etc/passwd").symlink_to(f"../../../../../../..{outside}")

    with pytest.raises(ToolError, match="no user 'eve'"):
        root.find("eve")


def test_a_fifo_does_not_hold_us_up(root: Root) -> None:
    root.write()
    (root.path / "etc/passwd").unlink()
    os.mkfifo(root.path / "etc/passwd")

    with pytest.raises(ToolError, match="/etc/passwd: is no regular file"):
        root.find("bob")


def test_a_file_without_an_end_is_refused(root: Root) -> None:
    root.write()
    os.truncate(root.path / "etc/group", 1 << 40)

    with pytest.raises(ToolError, match="/etc/group: has 1099511627776 bytes"):
        root.find("bob")


def test_a_guest_without_the_files_has_no_users(root: Root) -> None:
    with pytest.raises(ToolError, match="has no user 'bob'"):
        root.find("bob")


def test_more_groups_than_the_kernel_takes_are_refused(root: Root) -> None:
    root.write(groups="".join(f"g{gid}:x:{gid}:bob\n" for gid in range(70_000)))

    with pytest.raises(ToolError, match="is in 70000 groups"):
        root.find("bob")
