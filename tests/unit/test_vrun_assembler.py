"""Machine code as the GNU assembler gives it for the same instructions."""

import pytest

from vrun.assembler import (
    AddressOf,
    Branch,
    Call,
    Change,
    Environment,
    Instruction,
    Jump,
    Label,
    Load,
    Move,
    Negate,
    Scratch,
    Store,
    Word,
    assemble,
)

_START = {"x86_64": "48 89 e5", "aarch64": "fd 03 00 91"}  # mov rbp, rsp; mov x29, sp

_ENCODINGS: list[tuple[Instruction, str, str]] = [
    (
        Call("close", (3,)),
        "40 bf 03 00 00 00  40 b8 03 00 00 00  0f 05",
        "60 00 80 52 00 00 a0 72  28 07 80 52 08 00 a0 72  01 00 00 d4",
    ),
    (
        Call("wait4", (-1, Scratch(), 0x40000000, 0)),
        "40 bf ff ff ff ff  48 8d b5 c0 ff ff ff  40 ba 00 00 00 40  41 ba 00 00 00 00"
        "  40 b8 3d 00 00 00  0f 05",
        "e0 ff 9f 52 e0 ff bf 72  a1 03 01 d1  02 00 80 52 02 00 a8 72  03 00 80 52 03 00 a0 72"
        "  88 20 80 52 08 00 a0 72  01 00 00 d4",
    ),
    (
        Call("execve", (Word(2), AddressOf(3), Environment())),
        "48 8b bd 10 00 00 00  48 8d b5 18 00 00 00  48 8b 95 00 00 00 00  48 8d 54 d5 10"
        "  40 b8 3b 00 00 00  0f 05",
        "a0 0b 40 f9  a1 63 00 91  a2 03 40 f9  a2 0f 02 8b  42 40 00 91"
        "  a8 1b 80 52 08 00 a0 72  01 00 00 d4",
    ),
    (
        Call("exit_group", ("status",)),
        "41 8b fc  40 b8 e7 00 00 00  0f 05",
        "e0 03 14 2a  c8 0b 80 52 08 00 a0 72  01 00 00 d4",
    ),
    (Move("child", "result"), "40 8b d8", "f3 03 00 2a"),
    (Move("child", 0), "40 bb 00 00 00 00", "13 00 80 52 13 00 a0 72"),
    (Load("status"), "44 8b a5 c0 ff ff ff", "b4 03 5c b8"),
    (
        Store(0, 1),
        "c7 85 c0 ff ff ff 01 00 00 00",
        "29 00 80 52 09 00 a0 72  a9 03 1c b8",
    ),
    (Store(4, "child"), "40 89 9d c4 ff ff ff", "e9 03 13 2a  a9 43 1c b8"),
    (Store(4, "status"), "44 89 a5 c4 ff ff ff", "e9 03 14 2a  a9 43 1c b8"),
    (Negate("result"), "40 f7 d8", "e0 03 00 4b"),
    (
        Change("result", "and", 0x7F),
        "40 81 e0 7f 00 00 00",
        "e9 0f 80 52 09 00 a0 72  00 00 09 0a",
    ),
    (
        Change("result", "or", 128),
        "40 81 c8 80 00 00 00",
        "09 10 80 52 09 00 a0 72  00 00 09 2a",
    ),
    (
        Change("status", "shift right", 8),
        "41 c1 ec 08",
        "09 01 80 52 09 00 a0 72  94 26 c9 1a",
    ),
]


@pytest.mark.parametrize(
    ("instruction", "x86_64", "aarch64"), _ENCODINGS, ids=[repr(row[0]) for row in _ENCODINGS]
)
def test_an_instruction_is_what_the_gnu_assembler_makes_of_it(
    instruction: Instruction, x86_64: str, aarch64: str
) -> None:
    for machine, expected in (("x86_64", x86_64), ("aarch64", aarch64)):
        code = assemble((instruction,), machine)
        assert code.hex(" ") == bytes.fromhex(_START[machine] + expected).hex(" ")


@pytest.mark.parametrize(
    ("machine", "forward", "back"),
    [
        ("x86_64", "0f 8c 05 00 00 00", "e9 ee ff ff ff"),
        ("aarch64", "4b 00 00 54", "fc ff ff 17"),
    ],
)
def test_a_jump_reaches_its_label_forwards_and_backwards(
    machine: str, forward: str, back: str
) -> None:
    program = (
        Label("start"),
        Branch("result", "<", 0, "end"),
        Jump("start"),
        Label("end"),
    )
    code = assemble(program, machine).hex(" ")
    assert forward in code
    assert code.endswith(back)


def test_registers_can_be_compared() -> None:
    program = (Label("here"), Branch("result", "!=", "child", "here"))
    assert assemble(program, "x86_64").hex(" ") == "48 89 e5 40 3b c3 0f 85 f7 ff ff ff"
    assert (
        assemble(program, "aarch64").hex(" ") == "fd 03 00 91 e9 03 13 2a 1f 00 09 6b c1 ff ff 54"
    )


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(KeyError):
        assemble((), "vax")
