"""What vtop shows, and what its keys do: text and choices, without a terminal.

Two lists: of the contexts, and of the processes of the one that was chosen. What is chosen is kept
by what it is, a context or a process, wherever it moves in the list meanwhile.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from vrun.figures import show_bytes, show_ms
from vrun.live import Key, Load, Scene, Task
from vrun.membership import HOST
from vrun.termtext import fit
from vstore.record import dataclass
from vstore.render import show_name

GUESTS: Final = "  CTX NAME                 TASKS  %CPU    RSS    MEM   IO/s   CPUTIME    UPTIME"
PROCESSES: Final = "    PID S  NI THR  %CPU    RSS   IO/s   CPUTIME COMMAND"
HELP: Final = (
    "Up, Down, PgUp, PgDn, Home, End  choose a line",
    "Enter    the processes of the chosen guest; Esc or Left goes back",
    "c m i t  sort by cpu, memory, io, tasks (of processes: threads)",
    "n x      sort by name, by number; r the other way round",
    "k        send a signal to the chosen process, or to all of the guest",
    "+ -      look more often, less often; Space looks at once",
    "q        quit",
)
_UNKNOWN: Final = "-"
_FIXED_LINES: Final = 3
_NAME: Final = 19


@dataclass(frozen=True, slots=True)
class Order:
    """How a list is sorted."""

    name: str
    of_load: Callable[[Load], Any]
    of_task: Callable[[Task], Any]
    falls: bool = True
    """The largest first."""


ORDERS: Final[Mapping[str, Order]] = {
    "c": Order("cpu", lambda one: one.cpu or 0, lambda one: one.cpu or 0),
    "m": Order("memory", lambda one: one.row.resident, lambda one: one.process.resident),
    "i": Order("io", lambda one: one.io or 0, lambda one: one.io or 0),
    "t": Order("tasks", lambda one: one.row.threads, lambda one: one.process.threads),
    "n": Order("name", lambda one: one.row.name, lambda one: one.process.name, falls=False),
    "x": Order("number", lambda one: one.row.xid, lambda one: one.process.pid, falls=False),
}
"""By the key that chooses them."""


@dataclass(frozen=True, slots=True)
class Victim:
    """Whom a signal is meant for."""

    xid: int
    task: Key | None
    """A process; None: all of the context."""
    shown: str


class Board:
    """The state of the screen."""

    def __init__(self) -> None:
        self.opened: int | None = None
        """The context whose processes are shown."""
        self.order = ORDERS["c"]
        self.is_turned = False
        self.note = ""
        """What is said in the last line until the next key."""
        self._scene: Scene | None = None
        self._xid = HOST
        self._task: Key | None = None
        self._top = 0
        self._height = 1

    # --- what there is

    def take(self, scene: Scene) -> None:
        """Show this from now on; one whose context has ended shows all contexts again."""
        self._scene = scene
        there = {load.row.xid for load in scene.loads}
        if self.opened is not None and self.opened not in there:
            self.note = f"context {self.opened} has ended"
            self.close()

    def loads(self) -> list[Load]:
        """The contexts in their order; equals by their number."""
        found = sorted(self._scene.loads if self._scene else (), key=lambda one: one.row.xid)
        return sorted(found, key=self.order.of_load, reverse=self.order.falls != self.is_turned)

    def tasks(self) -> list[Task]:
        """The processes of the opened context, likewise."""
        if self._scene is None or self.opened is None:
            return []
        found = sorted(self._scene.tasks.get(self.opened, ()), key=lambda one: one.process.pid)
        return sorted(found, key=self.order.of_task, reverse=self.order.falls != self.is_turned)

    # --- keys

    def sort(self, key: str) -> None:
        """Sort by ORDERS[key]."""
        self.order, self.is_turned = ORDERS[key], False

    def turn(self) -> None:
        self.is_turned = not self.is_turned

    def move(self, lines: int) -> None:
        """Choose another line, so many below; above where it is negative."""
        keys = self._keys()
        if keys:
            place = min(max(0, self._place(keys) + lines), len(keys) - 1)
            self._choose(keys[place])

    def page(self, pages: int) -> None:
        self.move(pages * max(1, self._height - 1))

    def move_to_end(self, *, last: bool) -> None:
        self.move(1 << 30 if last else -(1 << 30))

    def open(self) -> None:
        """Show the processes of the chosen context."""
        if self.opened is None and self._scene is not None:
            keys = self._keys()
            if keys:
                self.opened = int(keys[self._place(keys)])
                self._xid, self._task, self._top = self.opened, None, 0

    def close(self) -> None:
        """Show the contexts again."""
        self.opened, self._task, self._top = None, None, 0

    def victim(self) -> Victim | None:
        """Whom a signal is for now; None where that is nobody, and why is noted."""
        keys = self._keys()
        if not keys:
            return None
        chosen = keys[self._place(keys)]
        if self.opened is None:
            if chosen == HOST:
                self.note = "the host as a whole gets no signal; Enter shows its processes"
                return None
            name = next(load.row.name for load in self.loads() if load.row.xid == chosen)
            return Victim(chosen, None, f"all of context {chosen} {name}".rstrip())
        task = next(one for one in self.tasks() if one.key == chosen)
        shown = f"process {task.process.pid} ({show_name(task.process.name)})"
        return Victim(self.opened, task.key, shown)

    def _keys(self) -> list[Any]:
        if self.opened is None:
            return [load.row.xid for load in self.loads()]
        return [task.key for task in self.tasks()]

    def _place(self, keys: Sequence[Any]) -> int:
        """Where the chosen line is; the first where it has ended."""
        chosen = self._xid if self.opened is None else self._task
        return keys.index(chosen) if chosen in keys else 0

    def _choose(self, key: Any) -> None:
        if self.opened is None:
            self._xid = key
        else:
            self._task = key

    # --- text

    def draw(self, width: int, height: int) -> tuple[list[str], int]:
        """The lines of the screen, and which of them is the chosen one; -1 for none.

        The second line is the header of the list. Each takes `width` places exactly.
        """
        self._height = max(1, height - _FIXED_LINES)
        keys = self._keys()
        place = self._place(keys)
        self._top = min(max(self._top, place - self._height + 1), place)
        body = self._lines()[self._top : self._top + self._height]
        body += [""] * (self._height - len(body))
        header = GUESTS if self.opened is None else PROCESSES
        last = self.note or f"sorted by {self.order.name}{', turned' if self.is_turned else ''}"
        lines = [self._title(), header, *body, f"{last}   h help  q quit"]
        chosen = 2 + place - self._top if keys else -1
        return [fit(line, width) for line in lines[:height]], chosen

    def _title(self) -> str:
        loads = self.loads()
        if self.opened is not None:
            load = next((one for one in loads if one.row.xid == self.opened), None)
            name = load.row.name if load else ""
            tasks = load.row.processes if load else 0
            return f"vtop: context {self.opened} {name}; processes: {tasks}"
        guests = sum(load.row.xid != HOST for load in loads)
        tasks = sum(load.row.processes for load in loads)
        busy = sum(load.cpu or 0 for load in loads)
        return f"vtop: contexts: {guests}, processes: {tasks}, cpu: {busy:.0f}%"

    def _lines(self) -> list[str]:
        if self.opened is None:
            return [_line_of_load(load) for load in self.loads()]
        return [_line_of_task(task) for task in self.tasks()]


def _line_of_load(load: Load) -> str:
    row = load.row
    sizes = f"{show_bytes(row.resident):>7}{_bytes(load.memory):>7}{_bytes(load.io):>7}"
    times = f"{show_ms(load.cpu_ms):>10}{show_ms(row.uptime_ms):>10}"
    return (
        f"{row.xid:>5} {fit(row.name, _NAME)} {row.threads:>6}{_percent(load.cpu):>6}{sizes}{times}"
    )


def _line_of_task(task: Task) -> str:
    one = task.process
    sizes = f"{show_bytes(one.resident):>7}{_bytes(task.io):>7}"
    start = f"{one.pid:>7} {one.state} {one.nice:>3}{one.threads:>4}{_percent(task.cpu):>6}"
    return f"{start}{sizes}{show_ms(task.cpu_ms):>10} {show_name(one.name)}"


def _percent(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _bytes(value: float | None) -> str:
    return _UNKNOWN + " " if value is None else show_bytes(int(value))
