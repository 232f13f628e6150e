"""What SOURCE and TARGET of vserver-copy mean."""

import pytest

from vstore.copy.order import Place, parse_place
from vstore.errors import WrongUsage


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web", Place("", "", "web")),
        ("other:", Place("other", "", "")),
        ("other:web", Place("other", "", "web")),
        ("root@other:web", Place("other", "root", "web")),
        ("me@corp@other:web", Place("other", "me@corp", "web")),
        ("[::1]:web", Place("::1", "", "web")),
        ("root@[2001:db8::5]:web", Place("2001:db8::5", "root", "web")),
        ("root@[fe80::1%eth0]:", Place("fe80::1%eth0", "root", "")),
        ("root@[192.0.2.1]:web", Place("192.0.2.1", "root", "web")),
    ],
)
def test_places_are_understood(text: str, place: Place) -> None:
    assert parse_place(text) == place
    assert parse_place(place.shown) == place


@pytest.mark.parametrize("text", ["a:b:c", "::1:web", ":web", "root@:web", "root@[::1:web", "[]:w"])
def test_places_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(WrongUsage):
        parse_place(text)
