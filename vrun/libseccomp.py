"""System call filters as libseccomp compiles them, by the package pyseccomp.

To load the library takes some 50 ms, so that starts keep what it made (`kept`).
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vrun import cachefile
from vrun.errors import NotPermitted

_ARCHITECTURES: Final = {"x86_64": ("X86",), "aarch64": ("ARM",)}
"""By machine, those whose programs it runs too."""
_BINARY_TREE: Final = 2  # SCMP_FLTATR_CTL_OPTIMIZE
_ITEM_SIZE: Final = 8  # struct sock_filter, linux/filter.h


def begin() -> tuple[Any, Any]:
    """The library, and a filter of it that lets all calls of all of the machine's architectures
    pass; calls of others answer ENOSYS. Raises NotPermitted without libseccomp.
    """
    try:
        import pyseccomp as library  # slow: it looks for the library with ldconfig or gcc
    except (ImportError, RuntimeError) as error:
        raise NotPermitted(
            f"no system call filter can be made: {error}", hint="install libseccomp2 and pyseccomp"
        ) from error
    program = library.SyscallFilter(library.ALLOW)
    program.set_attr(library.Attr.ACT_BADARCH, library.ERRNO(errno.ENOSYS))
    program.set_attr(library.Attr.CTL_OPTIMIZE, _BINARY_TREE)
    for name in _ARCHITECTURES.get(os.uname().machine, ()):
        program.add_arch(getattr(library.Arch, name))
    return library, program


def export(program: Any) -> bytes:
    """The filter as struct sock_filter items."""
    import tempfile  # 2 ms that a start with a kept filter need not pay

    with tempfile.TemporaryFile() as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def kept(path: Path, compile_program: Callable[[], bytes]) -> bytes:
    """The filter that is kept at `path`; else it is compiled, and kept there."""
    try:
        program = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        program = b""
    if not program or len(program) % _ITEM_SIZE:
        program = compile_program()
        cachefile.keep(path, program)
    return program
