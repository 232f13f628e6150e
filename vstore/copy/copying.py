"""A copy from the side of the person who asked for it: one pass, or two around a stop."""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Final

import msgspec

from vstore.copy.messages import Dialogue, Done, Hostile, Request, Source
from vstore.copy.order import Order, Report
from vstore.copy.peer import local_peer, remote_peer, run_vserver, set_up
from vstore.copy.receiving import receive_guest
from vstore.copy.sending import Outgoing, is_free
from vstore.errors import ToolError
from vstore.progress import Progress

log = logging.getLogger(__name__)

_WAIT_S: Final = 30.0
_POLL_S: Final = 0.05


def copy_guest(order: Order, progress: Progress) -> Report:
    """Carry the order out. Raises what goes wrong; the target is whole then, old or new."""
    began = time.monotonic()
    report = Report()
    with ExitStack() as stack:
        ready = None
        is_sent = order.session is not None and not order.source.host
        if is_sent and is_free(order.source.name):  # who has to wait calls the other side first
            ready = stack.enter_context(Outgoing(order.request))
            ready.list_ahead()
        dialogue = stack.enter_context(_open_peer(order))
        run = _Run(order, dialogue, progress, report)
        run.run(ready)
        dialogue.send(Request("end"))
        dialogue.channel.flush()
        report.bytes_sent = dialogue.channel.bytes_sent
        report.bytes_received = dialogue.channel.bytes_received
    report.seconds = time.monotonic() - began
    return report


def _open_peer(order: Order) -> AbstractContextManager[Dialogue]:
    return local_peer() if order.session is None else remote_peer(order.session)


class _Run:
    """The passes of one order."""

    def __init__(
        self, order: Order, dialogue: Dialogue, progress: Progress, report: Report
    ) -> None:
        self._order = order
        self._dialogue = dialogue
        self._progress = progress
        self._report = report

    def run(self, ready: Outgoing | None) -> None:
        """All passes; `ready` is the guest of the first one, where it is sent from here."""
        order = self._order
        source = self._pass(order.request, ready)
        if order.stop and source.is_running:
            self._stop_and_pass()
        elif order.start:
            self._start()

    def _pass(self, request: Request, ready: Outgoing | None = None) -> Source:
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
            if ready is None:
                self._await_source(order.source.name)
            with ready or Outgoing(request) as outgoing:
                source, result = outgoing.send(self._dialogue, self._progress)
        report = self._report
        report.result = result
        report.files_sent += result.files_sent
        report.bytes_lacking += result.bytes_lacking
        report.warnings += result.warnings
        report.passes += 1
        return source

    def _await_source(self, name: str) -> None:
        """Wait a little for who holds the source; the other side's refusal comes at once."""
        deadline = time.monotonic() + _WAIT_S
        while not is_free(name) and time.monotonic() < deadline:
            if self._dialogue.poll() is not None:
                raise Hostile("an answer to what was not said yet")
            time.sleep(_POLL_S)

    def _stop_and_pass(self) -> None:
        """The second pass: only what has changed since, while the guest stands still."""
        order = self._order
        began = time.monotonic()
        name = order.source.name
        with self._said_of_the_source("may have been stopped"):
            done = self._act(name, "stop", is_remote=bool(order.source.host))
        if done.status:
            raise ToolError(
                f"guest {name}: cannot be stopped (vserver ended with {done.status}): {done.said}",
                hint="the copy is as the guest was while it ran; stop it and use --refresh",
            )
        with self._said_of_the_source("was stopped, and nothing else was done to it"):
            # the first pass has made what the copy is to be
            self._pass(
                msgspec.structs.replace(
                    order.request, refresh=True, hostname="", addresses=[], context=0
                )
            )
            if order.start:
                self._start()
        self._report.downtime_s = time.monotonic() - began

    @contextmanager
    def _said_of_the_source(self, what: str) -> Iterator[None]:
        """Whatever ends the copy in here, the person is told what became of the guest."""
        source = self._order.source
        where = f"on {source.host}: " if source.host else ""
        told = f"guest {source.name} {what}"
        how = f"go on with --refresh, or start it again {where}vserver {source.name} start"
        try:
            yield
        except ToolError as error:
            error.message, error.hint = f"{error.message} ({told})", how
            raise
        except BaseException:
            log.warning("%s; %s", told, how)
            raise

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
