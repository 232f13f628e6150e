"""Old-style guests: CONFDIR/NAME.conf, a shell fragment that sets variables, and NAME.sh beside it.

The fragment may hold any shell code (a `case` on PROFILE is usual), so a shell runs it, with the
guest's name as $1, PROFILE set and nothing else of the caller's environment, and tells what the
variables are afterwards. What it writes is shown as warnings.
"""

import os
import re
import signal
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vrun.config_init import load_helper, load_scripts
from vrun.config_limits import INFINITE
from vrun.config_process import load_shell, parse_uts_name
from vrun.config_sharing import load_cgroup
from vrun.errors import ConfigInvalid
from vrun.iproot import is_free, parse_iproot
from vrun.keys import Keys, Line, parse_number
from vrun.spec import Address, ContextLimits, GuestSpec, InitSpec, Mount, Rlimit, Scripts
from vrun.ulimit import parse_ulimit
from vrun.words import GuestWords, make_words
from vrun.xids import XIDS
from vstore import syscalls
from vstore.guest import confdir

_VARIABLES: Final = (
    "IPROOT",
    "IPROOTDEV",
    "IPROOTMASK",
    "IPROOTBCAST",
    "S_HOSTNAME",
    "S_DOMAINNAME",
    "S_NICE",
    "S_FLAGS",
    "ULIMIT",
    "S_CAPS",
    "S_CONTEXT",
    "ONBOOT",
    "PRIORITY",
    "PROFILE",
)
_SHELLS: Final = ("/bin/bash", "/bin/sh")
"""The original ran under the system's sh, which was bash wherever it was used."""
_EMPTIED: Final = " ".join(f"{name}=" for name in _VARIABLES if name != "PROFILE")
_SHOWN: Final = " ".join(f'"${name}"' for name in _VARIABLES)
_TIMEOUT_S: Final = 10
_PATH: Final = "/sbin:/usr/sbin:/bin:/usr/bin:/usr/X11R6/bin"
_MTAB: Final = "/dev/hdv1 / ext2 rw 0 0\n"
_NO_DOMAIN: Final = "(none)"
"""What the kernel calls a domain that is not set."""
_MOST_INITTAB: Final = 1 << 16
_INITDEFAULT: Final = re.compile(rb"^[^#:\n]*:([0-9A-Za-z]):initdefault:", re.M)


def load_legacy(name: str, root: Path, config: Path, *, profile: str | None) -> GuestSpec:
    """What the file `config` of the old-style guest `name` says; no `profile`: $PROFILE's.

    Runs the file in a shell, as root, for at most ten seconds. Raises ConfigInvalid with the file
    and variable.
    """
    warnings: list[str] = []
    text = Keys(config.parent, warnings).text(config.name) or ""
    wanted = os.environ.get("PROFILE", "") if profile is None else profile
    values = _evaluate(name, config, text, wanted, warnings)
    return _Reader(name, root, config, values, warnings).spec()


# --- running the file


def _evaluate(
    name: str, config: Path, text: str, profile: str, warnings: list[str]
) -> dict[str, str]:
    """The variables after the file has run; `warnings` grows by what it writes."""
    memory_fd = os.memfd_create(config.name, os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(memory_fd), "wb") as file:
            file.write(os.fsencode(text))
        return _ask_shell(name, config, memory_fd, profile, warnings)
    finally:
        os.close(memory_fd)


def _ask_shell(
    name: str, config: Path, fd: int, profile: str, warnings: list[str]
) -> dict[str, str]:
    shell = next((shell for shell in _SHELLS if os.access(shell, os.X_OK)), _SHELLS[-1])
    copy = f"/proc/self/fd/{fd}"
    status, _, said = _run([shell, "-n", copy], config, fd, profile)
    if status:
        reason = said.strip().partition("\n")[0].replace(copy, os.fspath(config))
        raise ConfigInvalid(f"{config}: cannot be read by {shell}: {reason}")
    script = f"{_EMPTIED}\n. {copy} >&2\nprintf '%s\\0' {_SHOWN} end"
    status, told, said = _run([shell, "-c", script, name, name, "start"], config, fd, profile)
    *values, last, _ = ["", *told.split("\0")]
    if last != "end":
        raise ConfigInvalid(f"{config}: ends the shell that reads it, with status {status}")
    lines = said.replace(copy, os.fspath(config)).splitlines()
    warnings += (f"{config}: says: {line}" for line in lines if line.strip())
    return dict(zip(_VARIABLES, values[1:], strict=True))


def _run(command: list[str], config: Path, fd: int, profile: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the shell; late, all that it started is killed."""
    try:
        process = subprocess.Popen(  # noqa: S603 (the file is root's own, as the program is)
            command,
            env={"PATH": _PATH, "PROFILE": profile},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            pass_fds=[fd],
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigInvalid(f"{config}: cannot run {command[0]}: {error.strerror}") from error
    with process:
        try:
            told, said = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise ConfigInvalid(f"{config}: still runs after {_TIMEOUT_S} s") from error
    return process.returncode, os.fsdecode(told), os.fsdecode(said)


# --- from the variables to the spec


@dataclass(frozen=True, slots=True)
class _Reader:
    name: str
    root: Path
    config: Path
    values: Mapping[str, str]
    warnings: list[str]

    def spec(self) -> GuestSpec:
        folder = Keys(self.config.with_name(self.name), self.warnings)
        defaults = Keys(confdir() / ".defaults", self.warnings)
        iproot = self._line("IPROOT")
        words = self._words()
        rlimits, processes = self._limits(words)
        nice = self._line("S_NICE")
        hostname = self._line("S_HOSTNAME")
        return GuestSpec(
            name=self.name,
            root=self.root,
            config=self.config,
            profile=self.values["PROFILE"],
            display_name=self.name,
            xid=self._number("S_CONTEXT", XIDS),
            hostname=parse_uts_name(hostname) if hostname.text else None,
            domainname=self._domain_name(),
            nice=parse_number(nice, least=-20, most=19) if nice.text else 0,
            nice_is_relative=True,
            shell=load_shell(folder, defaults),
            capabilities=words.capabilities,
            flags=words.flags,
            network="free" if is_free(iproot.text) else "bound",
            addresses=self._addresses(iproot),
            mounts=self._mounts(),
            rlimits=rlimits,
            limits=ContextLimits(pids_max=processes),
            cgroup=load_cgroup(folder, defaults),
            init=self._init(words),
            scripts=self._scripts(folder, defaults),
            helper=load_helper(folder, defaults),
            warnings=tuple(dict.fromkeys(self.warnings)),  # the last: the others add to it
        )

    def _line(self, variable: str) -> Line:
        return Line(f"{self.config}: {variable}", self.values[variable].strip())

    def _number(self, variable: str, numbers: range) -> int | None:
        line = self._line(variable)
        return parse_number(line, least=numbers[0], most=numbers[-1]) if line.text else None

    def _domain_name(self) -> str | None:
        line = self._line("S_DOMAINNAME")
        if line.text == "none":
            return _NO_DOMAIN
        return parse_uts_name(line) if line.text else None

    def _words(self) -> GuestWords:
        flags = self._line("S_FLAGS")
        if "minit" in flags.text.split():
            raise ConfigInvalid(
                f"{flags.where}: minit is not offered",
                hint="fakeinit runs the guest's /sbin/init",
            )
        return make_words(
            bcapabilities=[self._line("S_CAPS")],
            cflags=[flags],
            network="bound",
            warnings=self.warnings,
        )

    def _limits(self, words: GuestWords) -> tuple[tuple[Rlimit, ...], int | None]:
        """The limits of each process; how many processes the guest may have, with flag nproc."""
        found = tuple(parse_ulimit(self._line("ULIMIT"), self.warnings))
        if "nproc" not in words.flags:
            return found, None
        last = next((limit for limit in reversed(found) if limit.name == "nproc"), None)
        most = (last.soft if last.hard is None else last.hard) if last else None
        most = None if most == INFINITE else most
        return tuple(limit for limit in found if limit.name != "nproc"), most

    def _addresses(self, iproot: Line) -> tuple[Address, ...]:
        if is_free(iproot.text):
            return ()
        return tuple(
            parse_iproot(
                iproot,
                device=self._line("IPROOTDEV"),
                mask=self._line("IPROOTMASK"),
                broadcast=self._line("IPROOTBCAST"),
                name=self.name,
            )
        )

    def _mounts(self) -> tuple[Mount, ...]:
        """What the original mounted for such a guest."""
        where = os.fspath(self.config)
        return (
            Mount("none", "/proc", "proc", ("defaults",), 0, False, where),
            Mount("none", "/dev/pts", "devpts", ("gid=5", "mode=0620"), 0, False, where),
        )

    def _init(self, words: GuestWords) -> InitSpec:
        environment = {
            "PATH": _PATH,
            "PROFILE": self.values["PROFILE"],
            "HOSTNAME": self.values["S_HOSTNAME"].strip(),
        }
        priority = self._number("PRIORITY", range(1000))
        return InitSpec(
            style="plain" if words.is_fake_init else "sysv",
            runlevel_start=None if words.is_fake_init else _initial_runlevel(self.root),
            environment=tuple((name, value) for name, value in environment.items() if value),
            marks=("default",) if self._line("ONBOOT").text == "yes" else (),
            priority=InitSpec().priority if priority is None else priority,
            mtab=_MTAB,
            pid_one=words.is_fake_init,
        )

    def _scripts(self, folder: Keys, defaults: Keys) -> Scripts:
        hook = self.config.with_name(f"{self.name}.sh")
        if hook.is_file() and not os.access(hook, os.X_OK):
            self.warnings.append(f"{hook}: cannot be executed; it is not run")
        is_run = hook.is_file() and os.access(hook, os.X_OK)
        common = load_scripts(folder, defaults)
        return Scripts(
            folder=common.folder, fallback=common.fallback, hook=hook if is_run else None
        )


def _initial_runlevel(root: Path) -> str | None:
    """The runlevel that the guest's /etc/inittab begins with, whatever symlinks lead to it."""
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = syscalls.openat2(
            root_fd,
            b"etc/inittab",
            flags=os.O_PATH,  # with O_NONBLOCK a link with `..` is not tried again
            resolve=syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS,
        )
    except OSError:
        return None
    finally:
        os.close(root_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        with Path(f"/proc/self/fd/{fd}").open("rb") as file:
            match = _INITDEFAULT.search(file.read(_MOST_INITTAB))
    finally:
        os.close(fd)
    return match[1].decode() if match else None
