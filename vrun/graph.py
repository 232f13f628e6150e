"""What has to be done before what: steps for many guests, handed out as soon as each may begin.

A step is a word and a guest's name. It begins when the steps before it have ended; one that needs
another is not done at all where that has failed.
"""

from collections import deque
from collections.abc import Iterator, Mapping

from vstore.record import dataclass

Key = tuple[str, str]
"""What is done, and to which guest: ("start", "web")."""


@dataclass(frozen=True, slots=True)
class Before:
    """What must have ended before a step."""

    needs: frozenset[Key] = frozenset()
    """These well, ..."""
    after: frozenset[Key] = frozenset()
    """... these anyhow."""


class Schedule:
    """Steps on their way; `before` says of each what must have ended.

    A step that is named there alone, and is none of the steps, counts as ended well. There are no
    cycles: find_cycles() tells.
    """

    def __init__(self, before: Mapping[Key, Before]) -> None:
        self._needs = {key: set(one.needs & before.keys()) for key, one in before.items()}
        waits = {key: (one.needs | one.after) & before.keys() for key, one in before.items()}
        self._waits = {key: set(keys) for key, keys in waits.items()}
        self._followers: dict[Key, list[Key]] = {}
        for key, keys in waits.items():
            for earlier in keys:
                self._followers.setdefault(earlier, []).append(key)
        self._ready = deque(key for key, keys in self._waits.items() if not keys)
        for key in self._ready:
            del self._waits[key]

    def take(self) -> Key | None:
        """A step that may begin now; None where all others wait for what is being done."""
        return self._ready.popleft() if self._ready else None

    def end(self, key: Key, *, well: bool) -> Iterator[tuple[Key, Key]]:
        """The step has ended; yields those that are not done for that, each with what it needs."""
        ended = [(key, well)]
        while ended:
            earlier, is_well = ended.pop()
            for follower in self._followers.get(earlier, ()):
                waits = self._waits.get(follower)
                if waits is None:
                    continue  # given up already
                waits.discard(earlier)
                if not is_well and earlier in self._needs[follower]:
                    del self._waits[follower]
                    yield follower, earlier
                    ended.append((follower, False))
                elif not waits:
                    del self._waits[follower]
                    self._ready.append(follower)


def find_cycles(needs: Mapping[str, tuple[str, ...]]) -> list[list[str]]:
    """Cycles among names that need others: in each, every name needs the next, the last the first.

    Not all that there are: every name of a cycle is in one of these, or needs one that is, however
    far away; and without what their last names need of the first there is none.
    """
    done: set[str] = set()
    return [cycle for name in needs for cycle in _cycles_from(name, needs, done)]


def _cycles_from(
    start: str, needs: Mapping[str, tuple[str, ...]], done: set[str]
) -> Iterator[list[str]]:
    """Go down from one name; `done` grows by all that need not be looked at again."""
    way: list[tuple[str, Iterator[str]]] = []
    places: dict[str, int] = {}

    def go_down(name: str) -> None:
        places[name] = len(way)
        way.append((name, iter(needs.get(name, ()))))

    if start not in done:
        go_down(start)
    while way:
        name, following = way[-1]
        other = next(following, None)
        if other is None:
            way.pop()
            del places[name]
            done.add(name)
        elif other in places:
            yield [step for step, _ in way[places[other] :]]
        elif other in needs and other not in done:
            go_down(other)
