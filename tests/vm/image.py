"""What the virtual machines boot from: Debian 12 with its kernel and the project, built once.

    CACHE/                  as tests/fixtures/guests.py has it, which builds the Debian tree
    └── vm/                 0700
        ├── lock            flock: one build and one machine at a time
        ├── image-<key>/    kernel and disk.ext4; the project's dependencies are in its /opt/venv,
        │                   process 1 is its /sbin/vtest-init or systemd
        ├── aarch64/        the other architecture's, which aarch64.py builds
        ├── build.log       what the programs that made it said
        └── console-<machine>.log  what the last run of it showed

The key is a hash of everything that goes in: another list of dependencies gives another image. The
checkout itself is not in it: machine.py hands it over at each run. Programs that mount run in a
mount namespace of their own, so nothing stays mounted however the build ends.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.fixtures.guests import CannotBuild, Recipe, cannot_build, unpack
from tests.fixtures.guests import cache_folder as shared_cache_folder
from vstore.errors import NotPermitted, ToolError

CHECKOUT: Final = Path(__file__).resolve().parents[2]
_HERE: Final = CHECKOUT / "tests/vm"

_PACKAGES: Final = (
    "acl",
    "attr",
    "btrfs-progs",
    "busybox-static",
    "e2fsprogs",
    "iproute2",
    "libcap2-bin",
    "libseccomp2",
    "linux-image-cloud-amd64",
    "procps",
    "python3",
    "python3-pyxattr",  # no wheel of it exists, and the machine has no compiler
    "python3-venv",
    "systemd-sysv",
    "xfsprogs",
)
_RECIPE: Final = Recipe("bookworm", "vm", _PACKAGES, variant="minbase")
_DISK_SIZE: Final = "16G"  # sparse; the tests' own images lie on it, sparse too
PROJECT: Final = "srv/vserver-tools"
_PLACES: Final = {"init": "sbin/vtest-init", "vtest.service": "etc/systemd/system/vtest.service"}
"""Files of this folder that are needed before the machine has the checkout."""

_INSTALL: Final = f"""
python3 -m venv --system-site-packages /opt/venv
/opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check \\
    --config-settings editable_mode=compat --editable '/{PROJECT}[dev]'
rm -rf /boot/initrd.img-* /usr/share/doc /usr/share/locale
echo vserver-tools >/etc/hostname
echo 127.0.0.1 localhost vserver-tools >/etc/hosts
"""
"""No initial RAM disk: this kernel has the drivers of NVMe disks and ext4 built in."""

_ENTER: Final = """
for file in /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt /etc/pip.conf \\
    "$HOME/.config/pip/pip.conf"
do
    [ -e "$file" ] || continue
    mkdir -p "$1${file%/*}"
    touch "$1$file"
    mount --bind "$file" "$1$file"
done
mount -t proc proc "$1/proc"
exec chroot "$1" sh -euc "$2"
"""
"""Run script $2 in tree $1, with what this machine knows of names, certificates and indexes."""

ENDS_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")
"""Before a command: it is killed when this program is, in whatever way."""

_PROGRAMS: Final = {
    "debootstrap": "debootstrap",
    "mkfs.ext4": "e2fsprogs",
    "unshare": "util-linux",
    "zstd": "zstd",
}
_EMULATORS: Final = {"aarch64": {"qemu-system-aarch64": "qemu-system-arm"}}
_EMULATOR: Final = {"qemu-system-x86_64": "qemu-system-x86"}
"""Of all other machines."""
_NOT_SOURCE: Final = ("build", "dist", "*.egg-info", ".?*")
"""Patterns of names at the top of the checkout that are no part of the project."""


@dataclass(frozen=True, slots=True)
class Image:
    """A folder with all that qemu boots from."""

    folder: Path

    @property
    def kernel(self) -> Path:
        return self.folder / "kernel"

    @property
    def disk(self) -> Path:
        return self.folder / "disk.ext4"


def check_host(machines: Iterable[str]) -> None:
    """Raises NotPermitted or ToolError, naming what this machine lacks for the virtual ones."""
    if os.geteuid() != 0:
        raise NotPermitted(
            "the virtual machine's disk cannot be built: not root",
            hint="run make test-vm as root",
        )
    if os.uname().machine != "x86_64":
        raise ToolError(f"the virtual machine's disk is built on x86_64, not {os.uname().machine}")
    wanted = dict(_PROGRAMS)
    for machine in machines:
        wanted |= _EMULATORS.get(machine, _EMULATOR)
    missing = {name: package for name, package in wanted.items() if not shutil.which(name)}
    if missing:
        raise ToolError(
            f"not installed: {', '.join(missing)}",
            hint=f"apt-get install {' '.join(missing.values())}",
        )


def cache_folder() -> Path:
    """CACHE/vm; made when missing."""
    folder = shared_cache_folder().absolute() / "vm"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def load_image(cache: Path) -> Image:
    """The image for this checkout, built where `cache` lacks it; the caller holds the lock.

    Building needs root, a package mirror and a Python package index, and takes 1 GB of disk. Images
    for another state of the checkout and the leftovers of killed runs are removed.
    Raises ToolError, which tells what could not be done and where the log is.
    """
    image = Image(cache / f"image-{_key()}")
    for old in {*cache.glob("image-*"), *cache.glob("work-*")} - {image.folder}:
        shutil.rmtree(old)
    if not image.folder.exists():
        _build(image, cache)
    return image


def _key() -> str:
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    installed = [settings["build-system"], settings["project"], settings["tool"]["setuptools"]]
    ours = [(place, (_HERE / name).read_text()) for name, place in _PLACES.items()]
    what = (_RECIPE.file_name, _INSTALL, _DISK_SIZE, installed, ours)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def _build(image: Image, cache: Path) -> None:
    with TemporaryDirectory(dir=cache, prefix="work-") as work:
        tree, part = Path(work) / "tree", Image(Path(work) / "image")
        part.folder.mkdir()
        say("building its Debian tree, unless an earlier run has: up to two minutes")
        _unpack_debian(tree)
        say("installing what the project depends on: up to a minute")
        copy_checkout(tree / PROJECT)
        place_files(tree)
        shutil.copy(next(tree.glob("boot/vmlinuz-*")), part.kernel)
        log = cache / "build.log"
        log.unlink(missing_ok=True)
        run_logged(("sh", "-euc", _ENTER, "sh", os.fspath(tree), _INSTALL), log)
        make_disk(tree, part, log)
        part.folder.rename(image.folder)


def place_files(tree: Path) -> None:
    """Put there what is needed before the machine has the checkout."""
    for name, place in _PLACES.items():
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_HERE / name, tree / place)


def make_disk(tree: Path, image: Image, log: Path) -> None:
    """Write the image's disk with the tree on it."""
    mkfs = ("mkfs.ext4", "-q", "-E", "nodiscard", "-d", os.fspath(tree))
    run_logged((*mkfs, os.fspath(image.disk), _DISK_SIZE), log)


def say(text: str) -> None:
    sys.stderr.write(f"test-vm: {text}\n")


def _unpack_debian(tree: Path) -> None:
    if reason := cannot_build([_RECIPE]):
        raise ToolError(
            f"cannot build the virtual machine's Debian tree: {reason}",
            hint="it is fetched from the mirror that apt is set to: see /etc/apt/sources.list.d",
        )
    try:
        unpack(_RECIPE, tree)
    except CannotBuild as error:
        raise ToolError(f"cannot build the virtual machine's Debian tree: {error}") from error


def copy_checkout(target: Path) -> None:
    """Copy the checkout to the new folder `target`, without what was built from it."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        patterns = _NOT_SOURCE if Path(folder) == CHECKOUT else ()
        return shutil.ignore_patterns("__pycache__", *patterns)(folder, names)

    shutil.copytree(CHECKOUT, target, symlinks=True, ignore=ignore)


def run_logged(command: Sequence[str], log: Path) -> None:
    """Run a program whose mounts and children end with it; its output goes to `log`."""
    alone = (*ENDS_WITH_US, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--")
    environ = os.environ | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    with log.open("ab") as file:
        done = subprocess.run(
            [*alone, *command], stdout=file, stderr=file, env=environ, check=False
        )
    if done.returncode:
        said = log.read_text(errors="replace").strip().splitlines()[-15:]
        raise ToolError(
            "\n".join([f"cannot build the virtual machine's disk, {command[0]} says:", *said]),
            hint=f"{log} has the rest; pip asks the index that its configuration names",
        )
