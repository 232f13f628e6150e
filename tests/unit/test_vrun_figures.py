"""The columns and numbers of vserver-stat, against the tables of the original."""

import pytest

from vrun.figures import HEADER, Row, show_bytes, show_ms, show_row

_KIB, _MIB, _GIB, _TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
_SECOND, _HOUR, _DAY = 1000, 3_600_000, 86_400_000


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 "),
        (999, "999 "),
        (1000, "0.9K"),
        (1536, "1.5K"),
        (995 * _KIB, "995K"),
        (1000 * _KIB, "0.9M"),
        (_MIB, "1M"),
        (1_023_998_976, "976.5M"),
        (999 * _GIB, "999G"),
        (3 * _TIB + _TIB // 2, "3.5T"),
        (2000 * _TIB, "1.9+"),
    ],
)
def test_bytes_are_shown_as_the_original_does(value: int, shown: str) -> None:
    assert show_bytes(value) == shown


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [
        (0, "0m00s00"),
        (61_230, "1m01s23"),
        (45, "0m00s04"),
        (450, "0m00s45"),
        (59 * 60 * _SECOND + 59_999, "59m59s99"),
        (3725 * _SECOND, "1h02m05"),
        (90_061 * _SECOND, "1d01h01"),
        (999 * _DAY + 23 * _HOUR, "999d23h00"),
        (1000 * _DAY, "2y27d00"),
        (1001 * _DAY + 5 * _HOUR, "2y27d05"),
        ((3 * 365 + 7) * _DAY, "3y07d00"),
        (-1, "INVALID"),
        (10**6 * _DAY * 365, "INVALID"),
    ],
)
def test_times_are_shown_as_the_original_does(milliseconds: int, shown: str) -> None:
    assert show_ms(milliseconds) == shown


def test_columns_end_where_those_of_the_header_do() -> None:
    assert HEADER == "CTX   PROC    VSZ    RSS  userTIME   sysTIME    UPTIME NAME"
    row = Row(49152, "web", 12, 30, 1_023_998_976, _MIB, 61_230, 3725 * _SECOND, 90_061_000)
    line = show_row(row)
    assert line == "49152   12 976.5M     1M   1m01s23   1h02m05   1d01h01 web"
    for word, text in (("PROC", "12"), ("VSZ", "976.5M"), ("userTIME", "1m01s23")):
        end = HEADER.index(word) + len(word)
        assert line[:end].endswith(text)
    assert line.index("web") == HEADER.index("NAME") == 55


def test_the_host_has_a_row_and_small_sizes_a_blank_for_their_unit() -> None:
    row = Row(0, "root server", 1, 1, 0, 999, 0, 0, 0)
    assert show_row(row) == "0        1     0    999    0m00s00   0m00s00   0m00s00 root server"


def test_long_names_are_cut_and_those_of_old_style_guests_bracketed() -> None:
    row = Row(2, "a-name-of-more-than-twenty", 1, 1, 0, 0, 0, 0, 0)
    assert show_row(row)[55:] == "a-name-of-more-than-"
    assert show_row(row, is_legacy=True)[55:] == "[a-name-of-more-tha]"
    assert show_row(Row(2, "", 1, 1, 0, 0, 0, 0, 0)).endswith("0m00s00")
