"""What a person asks for: which guest, from where to where, and how."""

import re
from dataclasses import dataclass, field
from typing import Final

from vstore.copy.access import Session
from vstore.copy.messages import Request, Result
from vstore.errors import WrongUsage
from vstore.guest import parse_name

_PLACE: Final = re.compile(
    r"(?:(?:(?P<user>[^:\[\]\s]+)@)?(?P<host>\[[^\]\s]+\]|[^:\[\]@\s]+):)?(?P<name>[^:]*)"
)


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
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}:{self.name}" if self.user else f"{host}:{self.name}"


def parse_place(text: str) -> Place:
    """What `[[user@]host:]NAME` means; an IPv6 address stands in brackets. Raises WrongUsage."""
    found = _PLACE.fullmatch(text)
    if found is None:
        raise WrongUsage(f"{text!r} is neither a guest nor [user@]host:GUEST")
    host = (found["host"] or "").removeprefix("[").removesuffix("]")
    name = found["name"].removesuffix("/")  # as shells complete it
    return Place(host, found["user"] or "", name)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be copied, and how. `session`: of the other machine, None for a copy here."""

    source: Place
    target: Place
    request: Request
    stop: bool = False
    start: bool = False
    session: Session | None = None


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

    @property
    def bytes_already_there(self) -> int:
        """What no pass had to send."""
        return max(0, self.result.bytes_total - self.bytes_lacking)


def check(order: Order) -> None:
    """Raises WrongUsage for what cannot be meant."""
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
