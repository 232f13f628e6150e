"""After which package commands guests are unified."""

import pytest

from vrun.commands import vapt_get, vrpm


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("update", False),
        ("dist-upgrade -y", True),
        ("-y install nginx", True),
        ("install -s nginx", False),
        ("--download-only upgrade", False),
        ("autoremove --purge", True),
        ("check", False),
    ],
)
def test_apt_get_changes_files(line: str, changes: bool) -> None:
    assert vapt_get._changes(tuple(line.split())) is changes


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("-qa", False),
        ("-q openssl", False),
        ("-Va", False),
        ("-K /srv/a.rpm", False),
        ("--query --all", False),
        ("-Uvh /srv/a.rpm", True),
        ("-i --test /srv/a.rpm", False),
        ("--erase openssl", True),
    ],
)
def test_rpm_changes_files(line: str, changes: bool) -> None:
    assert vrpm._changes(tuple(line.split())) is changes
