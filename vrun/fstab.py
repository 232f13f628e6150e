"""Reads a guest's fstab, fstab.local and fstab.remote; see fstab(5).

    source  target  type  [options  [dump  [pass]]]

Left out are `noauto` and swap lines. The target is inside the guest, the source on the host.
"""

import os
import re
from collections.abc import Iterator
from typing import Final

from vrun.errors import ConfigInvalid
from vrun.keys import Keys, Line
from vrun.spec import Mount

_ESCAPE: Final = r"\\(?!000)([0-3][0-7]{2})"
_DEFAULTS: Final = ["defaults", "0", "0"]
"""Fields four to six where a line ends before them."""


def load_mounts(guest: Keys) -> tuple[Mount, ...]:
    """The mounts of the guest in the order in which they are done.

    Raises ConfigInvalid with file and line for what is no line of an fstab.
    """
    if guest.has("fstab.local"):
        guest.warn("fstab.local", "is obsolete; its lines belong into fstab")
    return tuple(
        mount
        for key in ("fstab", "fstab.local", "fstab.remote")
        for line in guest.items(key)
        for mount in _parse(line, is_remote=key == "fstab.remote")
    )


def _parse(line: Line, *, is_remote: bool) -> Iterator[Mount]:
    fields = [re.sub(_ESCAPE, _unescape, field) for field in line.text.split()]
    if len(fields) < 3:
        raise ConfigInvalid(
            f"{line.where}: has {len(fields)} fields, and a mount needs source, target and type",
            hint="a blank within a field is written \\040",
        )
    source, target, fstype = fields[:3]
    options, _, fsck_pass = (fields[3:6] + _DEFAULTS[len(fields[3:6]) :])[:3]
    words = tuple(filter(None, options.split(",")))
    if fstype == "swap" or target == "none" or "noauto" in words:
        return
    if not fsck_pass.isdigit():
        raise ConfigInvalid(f"{line.where}: the sixth field, {fsck_pass!r}, is no number")
    yield Mount(source, _target(line, target), fstype, words, int(fsck_pass), is_remote, line.where)


def _unescape(match: re.Match[str]) -> str:
    return os.fsdecode(bytes([int(match[1], 8)]))


def _target(line: Line, target: str) -> str:
    """The target without doubled and final slashes."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    if not target.startswith("/") or ".." in parts:
        raise ConfigInvalid(
            f"{line.where}: {target!r} is no place inside the guest",
            hint="a target begins with a slash, which is the guest's root, and has no ..",
        )
    return "/" + "/".join(parts)
