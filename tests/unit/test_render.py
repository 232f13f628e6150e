"""What a person sees is harmless, unambiguous and in columns."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vstore import render
from vstore.progress import SILENT, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name.txt", "plain name.txt"),
        (b"plain", "plain"),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("a\nb", "a\\nb"),
        ("a\tb\r", "a\\tb\\r"),
        ("\x1b[2J", "\\x1b[2J"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("\udcff", "\\xff"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2028", "\\u2028"),
        ("\U000e0041", "\\U000e0041"),
        ("a\\nb", "a\\\\nb"),
        ("", ""),
    ],
)
def test_names_are_harmless(name: bytes | str, shown: str) -> None:
    assert render.show_name(name) == shown


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_different_names_never_look_the_same(one: bytes, other: bytes) -> None:
    assert (render.show_name(one) == render.show_name(other)) == (one == other)


@given(st.binary(max_size=12))
def test_a_shown_name_is_not_escaped_again(name: bytes) -> None:
    shown = render.show_name(name)
    assert render.show_text(shown) == shown
    assert shown.isprintable()


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1023 * 1024, "1023.0 KiB"),
        (3_650_722_201, "3.4 GiB"),
        (1024**4, "1.0 TiB"),
        (1024**6, "1.0 EiB"),
        (5000 * 1024**6, "5000.0 EiB"),
        (-1024, "-1.0 KiB"),
        (-5, "-5 B"),
    ],
)
def test_sizes(size: int, shown: str) -> None:
    assert render.show_size(size) == shown


def test_table_puts_numbers_to_the_right() -> None:
    rows = [("web", "3.4 GiB", "12"), ("database", "512 B", "-")]
    assert render.show_table(rows, ["guest", "own", "files"]).splitlines() == [
        "guest         own  files",
        "web       3.4 GiB     12",
        "database    512 B      -",
    ]


def test_table_without_rows_is_its_headers() -> None:
    assert render.show_table([], ["guest", "own"]) == "guest  own"


def test_table_has_no_blanks_at_the_ends_of_lines() -> None:
    table = render.show_table([("a", "long text"), ("b", "x")], ["one", "two"])
    assert [line for line in table.splitlines() if line != line.rstrip()] == []


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    with render.ProgressBar() as bar:
        bar.phase("hashing", total=10, unit="bytes")
        bar.advance(5)
    assert stderr.getvalue() == ""
    assert "tqdm" not in sys.modules


def test_a_bar_for_each_phase_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with render.ProgressBar() as bar:
        bar.phase("hashing", total=2048, unit="bytes")
        bar.advance(2048)
        bar.phase("linking", total=3)
        bar.advance()
        bar.advance(2)
        bar.close()
    shown = stderr.getvalue()
    assert "hashing: 100%" in shown
    assert "2.00k/2.00k" in shown
    assert "linking: 100%" in shown
    assert "3/3" in shown


def test_silent_and_the_bar_are_progress() -> None:
    progress: Progress = SILENT
    progress.phase("hashing", total=None)
    progress.advance(3)
    progress = render.ProgressBar()
    progress.advance()
