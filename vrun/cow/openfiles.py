"""How many files a supervisor and its monitor may have open: each window takes one for some
seconds, in both.
"""

import os
import resource
from typing import Final

_MOST: Final = 1 << 16


def allow_open_files() -> None:
    """Raise the limit of this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class _MonitorsLimit:
    """The monitor's limit of open files: raised while it keeps leases, but not for what it forks;
    a guest's processes would inherit it.
    """

    def __init__(self) -> None:
        self._before: tuple[int, int] | None = None
        self._is_registered = False

    def allow(self) -> None:
        if self._before is None:
            self._before = resource.getrlimit(resource.RLIMIT_NOFILE)
            allow_open_files()
        if not self._is_registered:
            self._is_registered = True
            os.register_at_fork(after_in_child=self.restore)

    def restore(self) -> None:
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, self._before)
            self._before = None


monitors_limit: Final = _MonitorsLimit()
