"""vserver-info: one fact about a guest, a process or the machine, for scripts.

A tag is one entry of TAGS: what prints, or fails, is in a function each.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import click

from vrun import features, names, namespaces
from vrun.commands import entry
from vrun.commands.plain import say, show_failure
from vrun.errors import ToolError, WrongUsage
from vrun.membership import HOST, SPECTATOR, Contexts, Member, find_contexts
from vrun.state import FIRST_DYNAMIC, LAST_DYNAMIC
from vrun.xids import XIDS, configured_xids
from vstore.cli import complete_guest, version_option
from vstore.guest import Guest, confdir
from vstore.record import dataclass
from vstore.render import show_name

SELF: Final = "-"
_UTS: Final = ("sysname", "nodename", "release", "version", "machine", "domainname")
_DOMAIN: Final = Path("/proc/sys/kernel/domainname")


class No(Exception):
    """The answer is no, or there is none: exit code 1."""


@dataclass(frozen=True, slots=True)
class Question:
    target: str
    argument: str | None

    @property
    def contexts(self) -> Contexts:
        return find_contexts()

    @property
    def guest(self) -> Guest:
        return names.find(self.target)

    def running(self) -> Member:
        """The context that is meant; raises No where it does not run."""
        if self.target == SELF:
            return self._of_process()
        found = self.contexts.find(self.target) or self.contexts.find(names.name_of(self.target))
        if found is None or not found.init_pid:
            raise No
        return found

    def _of_process(self) -> Member:
        contexts = self.contexts
        member = contexts.by_xid.get(self.xid_of_process(contexts))
        if member is None:
            raise No
        return member

    def xid_of_process(self, contexts: Contexts) -> int:
        """The context of the process that the target is the number of."""
        pid = os.getpid() if self.target == SELF else _number(self.target)
        xid = contexts.xid_of(pid)
        if xid is None:
            raise No
        return xid

    def is_switched_off(self) -> bool:
        return (self.argument or "").lower() in ("0", "false", "no")

    def is_switched_on(self) -> bool:
        return (self.argument or "").lower() in ("1", "true", "yes")

    def needed(self, what: str) -> str:
        if self.argument is None:
            raise WrongUsage(f"which {what}?")
        return self.argument


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise WrongUsage(f"{text!r} is no number")
    return int(text)


# --- the tags


def _context(question: Question) -> str:
    try:
        return str(question.running().xid)
    except No:
        if question.is_switched_off() or question.target == SELF:
            raise
    name = question.guest.name
    own = dict(configured_xids()).get(name)
    if own is None:
        raise No
    return str(own)


def _is_running(question: Question) -> str:
    question.running()
    return "1"


def _vdir(question: Question) -> str:
    guest = question.guest
    if question.is_switched_on() or guest.config is None:
        return os.fspath(guest.root)
    link = guest.config / "vdir"
    return os.fspath(link if link.is_symlink() else guest.root)


def _name(question: Question) -> str:
    if question.target == SELF or question.contexts.find(question.target):
        return question.running().shown or _refuse()
    return question.guest.name


def _refuse() -> str:
    raise No


def _config(question: Question) -> str:
    return os.fspath(confdir() / question.guest.name)


def _app_dir(question: Question) -> str:
    app = question.needed("APP")
    folder = question.guest.app_dir(app)
    if "/" in app or folder is None or not folder.is_dir():
        raise No
    return os.fspath(folder)


def _init_pid(question: Question) -> str:
    return str(question.running().init_pid)


def _init_of_process(question: Question) -> str:
    contexts = question.contexts
    xid = question.xid_of_process(contexts)
    if xid == HOST:
        return "1"
    member = contexts.by_xid.get(xid)
    return str(member.init_pid) if member and member.init_pid else _refuse()


def _xid(question: Question) -> str:
    return str(question.xid_of_process(question.contexts))


def _uts(question: Question) -> str:
    """A field of the guest's own utsname; what it has set is a stranger's text."""
    field = question.needed("field")
    if field not in _UTS:
        raise WrongUsage(f"{field!r} is no field of uts", hint=" ".join(_UTS))
    member = question.running()
    fd = os.pidfd_open(member.init_pid)
    namespaces.join(fd, {"uts"})  # this process has nothing else to do
    os.close(fd)
    if field == "domainname":
        return show_name(_DOMAIN.read_text(errors="surrogateescape").rstrip("\n"))
    return show_name(str(getattr(os.uname(), field)))


def _system(question: Question) -> str:
    return "\n".join(features.system_lines())


def _feature(question: Question) -> str:
    name = question.needed("feature").lower()
    if name not in features.FEATURES:
        raise WrongUsage(f"{name!r} is no feature", hint=" ".join(features.FEATURES))
    return "1" if features.FEATURES[name]() else _refuse()


def _canonical(question: Question) -> str:
    return names.name_of(question.target)


def _verify_caps(question: Question) -> str:
    return "1" if features.can_run_guests() else _refuse()


def _verify_proc(question: Question) -> str:
    return "1" if features.sees_all_of_proc() else _refuse()


def _xid_type(question: Question) -> str:
    kind = _type_of(question.target)
    if question.argument is not None and question.argument.lower() != kind:
        raise No
    return kind


def _type_of(text: str) -> str:
    if text == SELF:
        text = str(find_contexts().xid_of(os.getpid()))
    number = int(text) if text.isascii() and text.isdecimal() else -1
    if number in XIDS:
        return "static"
    if FIRST_DYNAMIC <= number <= LAST_DYNAMIC:
        return "dynamic"
    return {HOST: "main", SPECTATOR: "watch"}.get(number, "invalid")


@dataclass(frozen=True, slots=True)
class Tag:
    answer: Callable[[Question], str]
    target: str
    help: str


TAGS: Final[Mapping[str, Tag]] = {
    "APPDIR": Tag(_app_dir, "GUEST", "folder of its settings for the app ARG"),
    "CANONIFY": Tag(_canonical, "GUEST", "its name, which need not exist"),
    "CFGDIR": Tag(_config, "GUEST", "its configuration directory"),
    "CONTEXT": Tag(_context, "GUEST", "its number; ARG false: only while it runs"),
    "FEATURE": Tag(_feature, SELF, "1 if the machine and these tools have the feature ARG"),
    "ID": Tag(_context, "GUEST", "as CONTEXT"),
    "INITPID": Tag(_init_pid, "GUEST", "its process 1, as the host numbers it"),
    "INITPID_PID": Tag(_init_of_process, "PID", "process 1 of the context that PID is in"),
    "NAME": Tag(_name, "GUEST", "its name, of a number too"),
    "NID": Tag(_xid, "PID", "as XID"),
    "RUNNING": Tag(_is_running, "GUEST", "1 while it runs"),
    "SYSINFO": Tag(_system, SELF, "the machine, the folders, the features"),
    "UTS": Tag(_uts, "GUEST", f"field ARG of its names: {' '.join(_UTS)}"),
    "VDIR": Tag(_vdir, "GUEST", "its root; ARG true: without symlinks"),
    "VERIFYCAP": Tag(_verify_caps, SELF, "1 if this process has the rights that guests need"),
    "VERIFYPROC": Tag(_verify_proc, SELF, "1 if /proc shows all processes"),
    "XID": Tag(_xid, "PID", "the number of the context that PID is in"),
    "XIDTYPE": Tag(_xid_type, "XID", "main, watch, static, dynamic or invalid; of type ARG?"),
}


@click.command("vserver-info", context_settings=entry.WIDTH)
@click.option("-q", "--quiet", is_flag=True, help="Say it by the exit code alone.")
@click.option("-l", "--long", "listing", is_flag=True, help="List the tags.")
@version_option
@click.argument("target", required=False, shell_complete=complete_guest)
@click.argument("tag", required=False)
@click.argument("argument", metavar="[ARG]", required=False)
def command(
    *, quiet: bool, listing: bool, target: str | None, tag: str | None, argument: str | None
) -> int:
    """Print one fact; exit code 1 if there is none, or the answer is no.

    TARGET is a guest, by name or number, or the PID of a process; - is this process. Without TARGET
    and TAG the machine is described.
    """
    if listing:
        say("\n".join(f"{one.target:<6} {name:<12} {one.help}" for name, one in TAGS.items()))
        return 0
    if target is not None and tag is None:
        raise click.UsageError(f"{target}: which tag? -l lists them")
    asked = (tag or "SYSINFO").upper()
    if asked not in TAGS:
        raise click.UsageError(f"{tag!r} is no tag; -l lists them")
    try:
        answer = TAGS[asked].answer(Question(target or SELF, argument))
    except No:
        return entry.EXIT_FAILED
    except (ToolError, OSError) as error:
        if not quiet:
            text = error.message if isinstance(error, ToolError) else f"{error}"
            hint = error.hint if isinstance(error, ToolError) else None
            show_failure(text, hint, start="vserver-info")
        return entry.EXIT_FAILED
    if not quiet:
        say(answer)
    return 0


def main() -> None:
    """The console script."""
    entry.run(command)
