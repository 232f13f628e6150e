import errno
import os
import struct

import pytest

from vrun import stub
from vrun.stub import Ended, NotExecuted, Started, parse_reports

_KINDS: tuple[stub.Kind, ...] = ("exec", "wait", "join")


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_the_file_is_a_static_program_of_its_machine(
    kind: stub.Kind, machine: str, number: int
) -> None:
    image = stub.image(kind, machine)
    assert image[:7] == b"\x7fELF\x02\x01\x01"
    file_type, found, _, entry = struct.unpack_from("<HHIQ", image, 16)
    assert (file_type, found) == (2, number)
    offset, count = struct.unpack_from("<Q", image, 32)[0], struct.unpack_from("<H", image, 56)[0]
    headers = [struct.unpack_from("<IIQQQQQQ", image, offset + 56 * n) for n in range(count)]
    loads = [header for header in headers if header[0] == 1]
    assert len(loads) == 1
    _, flags, start, address, _, size, _, _ = loads[0]
    assert (flags & 2, start, size) == (0, 0, len(image)), "all of the file, not writable"
    assert address < entry < address + size
    assert {header[0]: header[1] for header in headers}[0x6474E551] == 6, "no executable stack"


def test_the_program_is_no_longer_than_a_page() -> None:
    assert max(len(stub.image(kind, "aarch64")) for kind in _KINDS) < 4096


def test_a_machine_without_a_stub_is_said() -> None:
    with pytest.raises(OSError, match="riscv64") as caught:
        stub.image("exec", "riscv64")
    assert caught.value.errno == errno.ENOSYS


def test_reports_are_read_back() -> None:
    data = struct.pack("<iiiiii", 1, 4711, 2, errno.ENOENT, 3, 9)
    assert parse_reports(data) == [Started(4711), NotExecuted(errno.ENOENT), Ended(9)]


@pytest.mark.parametrize("rest", [b"", b"x", bytes(7)])
def test_an_incomplete_report_is_left_out(rest: bytes) -> None:
    assert parse_reports(struct.pack("<ii", 3, 256) + rest) == [Ended(256)]


def test_what_no_stub_writes_is_left_out() -> None:
    assert parse_reports(os.urandom(0) + struct.pack("<iiii", 77, 1, -1, 5)) == []
