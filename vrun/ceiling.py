"""What the processes of a running guest are held to, kept so that those who join get no more.

    RUNDIR/NAME/ceiling.json    0600; written by the start before the guest's init runs

The configuration may have been edited since, and the kernel does not tell a filter back: whoever
joins a guest takes what is written here, never what a start would give it today.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vrun.errors import ConfigInvalid, FormatUnknown, ToolError
from vrun.spec import GuestSpec, Rlimit
from vstore.guest import STATE_FORMAT, parse_name, rundir
from vstore.record import dataclass

_FILE: Final = "ceiling.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The limits of each process of a guest; the fields mean what those of GuestSpec mean."""

    capabilities: frozenset[str]
    ccaps: frozenset[str] = frozenset()
    umask: frozenset[str] = frozenset()
    """With the two above: what the system call filter is made from."""
    rlimits: tuple[Rlimit, ...] = ()
    nice: int = 0
    ionice: tuple[int, int] | None = None
    personality: int | None = None
    oom_score_adj: int | None = None

    def as_spec(self) -> GuestSpec:
        """A guest of these limits, for those who take a GuestSpec to set them."""
        return GuestSpec(
            name="",
            root=Path("/"),
            rlimits=self.rlimits,
            nice=self.nice,
            ionice=self.ionice,
            personality=self.personality,
            oom_score_adj=self.oom_score_adj,
        )


def of(spec: GuestSpec) -> Ceiling:
    """What a guest that is started as `spec` says is held to."""
    return Ceiling(
        capabilities=spec.capabilities,
        ccaps=spec.ccaps,
        umask=spec.umask,
        rlimits=spec.rlimits,
        nice=0 if spec.nice_is_relative else spec.nice,
        ionice=spec.ionice,
        personality=spec.personality,
        oom_score_adj=spec.oom_score_adj,
    )


def write(name: str, ceiling: Ceiling) -> None:
    """Keep what the guest is held to, in the place of what was written before. Raises OSError."""
    import json  # 3 ms

    values = {
        "format": STATE_FORMAT,
        "capabilities": sorted(ceiling.capabilities),
        "ccaps": sorted(ceiling.ccaps),
        "umask": sorted(ceiling.umask),
        "rlimits": [
            [limit.resource, limit.name, limit.soft, limit.hard] for limit in ceiling.rlimits
        ],
        "nice": ceiling.nice,
        "ionice": ceiling.ionice,
        "personality": ceiling.personality,
        "oom_score_adj": ceiling.oom_score_adj,
    }
    path = _path(name)
    spare = path.with_suffix(".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(spare, flags, 0o600), "w") as file:
        json.dump(values, file)
    spare.replace(path)


def load(name: str) -> Ceiling:
    """What the running guest is held to.

    Raises ToolError where that is not known, ConfigInvalid and FormatUnknown for a file that does
    not tell it.
    """
    import json

    path = _path(name)
    try:
        values: dict[str, Any] = dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise ToolError(
            f"guest {name}: it is not known what its processes may do: {path} is missing",
            hint="stop the guest and start it again",
        ) from None
    except (ValueError, TypeError) as error:
        raise ConfigInvalid(f"{path}: is no JSON object: {error}") from error
    if values.get("format") != STATE_FORMAT:
        raise FormatUnknown(
            f"{path}: has format {values.get('format')!r}, this version knows {STATE_FORMAT}",
            hint="use the version that started the guest",
        )
    try:
        return _parse(values)
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigInvalid(f"{path}: key missing or of the wrong kind: {error}") from error


def forget(name: str) -> None:
    """The guest does not run any more. Raises OSError."""
    with suppress(FileNotFoundError):
        _path(name).unlink()


def _path(name: str) -> Path:
    return rundir() / parse_name(name) / _FILE


def _parse(values: Mapping[str, Any]) -> Ceiling:
    ionice = values["ionice"]
    return Ceiling(
        capabilities=_words(values["capabilities"]),
        ccaps=_words(values["ccaps"]),
        umask=_words(values["umask"]),
        rlimits=tuple(_parse_limit(*limit) for limit in values["rlimits"]),
        nice=int(values["nice"]),
        ionice=None if ionice is None else (int(ionice[0]), int(ionice[1])),
        personality=_number(values["personality"]),
        oom_score_adj=_number(values["oom_score_adj"]),
    )


def _parse_limit(resource: int, name: str, soft: int | None, hard: int | None) -> Rlimit:
    return Rlimit(int(resource), str(name), _number(soft), _number(hard))


def _words(values: object) -> frozenset[str]:
    if not isinstance(values, list):
        raise TypeError("is no list of words")
    return frozenset(str(value) for value in values)


def _number(value: int | None) -> int | None:
    return None if value is None else int(value)
