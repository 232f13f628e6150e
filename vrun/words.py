"""The word lists of one guest, put together: what it may do, and the warnings that this gives.

Each starts from what every guest has, and the guest's own words apply to that.
"""

from collections.abc import Sequence

from vrun import stock, wordlist
from vrun.keys import Keys, Line
from vrun.spec import Network
from vstore.record import dataclass


@dataclass(frozen=True, slots=True)
class GuestWords:
    """The fields are those of GuestSpec, but for `is_fake_init`."""

    capabilities: frozenset[str]
    ccaps: frozenset[str]
    flags: frozenset[str]
    nflags: frozenset[str]
    ncaps: frozenset[str]
    umask: frozenset[str]
    is_fake_init: bool
    """Whether the guest's own words have `fakeinit`: its init is then process 1."""


def load_words(guest: Keys, network: Network) -> GuestWords:
    """The lists in the guest's folder; raises ConfigInvalid with file and line."""
    flags = "cflags" if guest.has("cflags") else "flags"
    return make_words(
        bcapabilities=guest.items("bcapabilities"),
        ccapabilities=guest.items("ccapabilities"),
        cflags=guest.items(flags),
        nflags=guest.items("nflags"),
        ncapabilities=guest.items("ncapabilities"),
        umask=guest.items("umask"),
        network=network,
        warnings=guest.warnings,
    )


def make_words(
    *,
    bcapabilities: Sequence[Line] = (),
    ccapabilities: Sequence[Line] = (),
    cflags: Sequence[Line] = (),
    nflags: Sequence[Line] = (),
    ncapabilities: Sequence[Line] = (),
    umask: Sequence[Line] = (),
    network: Network,
    warnings: list[str],
) -> GuestWords:
    """What the lines come to; `warnings` grows by what of them cannot be had.

    Raises ConfigInvalid with file and line.
    """
    secure = frozenset(word.lower() for word in wordlist.SECURE_CAPS)
    system = wordlist.read_words(wordlist.CAPABILITIES, bcapabilities, secure)
    capabilities = frozenset(word.upper() for word in system.words)
    context = wordlist.read_words(wordlist.CCAPS, ccapabilities, wordlist.DEFAULT_CCAPS)
    flags = wordlist.read_words(wordlist.CFLAGS, cflags, wordlist.DEFAULT_FLAGS)
    net_flags = wordlist.read_words(wordlist.NFLAGS, nflags)
    net_caps = wordlist.read_words(wordlist.NCAPS, ncapabilities, wordlist.DEFAULT_NCAPS)
    spaces = wordlist.read_words(wordlist.SPACES, umask)
    warnings += stock.capabilities(system)
    warnings += stock.ccaps(context, capabilities)
    warnings += stock.cflags(flags, network)
    warnings += stock.nflags(net_flags, network)
    warnings += stock.ncaps(net_caps, network, capabilities)
    warnings += stock.spaces(spaces, capabilities)
    return GuestWords(
        capabilities=capabilities,
        ccaps=context.words,
        flags=flags.words,
        nflags=net_flags.words,
        ncaps=net_caps.words,
        umask=spaces.words,
        is_fake_init="fakeinit" in flags.words,
    )
