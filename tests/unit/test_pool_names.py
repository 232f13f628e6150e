"""An object's name says all that identity means, and says it back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vstore.pool import Identity, parse_object

_identities = st.builds(
    Identity,
    digest=st.binary(min_size=32, max_size=32),
    size=st.integers(0, (1 << 63) - 1),
    mode=st.integers(0o100000, 0o107777),
    uid=st.integers(0, (1 << 32) - 2),
    gid=st.integers(0, (1 << 32) - 2),
    mtime_ns=st.integers(-(1 << 63), (1 << 63) - 1),
    xattrs=st.one_of(st.just(b""), st.binary(min_size=32, max_size=32)),
)
_numbers = st.integers(0, 1_000_000)
_PLAIN = Identity(bytes(range(32)), 5, 0o100644, 0, 0, 1_700_000_000_000_000_000, b"")


@given(_identities, _numbers)
def test_a_name_is_parsed_to_what_it_was_made_of(identity: Identity, number: int) -> None:
    folder, _, name = identity.name(number).partition("/")
    assert folder == name[:2]
    assert parse_object(name) == (identity, number)


@given(_identities, _numbers)
def test_a_name_is_one_component_that_every_file_system_takes(
    identity: Identity, number: int
) -> None:
    name = identity.name(number).partition("/")[2]
    assert len(name) <= 255
    assert name.isascii()
    assert not set(name) & set("/\0\n ")


@given(_identities, _identities, _numbers, _numbers)
def test_different_identities_and_numbers_have_different_names(
    one: Identity, other: Identity, first: int, second: int
) -> None:
    assert (one.name(first) == other.name(second)) == ((one, first) == (other, second))


@pytest.mark.parametrize(
    "change",
    [
        {"digest": bytes(32)},
        {"size": 6},
        {"mode": 0o104644},
        {"uid": 1},
        {"gid": 1},
        {"mtime_ns": 1_700_000_000_000_000_001},
        {"xattrs": bytes(32)},
    ],
)
def test_each_part_of_an_identity_is_in_the_name(change: dict[str, int]) -> None:
    other = _PLAIN._replace(**change)  # type: ignore[arg-type]  # each key has its own type
    assert other.name(0) != _PLAIN.name(0)


def test_a_name_looks_as_the_documentation_says() -> None:
    digest = bytes(range(32)).hex()
    name = f"00/{digest}.5.100644.0.0.1700000000000000000.0-3"
    assert _PLAIN.name(3) == name


@given(st.text(alphabet="0123456789abcdef.-xyz", max_size=240))
def test_what_is_no_objects_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (whatever part of the name it was)
        parse_object(text)


@given(_identities, st.data())
def test_a_name_cut_short_is_refused_or_another_one(
    identity: Identity, data: st.DataObject
) -> None:
    name = identity.name(0).partition("/")[2]
    cut = data.draw(st.integers(0, len(name) - 1))
    try:
        found = parse_object(name[:cut])
    except ValueError:
        return
    assert found != (identity, 0)
