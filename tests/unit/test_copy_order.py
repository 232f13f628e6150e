"""What SOURCE and TARGET of vserver-copy mean, and what is said of a guest that was stopped."""

from typing import cast

import pytest

from vstore.copy import copying
from vstore.copy.messages import Dialogue, Done, Hostile, Request, Source
from vstore.copy.order import Order, Place, Report, parse_place
from vstore.copy.wire import ConnectionLost
from vstore.errors import NoSpace, ToolError, WrongUsage
from vstore.progress import SILENT


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web", Place("", "", "web")),
        ("web/", Place("", "", "web")),
        ("other:", Place("other", "", "")),
        ("other:web/", Place("other", "", "web")),
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


@pytest.mark.parametrize("error", [Hostile("nonsense"), ConnectionLost("cut"), NoSpace("full")])
def test_whatever_ends_the_last_pass_says_that_the_guest_is_stopped(
    monkeypatch: pytest.MonkeyPatch, error: ToolError
) -> None:
    order = Order(Place("", "", "web"), Place("", "", "new"), Request("receive"), stop=True)
    run = copying._Run(order, cast(Dialogue, None), SILENT, Report())

    def end(_: Request) -> Source:
        raise error

    monkeypatch.setattr(run, "_pass", end)
    monkeypatch.setattr(copying, "run_vserver", lambda *_: Done(0))
    with pytest.raises(type(error)) as found:
        run._stop_and_pass()
    assert "guest web was stopped" in found.value.message
    assert "vserver web start" in (found.value.hint or "")
