"""No module is loaded any more: for our interpreter once a guest's files are all that it can see.

There sys.path leads to files of the guest, and what an import finds there would run with the host's
rights.
"""

import sys
from typing import NoReturn


class _NoImports:
    """Finds no module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> NoReturn:
        raise ImportError(f"module {name} is not loaded inside a guest")


def refuse_imports() -> None:
    """Have every import that is not done yet fail, in this process and all that it forks."""
    sys.meta_path[:] = [_NoImports()]
    sys.path_importer_cache.clear()
