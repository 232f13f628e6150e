"""vrun.acl: what tar says of an ACL, as the kernel keeps it."""

import pytest

from tests.fixtures.trees import acl
from vrun.acl import pack_acl

_TEXT = b"user::rwx\nuser:1000:r-x\ngroup::r-x\nmask::rwx\nother::---\n"
_PACKED = acl(owner=7, group=5, other=0, users={1000: 5})


@pytest.mark.parametrize(
    "text",
    [
        _TEXT,
        _TEXT.replace(b"\n", b","),
        b"u::rwx,o::---,m::rwx,g::r-x,u:1000:r-x",
        b"user::rwx\nuser:somebody:r-x:1000\ngroup::r-x\nmask::rwx\nother::---",
        _TEXT.replace(b"r-x\ngroup", b"r-x #effective:r-x\ngroup"),
    ],
)
def test_every_spelling_comes_to_the_same(text: bytes) -> None:
    assert pack_acl(text) == _PACKED


@pytest.mark.parametrize("name", [b"somebody", b"4294967295", b"99999999999"])
def test_nobody_is_guessed_from_a_name(name: bytes) -> None:
    assert pack_acl(_TEXT.replace(b"1000", name)) is None


@pytest.mark.parametrize(
    "text", [b"user::rwz", b"nobody::rwx", b"user:rwx", b"user::rwx:", b"user::rwx\0"]
)
def test_what_is_no_acl_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="no entry of an ACL"):
        pack_acl(text)
