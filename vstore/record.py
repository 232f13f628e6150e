"""Records as `dataclasses` makes them, for programs that start in a few milliseconds.

`dataclasses` compiles the methods of each class from text, 0.2 ms a class, and imports `inspect`
for that; a program with 70 records pays 20 ms before its first line runs. Here all records share a
few methods. What a type checker knows of them is the same (PEP 681). Only what is used is offered:

    @dataclass(frozen=True, slots=True)      # always with slots
    class Address:
        ip: str
        prefix: int = 32

    replace(Address("10.0.0.5"), prefix=24)
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast, dataclass_transform, get_origin

_T = TypeVar("_T")


class _Factory:
    """A default that is made anew for each record."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def field(*, default_factory: Callable[[], _T]) -> _T:
    """A field whose default is `default_factory()`, called for each record."""
    return cast(_T, _Factory(default_factory))


@dataclass_transform(field_specifiers=(field,))
def dataclass(
    *, frozen: bool = False, slots: bool = True, kw_only: bool = False
) -> Callable[[type[_T]], type[_T]]:
    """Make a class a record of its annotated names: with __init__, __eq__, __repr__ and __slots__,
    and, if `frozen`, a hash and no assignment.

    `slots` says what is so anyway. A method of the class's own goes before ours.
    """

    def decorate(cls: type[_T]) -> type[_T]:
        return cast(type[_T], _make(cls, frozen=frozen, kw_only=kw_only))

    return decorate


def replace(record: _T, /, **changes: Any) -> _T:
    """A record like `record` but for the fields of `changes`; TypeError for unknown ones."""
    values = {name: getattr(record, name) for name in names_of(type(record))}
    return type(record)(**{**values, **changes})


def names_of(kind: type[Any]) -> tuple[str, ...]:
    """The names of the fields of a class that dataclass() has made, in their order."""
    names: tuple[str, ...] = kind.__record__
    return names


def _make(cls: type[Any], *, frozen: bool, kw_only: bool) -> type[Any]:
    """`cls` anew: slots can only be given to a class that is being made."""
    namespace = dict(cls.__dict__)
    own = tuple(
        name
        for name, kind in namespace.get("__annotations__", {}).items()
        if kind is not ClassVar and get_origin(kind) is not ClassVar
    )
    inherited: tuple[str, ...] = getattr(cls, "__record__", ())
    names = tuple(dict.fromkeys((*inherited, *own)))
    defaults = {**getattr(cls, "__record_defaults__", {})}
    defaults |= {name: namespace.pop(name) for name in own if name in namespace}
    for name in ("__dict__", "__weakref__"):
        namespace.pop(name, None)
    namespace |= {
        "__qualname__": cls.__qualname__,
        "__slots__": tuple(name for name in own if name not in inherited),
        "__record__": names,
        "__record_defaults__": defaults,
        "__match_args__": () if kw_only else names,
    }
    methods = {**_METHODS, **(_FROZEN if frozen else _OPEN)}
    methods["__init__"] = _initialiser(names, kw_only)
    for name, method in methods.items():
        namespace.setdefault(name, method)
    return type(cls.__name__, cls.__bases__, namespace)


def _initialiser(names: tuple[str, ...], kw_only: bool) -> Callable[..., None]:
    positional = () if kw_only else names
    known = frozenset(names)

    def __init__(self: Any, *given: Any, **named: Any) -> None:
        kind = type(self)
        if len(given) > len(positional):
            raise TypeError(f"{kind.__name__}: {len(given)} values for {len(positional)} fields")
        values = dict(zip(positional, given, strict=False))
        if not known.issuperset(named) or not values.keys().isdisjoint(named):
            odd = sorted(set(named) - known or set(named) & set(values))
            raise TypeError(f"{kind.__name__}: {', '.join(odd)}: no such field, or given twice")
        values.update(named)
        defaults = kind.__record_defaults__
        for name in names:
            if name in values:
                value = values[name]
            elif name in defaults:
                value = defaults[name]
                if type(value) is _Factory:
                    value = value.make()
            else:
                raise TypeError(f"{kind.__name__}: {name} is missing")
            object.__setattr__(self, name, value)

    return __init__


def _values(record: Any) -> tuple[Any, ...]:
    return tuple(getattr(record, name) for name in record.__record__)


def _equal(self: Any, other: object) -> Any:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _show(self: Any) -> str:
    shown = (f"{name}={getattr(self, name)!r}" for name in self.__record__)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _hash(self: Any) -> int:
    return hash(_values(self))


def _reduce(self: Any) -> tuple[Any, ...]:
    return _restore, (type(self), _values(self))


def _restore(kind: type[Any], values: tuple[Any, ...]) -> Any:
    """What pickle and copy make of what _reduce() told them."""
    return kind(**dict(zip(names_of(kind), values, strict=True)))


def _refuse(self: Any, name: str, *_: object) -> None:
    raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")


_METHODS = {"__eq__": _equal, "__repr__": _show, "__reduce__": _reduce}
_FROZEN = {"__hash__": _hash, "__setattr__": _refuse, "__delattr__": _refuse}
_OPEN = {"__hash__": None}
