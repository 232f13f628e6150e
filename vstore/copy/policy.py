"""What a receiver grants those who send to it, beyond the contents of a guest.

CONFDIR/.defaults/apps/vserver-copy/policy is a text of words, with comments behind `#`:

    prove       whoever sends must prove that it has each content that is here already
    devices     device nodes of all kinds may come, not those alone that each guest has
    scripts     the configuration's scripts, which run as the host's root, come along; so does
                an old-style NAME.conf that is more than assignments
"""

import os
import stat
from pathlib import Path
from typing import Final

from vstore.errors import ConfigInvalid
from vstore.guest import confdir
from vstore.record import dataclass

_WORDS: Final = frozenset({"prove", "devices", "scripts"})
_HARMLESS: Final = frozenset(
    (
        *((1, minor) for minor in (3, 5, 7, 8, 9)),  # null, zero, full, random, urandom
        *((5, minor) for minor in (0, 1, 2)),  # tty, console, ptmx
    )
)


@dataclass(frozen=True, slots=True)
class Policy:
    """What is granted."""

    prove: bool = False
    devices: bool = False
    scripts: bool = False

    def allows_device(self, mode: int, rdev: int) -> bool:
        """Whether a node of this mode and number may come."""
        if self.devices:
            return True
        return stat.S_ISCHR(mode) and (os.major(rdev), os.minor(rdev)) in _HARMLESS


def policy_path() -> Path:
    return confdir() / ".defaults" / "apps" / "vserver-copy" / "policy"


def load_policy() -> Policy:
    """The policy of this machine; without a file nothing more is granted.

    Raises ConfigInvalid.
    """
    path = policy_path()
    try:
        text = path.read_text()
    except FileNotFoundError:
        return Policy()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path}: cannot be read: {error}") from error
    words = {word for line in text.splitlines() for word in line.partition("#")[0].split()}
    if words - _WORDS:
        raise ConfigInvalid(
            f"{path}: {sorted(words - _WORDS)[0]!r} is no word of a policy",
            hint=f"the words are {', '.join(sorted(_WORDS))}",
        )
    return Policy(**dict.fromkeys(words, True))
