"""Questions for addresses as others write them, and what counts as an answer."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrun.wire import answers, question

_OWN = bytes.fromhex("02a1b2c3d4e5")


def test_the_arp_probe_of_rfc_5227() -> None:
    assert (
        question(_OWN, ip_address("10.9.0.5")).hex()
        == (
            "ffffffffffff" + "02a1b2c3d4e5" + "0806"  # to all
            "0001" + "0800" + "06" + "04" + "0001"  # who has
            "02a1b2c3d4e5" + "00000000"  # asks nobody yet
            "000000000000" + "0a090005"
        )
    )


def test_the_neighbour_solicitation_of_rfc_4862() -> None:
    frame = question(_OWN, ip_address("fd09::a1:b2c3"))
    assert frame[:14].hex() == "3333ffa1b2c3" + "02a1b2c3d4e5" + "86dd"
    assert frame[14:22].hex() == "60000000" + "0018" + "3a" + "ff"
    assert frame[22:38] == bytes(16)
    assert frame[38:54] == ip_address("ff02::1:ffa1:b2c3").packed
    assert frame[54:56].hex() == "8700"
    assert frame[62:] == ip_address("fd09::a1:b2c3").packed


def test_a_question_is_no_answer() -> None:
    for text in ("10.9.0.5", "fd09::5"):
        address = ip_address(text)
        assert not answers(question(_OWN, address), address)


def _advertisement(text: str) -> bytes:
    frame = bytearray(question(_OWN, ip_address(text)))
    frame[54] = 136
    return bytes(frame)


def test_an_answer_is_for_the_address_that_was_asked() -> None:
    frame = _advertisement("fd09::5")
    assert answers(frame, ip_address("fd09::5"))
    assert not answers(frame, ip_address("fd09::6"))
    reply = bytearray(question(_OWN, ip_address("10.9.0.1")))
    reply[28:32] = ip_address("10.9.0.5").packed  # its sender
    assert answers(bytes(reply), ip_address("10.9.0.5"))
    assert not answers(bytes(reply), ip_address("10.9.0.1"))


def test_an_advertisement_from_beyond_a_router_is_none() -> None:
    frame = bytearray(_advertisement("fd09::5"))
    frame[21] = 254
    assert not answers(bytes(frame), ip_address("fd09::5"))


@pytest.mark.parametrize("text", ["10.9.0.5", "fd09::5"])
@given(frame=st.binary(max_size=128))
def test_any_frame_can_be_looked_at(text: str, frame: bytes) -> None:
    assert answers(frame, ip_address(text)) in (True, False)
