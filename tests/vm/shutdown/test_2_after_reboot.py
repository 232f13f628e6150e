"""The machine has rebooted with guests that ran, and has started them again; it turns off next."""

import subprocess

from tests.fixtures.probes import need
from tests.fixtures.vservers import is_alive, wait_until
from tests.vm.shutdown.site import (
    BY_HAND,
    MARKED,
    PATIENCE_S,
    assert_started_in_order,
    assert_stopped_cleanly,
    assert_stopped_in_order,
    last_boot,
    open_host,
    this_boot,
)

pytestmark = need("systemd_host")


def _is_up() -> bool:
    state = ("systemctl", "show", "--value", "--property=ActiveState", "vservers@default.service")
    done = subprocess.run(state, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout != "failed\n"
    return done.stdout == "active\n"


def test_the_reboot_stopped_all_guests_in_their_order() -> None:
    assert_stopped_in_order(last_boot())


def test_the_reboot_cut_no_guest_short() -> None:
    assert_stopped_cleanly(last_boot())


def test_the_boot_started_those_with_the_mark() -> None:
    wait_until(_is_up, PATIENCE_S)
    assert_started_in_order(this_boot().replace("-", ""))
    host = open_host()
    assert all(is_alive(host.init_pid(name)) for name in MARKED)
    assert not host.state(BY_HAND)
    host.vserver(BY_HAND, "start", timeout_s=PATIENCE_S)
