"""A worker of a run: it walks, reads and links as the jobs say."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from vstore import apply, lease, reading, scan
from vstore.member import Member
from vstore.plan import Rules, Slot
from vstore.pool import Identity, InodeNumbers, Pool
from vstore.window import Windows

_SET_LIMIT: Final = 200_000  # a frozenset is quicker to ask and takes ten times the memory


class Hand:
    """Walks and reads; once equipped it links too."""

    def __init__(
        self, trees: Sequence[scan.Tree], objects: InodeNumbers, original: Mapping[int, str]
    ) -> None:
        lease.ignore_break_signals()
        self._trees = trees
        self._objects = objects.quick_set(_SET_LIMIT)
        self._original = original
        self._reader = reading.Reader(trees, original)
        self._windows: Windows | None = None
        self._linker: apply.Linker | None = None

    def equip(
        self, pool: Pool, windows: Windows, stage_fd: int, cgroups: Sequence[str], rules: Rules
    ) -> None:
        """Make it able to link."""
        self._windows = windows
        self._reader.tick = windows.idle
        self._linker = apply.Linker(
            pool, self._trees, cgroups, windows, stage_fd, self._original, rules
        )

    def serve(self, job: tuple[str, Any]) -> Iterator[Any]:
        """Carry out one job of a kind; yields plain answers."""
        kind, what = job
        if kind == "walk":
            tree, starts = what
            for part in scan.walk(self._trees[tree], starts, self._objects):
                yield part.as_plain()
        elif kind == "read":
            yield self._reader.read(what)
        elif self._linker is not None and self._windows is not None:
            self._windows.attacks.clear()
            if kind == "unify":
                answers, left = self._linker.read_and_link(*what)
                yield answers, [tuple(member) for member in left], len(self._windows.attacks)
            else:
                synced_ns, folders, slots = what
                answers = self._linker.link(synced_ns, folders, list(map(_make_slot, slots)))
                yield answers, len(self._windows.attacks)

    def idle(self) -> float | None:
        """Let leases go whose time is over; returns when to be called again (s), None for never."""
        return None if self._windows is None else self._windows.idle()

    def finish(self) -> None:
        """Let lingering leases go."""
        if self._windows is not None:
            self._windows.close()


def _make_slot(plain: tuple[tuple[Any, ...], int, int, list[tuple[Any, ...]]]) -> Slot:
    identity, number, ino, members = plain
    return Slot(Identity(*identity), number, ino, [Member._make(member) for member in members])
