"""Instructions as the kernel reads them."""

import struct

import pytest

from vrun.bpf import R0, R1, R2, R3, R6, R10, Code


def _lines(code: Code) -> list[str]:
    text = code.assemble()
    return [text[start : start + 8].hex(" ", 2) for start in range(0, len(text), 8)]


def _instruction(code: int, registers: int, offset: int, immediate: int) -> str:
    return struct.pack("=BBhi", code, registers, offset, immediate).hex(" ", 2)


def test_a_whole_program_is_what_a_hand_would_write() -> None:
    code = Code()
    code.load(R2, R1, 4)
    code.jump_unequal(R2, 0, "named")
    code.move(R3, 0x0A000005)
    code.store(R1, 4, R3)
    code.jump("good")
    code.place("named")
    code.jump_equal(R2, 0x0A000005, "good")
    code.leave(0)
    code.place("good")
    code.leave(1)
    assert _lines(code) == [
        _instruction(0x61, 0x12, 4, 0),  # r2 = *(u32 *)(r1 + 4)
        _instruction(0x56, 0x02, 3, 0),  # if w2 != 0 goto +3
        _instruction(0xB4, 0x03, 0, 0x0A000005),  # w3 = ...
        _instruction(0x63, 0x31, 4, 0),  # *(u32 *)(r1 + 4) = r3
        _instruction(0x05, 0x00, 3, 0),  # goto +3
        _instruction(0x16, 0x02, 2, 0x0A000005),  # if w2 == ... goto +2
        _instruction(0xB4, 0x00, 0, 0),
        _instruction(0x95, 0x00, 0, 0),
        _instruction(0xB4, 0x00, 0, 1),
        _instruction(0x95, 0x00, 0, 0),
    ]


def test_a_register_and_a_number_make_different_instructions() -> None:
    code = Code()
    code.move(R1, R6, wide=True)
    code.move(R1, 6)
    code.bit_and(R1, R2)
    code.bit_and(R1, 0xFFFFFF00)
    code.jump_equal(R1, R2, "end", wide=True)
    code.place("end")
    code.leave(1)
    assert _lines(code)[:5] == [
        _instruction(0xBF, 0x61, 0, 0),
        _instruction(0xB4, 0x01, 0, 6),
        _instruction(0x5C, 0x21, 0, 0),
        _instruction(0x54, 0x01, 0, -256),
        _instruction(0x1D, 0x21, 0, 0),
    ]


@pytest.mark.parametrize(("size", "bits"), [(1, 0x10), (2, 0x08), (4, 0x00), (8, 0x18)])
def test_sizes_of_what_is_read_and_written(size: int, bits: int) -> None:
    code = Code()
    code.load(R0, R10, -size, size)
    code.store(R10, -size, R0, size)
    code.store(R10, -size, 7, size)
    assert _lines(code) == [
        _instruction(0x61 | bits, 0xA0, -size, 0),
        _instruction(0x63 | bits, 0x0A, -size, 0),
        _instruction(0x62 | bits, 0x0A, -size, 7),
    ]


def test_a_map_takes_two_slots_that_jumps_count() -> None:
    code = Code()
    code.jump("end")
    code.map_fd(R1, 9)
    code.place("end")
    code.leave(0)
    assert _lines(code)[:3] == [
        _instruction(0x05, 0, 2, 0),
        _instruction(0x18, 0x11, 0, 9),
        _instruction(0, 0, 0, 0),
    ]


def test_a_label_is_placed_once_and_somewhere() -> None:
    code = Code()
    code.jump("nowhere")
    assert code.is_used("nowhere")
    assert not code.is_used("elsewhere")
    with pytest.raises(KeyError):
        code.assemble()
    code.place("nowhere")
    with pytest.raises(ValueError, match="placed twice"):
        code.place("nowhere")
