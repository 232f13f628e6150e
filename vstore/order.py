"""What a run of unifying is asked for, and what it answers."""

from dataclasses import dataclass, field
from typing import Final

from vstore.exclude import Excludes
from vstore.hold import Held
from vstore.plan import Rules

DEFAULT_MIN_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What to unify and how."""

    rules: Rules = field(default_factory=Rules)
    min_size: int = DEFAULT_MIN_SIZE  # bytes
    jobs: int | None = None  # None: every core
    time_budget_s: float | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A guest to unify, and what is left alone in it.

    `references`: the targets (refservers) with which alone it shares, at equal paths.
    """

    held: Held
    excludes: Excludes
    references: tuple[int, ...] = ()


@dataclass(slots=True)
class UnifyResult:
    """What a run found and did.

    Every regular file seen is unified, already unified, skipped or an error.
    """

    files_seen: int = 0
    files_unified: int = 0
    files_already: int = 0
    bytes_reclaimed: int = 0
    objects_new: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)
    attacks: int = 0
    seconds: float = 0.0

    def skip(self, reason: str, count: int = 1) -> None:
        if count:
            self.skipped[reason] = self.skipped.get(reason, 0) + count
