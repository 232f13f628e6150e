"""What the aarch64 machine boots from: Debian 12 for arm64, made where none of it can run.

    CACHE/vm/aarch64/           CACHE as tests/fixtures/guests.py has it
    ├── packages-<key>/         what apt fetched, with lists of its own
    ├── image-<key>/            kernel and disk.ext4, as image.py has them
    └── build.log               what pip and mkfs said

Packages are unpacked, and no script of theirs runs: what such scripts make and the tests need is
made here, or at each boot by tests/vm/inside. The project's dependencies are wheels for arm64.
"""

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from tests.fixtures.guests import find_mirror
from tests.vm.image import CHECKOUT, PROJECT, Image, make_disk, place_files, run_logged, say
from vstore.errors import ToolError

_KERNEL: Final = "linux-image-cloud-arm64"
_PACKAGES: Final = (
    *("?essential", "?priority(required)"),
    *("acl", "attr", "btrfs-progs", "busybox-static", "e2fsprogs", "iproute2", "kmod"),
    *("libcap2-bin", "libseccomp2", "procps", "python3", "python3-pyxattr", "xfsprogs"),
)
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_DEFAULT_MIRROR: Final = "http://deb.debian.org/debian"

_NO_WHEEL: Final = "pyxattr"
"""A dependency that comes as a Debian package."""
_FOR_TESTS: Final = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist")
_PLATFORMS: Final = ("manylinux_2_17_aarch64", "manylinux_2_28_aarch64", "manylinux_2_34_aarch64")
"""What Debian 12's C library (2.36) can load."""
_PYTHON: Final = "3.11"

_NOT_NEEDED: Final = ("usr/share/doc", "usr/share/man", "usr/share/locale")
_ACCOUNTS: Final = ("passwd", "group")
_SIGNING_IN: Final = {
    **{"auth": "auth", "account": "account", "password": "password"},
    **{"session": "session", "session-noninteractive": "session"},
}
"""Of /etc/pam.d, which else pam-auth-update writes."""
_SCRIPT: Final = """\
#!/opt/venv/bin/python
import sys
from {module} import {function}
sys.exit({function}())
"""


def load_arm_image(cache: Path) -> Image:
    """The image for this checkout, built where `cache` lacks it; the caller holds its lock.

    Images for another state of the checkout are removed. Raises ToolError, which tells what could
    not be done.
    """
    folder = cache / "aarch64"
    folder.mkdir(exist_ok=True)
    image = Image(folder / f"image-{_key()}")
    packages = folder / f"packages-{_hash(_PACKAGES, _KERNEL)}"
    for old in {path for path in folder.iterdir() if path.is_dir()} - {image.folder, packages}:
        shutil.rmtree(old)
    if not image.folder.exists():
        say("building the disk of Debian for arm64: up to two minutes")
        _build(image, packages, folder)
    return image


def _key() -> str:
    own = Path(__file__).read_text()
    image = (CHECKOUT / "tests/vm/image.py").read_text()
    init = (CHECKOUT / "tests/vm/init").read_text()
    return _hash(own, image, init, _requirements(), _scripts())


def _hash(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def _build(image: Image, packages: Path, folder: Path) -> None:
    with TemporaryDirectory(dir=folder, prefix="work-") as work:
        tree, part = Path(work) / "tree", Image(Path(work) / "image")
        part.folder.mkdir()
        _unpack(_fetch(packages), tree)
        shutil.copy(next(tree.glob("boot/vmlinuz-*")), part.kernel)
        _finish(tree)
        log = folder / "build.log"
        log.unlink(missing_ok=True)
        _install(tree, log)
        make_disk(tree, part, log)
        part.folder.rename(image.folder)


# --- Debian packages


def _fetch(folder: Path) -> list[Path]:
    """Packages for arm64, with apt and lists of its own; fetched once."""
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


def _unpack(packages: Sequence[Path], tree: Path) -> None:
    for name in ("bin", "lib", "sbin"):
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    tar = ("tar", "-x", "-p", "--numeric-owner", "--keep-directory-symlink", "-C", tree)
    for package in packages:
        command = ("dpkg-deb", "--fsys-tarfile", package)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as archive:
            unpacked = subprocess.run(tar, stdin=archive.stdout, check=False)
        if archive.returncode or unpacked.returncode:
            raise ToolError(f"{package} cannot be unpacked")


def _finish(tree: Path) -> None:
    """Make what the packages' own scripts would."""
    for name in _NOT_NEEDED:
        shutil.rmtree(tree / name, ignore_errors=True)
    for name in _ACCOUNTS:
        shutil.copy(tree / f"usr/share/base-passwd/{name}.master", tree / "etc" / name)
    for name, kind in _SIGNING_IN.items():
        (tree / "etc/pam.d" / f"common-{name}").write_text(f"{kind} required pam_permit.so\n")
    (tree / "etc/hostname").write_text("vserver-tools\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost vserver-tools\n")
    os.mknod(tree / "dev/console", stat.S_IFCHR | 0o600, os.makedev(5, 1))
    for name in ("mnt", "opt", "srv"):
        (tree / name).mkdir()
    place_files(tree)


# --- Python packages


def _install(tree: Path, log: Path) -> None:
    """What `pip install --editable` makes of a venv in /opt/venv, with wheels for arm64."""
    venv = tree / "opt/venv"
    site, programs = venv / f"lib/python{_PYTHON}/site-packages", venv / "bin"
    for folder in (site, programs):
        folder.mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = true\n")
    (programs / "python").symlink_to("/usr/bin/python3")
    (site / "vserver-tools.pth").write_text(f"/{PROJECT}\n")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    target = ("--target", os.fspath(site), "--python-version", _PYTHON, "--only-binary=:all:")
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    run_logged((*pip, *target, *platforms, *_requirements()), log)
    for name, entry in _scripts().items():
        module, _, function = entry.partition(":")
        (programs / name).write_text(_SCRIPT.format(module=module, function=function))
        (programs / name).chmod(0o755)


def _requirements() -> list[str]:
    project = _project()
    extra = project["optional-dependencies"]["dev"]
    wanted = [word for word in extra if _name_of(word) in _FOR_TESTS]
    return [word for word in project["dependencies"] if _name_of(word) != _NO_WHEEL] + wanted


def _name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _scripts() -> dict[str, str]:
    """The console scripts: name to `module:function`."""
    scripts: dict[str, str] = _project()["scripts"]
    return scripts


def _project() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return settings
