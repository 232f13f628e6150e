"""What a run of unifying is asked for, and what it answers."""

from dataclasses import dataclass, field
from typing import Final

from vstore.exclude import Excludes
from vstore.hold import Held
from vstore.plan import Rules
from vstore.scan import FOLDER_REASONS

DEFAULT_MIN_SIZE: Final = 16
TIME_IS_UP: Final = "time-budget"


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

    def add(self, other: "UnifyResult") -> None:
        """Count what another run, over other guests, found and did as well."""
        self.files_seen += other.files_seen
        self.files_unified += other.files_unified
        self.files_already += other.files_already
        self.bytes_reclaimed += other.bytes_reclaimed
        self.objects_new += other.objects_new
        for reason, count in other.skipped.items():
            self.skip(reason, count)
        self.errors += other.errors
        self.attacks += other.attacks
        self.seconds += other.seconds

    def count_late(self) -> None:
        """Skip what the time was too short for: every file that is nothing else."""
        settled = self.files_unified + self.files_already + len(self.errors)
        settled += sum(
            count for reason, count in self.skipped.items() if reason not in FOLDER_REASONS
        )
        self.skip(TIME_IS_UP, max(0, self.files_seen - settled))
