"""vrun.archive: what comes out of archives of every kind, and what stays in."""

import os
import shutil
import stat
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures.tarballs import COMPRESSORS, END, entry, header, pack, padded, pax, write
from vrun.archive import Rules, Unpacked, unpack
from vrun.errors import ConfigInvalid, NoSpace
from vrun.tarball import Kind

_DIRECTORY, _SYMLINK, _LINK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
_LONG = "/".join(["a folder with a long name"] * 9)


@dataclass(frozen=True, slots=True)
class Box:
    """A folder to unpack into, with a canary beside it that must never change."""

    top: Path

    @property
    def root(self) -> Path:
        return self.top / "root"

    def unpack(self, data: bytes, rules: Rules | None = None) -> Unpacked:
        root_fd = os.open(self.root, os.O_RDONLY)
        try:
            return unpack(write(self.top, data), root_fd, rules or Rules())
        finally:
            os.close(root_fd)

    def refuses(self, data: bytes, rules: Rules | None = None) -> str:
        """The message; beside the root nothing has changed."""
        with pytest.raises(ConfigInvalid) as caught:
            self.unpack(data, rules)
        assert (self.top / "canary").read_text() == "sings"
        assert sorted(path.name for path in self.top.iterdir()) == ["archive", "canary", "root"]
        return caught.value.message

    def paths(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*"))


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    (tmp_path / "root").mkdir()
    (tmp_path / "canary").write_text("sings")
    yield Box(tmp_path)
    assert (tmp_path / "canary").read_text() == "sings"


class Memory:
    """What the interpreter's objects take up at their highest."""

    @contextmanager
    def at_most(self, limit: int) -> Iterator[None]:
        tracemalloc.start()
        try:
            yield
            assert tracemalloc.get_traced_memory()[1] < limit
        finally:
            tracemalloc.stop()


@pytest.fixture
def memory() -> Memory:
    return Memory()


def _sample() -> list[tuple[tarfile.TarInfo, bytes]]:
    return [
        entry("./", kind=_DIRECTORY, mode=0o750, mtime=7),
        entry("etc/", kind=_DIRECTORY, mode=0o2755, mtime=5),
        entry("etc/conf", b"a setting\n" * 99, mode=0o600, mtime=1_500_000_000),
        entry("etc/same", kind=_LINK, link="etc/conf"),
        entry("etc/link", kind=_SYMLINK, link="../../nowhere"),
        entry(f"{_LONG}/file", b"deep"),
        entry("bin/su", b"ELF", mode=0o4755),
        entry("empty"),
        entry("pipe", kind=tarfile.FIFOTYPE, mode=0o620),
    ]


def _check_sample(root: Path) -> None:
    assert (root / "etc/conf").read_bytes() == b"a setting\n" * 99
    assert (root / "etc/conf").samefile(root / "etc/same")
    assert (root / "etc/link").readlink() == Path("../../nowhere")
    assert (root / _LONG / "file").read_text() == "deep"
    modes = {
        name: stat.S_IMODE((root / name).lstat().st_mode) for name in ("etc", "bin/su", "pipe")
    }
    assert modes == {"etc": 0o2755, "bin/su": 0o4755, "pipe": 0o620}
    assert stat.S_ISFIFO((root / "pipe").lstat().st_mode)
    assert [root.stat().st_mtime, (root / "etc").stat().st_mtime] == [7, 5]
    assert (root / "etc/conf").stat().st_mtime == 1_500_000_000


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_comes_out_whole(box: Box, form: int) -> None:
    sample = [
        item for item in _sample() if form != tarfile.USTAR_FORMAT or _LONG not in item[0].name
    ]
    short = entry(f"{_LONG[:90]}/{_LONG[:60].replace('/', '-')}/file", b"deep")
    result = box.unpack(pack(*sample, short, form=form))
    if form != tarfile.USTAR_FORMAT:
        _check_sample(box.root)
    assert (box.root / short[0].name).read_text() == "deep"
    assert result.counts[Kind.HARD_LINK] == 1
    assert result.passed_over == {}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compression_is_found_out(box: Box, name: str) -> None:
    box.unpack(COMPRESSORS[name](pack(*_sample())))
    _check_sample(box.root)


def test_layers_are_taken_off_until_an_archive_is_met(box: Box) -> None:
    data = pack(*_sample())
    for name in ("gzip", "xz", "zstd"):
        data = COMPRESSORS[name](data)
    box.unpack(data)
    _check_sample(box.root)
    for name in ("gzip", "gzip"):
        data = COMPRESSORS[name](data)
    assert "more than 4 times" in Box(box.top).refuses(data)


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz", "zstd"])
def test_streams_that_follow_each_other_are_one(box: Box, name: str) -> None:
    data, compress = pack(*_sample()), COMPRESSORS[name]
    pieces = [data[at : at + 700] for at in range(0, len(data), 700)]
    box.unpack(b"".join(compress(piece) for piece in pieces))
    _check_sample(box.root)


def test_times_have_nanoseconds_and_may_be_early(box: Box) -> None:
    times = {"mtime": "-1.25"}
    box.unpack(pack(entry("old", pax=times), entry("new", mtime=1_600_000_000.5)))
    assert (box.root / "old").stat().st_mtime_ns == -1_250_000_000
    assert (box.root / "new").stat().st_mtime_ns == 1_600_000_000_500_000_000


def test_a_folder_keeps_its_time_when_more_comes_later(box: Box) -> None:
    members = [entry("a/", kind=_DIRECTORY, mtime=3), entry("b", b"1"), entry("a/late", b"2")]
    box.unpack(pack(*members))
    assert (box.root / "a").stat().st_mtime == 3


def test_attributes_that_belong_to_users_are_kept_and_others_counted(box: Box) -> None:
    attributes = {"SCHILY.xattr.user.key": "value", "SCHILY.xattr.trusted.key": "value"}
    result = box.unpack(pack(entry("file", b"1", pax=attributes)))
    assert os.getxattr(box.root / "file", "user.key") == b"value"
    assert os.listxattr(box.root / "file") == ["user.key"]
    assert result.passed_over == {"attribute trusted.key": 1}


# --- what a name can try


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"/etc/passwd", "absolute"),
        (b"../canary", ".."),
        (b"a/../../canary", ".."),
        (b"a/..", ".."),
        (b"..", ".."),
        (b"", "0 bytes"),
        (b"x" * 99 + b"/" + b"y" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("kind", [b"0", b"5", b"2"])
def test_a_name_that_leads_elsewhere_is_refused(
    box: Box, name: bytes, reason: str, kind: bytes
) -> None:
    data = pax([(b"path", name)]) + header(b"good", kind=kind, link=b"x") + END
    assert reason in box.refuses(data)
    assert not any((box.root / path).is_file() for path in box.paths())


def test_a_name_with_a_nul_is_refused(box: Box) -> None:
    assert "NUL" in box.refuses(pax([(b"path", b"a\0b")]) + header(b"a") + END)


@pytest.mark.parametrize("link", ["..", "../canary", "/", "sub", "."])
def test_nothing_is_put_below_a_symlink(box: Box, link: str) -> None:
    data = pack(
        entry("sub/", kind=_DIRECTORY),
        entry("way", kind=_SYMLINK, link=link),
        entry("way/in", b"!"),
    )
    assert "way is no folder" in box.refuses(data)
    assert box.paths() == ["sub", "way"]


def test_nothing_is_put_below_a_file(box: Box) -> None:
    assert "way is no folder" in box.refuses(pack(entry("way", b"1"), entry("way/in", b"!")))


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("../canary", ".."),
        ("/etc/passwd", "absolute"),
        ("soft", "no regular file"),
        ("soft/canary", "Not a directory"),
        ("sub", "no regular file"),
        ("missing", "No such file"),
        (".", "no regular file"),
        ("", "0 bytes"),
    ],
)
def test_a_hard_link_leads_to_a_file_of_the_archive_or_nowhere(
    box: Box, link: str, reason: str
) -> None:
    data = pack(
        entry("sub/", kind=_DIRECTORY),
        entry("soft", kind=_SYMLINK, link=".."),
        entry("hard", kind=_LINK, link=link),
    )
    assert reason in box.refuses(data)
    assert box.paths() == ["soft", "sub"]
    assert (box.top / "canary").stat().st_nlink == 1


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_devices_are_refused(box: Box, kind: bytes) -> None:
    assert "only when asked for" in box.refuses(pack(entry("dev/mem", kind=kind, device=(1, 1))))
    assert "dev/mem" not in box.paths()


def test_what_is_below_a_folder_to_leave_out_is_not_even_looked_at(box: Box) -> None:
    devices = [entry(f"./dev/{name}", kind=tarfile.BLKTYPE, device=(8, 0)) for name in ("a", "b/c")]
    data = pack(entry("dev/", kind=_DIRECTORY), *devices, entry("file", b"1"))
    result = box.unpack(data, Rules(without=frozenset({b"dev"})))
    assert box.paths() == ["dev", "file"]
    assert result.passed_over == {"below dev": 2}


# --- two of one name


@pytest.mark.parametrize("first", [entry("x", b"1"), entry("x", kind=_SYMLINK, link="../canary")])
@pytest.mark.parametrize(
    "second",
    [
        entry("x", b"2"),
        entry("./x", kind=_SYMLINK, link="y"),
        entry("x", kind=_LINK, link="x"),
        entry("x/", kind=_DIRECTORY),
    ],
)
def test_a_second_member_of_a_name_is_refused(
    box: Box, first: tuple[tarfile.TarInfo, bytes], second: tuple[tarfile.TarInfo, bytes]
) -> None:
    reason = box.refuses(pack(first, second))
    assert "comes twice" in reason or "is no folder" in reason


def test_a_folder_may_come_twice_but_never_become_a_file(box: Box) -> None:
    twice = [entry("x/", kind=_DIRECTORY, mode=mode) for mode in (0o700, 0o755)]
    box.unpack(pack(*twice, entry("x/y", b"1")))
    assert stat.S_IMODE((box.root / "x").stat().st_mode) == 0o755
    for may_replace in (False, True):
        message = box.refuses(pack(entry("x", b"2")), Rules(may_replace=may_replace))
        assert "folder that is there already" in message
    assert (box.root / "x/y").read_text() == "1"


def test_what_is_replaced_is_never_written_through(box: Box) -> None:
    (box.root / "way").symlink_to("../canary")
    (box.root / "name").write_text("old")
    (box.root / "other name").hardlink_to(box.root / "name")
    box.unpack(pack(entry("way", b"2"), entry("name", b"new")), Rules(may_replace=True))
    assert not (box.root / "way").is_symlink()
    assert [(box.root / name).read_text() for name in ("name", "other name")] == ["new", "old"]


# --- headers


def _sized(size: bytes) -> bytes:
    return header(b"file", size=size) + END


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no archive " * 100, "checksum"),
        (b"", "cut short"),
        (pack(entry("file", bytes(2000)))[:1200], "cut short"),
        (pack(entry("file", b"1"))[:1024], "cut short"),
        (_sized(b"\xff" * 12), "a size of -1 bytes"),
        (_sized(b"\x80" + b"\xff" * 11), "a size of"),
        (_sized(b"8wonderful88"), "is no number"),
        (header(b"file", kind=b"M") + END, "another volume"),
        (header(b"file", kind=b"Q") + END, "unknown type"),
        (header(b"file", uid=b"\x80\0\0\0\xff\xff\xff\xff") + END, "owner or group"),
        (header(b"file", mtime=b"\x80\xff" + bytes(10)) + END, "a time of"),
        (header(b"way", kind=b"2") + END, "symlink to nothing"),
        (pax([(b"size", b"-5")]) + header(b"file") + END, "where a number belongs"),
        (pax([(b"size", b"9" * 30)]) + header(b"file") + END, "where a number belongs"),
        (header(b"long", kind=b"L", size=b"00020000000\0") + END, "extension header"),
        (header(b"p", kind=b"x", size=b"77777777777\0") + END, "extension header"),
        (header(b"p", kind=b"x", size=b"00000000020\0") + padded(b"9 path=abcdefgh") + END, "pax"),
        (header(b"p", kind=b"x", size=b"00000000011\0") + padded(b"99 a=b\n..") + END, "pax"),
        (pax([(b"uid", b"7")], kind=b"g") + header(b"file") + END, "for all members what uid is"),
        (pax([(b"SCHILY.xattr.user.x", b"7")], kind=b"g") + END, "what SCHILY.xattr.user.x is"),
    ],
)
def test_a_malformed_header_is_refused(box: Box, data: bytes, reason: str) -> None:
    assert reason in box.refuses(data)


def test_a_comment_for_all_members_does_no_harm(box: Box) -> None:
    box.unpack(pax([(b"comment", b"0f1e2d")], kind=b"g") + header(b"file") + END)
    assert box.paths() == ["file"]


def test_a_checksum_of_signed_bytes_is_one_too(box: Box) -> None:
    block = header(b"caf\xe9")
    signed = int(block[148:154], 8) - 256
    box.unpack(block[:148] + b"%06o\0 " % signed + block[156:] + END)
    assert (box.root / os.fsdecode(b"caf\xe9")).exists()
    assert "checksum" in box.refuses(block[:148] + b"%06o\0 " % (signed - 1) + block[156:] + END)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"070701" + b"0" * 600, "a cpio archive"),
        (b"PK\3\4" + bytes(600), "a zip archive"),
        (b"!<arch>\n" + bytes(600), "a Debian package"),
        (bytes(24) + b"\x6c\xea\0\0" + bytes(600), "a backup of dump(8)"),
    ],
)
def test_what_is_no_tar_archive_is_called_by_its_name(box: Box, data: bytes, what: str) -> None:
    assert what in box.refuses(data)
    assert what in box.refuses(COMPRESSORS["gzip"](data))


@pytest.mark.parametrize("name", ["PKG", "BZh", "0707", "LZIP", "]"])
def test_a_name_that_looks_like_another_format_is_a_name(box: Box, name: str) -> None:
    data = pack(entry(name, b"1"), entry("more", b"2"))
    box.unpack(data)
    assert box.paths() == sorted([name, "more"])
    shutil.rmtree(box.root)
    box.root.mkdir()
    box.unpack(COMPRESSORS["xz"](data))
    assert box.paths() == sorted([name, "more"])


def test_a_header_bomb_is_not_unpacked_into_memory(box: Box, memory: Memory) -> None:
    bomb = header(b"p", kind=b"x", size=b"%011o\0" % (1 << 30)) + bytes(1 << 26)
    data = COMPRESSORS["gzip"](bomb)
    with memory.at_most(1 << 22):
        box.refuses(data)


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz", "zstd"])
def test_memory_does_not_grow_with_what_comes_out(box: Box, name: str, memory: Memory) -> None:
    data = COMPRESSORS[name](pack(entry("file", bytes(40 << 20))))
    with memory.at_most(16 << 20):
        box.unpack(data)
    assert (box.root / "file").stat().st_size == 40 << 20


def test_a_dictionary_larger_than_memory_is_refused(box: Box) -> None:
    data = bytearray(COMPRESSORS["lzma"](pack(*_sample())))
    data[1:5] = (0xE000_0000).to_bytes(4, "little")  # lzma-file-format.txt: the dictionary's size
    assert "cannot be read" in box.refuses(bytes(data))
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([20 << 3]) + b"\x01\x00\x00"  # RFC 8878: 1 GiB
    assert "cannot be read" in box.refuses(frame)


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz", "zstd"])
def test_a_damaged_or_short_stream_is_refused(box: Box, name: str) -> None:
    whole = COMPRESSORS[name](pack(entry("file", os.urandom(5000)), entry("more", os.urandom(9))))
    assert "cut short" in box.refuses(whole[: len(whole) // 2])


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz"])
def test_damage_is_found_that_shows_at_the_end_alone(box: Box, name: str) -> None:
    whole = COMPRESSORS[name](pack(*_sample()) + bytes(3 << 18))  # so that the end is read last
    assert box.refuses(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    shutil.rmtree(box.root)
    box.root.mkdir()
    assert "cut short" in box.refuses(whole[:-7])


def test_what_stands_behind_the_end_mark_is_told_of(box: Box) -> None:
    first, second = pack(entry("first")), pack(entry("second"))
    assert not box.unpack(first + bytes(1 << 20)).has_more
    (box.root / "first").unlink()
    filled_up = (header(b"old") + END).ljust(20 * 512, b"?")  # as some programs end the last record
    assert not box.unpack(filled_up).has_more
    assert box.unpack(first + second).has_more
    assert box.paths() == ["first", "old"]


def test_a_file_for_which_there_is_no_room_is_not_begun(box: Box) -> None:
    size = 1 << 50
    data = header(b"file", size=b"\x80" + size.to_bytes(11, "big")) + bytes(1 << 16)
    with pytest.raises(NoSpace) as caught:
        box.unpack(data)
    assert "file" in caught.value.message
    assert box.paths() == []


# --- holes


@pytest.mark.parametrize(
    "records",
    [
        [(b"GNU.sparse.size", b"5000000"), (b"GNU.sparse.map", b"4096,3,4999999,1")],
        [
            (b"GNU.sparse.size", b"5000000"),
            (b"GNU.sparse.offset", b"4096"),
            (b"GNU.sparse.numbytes", b"3"),
            (b"GNU.sparse.offset", b"4999999"),
            (b"GNU.sparse.numbytes", b"1"),
        ],
    ],
)
def test_holes_stay_holes(box: Box, records: list[tuple[bytes, bytes]]) -> None:
    member = header(b"file", size=b"00000000004\0")
    box.unpack(pax(records) + member + padded(b"abcd") + END)
    content = (box.root / "file").read_bytes()
    assert (len(content), content.strip(b"\0")[:3], content[-1:]) == (5_000_000, b"abc", b"d")
    assert (box.root / "file").stat().st_blocks < 100


@pytest.mark.parametrize(
    ("size", "map_"),
    [
        (b"100", b"4096,3"),
        (b"5000", b"3,3,1,1"),
        (b"5000", b"0,2"),
        (b"5000", b"0,9"),
        (b"5000", b"9223372036854775807,4"),
        (b"9223372036854775808", b"0,4"),
    ],
)
def test_a_map_of_holes_that_makes_no_sense_is_refused(box: Box, size: bytes, map_: bytes) -> None:
    records = [(b"GNU.sparse.size", size), (b"GNU.sparse.map", map_)]
    data = pax(records) + header(b"file", size=b"00000000004\0") + padded(b"abcd") + END
    box.refuses(data)


def test_a_map_as_long_as_the_archive_is_refused(box: Box, memory: Memory) -> None:
    records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"5000")]
    member = header(b"file", size=b"%011o\0" % (1 << 24))
    for count in (b"99999999\n", b"99999\n"):
        data = pax(records) + member + (count + b"0\n" * (1 << 23))[: 1 << 24] + END
        with memory.at_most(16 << 20):
            box.refuses(data)
