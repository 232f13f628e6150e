"""Who may enter a guest: nobody, where its flag `private` says so.

The original's kernel kept even the host's root out. Here our own commands do not go in; what else
root does on the host cannot be refused.
"""

import re
from typing import Final

from vrun.errors import NotPermitted
from vrun.keys import Keys
from vstore.guest import Guest

_MAY_MEAN_IT: Final = re.compile(r"private|all|any|\^|[0-9]", re.IGNORECASE)
_OLD_STYLE: Final = re.compile("private", re.IGNORECASE)


def check_enter(guest: Guest) -> None:
    """Raise NotPermitted for a guest that nobody is to enter.

    Reads no more than one file of most guests. Raises ConfigInvalid for flags that cannot be meant.
    """
    if guest.config is None or not _may_be_private(guest):
        return
    from vrun.config import load_spec  # 20 ms, for the few guests with such a word

    if "private" in load_spec(guest).flags:
        raise NotPermitted(
            f"guest {guest.name}: its flag private keeps everybody out",
            hint=f"take it out of the flags in {guest.config}",
        )


def _may_be_private(guest: Guest) -> bool:
    assert guest.config is not None  # noqa: S101 - check_enter has looked
    if guest.config.name == f"{guest.name}.conf":
        text = Keys(guest.config.parent, []).text(guest.config.name)
        return _OLD_STYLE.search(text or "") is not None
    keys = Keys(guest.config, [])
    text = keys.text("cflags" if keys.has("cflags") else "flags")
    return _MAY_MEAN_IT.search(text or "") is not None
