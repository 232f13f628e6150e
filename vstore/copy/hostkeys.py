"""Who a host is: known_hosts files, with hashed names, `[host]:port`, `@revoked` and
`@cert-authority`; see sshd(8), SSH_KNOWN_HOSTS FILE FORMAT.
"""

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vstore.copy.sshconfig import matches
from vstore.errors import NotPermitted, ToolError

PORT: Final = 22
"""Of ssh: a host stands in known_hosts without it."""
_HASHED: Final = "|1|"
_REVOKED: Final = "@revoked"
_AUTHORITY: Final = "@cert-authority"


@dataclass(frozen=True, slots=True)
class Known:
    """A line about the host: a key that it has, must not have, or that certifies it."""

    place: str
    marker: str
    kind: str
    key: bytes


def place_of(host: str, port: int) -> str:
    """How known_hosts names a host."""
    return host.lower() if port == PORT else f"[{host.lower()}]:{port}"


def fingerprint(key: bytes) -> str:
    """As ssh-keygen -l shows it."""
    text = base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")
    return f"SHA256:{text}"


def load_known(host: str, port: int, files: Sequence[Path]) -> list[Known]:
    """All that the files say of the host."""
    place = place_of(host, port)
    return [known for file in files for known in _read(file, place)]


def _read(file: Path, place: str) -> Iterator[Known]:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        marker = words.pop(0) if words[0].startswith("@") else ""
        if len(words) >= 3 and _is_for(words[0], place):
            try:
                key = base64.b64decode(words[2], validate=True)
            except (binascii.Error, ValueError):
                continue
            yield Known(f"{file}:{number}", marker, words[1], key)


def _is_for(names: str, place: str) -> bool:
    if names.startswith(_HASHED):
        return _is_hash_of(names, place)
    return matches(names.lower().split(","), place)


def _is_hash_of(names: str, place: str) -> bool:
    try:
        salt, wanted = (base64.b64decode(part) for part in names[len(_HASHED) :].split("|"))
    except (ValueError, binascii.Error):
        return False
    found = hmac.new(salt, place.encode(), hashlib.sha1).digest()
    return hmac.compare_digest(found, wanted)


def known_kinds(known: Sequence[Known]) -> list[str]:
    """The kinds of the keys by which the host is known, to be asked for first."""
    return list(dict.fromkeys(item.kind for item in known if not item.marker))


def check_key(
    host: str, port: int, kind: str, key: bytes, known: Sequence[Known], *, accept_new: bool
) -> bool:
    """Whether the host's key is to be noted as new. Raises NotPermitted for one that is refused."""
    place = place_of(host, port)
    for item in known:
        if item.marker == _REVOKED and item.key == key:
            raise NotPermitted(
                f"{place}: its host key {fingerprint(key)} is revoked ({item.place})",
                hint="do not connect: somebody else may have that key",
            )
    plain = [item for item in known if not item.marker]
    if any(item.key == key for item in plain):
        return False
    if plain:
        same = [item for item in plain if item.kind == kind] or plain
        raise NotPermitted(
            f"{place}: its host key has changed: it shows {fingerprint(key)} ({kind}), known is "
            f"{fingerprint(same[0].key)} ({same[0].place})",
            hint="somebody may stand between; if the host was installed anew, remove that line",
        )
    if any(item.marker == _AUTHORITY for item in known):
        raise NotPermitted(
            f"{place}: is known by a certificate authority alone (@cert-authority), and "
            "certificates of hosts are not understood here",
            hint=f"add the host's own key to known_hosts: {_scan_command(host, port)}",
        )
    if not accept_new:
        raise NotPermitted(
            f"{place}: the host is unknown; it shows the key {fingerprint(key)} ({kind})",
            hint="compare that with the host's own (ssh-keygen -lf), then use --accept-new once",
        )
    return True


def _scan_command(host: str, port: int) -> str:
    return f"ssh-keyscan {host}" if port == PORT else f"ssh-keyscan -p {port} {host}"


def note_key(file: Path, host: str, port: int, kind: str, key: bytes) -> None:
    """Add the host to `file`. Raises ToolError."""
    line = f"{place_of(host, port)} {kind} {base64.b64encode(key).decode()}\n"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            is_open_line = size and os.pread(fd, 1, size - 1) != b"\n"
            os.write(fd, (("\n" if is_open_line else "") + line).encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise ToolError(f"{file}: the host's key cannot be noted: {error.strerror}") from error
