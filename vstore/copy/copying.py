"""A copy from the side of the person who asked for it: one pass, or two around a stop."""

import logging
import re
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from vstore.copy.messages import Dialogue, Done, Request, Result, Source
from vstore.copy.peer import local_peer, remote_peer, run_vserver, set_up
from vstore.copy.receiving import receive_guest
from vstore.copy.sending import send_guest
from vstore.errors import ToolError, WrongUsage
from vstore.guest import parse_name
from vstore.progress import Progress

if TYPE_CHECKING:
    from vstore.copy.session import Access

log = logging.getLogger(__name__)

_PLACE: Final = re.compile(r"(?:(?P<host>\[[^\]]+\]|[^:]+):)?(?P<name>[^:]*)")


@dataclass(frozen=True, slots=True)
class Place:
    """A guest, here (`host` is empty) or on another machine."""

    host: str
    user: str
    name: str

    @property
    def shown(self) -> str:
        if not self.host:
            return self.name
        return f"{self.user}@{self.host}:{self.name}" if self.user else f"{self.host}:{self.name}"


def parse_place(text: str) -> Place:
    """What `[[user@]host:]NAME` means. Raises WrongUsage."""
    found = _PLACE.fullmatch(text)
    if found is None:
        raise WrongUsage(f"{text!r} is neither a guest nor [user@]host:GUEST")
    user, _, host = (found["host"] or "").rpartition("@")
    return Place(host.strip("[]"), user, found["name"])


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be copied, and how."""

    source: Place
    target: Place
    request: Request
    stop: bool = False
    start: bool = False
    access: "Access | None" = None
    remote_command: str = ""


@dataclass(slots=True)
class Report:
    """What came of it. Bytes as they went over the wire, `result` of the last pass."""

    bytes_sent: int = 0
    bytes_received: int = 0
    files_sent: int = 0
    bytes_lacking: int = 0
    seconds: float = 0.0
    downtime_s: float | None = None
    passes: int = 0
    result: Result = field(default_factory=Result)
    warnings: list[str] = field(default_factory=list)


def copy_guest(order: Order, progress: Progress) -> Report:
    """Carry the order out. Raises what goes wrong; the target is whole then, old or new."""
    _check(order)
    began = time.monotonic()
    report = Report()
    with _open_peer(order) as dialogue:
        run = _Run(order, dialogue, progress, report)
        run.run()
        dialogue.send(Request("end"))
        dialogue.channel.flush()
        report.bytes_sent = dialogue.channel.bytes_sent
        report.bytes_received = dialogue.channel.bytes_received
    report.seconds = time.monotonic() - began
    return report


def _check(order: Order) -> None:
    source, target = order.source, order.target
    if source.host and target.host:
        raise WrongUsage(
            "both sides are on other machines", hint="run vserver-copy on one of the two"
        )
    for name in (source.name, target.name):
        parse_name(name)
    if not source.host and not target.host and source.name == target.name:
        raise WrongUsage(f"{source.name}: would be copied onto itself", hint="name another target")
    if order.request.dry_run and (order.stop or order.start):
        raise WrongUsage("--dry-run changes nothing, so it neither stops nor starts a guest")


def _open_peer(order: Order) -> AbstractContextManager[Dialogue]:
    if order.access is None:
        return local_peer()
    return remote_peer(order.access, order.remote_command)


class _Run:
    """The passes of one order."""

    def __init__(
        self, order: Order, dialogue: Dialogue, progress: Progress, report: Report
    ) -> None:
        self._order = order
        self._dialogue = dialogue
        self._progress = progress
        self._report = report

    def run(self) -> None:
        order = self._order
        source = self._pass(order.request)
        if order.stop and source.is_running:
            self._stop_and_pass()
        elif order.start:
            self._start()

    def _pass(self, request: Request) -> Source:
        """One pass, in whichever direction."""
        order = self._order
        set_up(self._dialogue.channel, request)
        if order.source.host:
            request.task = "send"
            self._dialogue.send(request)
            source, result = receive_guest(self._dialogue, request, self._progress)
        else:
            request.task = "receive"
            self._dialogue.send(request)
            source, result = send_guest(self._dialogue, request, self._progress)
        report = self._report
        report.result = result
        report.files_sent += result.files_sent
        report.bytes_lacking += result.bytes_lacking
        report.warnings += result.warnings
        report.passes += 1
        return source

    def _stop_and_pass(self) -> None:
        """The second pass: only what has changed since, while the guest stands still."""
        order = self._order
        began = time.monotonic()
        name = order.source.name
        done = self._act(name, "stop", is_remote=bool(order.source.host))
        if done.status:
            raise ToolError(
                f"guest {name}: cannot be stopped (vserver ended with {done.status}): {done.said}",
                hint="the copy is as the guest was while it ran; stop it and use --refresh",
            )
        try:
            again = msgspec.structs.replace(order.request, refresh=True)
            self._pass(again)
            if order.start:
                self._start()
        except ToolError as error:
            where = f"on {order.source.host}: " if order.source.host else ""
            raise type(error)(
                f"{error.message} (guest {name} was stopped, and nothing else was done to it)",
                hint=f"go on with --refresh, or start it again {where}vserver {name} start",
            ) from error
        self._report.downtime_s = time.monotonic() - began

    def _start(self) -> None:
        name = self._order.target.name
        done = self._act(name, "start", is_remote=bool(self._order.target.host))
        if done.status:
            raise ToolError(
                f"guest {name}: the copy is there, but cannot be started (vserver ended with "
                f"{done.status}): {done.said}",
                hint=f"see: vserver {name} status; the source was not changed",
            )

    def _act(self, name: str, action: str, *, is_remote: bool) -> Done:
        if not is_remote:
            return run_vserver(name, action)
        self._dialogue.send(Request(action, target=name))
        return self._dialogue.expect(Done)
