"""The CONTEXT column in what ps(1) prints, behind its column PID.

ps sets its columns by the places that characters take on a terminal, and a number too wide for its
column pushes what follows to the right: so a row's pid is looked for where the header ends its PID,
and to the right of that. Processes choose their names: what ps cuts to a column's width cannot push
anything, and a number in a name is never taken for the pid as long as nothing was pushed.
"""

import re
from typing import Final

from vrun.membership import HOST, SPECTATOR, Contexts
from vrun.termtext import index_at

WIDTH: Final = 20
_HEADING: Final = "CONTEXT"
_NUMBER_WIDTH: Final = 5
_NAMES: Final = {HOST: "MAIN", SPECTATOR: "ALL_PROC"}
_GONE: Final = "ERR"
_PID: Final = re.compile(r"(?<!\S)PID(?!\S)")
_NUMBER: Final = re.compile(r"(?<!\S)[0-9]+(?!\S)")


def add_column(text: str, contexts: Contexts) -> str | None:
    """`text` with the column; None where its first line has no PID.

    Processes that ps has shown and that are gone by now are in the context ERR.
    """
    header, *rows = text.split("\n")
    heading = _PID.search(header)
    if heading is None:
        return None
    end = heading.end()
    lines = [_insert(header, end, _HEADING)]
    for row in rows:
        if row == header:  # ps --headers
            lines.append(lines[0])
        elif row:
            place, pid = _find_pid(row, end, contexts)
            lines.append(_insert(row, place, "" if pid is None else show_context(pid, contexts)))
        else:
            lines.append(row)
    return "\n".join(lines)


def show_context(pid: int, contexts: Contexts) -> str:
    """`49152 web`, ` 0 MAIN`: the number to the right in five places, and the name."""
    xid = contexts.xid_of(pid)
    if xid is None:
        return f"{_GONE:>{_NUMBER_WIDTH}}"
    return f"{xid:>{_NUMBER_WIDTH}} {_NAMES.get(xid) or contexts.shown(xid)}".rstrip()


def _insert(line: str, end: int, column: str) -> str:
    """`line` with the column behind the blank that follows its character `end`."""
    rest = line[end + 1 :]
    return f"{line[:end]} {column:<{WIDTH - 1}} {rest}" if rest else f"{line[:end]} {column}"


def _find_pid(row: str, column: int, contexts: Contexts) -> tuple[int, int | None]:
    """Where in the row the pid ends that belongs below the place `column`, and the pid.

    A row of a thread has a dash there: no pid. In one that was pushed the first process that is
    there counts.
    """
    end = index_at(row, column)
    found = [match for match in _NUMBER.finditer(row) if match.end() >= end]
    if found and found[0].end() == end:
        return end, int(found[0][0])
    if row[max(0, end - 1) : end + 1].strip() == "-" or not found:
        return end, None
    for match in found:
        if contexts.xid_of(int(match[0])) is not None:
            return match.end(), int(match[0])
    return found[0].end(), int(found[0][0])
