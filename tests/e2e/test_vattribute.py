"""vattribute: what those may do who join a guest."""

import re
from collections.abc import Iterator

import pytest

from tests.fixtures.probes import need
from tests.fixtures.vservers import SLEEPER, Host, host_for_guests, run_installed, status_of

pytestmark = need("root")

_CHOWN, _FOWNER = 0, 3  # linux/capability.h


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with pytest.MonkeyPatch.context() as patch:
        yield from host_for_guests(tmp_path_factory.mktemp("attributes"), patch)


def run(*words: str, code: int = 0) -> str:
    """What `vattribute` shows, which must end with `code`."""
    done = run_installed("vattribute", *words, code=code)
    return done.stdout + done.stderr


def bounding(host: Host) -> int:
    """The bounding set of a process that joins the guest, as the kernel shows it there."""
    status = host.inside("web", "cat", "/proc/self/status")
    found = re.search(r"^CapBnd:\s+([0-9a-f]+)$", status, re.M)
    assert found
    return int(found[1], 16)


def bounding_of_init(host: Host) -> int:
    """That of a process which has run since the start."""
    return int(status_of(host.init_pid("web"))["CapBnd"], 16)


def test_what_is_taken_away_is_missing_in_the_next_that_joins(host: Host) -> None:
    host.add_busybox("web", {**SLEEPER, "bcapabilities": "NET_RAW"})
    assert "does not run" in run("-c", "web", "--get", code=1)
    host.vserver("web", "start")
    shown = run("-c", "web", "--get")
    capabilities, context, umask = shown.splitlines()
    assert {"CHOWN", "NET_RAW"} <= set(
        capabilities.removeprefix("bcapabilities").strip().split(",")
    )
    assert context.startswith("ccapabilities  ")
    assert umask.split() == ["umask", "none"]
    before = bounding(host)
    assert before >> _CHOWN & 1
    said = run("-c", "web", "--set", "--bcap", "~CAP_CHOWN,~fowner")
    assert (
        "its processes that run keep CHOWN FOWNER: a stock kernel takes nothing from them" in said
    )
    assert "written with ~ to bcapabilities it holds" in said
    assert bounding_of_init(host) == before  # which is what was said
    assert run("-c", "web", "--set", "--bcap", "~chown") == ""
    assert not bounding(host) >> _CHOWN & 1
    assert "chown" in host.vserver("web", "exec", "chown", "5", "/etc", code=1).stderr
    assert "CHOWN" not in run("-c", "web", "--get").split()[1].split(",")
    run("-c", "web", "--set", "--secure")
    assert "NET_RAW" not in run("-c", "web", "--get")
    assert "cannot get more: chown" in run("-c", "web", "--set", "--bcap", "chown", code=1)
    assert "sys_fly" in run("-c", "web", "--set", "--bcap", "~sys_fly", code=1).lower()
    assert not bounding(host) >> _CHOWN & 1
    host.vserver("web", "restart")
    assert bounding(host) == before
    host.set_key("web", "bcapabilities", "NET_RAW ~chown ~fowner\n")
    host.vserver("web", "restart")
    assert bounding_of_init(host) == before & ~(1 << _CHOWN | 1 << _FOWNER)
    assert bounding(host) == bounding_of_init(host)
    assert not {"CHOWN", "FOWNER"} & set(run("-c", "web", "--get").split()[1].split(","))


@pytest.mark.parametrize(
    "words", [["--get"], ["-c", "web"], ["-c", "web", "--get", "--bcap", "~chown"]]
)
def test_wrong_usage_changes_nothing(words: list[str]) -> None:
    assert run(*words, code=1)
