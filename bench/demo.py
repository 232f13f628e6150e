"""What `make demo` shows: ten real guests in an image file, unified; one of them booted, a package
upgraded in it, and what the others have seen of that.

Everything happens below one private folder, by the installed commands. However the demo ends the
guest is stopped and the folder taken down; only the cache of built guests stays.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Final, NoReturn

from bench.witness import digest_trees
from tests.fixtures.filesystems import (
    Filesystem,
    Site,
    copy_tree,
    free_bytes,
    make_site,
    mount_image,
    private_folder,
    scratch,
)
from tests.fixtures.guests import (
    DB,
    WEB,
    CannotBuild,
    add_extra_files,
    build_all,
    cache_folder,
    cannot_build,
    personalise,
    unpack,
)
from tests.fixtures.mirrors import newer_package
from tests.fixtures.sshd import find_sshd, run_sshd

_NAMES: Final = tuple(f"{role}{number}" for role in ("web", "db") for number in range(1, 6))
_IMAGE_SIZE: Final = 12 << 30
_DISK_NEEDED: Final = 7 << 30
"""Ten guests that share nothing, and the archives of two."""
_PACKAGE: Final = "git"
"""The one with the most files."""
_VICTIM: Final = "usr/lib/os-release"
BOOTED: Final = "web2"
_RUN: Final = os.getpid()
_ADDRESS: Final = f"198.51.100.{_RUN % 254 + 1}"
"""One of those for examples, RFC 5737: nobody's; another demo on this machine has another one."""
_SETTINGS: Final = {
    "context": f"{40_000 + _RUN % 9_000}",
    "uts/nodename": BOOTED,
    "apps/init/style": "systemd",
    "interfaces/0/ip": _ADDRESS,
    "interfaces/0/prefix": "32",
    "interfaces/0/dev": "lo",
    "rlimits/nproc": "200",
}
_UP_S: Final = 60


class DemoFailed(Exception):
    """A step did not do what it was to show."""


def main() -> int:
    """Run the demo; returns the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    started = monotonic()
    try:
        with private_folder() as folder, _stopped_in_the_end(), _undisturbed_end():
            _demonstrate(folder)
    except (DemoFailed, OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("demo: interrupted; everything is cleaned up\n")
        return 130
    _say(f"\nDone in {monotonic() - started:.0f} s; everything is cleaned up.")
    return 0


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _undisturbed_end() -> Iterator[None]:
    """After the block no second Ctrl-C stops the cleaning up, nor the programs that do it."""
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def _stopped_in_the_end() -> Iterator[None]:
    """After the block the guest does not run, whatever cut the demo short."""
    try:
        yield
    finally:
        rundir = os.environ.get("VSERVER_RUNDIR")
        if rundir and (Path(rundir) / BOOTED / "resources.json").exists():
            subprocess.run([_installed("vserver"), BOOTED, "stop"], check=True)


def _demonstrate(folder: Path) -> None:
    _check_needs()
    mount = mount_image("ext4", folder, size=_IMAGE_SIZE)
    site = make_site(Filesystem("ext4", mount, mount))
    os.environ["VSERVER_CONFDIR"] = os.fspath(site.confdir)
    os.environ["VSERVER_VDIRBASE"] = os.fspath(site.vdirbase)
    os.environ["VSERVER_RUNDIR"] = os.fspath(site.rundir)
    os.environ["VSERVER_LOGDIR"] = os.fspath(folder / "log")
    empty = free_bytes(mount)
    _make_guests(site)
    before = empty - free_bytes(mount)
    _run("vunify", "--all")
    after = empty - free_bytes(mount)
    _run("vdu")
    _say(
        f"\nDisk use by statvfs: {_megabytes(before)} before, {_megabytes(after)} after: "
        f"{after / before:.0%} of what it was."
    )
    _break_one(site)
    _copy_two(site, folder)
    _boot_one(site)
    _upgrade_one(site, folder, empty)
    _run("vserver", BOOTED, "stop")
    _run("vserver", BOOTED, "status", code=3)
    _run("vpool", "verify")


def _copy_two(site: Site, folder: Path) -> None:
    """Two guests go to another machine: the second one finds most of itself there."""
    (folder / "other").mkdir()
    mount = mount_image("ext4", folder / "other", size=_IMAGE_SIZE)
    there = make_site(Filesystem("ext4", mount, mount))
    places = {"CONFDIR": there.confdir, "VDIRBASE": there.vdirbase, "RUNDIR": there.rundir}
    shown = " ".join(f"VSERVER_{name}={path}" for name, path in places.items())
    _say("\nAnother machine, behind an sshd of its own on the loopback, with nothing on it yet:")
    with run_sshd(folder / "sshd", f"SetEnv {shown}") as server:
        config = folder / "ssh_config"
        config.write_text(
            f"Host other\n  HostName 127.0.0.1\n  Port {server.port}\n  User root\n"
            f"  IdentityFile {server.key}\n  UserKnownHostsFile {server.known_hosts()}\n"
        )
        program = os.fspath(Path(sys.executable).parent / "vserver-copy")
        for name in _NAMES[:2]:
            _run("vserver-copy", "-F", f"{config}", "--remote-command", program, name, "other:")
    for name in _NAMES[:2]:
        here, copy = (place.root(name) / "etc/hostname" for place in (site, there))
        if here.read_bytes() != copy.read_bytes():
            raise DemoFailed(f"{copy} is not {here}")
    _say(f"{_NAMES[1]} cost its own files and a manifest: the rest was there.")


def _check_needs() -> None:
    if os.geteuid() != 0:
        raise DemoFailed("needs root: it mounts an image and builds guests")
    if reason := find_sshd() or cannot_build([WEB, DB]):
        raise DemoFailed(reason)
    free = shutil.disk_usage(scratch()).free
    if free < _DISK_NEEDED:
        raise DemoFailed(
            f"{scratch()} has {_megabytes(free)} free, {_megabytes(_DISK_NEEDED)} are needed "
            "(VTEST_TMP names another place)"
        )


def _make_guests(site: Site) -> None:
    """Five guests each of two package sets, all with a life of their own."""
    _say("Building two Debian guests with debootstrap; the next time they come from the cache.")
    try:
        build_all([WEB, DB])
    except CannotBuild as error:
        raise DemoFailed(f"{error}\nhint: does the mirror that apt uses answer?") from error
    _say(f"Making ten guests of them: {' '.join(_NAMES)}")
    for recipe in (WEB, DB):
        first, *others = (name for name in _NAMES if name.startswith(recipe.role))
        unpack(recipe, site.root(first))
        for name in others:
            copy_tree(site.root(first), site.root(name))
    for number, name in enumerate(_NAMES, start=1):
        personalise(site.root(name), name, number)
        site.register(name, site.root(name))
    add_extra_files(site.root(_NAMES[0]))


def _break_one(site: Site) -> None:
    """One guest gets a private copy of a shared file and changes it; its sibling sees nothing."""
    mine, theirs = (site.root(name) / _VICTIM for name in _NAMES[:2])
    original = theirs.read_bytes()
    _say(f"\n{_VICTIM} is one inode in {mine.stat().st_nlink - 1} guests; a write is refused:")
    try:
        mine.write_bytes(b"never")
    except PermissionError as error:
        _say(f"  {error}")
    else:
        raise DemoFailed(f"{mine} is not protected")
    _run("vpool", "break", os.fspath(mine))
    mine.write_bytes(b"NAME='changed in one guest'\n")
    if theirs.read_bytes() != original:
        raise DemoFailed(f"{theirs} changed with {mine}")
    _say(f"{_NAMES[0]} has changed its own copy; {_NAMES[1]} has the old content.")


def _boot_one(site: Site) -> None:
    """Start a guest as it is, unified; see it from inside and from outside."""
    _say(f"\n{BOOTED} gets settings of its own, and boots with all that it shares:")
    for key, value in _SETTINGS.items():
        site.configure(BOOTED, key, f"{value}\n")
        _say(f"  {key:20}{value}")
    _run("vserver", BOOTED, "start")
    _wait_until_up()
    _run("vserver", BOOTED, "status")
    _run("vserver", BOOTED, "exec", "ps", "-eo", "pid,user,args")
    _say("\nIts servers asked for every address of the machine, and got its own:")
    _run("ss", "-Hltn", "src", _ADDRESS)
    _run("vserver", BOOTED, "exec", "curl", "--head", "--silent", f"http://{_ADDRESS}/")


def _upgrade_one(site: Site, folder: Path, empty: int) -> None:
    """Upgrade a package in the guest that runs; look at the others; unify again."""
    mount = site.filesystem.mount
    kept = sorted((cache_folder() / "packages" / WEB.release).glob(f"{_PACKAGE}_*.deb"))
    if not kept:
        raise DemoFailed(f"the cache of packages has no {_PACKAGE}")
    package, version = newer_package(folder, kept[-1])
    _say(
        f"\nA newer {_PACKAGE} comes out, {version}. Before {BOOTED} gets it, a look at the others:"
    )
    others = [name for name in _NAMES if name != BOOTED]
    before = digest_trees([site.root(name) for name in others])
    _say(
        f"  SHA-256 of nine trees, every name, byte, mode, owner, time and xattr: {before[:16]}..."
    )
    shutil.copy2(package, site.root(BOOTED) / "root" / package.name)
    shared = empty - free_bytes(mount)
    _say(f"  Disk use by statvfs: {_megabytes(shared)}")
    install = ("apt-get", "install", "--yes", "--quiet=2", f"/root/{package.name}")
    _run("vserver", BOOTED, "exec", "env", "DEBIAN_FRONTEND=noninteractive", *install)
    _run("vserver", BOOTED, "exec", "dpkg-query", "--show", _PACKAGE)
    _run("vserver", BOOTED, "exec", _PACKAGE, "--version")
    _run("vserver", BOOTED, "exec", "dpkg", "--verify", _PACKAGE)
    (site.root(BOOTED) / "root" / package.name).unlink()
    own = empty - free_bytes(mount)
    _say(f"\n{BOOTED} has copies of its own now: {_megabytes(own)}. The next night, while it runs:")
    _run("vunify", "--all")
    again = empty - free_bytes(mount)
    if digest_trees([site.root(name) for name in others]) != before:
        raise DemoFailed(f"the package work in {BOOTED} has changed another guest")
    _say(
        f"\nThe nine others: {before[:16]}... as before, unchanged.\n"
        f"Disk use by statvfs: {_megabytes(own)} after the upgrade, {_megabytes(again)} now."
    )


def _wait_until_up() -> None:
    """Until its systemd says that it has started what there is to start, well or not."""
    ask = (_installed("vserver"), BOOTED, "exec", "systemctl", "is-system-running", "--wait")
    deadline = monotonic() + _UP_S
    state = ""
    while state not in ("running", "degraded"):  # at first nobody answers
        if monotonic() > deadline:
            raise DemoFailed(f"{BOOTED} is not up after {_UP_S} s but {state or 'silent'}")
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_UP_S, check=False)
        state = done.stdout.strip()


def _run(name: str, *arguments: str, code: int = 0) -> None:
    """Run a command as a person would, its output shown; it must end with `code`."""
    _say(f"\n$ {shlex.join((name, *arguments))}")
    done = subprocess.run([_installed(name), *arguments], check=False)
    if done.returncode != code:
        raise DemoFailed(f"{name} ended with {done.returncode}")


def _installed(name: str) -> str:
    """The command of this checkout; where it has none of that name, the machine's."""
    ours = Path(sys.executable).parent / name
    return os.fspath(ours) if ours.exists() else name


def _megabytes(size: int) -> str:
    return f"{size / 1_000_000:,.0f} MB"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
