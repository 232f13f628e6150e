"""Records are what dataclasses of the standard library are, as far as they are used."""

import dataclasses
import subprocess
import sys
from typing import ClassVar

import pytest

from vstore.record import dataclass, field, names_of, replace


@dataclass(frozen=True, slots=True)
class Point:
    """A frozen one."""

    kind: ClassVar[str] = "point"
    x: int
    y: int = 2
    tags: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.x + self.y


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    name: str = "nobody"
    size: int


@dataclass(slots=True)
class Counter:
    count: int = 0


@dataclass(frozen=True, slots=True)
class Deep(Point):
    z: int = 3


def test_values_come_by_place_or_name_and_defaults_fill_in() -> None:
    point = Point(1, tags=["a"])
    assert (point.x, point.y, point.tags, point.total, point.kind) == (1, 2, ["a"], 3, "point")
    assert names_of(Point) == ("x", "y", "tags")
    assert repr(point) == "Point(x=1, y=2, tags=['a'])"


def test_each_record_has_a_default_of_its_own() -> None:
    first = Point(1)
    first.tags.append("a")
    assert Point(1).tags == []


@pytest.mark.parametrize(
    ("given", "named"),
    [((), {}), ((1, 2, [], 4), {}), ((1,), {"x": 1}), ((1,), {"w": 1})],
)
def test_wrong_values_are_refused(given: tuple[int, ...], named: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="Point"):
        Point(*given, **named)  # type: ignore[arg-type]  # that is what is tried


def test_keywords_alone_where_that_is_said() -> None:
    assert Named(size=3) == Named(name="nobody", size=3)
    with pytest.raises(TypeError):
        Named("web", 3)  # type: ignore[call-arg]  # that is what is tried


def test_a_frozen_one_cannot_be_changed_and_is_a_key() -> None:
    named = Named(size=3)
    with pytest.raises(AttributeError):
        named.size = 4  # type: ignore[misc]  # that is what is tried
    with pytest.raises(AttributeError):
        del named.size
    assert {named: "a"}[Named(size=3)] == "a"
    assert named != Named(size=4)
    assert replace(named, size=4) == Named(size=4)


def test_one_that_is_not_frozen_can_be_changed_and_is_no_key() -> None:
    counter = Counter()
    counter.count += 1
    assert counter == Counter(1)
    with pytest.raises(TypeError):
        hash(counter)
    with pytest.raises(AttributeError):
        counter.other = 1  # type: ignore[attr-defined]  # it has slots


def test_fields_are_inherited_and_can_be_matched() -> None:
    match Deep(1, z=5):
        case Deep(x, y, _, z):
            assert (x, y, z) == (1, 2, 5)
        case _:
            pytest.fail("no match")


def test_dataclasses_of_the_standard_library_say_the_same() -> None:
    theirs = dataclasses.make_dataclass("Named", [("size", int), ("name", str, "nobody")])
    assert repr(theirs(size=3, name="web")) == "Named(size=3, name='web')"
    assert repr(Named(size=3, name="web")) == "Named(name='web', size=3)"


def test_a_start_does_not_load_what_takes_long_to_load() -> None:
    program = "import sys, vrun.monitor, vrun.commands.plain; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    slow = {"click", "dataclasses", "inspect", "logging", "pyroute2", "shutil", "subprocess"}
    assert slow & loaded == set()
