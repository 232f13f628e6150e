"""The process that speaks ssh: it runs a program on another machine, and carries what that says.

paramiko and the encryption are in it alone, so that both cores have something to do and nothing of
it stands in the way of the copy. One exec channel, with a window that a long way does not exhaust;
never SFTP.
"""

import base64
import contextlib
import getpass
import importlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import paramiko

from vstore.copy import hostkeys, questions, sshconfig
from vstore.copy.access import Access
from vstore.copy.wire import ConnectionLost
from vstore.errors import ConfigInvalid, NotPermitted, ToolError

log = logging.getLogger(__name__)

_WINDOW: Final = 1 << 30
_PACKET: Final = 1 << 18
_TIMEOUT_S: Final = 20.0
_PERSON_S: Final = 300.0  # to answer; sshd allows two minutes unless told otherwise
_STEP: Final = 1 << 18
_SAID_AT_MOST: Final = 1 << 14
_REKEY_BYTES: Final = 1 << 38  # far below what AES-GCM allows a key; each rekeying is a pause
_REKEY_PACKETS: Final = 1 << 30
_ALIVE_S: Final = 15
_HOPS: Final = 8
_PROMPT_BYTES: Final = 16 << 10  # some times what a login takes
_GCM: Final = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
_NO_BANNER: Final = "Error reading SSH protocol banner"  # and perhaps why, says paramiko
_NOT_YET: Final = "the connection ended before anybody could log in"
_IDENTITIES: Final = ("id_ed25519", "id_ecdsa", "id_rsa")
_KEY_KINDS: Final[tuple[type[paramiko.PKey], ...]] = (
    paramiko.Ed25519Key,
    paramiko.ECDSAKey,
    paramiko.RSAKey,
)


def run(access: Access, command: str, end: socket.socket, status_fd: int) -> int:
    """Run `command` on the other machine and carry its stdin and stdout to `end`.

    Lines of JSON on `status_fd` tell how that goes: that the program was started or why it could
    not be, then how it ended. Returns the exit code of this process.
    """
    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # it logs what it raises
    with os.fdopen(status_fd, "w", encoding="utf-8") as status:
        try:
            with contextlib.ExitStack() as stack:
                transport = _Connector(access, stack).connect()
                _tell(status, ok=True)
                _serve(transport, command, end, status)
                return 0
        except ToolError as error:
            kind = type(error).__name__
            _tell(status, kind=kind, message=error.message, hint=error.hint)
        except (OSError, paramiko.SSHException, EOFError) as error:
            reason = getattr(error, "strerror", None) or f"{error}"
            if not reason or reason.startswith(_NO_BANNER):
                reason = _NOT_YET
            message = f"{access.shown}: {reason}"
            _tell(status, kind="ConnectionLost", message=message, reason=reason)
    return 1


def _tell(status: Any, **values: object) -> None:
    status.write(json.dumps(values) + "\n")
    status.flush()


def _serve(transport: paramiko.Transport, command: str, end: socket.socket, status: Any) -> None:
    """Carry bytes both ways until the program has ended."""
    channel = transport.open_session(window_size=_WINDOW, max_packet_size=_PACKET)
    channel.exec_command(command)
    said = bytearray()
    threads = [
        threading.Thread(target=_carry_out, args=(end, channel), daemon=True),
        threading.Thread(target=_listen, args=(channel, said), daemon=True),
    ]
    for thread in threads:
        thread.start()
    while data := channel.recv(_STEP):
        try:
            end.sendall(data)
        except OSError:
            break
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    code = channel.recv_exit_status() if channel.status_event.wait(5) else -1
    threads[1].join(1)
    if transport.is_active() or code >= 0:
        _tell(status, exit=code, said=said.decode(errors="replace"))
    else:
        _tell(status, reason="the ssh connection was cut")


def _carry_out(end: socket.socket, channel: paramiko.Channel) -> None:
    try:
        while data := end.recv(_STEP):
            channel.sendall(data)
        channel.shutdown_write()
    except (OSError, EOFError, paramiko.SSHException):
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            channel.close()


def _listen(channel: paramiko.Channel, said: bytearray) -> None:
    """Keep what the program writes to stderr, as far as there is room."""
    while data := channel.recv_stderr(4096):
        said += data[: max(0, _SAID_AT_MOST - len(said))]


class _Prompt(socket.socket):
    """A TCP connection whose first bytes are acknowledged as they come.

    While it logs us in sshd has several small messages in a row. TCP holds the next one back until
    the last is acknowledged, which Linux puts off for 40 ms otherwise; see TCP_QUICKACK in tcp(7).
    """

    _left = _PROMPT_BYTES

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self._left > 0:
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        data = super().recv(size, flags)
        self._left -= len(data)
        return data


class _Connector:
    """Makes the connection, through other hosts if the configuration says so."""

    def __init__(self, access: Access, stack: contextlib.ExitStack, depth: int = 0) -> None:
        self._access = access
        self._stack = stack
        self._depth = depth
        # the first value counts, and others depend on it: Match user, %p and %r of ProxyCommand
        said = [f"User {access.user}"] * bool(access.user) + [f"Port {access.port}"] * bool(
            access.port
        )
        text = "\n".join([*said, sshconfig.load_text(access.host, access.config)])
        if "exec" in text.lower():
            load_invoke()
        try:
            self._config = paramiko.SSHConfig.from_text(text).lookup(access.host)
        except paramiko.ConfigParseError as error:
            raise ToolError(f"{access.config or 'ssh_config'}: {error}") from error
        self._host = str(self._config.get("hostname", access.host))
        self._port = parse_port(str(self._config.get("port", hostkeys.PORT)), access.host)
        self._user = str(self._config.get("user", "")) or getpass.getuser()

    def connect(self) -> paramiko.Transport:
        transport = paramiko.Transport(
            self._open_socket(), default_window_size=_WINDOW, default_max_packet_size=_PACKET
        )
        self._stack.callback(transport.close)
        transport.packetizer.REKEY_BYTES = _REKEY_BYTES
        transport.packetizer.REKEY_PACKETS = _REKEY_PACKETS
        transport.banner_timeout = transport.handshake_timeout = _TIMEOUT_S
        options = transport.get_security_options()
        options.ciphers = [
            *(name for name in _GCM if name in options.ciphers),
            *(name for name in options.ciphers if name not in _GCM),
        ]
        known = hostkeys.load_known(*self._place, self._known_files())
        kinds = _negotiable(hostkeys.known_kinds(known), options.key_types)
        options.key_types = [*kinds, *(kind for kind in options.key_types if kind not in kinds)]
        transport.start_client(timeout=_TIMEOUT_S)
        self._check_key(transport, known)
        transport.set_keepalive(_ALIVE_S)
        self._log_in(transport)
        return transport

    @property
    def _place(self) -> tuple[str, int]:
        """By which name and port known_hosts knows the host; an alias stands there without port."""
        alias = str(self._config.get("hostkeyalias", ""))
        return (alias, hostkeys.PORT) if alias else (self._host, self._port)

    def _open_socket(self) -> Any:
        jump = str(self._config.get("proxyjump", "none"))
        command = str(self._config.get("proxycommand", "none"))
        if jump.lower() != "none":
            return self._jump(jump.split(","))
        if command.lower() != "none":
            return self._run_proxy(command)
        try:
            found = socket.create_connection((self._host, self._port), timeout=_TIMEOUT_S)
        except OSError as error:
            raise ConnectionLost(
                f"{self._access.shown}: cannot connect to {self._host} port {self._port}: "
                f"{error.strerror or error}"
            ) from error
        found.settimeout(None)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Prompt(fileno=found.detach())

    def _run_proxy(self, command: str) -> socket.socket:
        """A connection through a program's stdin and stdout. paramiko has its own way, which does
        not notice that the program has ended.
        """
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(  # noqa: S603 - the user's own words, as ssh(1) takes them
            ["/bin/sh", "-c", f"exec {command}"], stdin=theirs.fileno(), stdout=theirs.fileno()
        )
        theirs.close()

        def end() -> None:
            process.terminate()
            process.wait()
            ours.close()

        self._stack.callback(end)
        return ours

    def _jump(self, hops: list[str]) -> Any:
        """A connection to the host through the last of the hops, which goes through the others."""
        if self._depth >= _HOPS:
            raise ToolError(f"{self._access.shown}: more than {_HOPS} ProxyJump hosts in a row")
        access = parse_hop(hops[-1], self._access)
        connector = _Connector(access, self._stack, self._depth + 1)
        if hops[:-1]:
            connector._config["proxyjump"] = ",".join(hops[:-1])
        transport = connector.connect()
        return transport.open_channel(
            "direct-tcpip",
            (self._host, self._port),
            ("127.0.0.1", 0),
            window_size=_WINDOW,
            max_packet_size=_PACKET,
            timeout=_TIMEOUT_S,
        )

    # --- who answers

    def _known_files(self) -> list[Path]:
        if self._access.known_hosts is not None:
            return [self._access.known_hosts]
        ours = str(self._config.get("userknownhostsfile", "")).split()
        theirs = str(self._config.get("globalknownhostsfile", "")).split()
        files = [Path(name).expanduser() for name in ours] or [
            sshconfig.user_folder() / "known_hosts",
            sshconfig.user_folder() / "known_hosts2",
        ]
        return files + (
            [Path(name).expanduser() for name in theirs]
            or [Path("/etc/ssh/ssh_known_hosts"), Path("/etc/ssh/ssh_known_hosts2")]
        )

    def _check_key(self, transport: paramiko.Transport, known: Sequence[hostkeys.Known]) -> None:
        key = transport.get_remote_server_key()
        is_new = hostkeys.check_key(
            *self._place,
            key.get_name(),
            key.asbytes(),
            known,
            accept_new=self._access.accept_new,
        )
        if is_new:
            file = self._known_files()[0]
            hostkeys.note_key(file, *self._place, key.get_name(), key.asbytes())

    # --- who we are

    def _log_in(self, transport: paramiko.Transport) -> None:
        allowed: list[str] = []
        try:
            transport.auth_none(self._user)
            return
        except paramiko.BadAuthenticationType as error:
            allowed = error.allowed_types
        except paramiko.SSHException as error:
            log.debug("%s: %s", self._access.shown, error)
        tried = 0
        for key in self._keys():
            tried += 1
            try:
                more = transport.auth_publickey(self._user, key)
            except paramiko.BadAuthenticationType as error:
                allowed = error.allowed_types
                break
            except paramiko.SSHException:
                if not transport.is_active():
                    break
                continue
            if transport.is_authenticated():
                return
            allowed = more  # the key is good, and not enough
            break
        if self._access.may_ask and sys.stdin.isatty() and transport.is_active():
            with contextlib.suppress(paramiko.SSHException):
                self._ask(transport, allowed)
            if transport.is_authenticated():
                return
        which = f"; it takes: {', '.join(allowed)}" if allowed else ""
        raise NotPermitted(
            f"{self._access.shown}: refuses the login of {self._user} ({tried} keys tried{which})",
            hint="see that the key is in authorized_keys there; -i FILE names another",
        )

    def _ask(self, transport: paramiko.Transport, allowed: Sequence[str]) -> None:
        """Log in by what the person knows: the other machine's own questions, or a password.

        Raises SSHException where that is refused.
        """
        if "keyboard-interactive" in allowed:
            place = f"{self._user}@{self._host}"
            transport.auth_timeout = _PERSON_S
            with questions.terminal_kept():
                allowed = transport.auth_interactive(
                    self._user,
                    lambda title, text, asked: questions.put(place, (title, text), asked),
                )
        if not transport.is_authenticated() and ("password" in allowed or not allowed):
            secret = questions.ask_secret(f"{self._user}@{self._host}'s password: ")
            transport.auth_password(self._user, secret, fallback=False)

    def _keys(self) -> Iterator[paramiko.PKey]:
        named = [Path(name).expanduser() for name in self._access.identities]
        named += [Path(name).expanduser() for name in self._config.get("identityfile", ())]
        named = named or [sshconfig.user_folder() / name for name in _IDENTITIES]
        only = str(self._config.get("identitiesonly", "no")).lower() == "yes"
        publics = {path: _public_of(path) for path in named}
        tried = set()
        for key in _agent_keys():
            if not only or key.asbytes() in publics.values():
                tried.add(key.asbytes())
                yield key
        for path in named:
            loaded = None if publics[path] in tried else self._load_key(path)
            if loaded is not None:
                yield loaded

    def _load_key(self, path: Path) -> paramiko.PKey | None:
        if not path.exists():
            if path in self._access.identities:
                raise ToolError(f"{path}: no such key")
            return None
        secret: str | None = None
        for _ in range(2):
            for kind in _KEY_KINDS:
                try:
                    return kind.from_private_key_file(os.fspath(path), secret)
                except paramiko.PasswordRequiredException:
                    break
                except (paramiko.SSHException, ValueError, OSError):
                    continue
            else:
                log.warning("%s: is no key that can be read", path)
                return None
            if not self._access.may_ask or not sys.stdin.isatty():
                return None
            secret = questions.ask_secret(f"Passphrase of {path}: ")
        return None


def load_invoke() -> None:
    """Let paramiko run what `Match exec` of ssh_config says.

    The package that it takes for that alone loads as long as all the rest: who does not need it
    goes without.
    """
    if sys.modules.get("invoke", sys) is None:
        del sys.modules["invoke"]
        vars(paramiko.config)["invoke"] = importlib.import_module("invoke")


def _agent_keys() -> Iterator[paramiko.PKey]:
    try:
        yield from paramiko.Agent().get_keys()
    except (paramiko.SSHException, OSError) as error:
        log.info("the agent does not answer: %s", error)


def _public_of(path: Path) -> bytes:
    """The public half of the key in that file, which may be all that is in it: an agent has the
    other. b"" where that is not known.
    """
    for place in (path, path.with_name(f"{path.name}.pub")):
        with contextlib.suppress(OSError, ValueError, IndexError):
            return base64.b64decode(place.read_text().split()[1], validate=True)
    return b""


def _negotiable(kinds: Sequence[str], offered: Sequence[str]) -> list[str]:
    """The algorithms for keys of these kinds: an RSA key signs with SHA-2."""
    wanted = []
    for kind in kinds:
        names = ("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,)
        wanted += [name for name in names if name in offered]
    return wanted


def parse_port(text: str, host: str) -> int:
    """The port that ssh_config gives for the host. Raises ConfigInvalid."""
    if text.isdecimal() and 0 < int(text) < 1 << 16:
        return int(text)
    raise ConfigInvalid(f"ssh_config: {host}: {text!r} is no port")


def parse_hop(text: str, access: Access) -> Access:
    """A host of ProxyJump, `[user@]host[:port]`, reached with the same keys and files.

    Raises ConfigInvalid.
    """
    user, _, place = text.strip().removeprefix("ssh://").rpartition("@")
    host, port = place, 0
    if place.startswith("["):
        host, _, rest = place[1:].partition("]")
        port = parse_port(rest[1:], text) if rest else 0
    elif place.count(":") == 1:
        host, _, number = place.partition(":")
        port = parse_port(number, text)
    return Access(
        host,
        user,
        port,
        access.identities,
        access.config,
        access.known_hosts,
        access.accept_new,
        access.may_ask,
    )
