"""Which guest a word of the command line means; see section 2 of the reference."""

from pathlib import Path

from vrun.errors import GuestNotFound, WrongUsage
from vrun.state import find_by_xid
from vstore.guest import Guest, confdir, load_guest


class NoConfiguration(GuestNotFound):
    """There is no configuration of that name."""

    exit_code = 5


def find(word: str) -> Guest:
    """The guest that `word` is: its name, the number of its context while it runs, or the path of
    its configuration directory, with a slash in it.

    Raises NoConfiguration where there is none, GuestNotFound where its root is missing,
    ConfigInvalid.
    """
    name = name_of(word)
    try:
        return load_guest(name)
    except WrongUsage as error:
        raise NoConfiguration(error.message, hint=error.hint) from error
    except GuestNotFound as error:
        if (confdir() / name / "vdir").is_symlink() or (confdir() / f"{name}.conf").exists():
            raise
        raise NoConfiguration(error.message, hint=error.hint) from error


def name_of(word: str) -> str:
    """The name of the guest, which need not exist. Raises NoConfiguration for another's path."""
    plain = word.removesuffix("/")
    if "/" in plain:
        path = Path(plain).absolute()
        if path.parent.resolve() == confdir().resolve():
            return path.name
        raise NoConfiguration(
            f"{word}: is no configuration directory of {confdir()}",
            hint="VSERVER_CONFDIR names another folder",
        )
    if plain.isdecimal() and (name := find_by_xid(int(plain))):
        return name
    return plain
