"""bpf(2): programs, their attachment to cgroups, maps and types; structures of linux/bpf.h.

Each function raises OSError. Descriptors are close-on-exec; what they stand for goes with the last
of them unless it is attached.
"""

import struct
from typing import Final

from vrun.syscalls import Buffer, bpf

_MAP_CREATE: Final = 0  # enum bpf_cmd
_PROG_LOAD: Final = 5
_PROG_ATTACH: Final = 8
_PROG_DETACH: Final = 9
_BTF_LOAD: Final = 18
_ALLOW_MULTI: Final = 2  # BPF_F_ALLOW_MULTI

_INSTRUCTION_BYTES: Final = 8
_LOG_BYTES: Final = 65536

_LOAD: Final = struct.Struct("=IIQQIIQII16sII")  # union bpf_attr as far as expected_attach_type
_MAP: Final = struct.Struct("=IIIIIII16sIIII")  # as far as btf_value_type_id
_TYPES: Final = struct.Struct("=QQIII")
_ATTACH: Final = struct.Struct("=IIII")


def prog_load(program: bytes, *, prog_type: int, attach_type: int, name: bytes) -> int:
    """Load struct bpf_insn items and give the program's descriptor.

    Where the verifier refuses, its words follow the reason in the OSError.
    """
    code, terms = Buffer(program), Buffer(b"GPL\0")

    def load(level: int, log: Buffer | None) -> int:
        about_log = (level, _LOG_BYTES if log else 0, log.address if log else 0)
        count = len(program) // _INSTRUCTION_BYTES
        head = (prog_type, count, code.address, terms.address, *about_log)
        return bpf(_PROG_LOAD, _LOAD.pack(*head, 0, 0, name, 0, attach_type))

    try:
        return load(0, None)
    except OSError:
        log = Buffer(bytes(_LOG_BYTES))
    try:
        return load(1, log)
    except OSError as error:
        said = log.text.decode(errors="replace").strip()
        reason = f"{error.strerror}: {said}" if said else error.strerror
        raise OSError(error.errno, reason) from None


def prog_attach(target_fd: int, prog_fd: int, *, attach_type: int) -> None:
    """Attach a loaded program to a cgroup (a descriptor of its folder) until that is removed.

    It runs beside those that others have attached or will attach.
    """
    bpf(_PROG_ATTACH, _ATTACH.pack(target_fd, prog_fd, attach_type, _ALLOW_MULTI))


def prog_detach(target_fd: int, prog_fd: int, *, attach_type: int) -> None:
    """Take a program off a cgroup again; ENOENT where it is not attached."""
    bpf(_PROG_DETACH, _ATTACH.pack(target_fd, prog_fd, attach_type, 0))


def btf_load(types: bytes) -> int:
    """Give the kernel a description of types in its binary form; a descriptor."""
    text = Buffer(types)
    return bpf(_BTF_LOAD, _TYPES.pack(text.address, 0, len(types), 0, 0))


def map_create(
    *,
    map_type: int,
    key_size: int,
    value_size: int,
    flags: int,
    name: bytes,
    types_fd: int,
    type_id: int,
) -> int:
    """Make a map whose keys and values are of the type `type_id` of `types_fd`; a descriptor."""
    sizes = (map_type, key_size, value_size, 0, flags, 0, 0)
    return bpf(_MAP_CREATE, _MAP.pack(*sizes, name, 0, types_fd, type_id, type_id))
