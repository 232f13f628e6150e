"""Boot Debian 12's own kernel under qemu with this checkout, and run tests there.

    tests/vm/run [--machine MACHINE] [--accel kvm|tcg] [--limit SECONDS] [PYTEST ARGUMENT...]

There are four machines, all with all cgroup controllers in one v2 hierarchy:

    plain       process 1 is a script: tests of the kernel, and of control groups that are all ours
    systemd     process 1 is systemd, which owns the control groups: tests/vm/systemd
    shutdown    boots as hosts do, three times: it reboots and is turned off with guests that run,
                and the next boot looks at what became of them: tests/vm/shutdown
    aarch64     as plain, of another architecture, always emulated: tests of what knows numbers
                of calls, machine code, or the layout of memory

What is no option of ours is given to pytest: `tests/vm/run -k clock`, `tests/vm/run tests/root`.
Without any all machines run, one after the other, each the tests meant for it; with some the plain
one does, unless MACHINE is given. The exit status is pytest's, the first that is not 0; without one
(a crash, the limit) it is 1.

A machine has two disks: the image of image.py or aarch64.py (what is written to it is thrown away
in the end) and a tar archive with the checkout. It has two serial ports: the console, and one on
which tests/vm/inside reports "exit N". It has no network.
"""

import argparse
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Final

from tests.vm.aarch64 import load_arm_image
from tests.vm.image import (
    ENDS_WITH_US,
    Image,
    cache_folder,
    check_host,
    copy_checkout,
    load_image,
)
from vstore.errors import ToolError

_MEMORY: Final = "2G"
_KVM_LIMIT_S: Final = 10
_POLL_S: Final = 0.2
_PASSED_ON: Final = ("VTEST_REQUIRE", "VTEST_SOAK")
_SYSTEMD: Final = (
    "init=/lib/systemd/systemd systemd.show_status=no systemd.unified_cgroup_hierarchy=1 "
)
_PLAIN: Final = ("init=/sbin/vtest-init",)
_MACHINES: Final = {
    "plain": _PLAIN,
    "systemd": (_SYSTEMD + "systemd.unit=vtest.service",),
    "shutdown": tuple(
        f"{_SYSTEMD}systemd.wants=vtest.service systemd.setenv=VTEST_BOOT={boot}"
        for boot in (1, 2, 3)
    ),
    "aarch64": _PLAIN,
}
"""What each is told on its kernel's command line, in each of its boots."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What qemu is to be, and how serial ports are had there."""

    program: tuple[str, ...]
    console: str
    """The first serial port, as the kernel names it."""
    report: tuple[str, ...]
    """Options for the second one, which is to write to the character device `report`."""


_X86: Final = Hardware(
    ("qemu-system-x86_64", "-cpu", "max"), "ttyS0", ("-serial", "chardev:report")
)
_ARM: Final = Hardware(  # the architecture's own pointer authentication is slow to emulate
    ("qemu-system-aarch64", "-M", "virt", "-cpu", "max,pauth-impdef=on"),
    "ttyAMA0",
    ("-device", "pci-serial,chardev=report"),
)


def main(arguments: Sequence[str]) -> int:
    """Run the tests; returns the exit status."""
    parser = argparse.ArgumentParser(prog="run", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--machine", choices=tuple(_MACHINES), help="default: see above")
    parser.add_argument("--accel", choices=("kvm", "tcg"), help="default: kvm where it works")
    parser.add_argument("--limit", type=int, default=1800, help="seconds; default: %(default)s")
    ours, pytest_arguments = parser.parse_known_args(arguments)
    machines = [ours.machine or "plain"] if ours.machine or pytest_arguments else list(_MACHINES)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check_host(machines)
        with _only_one(cache_folder()) as cache:
            codes = [
                _run_tests(cache, machine, pytest_arguments, accel=ours.accel, limit_s=ours.limit)
                for machine in machines
            ]
            return next(filter(None, codes), 0)
    except ToolError as error:
        hint = f"hint: {error.hint}\n" if error.hint else ""
        sys.stderr.write(f"test-vm: {error}\n{hint}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


@contextmanager
def _only_one(cache: Path) -> Iterator[Path]:
    """Hold the lock of `cache`; a second run waits for the first."""
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write("test-vm: waiting for another run to end\n")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


def _run_tests(
    cache: Path, machine: str, pytest_arguments: Sequence[str], *, accel: str | None, limit_s: int
) -> int:
    is_arm = machine == "aarch64"
    image = load_arm_image(cache) if is_arm else load_image(cache)
    hardware = _ARM if is_arm else _X86
    with TemporaryDirectory(dir=cache, prefix="work-") as folder:
        work = Path(folder)
        _pack_checkout(work, pytest_arguments)
        chosen = "tcg" if is_arm else accel or _choose_accelerator(cache, image)
        disk = f"{image.disk},snapshot=on"
        if len(_MACHINES[machine]) > 1:  # what one boot writes, the next one finds
            disk = os.fspath(work / "disk.ext4")
            subprocess.run(["cp", "--sparse=always", image.disk, disk], check=True)
        for number, parameters in enumerate(_MACHINES[machine], 1):
            console = cache / f"console-{machine}{f'-{number}' if number > 1 else ''}.log"
            sys.stderr.write(
                f"test-vm: booting {machine} ({chosen}); the console goes to {console}\n"
            )
            command = _qemu(hardware, image, disk, chosen, parameters)
            ports = ("-serial", f"file:{console}", *hardware.report)
            if code := _run_boot([*command, *ports], work, console, limit_s=limit_s):
                return code
    return 0


def _run_boot(command: Sequence[str], work: Path, console: Path, *, limit_s: int) -> int:
    """One boot; pytest's exit status in it. Raises ToolError where it was not done or has none."""
    finished = _boot(command, work, console, limit_s=limit_s)
    report = (work / "report").read_text(errors="replace")
    found = re.search(r"^exit (\d+)\s*$", report, re.MULTILINE)
    if not found or not finished:
        reason = "ended without a result" if finished else f"was not done after {limit_s} s"
        hint = f"see the end of {console}" + ("" if finished else "; --limit gives more")
        raise ToolError(f"the virtual machine {reason}", hint=hint)
    return int(found[1])


def _pack_checkout(work: Path, pytest_arguments: Sequence[str]) -> None:
    """Write the second disk: the checkout, and the settings that tests/vm/inside reads."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in passed.items()]
    (work / "settings").write_text(
        "\n".join([*exports, f'set -- "$@" {shlex.join(pytest_arguments)}\n'])
    )
    copy_checkout(work / "vserver-tools")
    with tarfile.open(work / "checkout.tar", "w") as tar:
        for name in ("settings", "vserver-tools"):
            tar.add(work / name, name)


def _choose_accelerator(cache: Path, image: Image) -> str:
    """kvm where it boots the kernel, which is tried once after each start of this machine."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    verdict = cache / f"accelerator-{boot_id}"
    if not verdict.exists():
        for old in cache.glob("accelerator-*"):
            old.unlink()
        verdict.write_text("kvm" if _boots_with_kvm(image) else "tcg")
    return "kvm" if verdict.read_text() == "kvm" else "tcg"


def _boots_with_kvm(image: Image) -> bool:
    """Whether the kernel starts its first process, which ends at once, in good time."""
    disk = f"{image.disk},snapshot=on"
    command = [*_qemu(_X86, image, disk, "kvm", "init=/bin/true"), "-serial", "null"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_KVM_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _qemu(hardware: Hardware, image: Image, disk: str, accel: str, *parameters: str) -> list[str]:
    """The command but for serial ports; panic=-1 and -no-reboot make every way out end it.

    `disk` is the file of its root, with qemu's options.
    """
    options = "root=/dev/nvme0n1 rw rootflags=noinit_itable quiet panic=-1"
    options += f" console={hardware.console}"
    return [
        *ENDS_WITH_US,
        *(*hardware.program, "-accel", accel, "-smp", "2", "-m", _MEMORY),
        *("-nodefaults", "-display", "none", "-no-reboot"),
        *("-kernel", os.fspath(image.kernel), "-append", " ".join([options, *parameters])),
        *_disk("root", f"{disk},cache=unsafe"),
    ]


def _disk(name: str, options: str) -> tuple[str, ...]:
    drive = f"if=none,id={name},format=raw,file={options}"
    return ("-drive", drive, "-device", f"nvme,drive={name},serial={name}")


def _boot(machine: Sequence[str], work: Path, console: Path, *, limit_s: int) -> bool:
    """Run the machine, showing its console, until it turns itself off: False if it did not."""
    command = [
        *machine,
        *_disk("checkout", f"{work}/checkout.tar,readonly=on"),
        *("-chardev", f"file,id=report,path={work}/report"),
    ]
    deadline = monotonic() + limit_s
    console.write_bytes(b"")
    (work / "report").touch()
    # qemu keeps what the machine writes to its disk in an unlinked file there.
    qemu = subprocess.Popen(command, env=os.environ | {"TMPDIR": os.fspath(work)})
    try:
        with console.open("rb") as seen:
            while qemu.poll() is None and monotonic() < deadline:
                _show(seen.read())
                sleep(_POLL_S)
            _show(seen.read())
        return qemu.poll() is not None
    finally:
        qemu.kill()
        qemu.wait()


def _show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()
