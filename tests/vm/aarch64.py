"""The filter of copy-on-write links on aarch64: boots Debian 12's arm64 kernel and counts there.

    CACHE/vm/aarch64/       CACHE as tests/fixtures/guests.py has it
    ├── lists/ archives/    what apt fetched: Python, libseccomp and the kernel, for arm64; once
    └── console.log         what the last run showed

All that the machine has is a RAM disk with these packages unpacked, this checkout's vrun and
vstore, and aarch64-init as its only program.
"""

import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Final

from tests.fixtures.guests import find_mirror
from tests.vm.image import CHECKOUT, ENDS_WITH_US, cache_folder
from vstore.errors import ToolError

_QEMU: Final = "qemu-system-aarch64"
_KERNEL: Final = "linux-image-cloud-arm64"
_PACKAGES: Final = ("python3", "libseccomp2")
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_DEFAULT_MIRROR: Final = "http://deb.debian.org/debian"
_LIMIT_S: Final = 300
_NOT_NEEDED: Final = ("usr/share/doc", "usr/share/man", "lib/modules", "boot")


def main() -> int:
    """Run the checks; 0, or 1 with the reason on stderr."""
    try:
        return run()
    except (OSError, subprocess.SubprocessError, ToolError) as error:
        sys.stderr.write(f"test-vm: aarch64: {error}\n")
        return 1


def run() -> int:
    """Boot it; the exit status that it reported. Raises OSError, SubprocessError, ToolError."""
    if not shutil.which(_QEMU):
        raise ToolError(f"{_QEMU} is not installed", hint="apt-get install qemu-system-arm")
    folder = cache_folder() / "aarch64"
    with (cache_folder() / "aarch64.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _run(folder)


def _run(folder: Path) -> int:
    packages = _fetch(folder)
    with TemporaryDirectory(dir=cache_folder(), prefix="aarch64-") as work:
        tree = Path(work) / "tree"
        tree.mkdir()
        for package in packages:
            subprocess.run(["dpkg", "-x", package, tree], check=True)
        kernel = Path(work) / "kernel"
        shutil.copy(next(tree.glob("boot/vmlinuz-*")), kernel)
        _add_ours(tree)
        disk = Path(work) / "initrd"
        with disk.open("wb") as file:
            _write_cpio(tree, file)
        console = folder / "console.log"
        sys.stderr.write(f"test-vm: booting aarch64 (tcg); the console goes to {console}\n")
        said = _boot(kernel, disk, console)
    found = re.search(r"^exit (\d+)\s*$", said, re.MULTILINE)
    sys.stdout.write("".join(f"{line}\n" for line in said.splitlines() if line.startswith("==")))
    if not found:
        raise ToolError(f"the machine ended without a result; see the end of {console}")
    if int(found[1]):
        sys.stdout.write(said)
    return int(found[1])


def _fetch(folder: Path) -> list[Path]:
    """Packages for arm64, with apt and lists of their own; fetched once."""
    done = folder / "archives" / "complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("lists/partial", "archives/partial", "cache"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        mirror = find_mirror("bookworm") or _DEFAULT_MIRROR
        source = f"deb [signed-by={_KEYRING}] {mirror} bookworm main\n"
        (folder / "sources.list").write_text(source)
        _apt(folder, "apt-get", "-qq", "update")
        how = ("-qq", "--yes", "--no-install-recommends", "--download-only", "install")
        _apt(folder, "apt-get", *how, *_PACKAGES)
        said = _apt(folder, "apt-cache", "depends", _KERNEL)
        kernel = re.search(r"Depends: (linux-image-\S+)", said)
        if kernel is None:
            raise ToolError(f"{_KERNEL} depends on no kernel: {said}")
        _apt(folder, "apt-get", "-qq", "download", kernel[1])
        done.touch()
    return sorted(done.parent.glob("*.deb"))


def _apt(folder: Path, *argv: str) -> str:
    settings = {
        **{"APT::Architecture": "arm64", "APT::Architectures": "arm64"},
        **{"APT::Sandbox::User": "root", "Acquire::Languages": "none"},
        **{"Dir::State::lists": folder / "lists", "Dir::State::status": folder / "status"},
        **{"Dir::Cache": folder / "cache", "Dir::Cache::archives": folder / "archives"},
        **{"Dir::Etc::sourcelist": folder / "sources.list", "Dir::Etc::sourceparts": "/dev/null"},
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    done = subprocess.run(
        [argv[0], *options, *argv[1:]],
        cwd=folder / "archives",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ToolError(f"{argv[0]} cannot fetch packages for arm64: {done.stderr[-300:].strip()}")
    return done.stdout


def _add_ours(tree: Path) -> None:
    for name in _NOT_NEEDED:
        shutil.rmtree(tree / name, ignore_errors=True)
    project, packages = tree / "srv/vserver-tools", tree / "srv/packages"
    packages.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "man")
    for name in ("vrun", "vstore"):
        shutil.copytree(CHECKOUT / name, project / name, ignore=ignore)
    import pyseccomp  # pure Python, whatever machine it was installed for

    shutil.copy(pyseccomp.__file__, packages)
    shutil.copy(CHECKOUT / "tests/vm/aarch64-init", tree / "init")
    (tree / "init").chmod(0o755)


def _boot(kernel: Path, disk: Path, console: Path) -> str:
    command: list[str | Path] = [
        *ENDS_WITH_US,
        *(_QEMU, "-M", "virt", "-cpu", "max,pauth-impdef=on", "-smp", "1", "-m", "1G"),
        *("-nodefaults", "-nographic", "-no-reboot", "-nic", "none"),
        *("-kernel", kernel, "-initrd", disk, "-append", "console=ttyAMA0 quiet panic=-1"),
        *("-serial", f"file:{console}"),
    ]
    subprocess.run(command, check=True, timeout=_LIMIT_S, stdin=subprocess.DEVNULL)
    return console.read_text(errors="replace").replace("\r", "")


# --- the RAM disk: a cpio archive, see initramfs-buffer-format.rst of the kernel


def _write_cpio(tree: Path, file: IO[bytes]) -> None:
    """All files of the tree, owned by root, and a console for the first process."""
    for number, (name, mode, data) in enumerate(_entries(tree), start=1):
        _write_entry(file, number, name, mode, data)
    _write_entry(file, 0, "dev", stat.S_IFDIR | 0o755, b"")
    _write_entry(file, 0, "dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1))
    _write_entry(file, 0, "TRAILER!!!", 0, b"")


def _entries(tree: Path) -> Iterator[tuple[str, int, bytes]]:
    for path in sorted(tree.rglob("*")):
        mode = path.lstat().st_mode
        data = b""
        if stat.S_ISLNK(mode):
            data = os.fsencode(path.readlink())
        elif stat.S_ISREG(mode):
            data = path.read_bytes()
        yield os.fspath(path.relative_to(tree)), mode, data


def _write_entry(
    file: IO[bytes],
    number: int,
    name: str,
    mode: int,
    data: bytes,
    device: tuple[int, int] = (0, 0),
) -> None:
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name.encode()) + 1, 0)
    file.write(b"070701" + b"".join(b"%08X" % field for field in fields))
    for part in (name.encode() + b"\0", data):
        file.write(part)
        file.write(bytes(-file.tell() % 4))


if __name__ == "__main__":
    sys.exit(main())
