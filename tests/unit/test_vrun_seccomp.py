import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pyseccomp
import pytest

from vrun import seccomp
from vrun.capabilities import NUMBERS
from vrun.wordlist import CCAPS, DEFAULT_CCAPS, SECURE_CAPS, SPACES


def test_libseccomp_knows_every_call_of_the_rules() -> None:
    calls = {call for rule in seccomp.RULES for call in rule.calls}
    unknown = [
        call for call in calls if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call) == -1
    ]
    assert unknown == []


def test_every_word_that_opens_a_rule_is_one_that_a_guest_can_have() -> None:
    words = {word for rule in seccomp.RULES for word in rule.opened_by}
    namespaces = set(SPACES.bits) | {"newcgroup", seccomp.LINUX32}
    assert words - set(NUMBERS) - set(CCAPS.bits) - namespaces == set()


def test_a_program_is_whole_instructions_and_ends_in_a_return() -> None:
    program = seccomp.compile_program(SECURE_CAPS, DEFAULT_CCAPS)
    assert len(program) % 8 == 0
    assert 100 < len(program) // 8 < 4096
    assert struct.unpack("=HBBI", program[-8:])[0] == 0x06


def test_the_same_words_give_the_same_program() -> None:
    first = seccomp.compile_program(SECURE_CAPS, DEFAULT_CCAPS)
    assert first == seccomp.compile_program(sorted(SECURE_CAPS), tuple(DEFAULT_CCAPS))


def test_each_word_makes_the_program_another_one() -> None:
    base = seccomp.compile_program(SECURE_CAPS)
    for word in ("SYS_ADMIN", "BPF", "SYS_MODULE", "LEASE", "SYS_TIME", "NET_ADMIN"):
        assert seccomp.compile_program(SECURE_CAPS | {word}) != base, word
    assert seccomp.compile_program(SECURE_CAPS | {"NET_RAW"}) == base


def test_a_program_is_kept_and_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "run" / ".filters"
    program = seccomp.cached_program(folder, SECURE_CAPS, DEFAULT_CCAPS)
    assert program == seccomp.compile_program(SECURE_CAPS, DEFAULT_CCAPS)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (file,) = folder.iterdir()
    mark = program + b"\x06\0\0\0\0\0\xff\x7f"
    file.write_bytes(mark)
    assert seccomp.cached_program(folder, SECURE_CAPS, DEFAULT_CCAPS) == mark, "read, not made"


def test_other_words_are_kept_apart(tmp_path: Path) -> None:
    for words in (SECURE_CAPS, SECURE_CAPS | {"BPF"}, SECURE_CAPS | {"SYS_ADMIN"}):
        assert seccomp.cached_program(tmp_path, words) == seccomp.compile_program(words)
    assert len(list(tmp_path.iterdir())) == 3


def test_words_that_open_nothing_share_a_program(tmp_path: Path) -> None:
    for words in (SECURE_CAPS, SECURE_CAPS | {"NET_RAW"}, SECURE_CAPS - {"KILL"}):
        seccomp.cached_program(tmp_path, words)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"short", bytes(7)])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    program = seccomp.cached_program(tmp_path, SECURE_CAPS)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    assert seccomp.cached_program(tmp_path, SECURE_CAPS) == program
    assert file.read_bytes() == program


def test_no_place_for_the_cache_is_no_failure(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    program = seccomp.cached_program(blocked / "below", SECURE_CAPS)
    assert program == seccomp.compile_program(SECURE_CAPS)


def test_a_kept_program_is_used_without_libseccomp(tmp_path: Path) -> None:
    """A start does not pay for the library when its filter is there."""
    seccomp.cached_program(tmp_path, SECURE_CAPS)
    script = (
        "import sys; from pathlib import Path; from vrun import seccomp;"
        "from vrun.wordlist import SECURE_CAPS;"
        "seccomp.cached_program(Path(sys.argv[1]), SECURE_CAPS);"
        "sys.exit('pyseccomp' in sys.modules)"
    )
    top = os.fspath(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": top}
    command = [sys.executable, "-c", script, os.fspath(tmp_path)]
    assert subprocess.run(command, env=environment, check=False).returncode == 0
